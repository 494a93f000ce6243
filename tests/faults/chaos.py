"""Clients at work while faults strike at random, and the verdict on what they were told.

`make chaos N=100000 KILLS=50 SEED=7`: N requests through two front ends to four sidecars, with the controller, three
RabbitMQ nodes, a Redis with two replicas and three Sentinels, and an S3 server, all on the loopback, under profile C;
and KILLS faults, each with its share of the requests. The seed decides what strikes when and what is asked for; what it
finds there is the machine's doing. Exits 1, with the seed and the story of every request at fault, if a promise was
broken (PROTOCOL §2.2).
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import aiohttp

from infra.local import binaries
from tests.checker import UNKNOWN_ID, Census, Ending, Kind, Operation, Terms, Violation, violations
from tests.faults.cluster import Cluster
from tests.faults.growth import Growth
from tests.faults.nemesis import Nemesis
from tests.house import RECORDER, Caller, Function, House, Reply

SIDECARS = 4
AT_ONCE = 24
# A fault's share of the requests is spread over this, or over the fault if that is shorter.
SPREAD_S = 10.0
# How long a client asks for one answer: for all of a fault, with time to spare.
PATIENCE_S = 600.0
# Larger bodies wait in S3.
INLINE_BYTES = 1024
PAGE = 200
CANCELS = {202: Ending.OK, 404: Ending.FAILED, 409: Ending.FAILED, 429: Ending.FAILED, 503: Ending.UNKNOWN}
# The end that a problem's type tells of.
PROBLEMS = {
    "request-cancelled": "cancelled",
    "request-expired": "expired",
    "queue-timeout": "expired",
    "request-dead": "dead",
    "request-refused": "abandoned",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    requests: int
    faults: int
    seed: int


@dataclass(slots=True, kw_only=True)
class Report:
    seed: int
    took_s: float
    broken: list[Violation]
    endings: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    growth: Growth = field(default_factory=Growth)

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}: {self.took_s:.0f} s, {sum(self.faults.values())} faults, {self.attempts} attempts",
            "faults: " + ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items())),
            "requests: " + ", ".join(f"{name} {count}" for name, count in sorted(self.endings.items())),
            str(self.growth),
            f"broken promises: {len(self.broken)}",
            *map(str, self.broken),
        ]
        return "\n".join(lines)


class Clients:
    """They send, ask again under the same key when nobody answered or it was refused, cancel some of it, and read every
    result at both front ends."""

    def __init__(self, callers: Sequence[Caller], function: Function, chance: random.Random) -> None:
        self._callers = callers
        self._function = function
        self._chance = chance
        self.history: list[Operation] = []
        self.ids: dict[str, str] = {}

    async def one(self, number: int) -> None:
        wish, front = Wish.of(f"r{number}", self._chance), number % 2
        await self._submit(wish, front)
        if wish.name in self.ids:
            if wish.cancelled:
                await self._note(Kind.CANCEL, wish.name, lambda: self._callers[front].cancel(self.ids[wish.name]))
            await self._end(wish.name, front)
            await self.read(wish.name, 1 - front)

    async def read(self, name: str, front: int) -> Operation:
        return await self._note(Kind.READ, name, lambda: self._callers[front].status(self.ids[name], wait_s=5))

    async def census(self) -> Census | None:
        """Of the function, once nothing is under way; the queue's own counts beside it. None if a server is away."""
        caller, cursor = self._callers[0], ""
        states: dict[str, str] = {}
        while True:
            path = f"/v2/nvcf/requests?functionId={self._function.id}&limit={PAGE}"
            page = await caller.call("GET", path + (f"&cursor={cursor}" if cursor else ""))
            if page.status != 200:
                return None
            states |= {each["requestId"]: str(each["status"]) for each in page.json["requests"]}
            cursor = page.json.get("cursor") or ""
            if not cursor:
                break
        counted = await caller.depth(self._function.id)
        if counted.status != 200:
            return None
        depth = counted.json["queues"][0]
        return Census(states=states, queued=int(depth["queueDepth"]), running=int(depth["inFlight"]))

    async def _submit(self, wish: Wish, front: int) -> None:
        """Until somebody says what became of it, if it has a key; once otherwise."""
        refusals, until = 0, time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            caller = self._callers[front]
            done = await self._note(
                Kind.SUBMIT,
                wish.name,
                lambda: caller.invoke(  # noqa: B023  called before the loop goes on
                    self._function.id, wish.order, wait_s=wish.wait_s, headers=wish.headers
                ),
            )
            refusals += done.ending is Ending.FAILED
            if done.ending is Ending.OK or not wish.keyed or refusals > wish.retries:
                return
            front = 1 - front
            await asyncio.sleep(0.5)

    async def _end(self, name: str, front: int) -> None:
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            seen = await self.read(name, front)
            if seen.terminal:
                return
            if seen.ending is not Ending.OK:
                front = 1 - front
                await asyncio.sleep(0.5)

    async def _note(self, kind: Kind, name: str, ask: Callable[[], Awaitable[Reply]]) -> Operation:
        began_at = time.monotonic()
        try:
            reply = await ask()
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as exc:
            ending, state, digest, note = Ending.UNKNOWN, "", "", type(exc).__name__
        else:
            ending, state, digest, note = told(kind, reply)
            if kind is Kind.SUBMIT and ending is Ending.OK:
                self.ids[name] = reply.request_id
        operation = Operation(
            kind=kind,
            name=name,
            ending=ending,
            began_at=began_at,
            ended_at=time.monotonic(),
            request_id=self.ids.get(name, "") if ending is Ending.OK else "",
            state=state,
            digest=digest,
            note=note,
        )
        self.history.append(operation)
        return operation


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a client wants. `retries`: how often it comes back after a refusal."""

    name: str
    order: dict[str, object]
    wait_s: int
    keyed: bool
    cancelled: bool
    retries: int

    @classmethod
    def of(cls, name: str, chance: random.Random) -> Wish:
        cancelled, large = chance.random() < 0.05, chance.random() < 0.1
        think_s = 2.0 if cancelled else chance.choice((0.0, 0.02, 0.2))
        return cls(
            name=name,
            order={"id": name, "delay_s": think_s, "padding": "x" * (4 * INLINE_BYTES * large)},
            wait_s=0 if cancelled else chance.choice((1, 5)),
            keyed=chance.random() < 0.7,
            cancelled=cancelled,
            retries=chance.choice((0, 3)),
        )

    @property
    def headers(self) -> dict[str, str]:
        key = {"Idempotency-Key": self.name} if self.keyed else {}
        return key | ({} if self.wait_s else {"Prefer": "respond-async"})


def told(kind: Kind, reply: Reply) -> tuple[Ending, str, str, str]:
    """The ending, state and digest that an answer stands for, and a note for whoever reads the history."""
    status, note = reply.headers.get("NVCF-STATUS", ""), str(reply.status)
    if kind is Kind.CANCEL:
        return CANCELS.get(reply.status, Ending.UNKNOWN), UNKNOWN_ID if reply.status == 404 else "", "", note
    if reply.status == 202:
        return Ending.OK, "running" if status == "in-progress" else "queued", "", note
    if status and "NVCF-REQID" in reply.headers:
        state = "fulfilled" if reply.status in (200, 302) else ended(reply) or status
        return Ending.OK, state, hashlib.sha256(b"%d %s" % (reply.status, reply.body)).hexdigest(), note
    if kind is Kind.READ:
        gone = reply.status == 404
        return (Ending.OK, UNKNOWN_ID, "", note) if gone else (Ending.UNKNOWN, "", "", note)
    unknown = b'"outcome":"unknown"' in reply.body.replace(b" ", b"")
    return (Ending.UNKNOWN if unknown or reply.status not in (429, 503) else Ending.FAILED), "", "", note


def ended(reply: Reply) -> str:
    """The state that our own problem tells of, "" for a container's answer."""
    with suppress(ValueError, AttributeError):
        kind = str(json.loads(reply.body).get("type", ""))
        return next((state for problem, state in PROBLEMS.items() if kind.endswith(problem)), "")
    return ""


