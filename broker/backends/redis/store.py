"""Opens Results, Streams, Catalog, Counters, Upkeep, DeadLetters, Webhooks and InstanceLogs over one Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from broker.backends.redis.catalog import RedisCatalog
from broker.backends.redis.connection import Connection
from broker.backends.redis.counters import RedisCounters
from broker.backends.redis.dead_letters import RedisDeadLetters
from broker.backends.redis.instance_logs import RedisInstanceLogs
from broker.backends.redis.results import RedisResults
from broker.backends.redis.streams import RedisStreams
from broker.backends.redis.upkeep import RedisUpkeep
from broker.backends.redis.webhooks import RedisWebhooks
from broker.ports import Store
from broker.settings import Settings


@asynccontextmanager
async def open_store(url: str, settings: Settings) -> AsyncIterator[Store]:
    """Raises ConfigurationError for a URL that cannot be read; a Redis that is away does not fail the opening."""
    connection = Connection(url, settings)
    results = RedisResults(connection, settings)
    listening = asyncio.create_task(results.run())
    try:
        with suppress(TimeoutError):
            await asyncio.wait_for(results.subscribed.wait(), settings.store_timeout_s)
        yield Store(
            results=results,
            streams=RedisStreams(connection, settings, hints=results.hints, channel=results.channel),
            catalog=RedisCatalog(connection),
            counters=RedisCounters(connection),
            upkeep=RedisUpkeep(connection, settings, results),
            dead_letters=RedisDeadLetters(connection, settings),
            webhooks=RedisWebhooks(connection, settings, results),
            instance_logs=RedisInstanceLogs(connection),
        )
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await connection.close()
