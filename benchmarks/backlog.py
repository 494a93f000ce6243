"""`python -m benchmarks.backlog`: what many queued requests cost: memory of Redis and RabbitMQ, the time to tell a
position, and the CPU of the requests beside them."""

from __future__ import annotations

import http.client
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import redis

from benchmarks import cpu
from benchmarks.load import LOOPBACK, Burst, Kind, LoadFailed, Send, generator
from benchmarks.meter import BODY_BYTES, CALLERS, Meter, table
from benchmarks.targets import HTTP_S, SetUpFailed, Target, another, production, started
from infra.local import binaries
from infra.local.process import Server, ServerFailed
from infra.local.servers import INFRA, RabbitMQ

DATA = Path(".fnqueue")
AT_ONCE = 10_000  # of one burst of the load generator
FILL_S = 3600.0
HELD_S = 3600.0
ASKED = 2000
AT_REST = 100.0  # milliseconds of CPU a second
REST_S = 120.0
MIB = 1 << 20


@click.command()
@click.option("--queued", type=click.IntRange(1000, 10_000_000), default=200_000, show_default=True)
@click.option("--rounds", type=click.IntRange(1, 20), default=3, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.5, 60), default=3.0, show_default=True, help="Of one burst.")
def main(queued: int, rounds: int, seconds: float) -> None:
    """Queue so many requests of 1 KiB for a function whose only slot is taken, through the API; ask for positions, one
    at a time; and invoke another function before and after.

    Exits with 1 when a request was refused or a position was wrong.
    """
    binaries.ensure()
    DATA.mkdir(exist_ok=True)
    settings = {"FNQUEUE_QUEUE_LIMIT": str(2 * queued), "FNQUEUE_VERSION_BYTES": "0"}
    try:
        with (
            tempfile.TemporaryDirectory(prefix="benchmark-", dir=DATA, ignore_cleanup_errors=True) as name,
            started(Path(name).resolve()) as servers,
            production(Path(name).resolve(), slots=CALLERS, settings=settings, servers=servers) as target,
            generator() as send,
        ):
            sys.exit(0 if _Backlog(send, target, servers, queued).measure(rounds, seconds) else 1)
    except (ServerFailed, SetUpFailed, LoadFailed) as exc:
        raise click.ClickException(str(exc)) from exc


