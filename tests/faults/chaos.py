"""Clients at work while processes are killed and frozen at random, and the verdict on what they were told.

`make chaos N=100000 KILLS=50 SEED=7`: N requests through two front ends to four sidecars, with the controller, one
RabbitMQ, one Redis and an S3 server on the loopback, and KILLS faults spread evenly over them. The seed decides what
strikes when, by the number of requests sent; what it finds there is the machine's doing. Exits 1, with the seed and the
story of every request at fault, if a promise was broken (PROTOCOL §2.2).
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import aiohttp
import psutil

from infra.local import binaries
from infra.local.process import Server
from infra.local.servers import S3, RabbitMQ, Redis
from tests.checker import UNKNOWN_ID, Census, Ending, Kind, Operation, Terms, Violation, violations
from tests.eventually import eventually
from tests.house import RECORDER, Caller, Function, House, Reply

SIDECARS = 4
AT_ONCE = 24
# A fault of a server is over after this; all else is brought back by who looks after it.
AWAY_S = (0.2, 3.0)
FROZEN_S = (1.0, 8.0)
# How long a client asks for one answer: for all of the faults, with time to spare.
PATIENCE_S = 300.0
PAGE = 200
# Kinds of faults.
KINDS = 12


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

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}: {self.took_s:.0f} s, {sum(self.faults.values())} faults, {self.attempts} attempts",
            "faults: " + ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items())),
            "requests: " + ", ".join(f"{name} {count}" for name, count in sorted(self.endings.items())),
            f"broken promises: {len(self.broken)}",
            *map(str, self.broken),
        ]
        return "\n".join(lines)


class Clients:
    """They send, ask again under the same key when nobody answered, and read every result at both front ends."""

    def __init__(self, callers: Sequence[Caller], function: Function, chance: random.Random) -> None:
        self._callers = callers
        self._function = function
        self._chance = chance
        self.history: list[Operation] = []
        self.ids: dict[str, str] = {}
        self.sent = 0
        self.progress = asyncio.Event()

    async def one(self, number: int) -> None:
        name = f"r{number}"
        waits, think_s, front = self._chance.random() < 0.5, self._chance.choice((0.0, 0.02, 0.2)), number % 2
        self.sent += 1
        self.progress.set()
        await self._submit(name, front, waits=waits, think_s=think_s)
        if name in self.ids:
            await self._end(name, front)
            await self.read(name, 1 - front)

    async def read(self, name: str, front: int) -> Operation:
        return await self._note(Kind.READ, name, lambda: self._callers[front].status(self.ids[name], wait_s=5))

    async def census(self) -> Census:
        """Of the function, once nothing is under way; the queue's own counts beside it."""
        caller, cursor = self._callers[0], ""
        states: dict[str, str] = {}
        while True:
            path = f"/v2/nvcf/requests?functionId={self._function.id}&limit={PAGE}"
            page = await caller.call("GET", path + (f"&cursor={cursor}" if cursor else ""))
            assert page.status == 200, page
            states |= {each["requestId"]: str(each["status"]) for each in page.json["requests"]}
            cursor = page.json.get("cursor") or ""
            if not cursor:
                break
        depth = (await caller.depth(self._function.id)).json["queues"][0]
        return Census(states=states, queued=int(depth["queueDepth"]), running=int(depth["inFlight"]))

    async def _submit(self, name: str, front: int, *, waits: bool, think_s: float) -> None:
        """Until somebody says what became of it."""
        order = {"id": name, "delay_s": think_s}
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            caller = self._callers[front]
            done = await self._note(
                Kind.SUBMIT,
                name,
                lambda: caller.invoke(  # noqa: B023  called before the loop goes on
                    self._function.id, order, wait_s=5 if waits else 1, headers={"Idempotency-Key": name}
                ),
            )
            if done.ending is not Ending.UNKNOWN:
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


def told(kind: Kind, reply: Reply) -> tuple[Ending, str, str, str]:
    """The ending, state and digest that an answer stands for, and a note for whoever reads the history."""
    status, note = reply.headers.get("NVCF-STATUS", ""), str(reply.status)
    if reply.status == 202:
        return Ending.OK, "running" if status == "in-progress" else "queued", "", note
    if status and "NVCF-REQID" in reply.headers:
        state = "fulfilled" if reply.status in (200, 302) else status
        return Ending.OK, state, hashlib.sha256(b"%d %s" % (reply.status, reply.body)).hexdigest(), note
    if kind is Kind.READ:
        gone = reply.status == 404
        return (Ending.OK, UNKNOWN_ID, "", note) if gone else (Ending.UNKNOWN, "", "", note)
    unknown = b'"outcome":"unknown"' in reply.body.replace(b" ", b"")
    return (Ending.UNKNOWN if unknown or reply.status not in (429, 503) else Ending.FAILED), "", "", note


