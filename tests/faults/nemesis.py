"""Faults, one at a time: the next one strikes when the servers are whole again, for profile C promises no more."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import TypeVar

import psutil

from infra.local.process import Server
from tests.faults.cluster import Cluster, Replica
from tests.house import House

T = TypeVar("T")
Fault = Callable[[], AbstractAsyncContextManager[None]]

HOLD_S = (0.2, 8.0)
# Turns of a process that is slowed down: it stands still for one half of the time.
TURN_S = 0.2
# Kinds of faults.
KINDS = 28


class Nemesis:
    """Strikes, and brings back what nobody else would. Every kind of fault comes once before one comes again."""

    def __init__(self, house: House, cluster: Cluster, chance: random.Random) -> None:
        self._house = house
        self._cluster = cluster
        self._chance = chance
        self._left: list[str] = []
        self.done: Counter[str] = Counter()
        self._kinds: dict[str, Fault] = {**self._of_ours(), **self._of_rabbitmq(), **self._of_redis()}
        assert len(self._kinds) == KINDS

    async def strike(self) -> str:
        """One fault, from its beginning until all is whole again. What it was."""
        if not self._left:
            self._left = self._chance.sample(list(self._kinds), len(self._kinds))
        name, hold_s = self._left.pop(), self._chance.uniform(*HOLD_S)
        async with self._kinds[name]():
            await asyncio.sleep(hold_s)
        await asyncio.to_thread(self._cluster.await_whole)
        self.done[name] += 1
        return f"{name} for {hold_s:.1f} s"

    # -- what strikes whom -------------------------------------------------------------------------

    def _of_ours(self) -> dict[str, Fault]:
        house, s3 = self._house, self._cluster.s3
        found: dict[str, Fault] = {
            "kill sidecar": lambda: self._ended(house.sidecars),
            "freeze sidecar": lambda: self._frozen(lambda: self._one(house.sidecars()).pid),
            "kill container": lambda: self._ended(house.containers),
        }
        among: dict[str, Sequence[Server]] = {"front end": house.fronts, "controller": house.controllers, "S3": [s3]}
        for name, servers in among.items():
            found |= self._of_server(name, partial(self._one, servers), slow=False)
        return found

    def _of_rabbitmq(self) -> dict[str, Fault]:
        return {
            **self._of_server("RabbitMQ node", partial(self._one, self._cluster.nodes)),
            "cut off RabbitMQ node": self._isolated_node,
            "memory alarm": partial(self._alarm, "set_vm_memory_high_watermark", "0.0000001", "0.4"),
            "disk alarm": partial(self._alarm, "set_disk_free_limit", "100000GB", "50MB"),
        }

    def _of_redis(self) -> dict[str, Fault]:
        redis = self._cluster.redis
        return {
            **self._of_server("Redis primary", redis.primary),
            **self._of_server("Redis replica", self._replica),
            **self._of_server("Sentinel", partial(self._one, redis.sentinels)),
            "cut off Redis primary": self._isolated_primary,
            "fill Redis' disk": self._full_disk,
            "fill Redis' memory": self._full_memory,
            "fail over": self._failed_over,
        }

    def _of_server(self, what: str, choose: Callable[[], Server], *, slow: bool = True) -> dict[str, Fault]:
        found: dict[str, Fault] = {
            f"kill {what}": lambda: self._killed(choose),
            f"freeze {what}": lambda: self._frozen(lambda: choose().pid),
        }
        if slow:
            found[f"slow down {what}"] = lambda: self._slowed(lambda: choose().pid)
        return found

    def _one(self, among: Sequence[T]) -> T:
        return self._chance.choice(among)

    def _replica(self) -> Replica:
        primary = self._cluster.redis.primary()
        return self._one([store for store in self._cluster.redis.stores if store is not primary])

    # -- faults ------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _killed(self, choose: Callable[[], Server]) -> AsyncIterator[None]:
        server = await asyncio.to_thread(choose)
        await asyncio.to_thread(server.kill)
        try:
            yield
        finally:
            await asyncio.to_thread(server.start)

    @asynccontextmanager
    async def _ended(self, processes: Callable[[], Sequence[psutil.Process]]) -> AsyncIterator[None]:
        """Their launcher starts another one."""
        if found := processes():
            with suppress(psutil.NoSuchProcess):
                self._one(found).kill()
        yield

    @asynccontextmanager
    async def _frozen(self, choose: Callable[[], int]) -> AsyncIterator[None]:
        pid = await asyncio.to_thread(choose)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    @asynccontextmanager
    async def _slowed(self, choose: Callable[[], int]) -> AsyncIterator[None]:
        pid = await asyncio.to_thread(choose)

        async def stutter() -> None:
            while True:
                for turn in (signal.SIGSTOP, signal.SIGCONT):
                    os.kill(pid, turn)
                    await asyncio.sleep(TURN_S)

        stuttering = asyncio.create_task(stutter())
        try:
            yield
        finally:
            stuttering.cancel()
            await asyncio.gather(stuttering, return_exceptions=True)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    @asynccontextmanager
    async def _isolated_node(self) -> AsyncIterator[None]:
        """A minority of one."""
        lonely = self._one(self._cluster.nodes)
        others = [node for node in self._cluster.nodes if node is not lonely]
        await asyncio.to_thread(lonely.isolate, others)
        try:
            yield
        finally:
            await asyncio.to_thread(lonely.rejoin, others)

    @asynccontextmanager
    async def _isolated_primary(self) -> AsyncIterator[None]:
        """It goes on serving its clients, and does not know that it is the primary no more."""
        lonely = await asyncio.to_thread(self._cluster.redis.primary)
        await asyncio.to_thread(lonely.isolate)
        try:
            yield
        finally:
            await asyncio.to_thread(lonely.rejoin)

    @asynccontextmanager
    async def _failed_over(self) -> AsyncIterator[None]:
        """As an operator orders it."""
        await asyncio.to_thread(self._cluster.redis.fail_over)
        yield

    @asynccontextmanager
    async def _alarm(self, command: str, raised: str, usual: str) -> AsyncIterator[None]:
        node = self._one(self._cluster.nodes)
        await asyncio.to_thread(node.ctl, command, raised)
        try:
            yield
        finally:
            await asyncio.to_thread(node.ctl, command, usual)

    @asynccontextmanager
    async def _full_disk(self) -> AsyncIterator[None]:
        """No file of the primary can grow."""
        store = await asyncio.to_thread(self._cluster.redis.primary)
        _, most = resource.prlimit(store.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(store.pid, resource.RLIMIT_FSIZE, (0, most))
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                resource.prlimit(store.pid, resource.RLIMIT_FSIZE, (most, most))

    @asynccontextmanager
    async def _full_memory(self) -> AsyncIterator[None]:
        store = await asyncio.to_thread(self._cluster.redis.primary)
        with store.client() as client:
            await asyncio.to_thread(client.config_set, "maxmemory", 1)
            try:
                yield
            finally:
                await asyncio.to_thread(client.config_set, "maxmemory", 0)