class _Backlog:
    def __init__(self, send: Send, target: Target, servers: Mapping[str, Server], queued: int) -> None:
        self._send = send
        self._target = target
        self._queue, self._store = servers["FNQUEUE_QUEUE_URL"], servers["FNQUEUE_STORE_URL"]
        self._queued = queued
        self._serials = itertools.count(1, 10 * AT_ONCE)

    def measure(self, rounds: int, seconds: float) -> bool:
        """Whether nothing went wrong."""
        assert isinstance(self._queue, RabbitMQ)
        _allow(self._queue, 2 * self._queued)
        crowded = another(self._target, "crowded", slots=1)
        occupy(crowded)
        meter = Meter(self._send, self._target, seconds)
        meter.burst()  # warms up
        none, many = "nothing queued", f"{self._queued} queued"
        rows, idle = {none: [meter.burst() for _ in range(rounds)]}, {none: meter.idle()}
        empty = self._memory()
        began_at = time.monotonic()
        ids = self._fill(crowded)
        took_s = time.monotonic() - began_at
        full = self._memory()
        idle[many] = _rest(meter)
        rows[many] = [meter.burst() for _ in range(rounds)]
        asked_ms, wrong = self._ask(ids)
        click.echo(f"{len(ids)} queued, 1 KiB each, in {took_s:.0f} s ({len(ids) / took_s:.0f}/s)")
        for role in full:
            grown = full[role] - empty[role]
            click.echo(f"{role}: {grown / MIB:.0f} MiB, {grown / len(ids):.0f} bytes each")
        p50, p99 = statistics.median(asked_ms), statistics.quantiles(asked_ms, n=100)[98]
        click.echo(f"position, one at a time: p50 {p50:.2f} ms, p99 {p99:.2f} ms; wrong: {wrong}")
        click.echo(table(rows, idle))
        return len(ids) == self._queued and not wrong

    def _fill(self, crowded: Target) -> Sequence[str]:
        """The IDs, in the order of their acceptance but for those that were under way together."""
        ids: list[str] = []
        while len(ids) < self._queued:
            tally = self._send(self._burst(crowded, min(AT_ONCE, self._queued - len(ids))))
            if tally.errors:
                raise LoadFailed(f"refused: {tally.examples}")
            ids.extend(accepted.id for accepted in tally.accepted)
        return ids

    def _burst(self, target: Target, requests: int) -> Burst:
        return Burst(
            kind=Kind.SUBMIT,
            port=target.port,
            concurrency=CALLERS,
            seconds=FILL_S,
            requests=requests,
            first_serial=next(self._serials),
            body_bytes=BODY_BYTES,
            path=target.path,
            status_path=target.status_path,
            headers=(*target.headers, ("Prefer", "respond-async")),
        )

    def _memory(self) -> dict[str, int]:
        with redis.Redis.from_url(self._store.url) as client:
            used = int(client.info("memory")["used_memory"])
        return {"redis": used, "rabbitmq": cpu.resident_bytes({"rabbitmq": cpu.tree(self._queue.pid)})["rabbitmq"]}

    def _ask(self, ids: Sequence[str]) -> tuple[list[float], int]:
        """Milliseconds of each question, and how many answers were off by more than what was under way together."""
        took_ms, wrong = [], 0
        connection = http.client.HTTPConnection(LOOPBACK, self._target.port, timeout=HTTP_S)
        # A rank is told exactly; beyond a thousand, as "more than a thousand".
        for index in (random.randrange(len(ids)) for _ in range(ASKED)):
            asked_at = time.perf_counter()
            connection.request("GET", f"/v2/nvcf/queues/{ids[index]}/position", headers=dict(self._target.headers))
            answer = connection.getresponse()
            told = json.loads(answer.read())
            took_ms.append((time.perf_counter() - asked_at) * 1000)
            rank = told.get("positionInQueue", 0)
            wrong += abs(rank - min(index + 1, 1000)) > CALLERS
        return took_ms, wrong


def _rest(meter: Meter) -> dict[str, float]:
    """What the processes use when idle, once those that still write, or clear up, behind what was accepted are done, or
    after `REST_S` seconds."""
    give_up_at = time.monotonic() + REST_S
    while sum((idle := meter.idle()).values()) > AT_REST and time.monotonic() < give_up_at:
        pass
    return idle


def _allow(queue: RabbitMQ, messages: int) -> None:
    """The shipped policy, with room for so many."""
    (shipped,) = (
        policy
        for policy in json.loads((INFRA / "rabbitmq" / "definitions.json").read_text())["policies"]
        if "max-length" in policy["definition"]
    )
    definition = {**shipped["definition"], "max-length": messages, "max-length-bytes": messages * 4 * BODY_BYTES}
    more = ["--priority", str(shipped["priority"] + 1), "--apply-to", shipped["apply-to"]]
    queue.ctl("set_policy", *more, "backlog", shipped["pattern"], json.dumps(definition))


def occupy(crowded: Target) -> None:
    """Its only slot, for as long as this takes."""
    connection = http.client.HTTPConnection(LOOPBACK, crowded.port, timeout=HTTP_S)
    headers = {**dict(crowded.headers), "Content-Type": "application/json", "Prefer": "respond-async"}
    connection.request("POST", crowded.path, json.dumps({"message": "holds", "delay": HELD_S}), headers)
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 202:
        raise SetUpFailed(f"the slot was not taken: {answer.status} {content[:300]!r}")
    request_id = answer.headers["NVCF-REQID"]
    give_up_at = time.monotonic() + HTTP_S
    while True:
        connection.request("GET", f"{crowded.status_path}{request_id}", headers={**headers, "NVCF-POLL-SECONDS": "1"})
        answer = connection.getresponse()
        answer.read()
        if answer.headers.get("NVCF-STATUS") == "in-progress":
            return
        if time.monotonic() > give_up_at:
            raise SetUpFailed(f"the slot was not taken: {answer.status} {answer.headers.get('NVCF-STATUS')}")


if __name__ == "__main__":
    main()