class Nemesis:
    """Strikes one process after the other, and brings back what nobody else would. Every kind of fault comes once
    before one comes again."""

    def __init__(self, house: House, servers: Mapping[str, Server], chance: random.Random) -> None:
        self._chance = chance
        self._left: list[str] = []
        self.done: Counter[str] = Counter()
        self._kinds: dict[str, Callable[[], Awaitable[bool]]] = {
            "kill front end": lambda: self._kill_program(house.fronts),
            "kill controller": lambda: self._kill_program(house.controllers),
            "kill sidecar": lambda: self._kill_process(house.sidecars()),
            "kill container": lambda: self._kill_process(house.containers()),
            "freeze front end": lambda: self._freeze([front.leader for front in house.fronts]),
            "freeze sidecar": lambda: self._freeze([process.pid for process in house.sidecars()]),
        }
        for name, server in servers.items():
            self._kinds[f"kill {name}"] = partial(self._kill_program, [server])
            self._kinds[f"freeze {name}"] = partial(self._freeze_server, server)
        assert len(self._kinds) == KINDS

    async def strike(self) -> None:
        if not self._left:
            self._left = self._chance.sample(list(self._kinds), len(self._kinds))
        name = self._left.pop()
        if await self._kinds[name]():
            self.done[name] += 1

    async def _freeze_server(self, server: Server) -> bool:
        return await self._freeze([server.leader])

    async def _kill_program(self, programs: Sequence[Server]) -> bool:
        program, away_s = self._chance.choice(programs), self._chance.uniform(*AWAY_S)
        await asyncio.to_thread(program.kill)
        await asyncio.sleep(away_s)
        await asyncio.to_thread(program.start)
        return True

    async def _kill_process(self, processes: Sequence[psutil.Process]) -> bool:
        """Its launcher starts another one."""
        if not processes:
            return False
        with suppress(psutil.NoSuchProcess):
            self._chance.choice(processes).kill()
        return True

    async def _freeze(self, pids: Sequence[int | None]) -> bool:
        pid, seconds = self._chance.choice(pids) if pids else None, self._chance.uniform(*FROZEN_S)
        if pid is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(seconds)
            finally:
                os.kill(pid, signal.SIGCONT)
        return True


async def run(plan: Plan, folder: Path) -> Report:
    """Start everything, let clients and faults loose on it, and judge."""
    rabbitmq, redis, s3 = RabbitMQ(folder / "rabbitmq"), Redis(folder / "redis"), S3(folder / "s3")
    servers: dict[str, Server] = {"RabbitMQ": rabbitmq, "Redis": redis, "S3": s3}
    urls = {"FNQUEUE_QUEUE_URL": rabbitmq.url, "FNQUEUE_STORE_URL": redis.url, "FNQUEUE_BLOBS_URL": s3.url}
    house = House(folder, urls, fronts=2)
    try:
        for server in (*servers.values(), *house.fronts, *house.controllers):
            await asyncio.to_thread(server.start)
        return await _judged(plan, house, servers)
    finally:
        await asyncio.to_thread(house.stop)
        for server in servers.values():
            await asyncio.to_thread(server.kill)


async def _judged(plan: Plan, house: House, servers: Mapping[str, Server]) -> Report:
    began_at = time.monotonic()
    async with AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(house.caller(front)) for front in range(2)]
        function = await callers[0].deploy(RECORDER, instances=SIDECARS, concurrency=4)
        clients = Clients(callers, function, random.Random(plan.seed))
        nemesis = Nemesis(house, servers, random.Random(plan.seed + 1))
        async with asyncio.TaskGroup() as group:
            group.create_task(_strikes(plan, clients, nemesis))
            group.create_task(_all(clients, plan.requests))

        async def nothing_under_way() -> Census | None:
            with suppress(aiohttp.ClientError, TimeoutError):
                return await clients.census()
            return None

        # Frozen sidecars come back, and look once more at what others have ended.
        census = await eventually(
            nothing_under_way, lambda seen: seen is not None and not seen.running, within_s=PATIENCE_S
        )
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
    )


async def _strikes(plan: Plan, clients: Clients, nemesis: Nemesis) -> None:
    """One after the other, each when its share of the requests was sent."""
    for number in range(plan.faults):
        while clients.sent < plan.requests * (number + 1) // (plan.faults + 1):
            clients.progress.clear()
            await clients.progress.wait()
        await nemesis.strike()


async def _all(clients: Clients, requests: int) -> None:
    numbers = iter(range(requests))

    async def send() -> None:
        for number in numbers:
            await clients.one(number)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(send())


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Kill and freeze everything at random, and check the promises.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="0: a random one")
    given = parser.parse_args(arguments)
    plan = Plan(requests=given.requests, faults=given.kills, seed=given.seed or secrets.randbelow(1_000_000) + 1)
    print(f"seed {plan.seed}", flush=True)
    binaries.ensure()
    with tempfile.TemporaryDirectory(prefix="fnqueue-chaos-") as folder:
        report = asyncio.run(run(plan, Path(folder)))
    print(report)
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