async def run(plan: Plan, folder: Path, *, say: Callable[[str], None] = lambda _: None) -> Report:
    """Start everything, let clients and faults loose on it, and judge. `say` is told of each fault that is over."""
    cluster = Cluster(folder / "servers")
    try:
        await asyncio.to_thread(cluster.start)
        (folder / "house").mkdir()
        settings = {
            "FNQUEUE_INLINE_BODY_BYTES": str(INLINE_BYTES),
            "FNQUEUE_LISTED_REQUESTS": str(2 * plan.requests + 1000),
        }
        house = House(folder / "house", cluster.settings, fronts=2, **settings)
        try:
            await asyncio.to_thread(house.start)
            return await _judged(plan, house, cluster, say)
        finally:
            await asyncio.to_thread(house.stop)
    finally:
        await asyncio.to_thread(cluster.kill)


async def _judged(plan: Plan, house: House, cluster: Cluster, say: Callable[[str], None]) -> Report:
    began_at = time.monotonic()
    async with AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(house.caller(front)) for front in range(2)]
        function = await callers[0].deploy(RECORDER, instances=SIDECARS, concurrency=4)
        clients = Clients(callers, function, random.Random(f"clients {plan.seed}"))
        nemesis = Nemesis(house, cluster, random.Random(f"nemesis {plan.seed}"))
        growth = Growth()
        await stack.enter_async_context(growth.watching(house, cluster))
        await _load(plan, clients, nemesis, say)
        census = await _quiet(clients)
        for name in clients.ids:
            await clients.read(name, 0)
    starts = house.record.counts("start")
    last = {each.name: each.state or each.ending.value for each in clients.history}
    return Report(
        seed=plan.seed,
        took_s=time.monotonic() - began_at,
        broken=violations(clients.history, starts, census, Terms(may_expire=False)),
        endings=Counter(last.values()),
        faults=nemesis.done,
        attempts=sum(starts.values()),
        growth=growth,
    )


