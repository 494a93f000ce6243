"""`python -m benchmarks.streams`: how much later an event of a stream arrives through fnqueue than directly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import click

from benchmarks.load import LOOPBACK
from benchmarks.targets import FUNCTION, Program, SetUpFailed, Target, production, running
from infra.local import binaries
from infra.local.process import ServerFailed, free_port

DATA = Path(".fnqueue")
TICKER = Path(__file__).with_name("ticker.py")
IMAGE = "benchmarks/ticker:latest"
STREAM_S = 60.0


class Broken(Exception):
    """A stream was not what the function sent."""


@dataclass(slots=True)
class Delays:
    """Milliseconds from when the function wrote an event to when the client had it."""

    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)

    def add(self, delays_ms: Sequence[float]) -> None:
        self.first.append(delays_ms[0])
        self.later.extend(delays_ms[1:])


@click.command()
@click.option("--streams", type=click.IntRange(1, 500), default=8, show_default=True, help="At once.")
@click.option("--events", type=click.IntRange(2, 100_000), default=100, show_default=True, help="Of each stream.")
@click.option("--every-ms", type=click.FloatRange(0, 10_000), default=20, show_default=True, help="Between two events.")
@click.option("--rounds", type=click.IntRange(2, 100), default=5, show_default=True)
def main(streams: int, events: int, every_ms: float, rounds: int) -> None:
    """Measure streams through fnqueue against the same function's own, in alternation, in one run."""
    order = json.dumps({"events": events, "every_s": every_ms / 1000}).encode()
    try:
        with _targets(streams) as targets:
            found = {target.name: Delays() for target in targets}
            for number in range(rounds + 1):
                for target in targets if number % 2 else reversed(targets):
                    rows = asyncio.run(_burst(target, order, streams, events))
                    if number:  # the first round warms up
                        for row in rows:
                            found[target.name].add(row)
    except (Broken, ServerFailed, SetUpFailed, aiohttp.ClientError, TimeoutError) as exc:
        raise click.ClickException(str(exc) or type(exc).__name__) from exc
    click.echo(f"{streams} streams at once of {events} events, one every {every_ms:g} ms, {rounds} rounds\n")
    click.echo("milliseconds from written to read      floor p50   p99    fnqueue p50   p99    added p50")
    for which in ("first", "later"):
        floor, through = (getattr(found[target.name], which) for target in targets)
        found_ms = (_p(floor, 50), _p(floor, 99), _p(through, 50), _p(through, 99), _p(through, 50) - _p(floor, 50))
        click.echo("{:<36} {:>9.2f} {:>7.2f} {:>11.2f} {:>7.2f} {:>10.2f}".format(f"{which} events", *found_ms))


async def _burst(target: Target, order: bytes, streams: int, events: int) -> list[list[float]]:
    timeout = aiohttp.ClientTimeout(total=STREAM_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        return await asyncio.gather(*(_stream(session, target, order, events) for _ in range(streams)))


async def _stream(session: aiohttp.ClientSession, target: Target, order: bytes, events: int) -> list[float]:
    """The delay of each event of one stream."""
    headers = {"Accept": "text/event-stream", "Content-Type": "application/json", **dict(target.headers)}
    delays_ms: list[float] = []
    async with session.post(f"http://{LOOPBACK}:{target.port}{target.path}", data=order, headers=headers) as response:
        if response.status != 200:
            raise Broken(f"{target.name} answered {response.status}")
        async for line in response.content:
            if line.startswith(b"data: "):
                delays_ms.append((time.monotonic() - float(line[6:])) * 1000)  # noqa: PERF401  reads as it comes
    if len(delays_ms) != events:
        raise Broken(f"{target.name} handed on {len(delays_ms)} of {events} events")
    return delays_ms


def _p(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


@contextlib.contextmanager
def _targets(streams: int) -> Iterator[list[Target]]:
    """The function alone, and behind fnqueue."""
    binaries.ensure()
    DATA.mkdir(exist_ok=True)
    with contextlib.ExitStack() as opened:
        name = opened.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-", dir=DATA))
        folder, port = Path(name).resolve(), free_port()
        images = folder / "images.toml"
        images.write_text(f'["{IMAGE}"]\ncommand = {json.dumps([sys.executable, str(TICKER)])}\n')
        alone = Program(
            "ticker", folder, command=[sys.executable, str(TICKER)], environment={"PORT": str(port)}, port=port
        )
        opened.enter_context(running(alone))
        definition = {**FUNCTION, "inferenceUrl": "/tick", "containerImage": IMAGE}
        through = opened.enter_context(production(folder, slots=streams, function=definition, images=images))
        yield [Target(name="floor", port=port, path="/tick", trees=dict), through]


if __name__ == "__main__":
    main()
