"""What the suites of the Queue port share: jobs to publish, and bounded ways to receive them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import aiormq
from aiormq.abc import AbstractChannel

from broker.model import Job
from broker.ports import Delivery, Queue

T = TypeVar("T")

SOON_S = 30.0  # far beyond what any step takes; only a failing test waits this long
RESIDENCE_S = 60.0


def a_job(version_id: str, **changes: Any) -> Job:
    now = time.time()
    fields: dict[str, Any] = {
        "id": str(uuid.uuid4()),
        "account": "default",
        "function_id": str(uuid.uuid4()),
        "version_id": version_id,
        "subject": "key-1",
        "created_at": now,
        "deadline_at": now + 3600,
        "digest": "0" * 64,
        "body": b'{"n": 1}',
    }
    return Job(**(fields | changes))


def a_job_to_expire(version_id: str, *, after_s: float) -> Job:
    """A job whose message expires `after_s` seconds after its publishing: far past its deadline."""
    now = time.time()
    return a_job(version_id, created_at=now, deadline_at=now - RESIDENCE_S + after_s)


async def soon(awaitable: Awaitable[T]) -> T:
    async with asyncio.timeout(SOON_S):
        return await awaitable


async def receive(deliveries: AsyncIterator[Delivery], count: int) -> list[Job]:
    """The next `count` jobs, each acknowledged as it comes."""
    jobs = []
    for _ in range(count):
        delivery = await soon(anext(deliveries))
        jobs.append(delivery.job)
        await delivery.ack()
    return jobs


async def dead_letter(queue: Queue, version_id: str) -> Delivery:
    """The next dead letter of this version, acknowledged; those of others are acknowledged unread."""
    async with asyncio.timeout(SOON_S), queue.dead_letters(prefetch=10) as deliveries:
        async for delivery in deliveries:
            await delivery.ack()
            if delivery.job.version_id == version_id:
                return delivery
    raise AssertionError("the dead letters ended")


@asynccontextmanager
async def raw_channel(url: str) -> AsyncIterator[AbstractChannel]:
    """RabbitMQ without fnqueue in between."""
    connection = await soon(aiormq.connect(url))
    try:
        yield await soon(connection.channel(on_return_raises=True))
    finally:
        await connection.close()
