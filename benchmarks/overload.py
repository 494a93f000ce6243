"""`python -m benchmarks.overload`: what is served while twice as much is asked, and how fast the rest is refused; then
how fast everybody is while a server is away."""

from __future__ import annotations

import asyncio
import contextlib
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import click
import orjson

from benchmarks.load import CONNECT_S, LOOPBACK, REPLY_S, Answer
from benchmarks.targets import SetUpFailed, Target, production
from infra.local import binaries
from infra.local.process import ServerFailed
from infra.local.stack import healthy

try:
    from uvloop import new_event_loop
except ImportError:  # no wheel for this platform: slower, otherwise the same
    from asyncio import new_event_loop  # type: ignore[assignment]  # uvloop's says Loop, a subclass

DATA = Path(".fnqueue")
MOST_CONNECTIONS = 4000
GRACE_S = 30.0
BETWEEN_S = 1.0
# After so long without an answer, the breakers of Redis and of RabbitMQ are open.
OPENED_S = 25.0
BACK_S = 60.0
AWAY_PER_S = 20.0
RAMP_S = 2.0  # until as much waits as may


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Requests at a pace, whatever becomes of those before; or, at a pace of 0, by so many callers that each wait for
    their answer."""

    port: int
    path: str
    headers: tuple[tuple[str, str], ...]
    seconds: float
    delay_s: float
    per_s: float = 0.0
    callers: int = 0
    first_serial: int = 0


@dataclass(slots=True, kw_only=True)
class Seen:
    """Latencies are from the moment that a request was due. `unsent` found no connection. `steady` were served between
    the first RAMP_S and the end of what was asked."""

    elapsed_s: float = 0.0
    steady: int = 0
    served_s: array[float] = field(default_factory=lambda: array("d"))
    refused_s: array[float] = field(default_factory=lambda: array("d"))
    statuses: Counter[str] = field(default_factory=Counter)
    unsent: int = 0

    @property
    def served_per_s(self) -> float:
        return self.steady / (self.elapsed_s - RAMP_S)


def percentile_ms(latencies_s: Sequence[float], percent: float) -> float:
    """By nearest rank; 0 when there are none."""
    if not latencies_s:
        return 0.0
    return sorted(latencies_s)[max(0, math.ceil(percent / 100 * len(latencies_s)) - 1)] * 1000


Play = Callable[[Stage], Seen]


@contextlib.contextmanager
def generator() -> Iterator[Play]:
    """A process that plays stages, one at a time, until the block ends."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield lambda stage: pool.apply_async(run, (stage,)).get(CONNECT_S + stage.seconds + GRACE_S + REPLY_S)


