"""Processes that die, freeze and misbehave at a chosen call of a port.

Every call that a simulated process makes of a port goes through its `Process.call`. A killed one makes no further
call and gets no further answer, and the broker has its messages back: what SIGKILL does. A frozen one goes on later,
unaware, when the broker has long given its messages to others: what SIGSTOP does.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeVar, cast

from broker.errors import BlobsUnavailable, PublishUnconfirmed, StoreUnavailable, Unavailable
from broker.model import Job
from broker.ports import Broker, Delivery, Queue

T = TypeVar("T")

# Longer than a lease.
FROZEN_S = 20.0


class Action(StrEnum):
    """HANG freezes the process at the call; RAISE is what the port says when its server does not answer; DUPLICATE has
    the effect twice, as when a client library repeats a command whose answer was lost."""

    KILL = "kill"
    HANG = "hang"
    RAISE = "raise"
    DUPLICATE = "duplicate"


class When(StrEnum):
    """On which side of the call's effect."""

    BEFORE = "before"
    AFTER = "after"


@dataclass(frozen=True, slots=True)
class Failpoint:
    """At the `nth` call of `name`, such as `results.claim`."""

    name: str
    action: Action
    when: When = When.BEFORE
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.action} {self.when} call {self.nth} of {self.name}"


class Process:
    """One process: `broker` is what it sees of the servers."""

    def __init__(self, name: str, servers: Broker) -> None:
        self.name = name
        self.calls: list[str] = []
        self.failpoint: Failpoint | None = None
        self.struck = False
        self.dead = False
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._loans: set[Delivery] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.servers = servers
        self.broker = replace(
            servers,
            queue=cast("Queue", _SeenQueue(self, servers.queue)),
            results=cast("Any", _Seen(self, "results", servers.results)),
            catalog=servers.catalog,
            blobs=cast("Any", _Seen(self, "blobs", servers.blobs)),
        )

    @property
    def frozen(self) -> bool:
        return not self._thawed.is_set()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task that ends with the process."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def kill(self) -> None:
        self.dead = True
        self._thawed.set()
        await self.disconnect()
        for task in list(self._tasks):
            task.cancel()

    async def freeze(self, seconds: float = FROZEN_S) -> None:
        self._thawed.clear()
        asyncio.get_running_loop().call_later(seconds, self._thawed.set)
        await self.disconnect()

    async def disconnect(self) -> None:
        """The broker takes the connection for lost, and has what was on loan back."""
        loans, self._loans = self._loans, set()
        for loan in loans:
            await loan.requeue()

    async def gone(self) -> None:
        """After `kill`: what was left to cancel was cancelled."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def there(self) -> None:
        """Return when the process runs. Never for a dead one."""
        await self._thawed.wait()
        if self.dead:
            raise asyncio.CancelledError

    def lend(self, delivery: Delivery) -> Delivery:
        self._loans.add(delivery)
        return _SeenDelivery(self, delivery)

    def returned(self, delivery: Delivery) -> None:
        self._loans.discard(delivery)

    async def call(self, name: str, effect: Callable[[], Awaitable[T]]) -> T:
        await self.there()
        self.calls.append(name)
        point = self.failpoint
        if point is None or self.struck or point.name != name or self.calls.count(name) != point.nth:
            found = await effect()
        else:
            self.struck = True
            found = await self._strike(point, effect)
        await self.there()
        return found

    async def _strike(self, point: Failpoint, effect: Callable[[], Awaitable[T]]) -> T:
        if point.action is Action.DUPLICATE:
            await effect()
            return await effect()
        if point.when is When.AFTER:
            found = await effect()
            await self._suffer(point)
            return found
        await self._suffer(point)
        await self.there()
        return await effect()

    async def _suffer(self, point: Failpoint) -> None:
        match point.action:
            case Action.KILL:
                await self.kill()
                raise asyncio.CancelledError
            case Action.HANG:
                await self.freeze()
            case Action.RAISE if point.name.startswith("delivery."):
                await self.disconnect()  # these verbs raise nothing
            case Action.RAISE if point.name.startswith("queue.") and point.when is When.AFTER:
                raise PublishUnconfirmed("no confirm came in time")
            case Action.RAISE if point.name.startswith("queue."):
                raise Unavailable("the job queue does not answer")
            case Action.RAISE if point.name.startswith("blobs."):
                raise BlobsUnavailable("the blob store does not answer")
            case Action.RAISE:
                raise StoreUnavailable("the store does not answer")


class _Seen:
    """A port whose calls go through the process."""

    def __init__(self, process: Process, port: str, inner: Any) -> None:
        self._process = process
        self._port = port
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self._inner, name)
        if name == "watch":
            return self._watched
        if not inspect.iscoroutinefunction(inner):
            return inner

        async def call(*given: Any, **named: Any) -> Any:
            return await self._process.call(f"{self._port}.{name}", lambda: inner(*given, **named))

        return call

    @asynccontextmanager
    async def _watched(self, *given: Any, **named: Any) -> AsyncIterator[Any]:
        async with self._inner.watch(*given, **named) as watch:
            yield _SeenWatch(self._process, watch)


class _SeenWatch:
    def __init__(self, process: Process, inner: Any) -> None:
        self._process = process
        self._inner = inner

    async def read(self) -> Any:
        return await self._process.call("watch.read", self._inner.read)

    async def changed(self, timeout_s: float) -> bool:
        hinted: bool = await self._inner.changed(timeout_s)
        await self._process.there()
        return hinted

    def wake(self) -> None:
        self._inner.wake()


class _SeenQueue(_Seen):
    def __init__(self, process: Process, inner: Queue) -> None:
        super().__init__(process, "queue", inner)

    def consume(self, version_id: str, *, prefetch: int) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        return self._lending(self._inner.consume(version_id, prefetch=prefetch))

    def dead_letters(self, *, prefetch: int) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        return self._lending(self._inner.dead_letters(prefetch=prefetch))

    @asynccontextmanager
    async def _lending(
        self, source: AbstractAsyncContextManager[AsyncIterator[Delivery]]
    ) -> AsyncIterator[AsyncIterator[Delivery]]:
        async with source as deliveries:
            yield self._lent(deliveries)

    async def _lent(self, deliveries: AsyncIterator[Delivery]) -> AsyncIterator[Delivery]:
        process = self._process
        while True:
            await process.there()
            delivery = await anext(deliveries, None)
            if delivery is None:
                return
            if process.dead or process.frozen:
                await delivery.requeue()
                continue
            lent = process.lend(delivery)
            before = process.struck
            await process.call("delivery.arrive", lambda: asyncio.sleep(0))
            point = process.failpoint
            if point is not None and point.action is Action.DUPLICATE and process.struck and not before:
                await self._inner.publish(lent.job, timeout_s=1)
            yield lent


class _SeenDelivery:
    def __init__(self, process: Process, inner: Delivery) -> None:
        self._process = process
        self._inner = inner

    @property
    def job(self) -> Job:
        return self._inner.job

    @property
    def death(self) -> str:
        return self._inner.death

    @property
    def fault(self) -> str:
        return self._inner.fault

    async def ack(self) -> None:
        await self._end("ack", self._inner.ack)

    async def requeue(self) -> None:
        await self._end("requeue", self._inner.requeue)

    async def reject(self) -> None:
        await self._end("reject", self._inner.reject)

    async def _end(self, name: str, verb: Callable[[], Awaitable[None]]) -> None:
        await self._process.call(f"delivery.{name}", verb)
        self._process.returned(self._inner)