async def _load(plan: Plan, clients: Clients, nemesis: Nemesis, say: Callable[[str], None]) -> None:
    """Each fault strikes together with its share of the requests; the last share has none."""
    bounds = [plan.requests * at // (plan.faults + 1) for at in range(plan.faults + 2)]
    free = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        try:
            await clients.one(number)
        finally:
            free.release()

    async with asyncio.TaskGroup() as group:
        for first, behind in pairwise(bounds):
            strike = group.create_task(nemesis.strike()) if behind < plan.requests else None
            for number in range(first, behind):
                await free.acquire()
                group.create_task(one(number))
                if strike is not None and not strike.done():
                    await asyncio.wait([strike], timeout=SPREAD_S / (behind - first))
            if strike is not None:
                say(await strike)


async def _quiet(clients: Clients) -> Census:
    """Frozen sidecars come back, and look once more at what others have ended; what a failing-over tore apart is swept.
    What it looks like then, or when nobody would wait any longer."""
    until, seen = time.monotonic() + PATIENCE_S, None
    while time.monotonic() < until:
        with suppress(aiohttp.ClientError, TimeoutError):
            seen = await clients.census()
            if seen is not None and seen.settled:
                return seen
        await asyncio.sleep(0.5)
    assert seen is not None, "the front end does not answer"
    return seen


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Strike at everything at random, and check the promises.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=7, help="0: a random one")
    parser.add_argument("--folder", type=Path, help="an empty one, where all logs and data are kept")
    given = parser.parse_args(arguments)
    plan = Plan(requests=given.requests, faults=given.kills, seed=given.seed or secrets.randbelow(1_000_000) + 1)
    print(f"seed {plan.seed}", flush=True)
    binaries.ensure()
    with tempfile.TemporaryDirectory(prefix="fnqueue-chaos-") as temporary:
        folder = given.folder or Path(temporary)
        report = asyncio.run(run(plan, folder.resolve(), say=lambda fault: print(f"  {fault}", flush=True)))
    print(report)
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