def run(stage: Stage) -> Seen:
    """Play one stage in this process."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(play(stage))


async def play(stage: Stage) -> Seen:
    crowd = _Crowd(stage)
    try:
        await (crowd.pace() if stage.per_s else crowd.circle())
    finally:
        crowd.leave()
    return crowd.seen


class _Crowd:
    """Connections that are free, and those that wait for an answer."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.seen = Seen()
        self._free: list[_Caller] = []
        self._all: set[_Caller] = set()
        self._dialling: set[asyncio.Task[None]] = set()
        self.seen.elapsed_s = stage.seconds
        self._serial = stage.first_serial
        self._outstanding = 0
        self._quiet = asyncio.Event()
        self._began_at = 0.0
        self._circling = False

    async def pace(self) -> None:
        self._began_at = began_at = time.perf_counter()
        total = int(self.stage.per_s * self.stage.seconds)
        for number in range(total):
            due_at = began_at + number / self.stage.per_s
            if (wait_s := due_at - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            self._ask(due_at)
        await self._answered()

    async def circle(self) -> None:
        self._began_at = time.perf_counter()
        self._circling = True
        for _ in range(self.stage.callers):
            self._ask(time.perf_counter())
        await self._answered()

    def leave(self) -> None:
        for task in self._dialling:
            task.cancel()
        for caller in list(self._all):
            caller.leave()

    def ended(self, caller: _Caller, due_at: float, status: str) -> None:
        """One request has come to its end."""
        now = time.perf_counter()
        took_s, going_s = now - due_at, now - self._began_at
        self.seen.statuses[status] += 1
        if status == "200":
            self.seen.served_s.append(took_s)
            self.seen.steady += RAMP_S <= going_s < self.stage.seconds
        elif status in ("429", "503"):
            self.seen.refused_s.append(took_s)
        if caller.usable:
            self._free.append(caller)
        else:
            self._all.discard(caller)
        self._outstanding -= 1
        if self._circling and going_s < self.stage.seconds:
            self._ask(now)
        if not self._outstanding:
            self._quiet.set()

    async def _answered(self) -> None:
        if self._outstanding:
            self._quiet.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.stage.seconds * (not self.stage.per_s) + GRACE_S):
                    while self._outstanding:
                        await self._quiet.wait()
                        self._quiet.clear()
        if self._outstanding:
            self.seen.statuses["no answer"] += self._outstanding

    def _ask(self, due_at: float) -> None:
        self._outstanding += 1
        if self._free:
            self._free.pop().ask(self._request(), due_at)
        elif len(self._all) + len(self._dialling) < MOST_CONNECTIONS:
            task = asyncio.get_running_loop().create_task(self._dial(due_at))
            self._dialling.add(task)
            task.add_done_callback(self._dialling.discard)
        else:
            self._outstanding -= 1
            self.seen.unsent += 1

    async def _dial(self, due_at: float) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, caller = await loop.create_connection(lambda: _Caller(self), LOOPBACK, self.stage.port)
        except OSError as exc:
            self._outstanding -= 1
            self.seen.statuses[type(exc).__name__] += 1
            return
        self._all.add(caller)
        caller.ask(self._request(), due_at)

    def _request(self) -> tuple[bytes, bytes]:
        """What to send, and the answer that belongs to it."""
        self._serial += 1
        message = f"{self._serial:012d}"
        body = orjson.dumps({"message": message, "delay": self.stage.delay_s})
        fields = "".join(f"{name}: {value}\r\n" for name, value in self.stage.headers)
        head = (
            f"POST {self.stage.path} HTTP/1.1\r\nHost: {LOOPBACK}\r\n{fields}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body, message.encode()


class _Caller(asyncio.Protocol):
    """One keep-alive connection with one request at a time."""

    def __init__(self, crowd: _Crowd) -> None:
        self._crowd = crowd
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._expected = b""
        self._due_at = 0.0
        self._waiting = False

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def ask(self, request: tuple[bytes, bytes], due_at: float) -> None:
        sent, self._expected = request
        self._received, self._due_at, self._waiting = b"", due_at, True
        if self._transport is None:
            self._end("connection lost")
        else:
            self._transport.write(sent)

    def leave(self) -> None:
        self._waiting = False
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._end("connection lost")

    def data_received(self, data: bytes) -> None:
        self._received += data
        answer = Answer.parse(self._received)
        if isinstance(answer, int):
            return
        if answer.header(b"connection").lower() == "close" and self._transport is not None:
            self._transport.close()
        wrong = answer.status == 200 and self._expected not in answer.body
        self._end("wrong body" if wrong else str(answer.status))

    def _end(self, status: str) -> None:
        if self._waiting:
            self._waiting = False
            self._crowd.ended(self, self._due_at, status)


@click.command()
@click.option("--slots", type=click.IntRange(1, 1000), default=16, show_default=True, help="maxRequestConcurrency.")
@click.option("--delay-ms", type=click.FloatRange(0, 10_000), default=100, show_default=True, help="Of one request.")
@click.option("--admitted", type=click.IntRange(1, 100_000), default=64, show_default=True, help="Queued and running.")
@click.option("--seconds", type=click.FloatRange(5, 600), default=10.0, show_default=True, help="Of one stage.")
@click.option("--rounds", type=click.IntRange(1, 20), default=3, show_default=True)
@click.option("--times", type=click.FloatRange(1, 20), default=2.0, show_default=True, help="The capacity.")
@click.option("--away/--no-away", default=True, show_default=True, help="Freeze Redis, then RabbitMQ, afterwards.")
def main(slots: int, delay_ms: float, admitted: int, seconds: float, rounds: int, times: float, *, away: bool) -> None:
    """Find out in one run what is served at most, and what is served when more is asked, at a steady pace that waits
    for nobody; then freeze one server after the other.

    Exits with 1 unless 90 % of the most is still served, and 99 of 100 refusals take 100 ms at most while a server is
    away.
    """
    try:
        with _target(slots, admitted) as target, generator() as play_stage:
            bench = _Bench(play_stage, target, seconds=seconds, delay_s=delay_ms / 1000)
            kept = bench.overload(callers=min(admitted, 4 * slots), rounds=rounds, times=times)
            fast = [bench.away(server) for server in ("redis", "rabbitmq")] if away else []
    except (ServerFailed, SetUpFailed) as exc:
        raise click.ClickException(str(exc)) from exc
    sys.exit(0 if kept and all(fast) else 1)


class _Bench:
    def __init__(self, play_stage: Play, target: Target, *, seconds: float, delay_s: float) -> None:
        self._play = play_stage
        self._target = target
        self._seconds = seconds
        self._delay_s = delay_s
        self._serial = 0

    def overload(self, *, callers: int, rounds: int, times: float) -> bool:
        """Whether what is promised held."""
        self._stage(callers=callers, seconds=2 * RAMP_S)  # warms up
        kept, refusals = [], array("d")
        _title()
        for _ in range(rounds):
            peak = self._stage(callers=callers)
            _tell(f"{callers} callers", peak)
            time.sleep(BETWEEN_S)
            crowded = self._stage(per_s=times * peak.served_per_s)
            _tell(f"{times:g} x capacity", crowded)
            kept.append(crowded.served_per_s / peak.served_per_s)
            refusals.extend(crowded.refused_s)
            time.sleep(BETWEEN_S)
        share, refused_ms = statistics.median(kept), percentile_ms(refusals, 99)
        shares = ", ".join(f"{each:.1%}" for each in kept)
        click.echo(f"\nserved at {times:g} x capacity: {share:.1%} of what is served at most ({shares})")
        click.echo(f"p99 of refusals: {refused_ms:.0f} ms\n")
        return share >= 0.9

    def away(self, server: str) -> bool:
        """Whether refusals were fast once the breaker was open."""
        frozen = [process for role, tree in self._target.trees().items() if role == server for process in tree]
        for process in frozen:
            process.suspend()
        try:
            _tell(f"{server} freezes", self._stage(per_s=AWAY_PER_S, seconds=OPENED_S))
            seen = self._stage(per_s=AWAY_PER_S)
            _tell(f"{server} away", seen)
        finally:
            for process in frozen:
                process.resume()
        give_up_at = time.monotonic() + BACK_S
        while not healthy(f"http://{LOOPBACK}:{self._target.port}"):
            if time.monotonic() > give_up_at:
                raise SetUpFailed(f"fnqueue did not come back within {BACK_S:g} s after {server} had")
            time.sleep(0.1)
        back = self._stage(per_s=AWAY_PER_S, seconds=2 * RAMP_S)
        _tell(f"{server} back", back)
        return percentile_ms(seen.refused_s, 99) <= 100 and set(seen.statuses) == {"503"}

    def _stage(self, *, per_s: float = 0.0, callers: int = 0, seconds: float = 0.0) -> Seen:
        stage = Stage(
            port=self._target.port,
            path=self._target.path,
            headers=self._target.headers,
            seconds=seconds or self._seconds,
            delay_s=self._delay_s,
            per_s=per_s,
            callers=callers,
            first_serial=self._serial,
        )
        self._serial += 10_000_000
        return self._play(stage)


def _title() -> None:
    click.echo(f"{'':<18} {'asked/s':>8} {'served/s':>9} {'p50 ms':>8} {'p99 ms':>8} {'refused p50':>12} {'p99 ms':>8}")


def _tell(what: str, seen: Seen) -> None:
    asked = (sum(seen.statuses.values()) + seen.unsent) / seen.elapsed_s
    served = [percentile_ms(seen.served_s, percent) for percent in (50, 99)]
    refused = [percentile_ms(seen.refused_s, percent) for percent in (50, 99)]
    told = ", ".join(f"{number} x {status}" for status, number in sorted(seen.statuses.items()))
    click.echo(
        f"{what:<18} {asked:>8.0f} {seen.served_per_s:>9.1f} {served[0]:>8.0f} {served[1]:>8.0f} "
        f"{refused[0]:>12.1f} {refused[1]:>8.1f}   {told}" + (f", {seen.unsent} unsent" if seen.unsent else "")
    )


@contextlib.contextmanager
def _target(slots: int, admitted: int) -> Iterator[Target]:
    binaries.ensure()
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=DATA, ignore_cleanup_errors=True) as name:
        limits = {"FNQUEUE_VERSION_REQUESTS": str(admitted)}
        with production(Path(name).resolve(), slots=slots, settings=limits) as target:
            yield target


if __name__ == "__main__":
    main()
