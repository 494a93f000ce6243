"""A queue whose jobs carry the trace that they were published in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

from broker.model import Job
from broker.ports import Delivery, Queue
from broker.telemetry.tracing import Tracing


class TracedQueue:
    """Implements Queue by another one, with a span around each publish."""

    def __init__(self, queue: Queue, tracing: Tracing) -> None:
        self._queue = queue
        self._tracing = tracing

    async def declare(self, version_id: str) -> None:
        await self._queue.declare(version_id)

    async def delete(self, version_id: str) -> None:
        await self._queue.delete(version_id)

    async def publish(self, job: Job, *, timeout_s: float) -> None:
        with self._tracing.publish(job) as carrying:
            await self._queue.publish(carrying, timeout_s=timeout_s)

    def consume(self, version_id: str, *, prefetch: int) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        return self._queue.consume(version_id, prefetch=prefetch)

    def dead_letters(self, *, prefetch: int) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        return self._queue.dead_letters(prefetch=prefetch)

    async def take(self, version_id: str) -> Delivery | None:
        return await self._queue.take(version_id)

    async def depth(self, version_id: str) -> int | None:
        return await self._queue.depth(version_id)

    async def ping(self) -> None:
        await self._queue.ping()
