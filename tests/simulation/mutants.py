"""The protocol with one rule left out (PROTOCOL §2.4): each loses what that rule is there for.

Each is a port that behaves like the real one but for that rule.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

from broker.errors import StoreUnavailable, Unavailable
from broker.model import Interest, Job, Lease, Outcome, Record, RequestState, Timings
from broker.ports import Delivery, Queue, Results, Watch
from tests.simulation.world import Store


class _Like:
    """Everything as the real one."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _EarlyAck(_Like):
    @asynccontextmanager
    async def consume(self, version_id: str, *, prefetch: int) -> AsyncIterator[AsyncIterator[Delivery]]:
        async with self._inner.consume(version_id, prefetch=prefetch) as deliveries:
            yield self._acknowledged(deliveries)

    async def _acknowledged(self, deliveries: AsyncIterator[Delivery]) -> AsyncIterator[Delivery]:
        async for delivery in deliveries:
            await delivery.ack()
            yield delivery


class _Unconfirmed(_Like):
    async def publish(self, job: Job, *, timeout_s: float) -> None:
        with suppress(Unavailable):
            await self._inner.publish(job, timeout_s=timeout_s)


class _NoTombstone(_Like):
    async def abandon(self, request_id: str, version_id: str, *, reason: str) -> bool:
        return True


class _Overwrite(_Like):
    def __init__(self, inner: Any, store: Store) -> None:
        super().__init__(inner)
        self._store = store

    async def settle(
        self, lease: Lease, job: Job, state: RequestState, outcome: Outcome, timings: Timings
    ) -> RequestState:
        entry = self._store.entry(job.id)
        if entry is not None:
            entry.state, entry.token, entry.attempt = RequestState.RUNNING, lease.token, lease.attempt
        return cast("RequestState", await self._inner.settle(lease, job, state, outcome, timings))


class _HintsAsFacts(_Like):
    """Reads once, and again only when a hint came."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self._known: dict[str, Record | None] = {}

    @asynccontextmanager
    async def watch(self, request_id: str, interest: Interest = Interest.END) -> AsyncIterator[Watch]:
        async with self._inner.watch(request_id, interest) as inner:
            yield _Believing(inner, self._known, request_id)


class _Believing:
    def __init__(self, inner: Watch, known: dict[str, Record | None], request_id: str) -> None:
        self._inner = inner
        self._known = known
        self._id = request_id

    async def read(self) -> Record | None:
        if self._id not in self._known:
            self._known[self._id] = await self._inner.read()
        return self._known[self._id]

    async def changed(self, timeout_s: float) -> bool:
        hinted = await self._inner.changed(timeout_s)
        if hinted:
            self._known.pop(self._id, None)
        return hinted

    def wake(self) -> None:
        self._inner.wake()


class _NonDurableReads(_Like):
    def __init__(self, inner: Any, store: Store) -> None:
        super().__init__(inner)
        self._store = store

    @asynccontextmanager
    async def watch(self, request_id: str, interest: Interest = Interest.END) -> AsyncIterator[Watch]:
        async with self._inner.watch(request_id, interest) as inner:
            yield _Hasty(inner, self._store, request_id)


class _Hasty:
    def __init__(self, inner: Watch, store: Store, request_id: str) -> None:
        self._inner = inner
        self._store = store
        self._id = request_id
        self.changed = inner.changed
        self.wake = inner.wake

    async def read(self) -> Record | None:
        with suppress(StoreUnavailable):
            await self._inner.read()
        entry = self._store.entry(self._id)
        return entry.record() if entry is not None else None


class _AckBeforeDurable(_Like):
    async def settle(
        self, lease: Lease, job: Job, state: RequestState, outcome: Outcome, timings: Timings
    ) -> RequestState:
        try:
            return cast("RequestState", await self._inner.settle(lease, job, state, outcome, timings))
        except StoreUnavailable:
            return state


def early_ack(queue: Queue) -> Queue:
    """A message is acknowledged when it arrives."""
    return cast("Queue", _EarlyAck(queue))


def unconfirmed(queue: Queue) -> Queue:
    """202 is answered whatever the broker says to the publish."""
    return cast("Queue", _Unconfirmed(queue))


def no_tombstone(results: Results, _: Store) -> Results:
    """503 is answered, and the record left as it is."""
    return cast("Results", _NoTombstone(results))


def overwrite(results: Results, store: Store) -> Results:
    """The last result stands."""
    return cast("Results", _Overwrite(results, store))


def hints_as_facts(results: Results, _: Store) -> Results:
    """What no hint came for has not changed."""
    return cast("Results", _HintsAsFacts(results))


def non_durable_reads(results: Results, store: Store) -> Results:
    """A result is shown before a replica has it."""
    return cast("Results", _NonDurableReads(results, store))


def ack_before_durable(results: Results, _: Store) -> Results:
    """A message is acknowledged when the primary has the result."""
    return cast("Results", _AckBeforeDurable(results))
