"""What a Redis says of itself, asked over a connection of its own."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Mapping
from typing import Any, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from broker.errors import ConfigurationError
from broker.facts import StoreFacts
from broker.settings import Settings

_PATTERNS = ("append*", "maxmemory*", "min-replicas-*")


async def look(url: str, settings: Settings) -> StoreFacts:
    """Bounded by the store's time-out for each question. A server that is away is a fault, and no error.

    Raises ConfigurationError for a URL that cannot be read.
    """
    try:
        client = Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=settings.store_timeout_s,
            socket_connect_timeout=settings.store_timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError as exc:
        raise ConfigurationError("FNQUEUE_STORE_URL: not a Redis URL") from exc
    given = client.connection_pool.connection_kwargs
    address = f"-h {given['host']} -p {given.get('port', 6379)}" if "host" in given else f"-s {given.get('path', '')}"
    try:
        return await _ask(client, address)
    except AuthenticationError as exc:
        return StoreFacts(kind="redis", address=address, fault=f"it refuses the URL's user or password: {exc}")
    except (RedisError, OSError, TimeoutError) as exc:
        return StoreFacts(kind="redis", address=address, fault=f"it does not answer ({type(exc).__name__})")
    finally:
        await client.aclose()


async def _ask(client: Redis, address: str) -> StoreFacts:
    await client.ping()
    asked_at = time.time()
    seconds, micros = await client.time()
    skew_s = seconds + micros / 1_000_000 - (asked_at + time.time()) / 2
    info, config = await _info(client), await _config(client)
    return StoreFacts(
        kind="redis",
        address=address,
        version=str(info.get("redis_version", "")),
        config=config,
        skew_s=skew_s,
        replicas=info.get("connected_slaves"),
        used_bytes=info.get("used_memory"),
        writes_kept=info["aof_last_write_status"] == "ok" if "aof_last_write_status" in info else None,
    )


async def _info(client: Redis) -> Mapping[str, Any]:
    try:
        return dict(await client.info())
    except ResponseError:  # not permitted
        return {}


async def _config(client: Redis) -> Mapping[str, str] | None:
    """None where the command is not permitted, or not there, as with many managed ones."""
    found: dict[str, str] = {}
    try:
        for pattern in _PATTERNS:
            answer = await cast("Awaitable[Mapping[Any, Any]]", client.config_get(pattern))
            found |= {str(name): str(value) for name, value in answer.items()}
    except ResponseError:
        return None
    return found
