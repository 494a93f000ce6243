"""What a Redis says of itself, asked over a connection of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from broker.backends.redis.pools import SentinelPool, open_pool
from broker.facts import StoreFacts
from broker.settings import Settings

# What patterns of an ACL user's rules begin with.
_SIGNS = {"keys": "~", "channels": "&"}
_PATTERNS = ("append*", "maxmemory*", "min-replicas-*")


async def look(url: str, settings: Settings, *, users: bool = False) -> StoreFacts:
    """Bounded by the store's time-out for each question. A server that is away is a fault, and no error. Only with
    `users` it is asked for those: a refusal stands in its log.

    Raises ConfigurationError for a URL that cannot be read.
    """
    pool = open_pool(url, settings, decode_responses=True, retry=Retry(NoBackoff(), 0))
    client = Redis(connection_pool=pool)
    facts = StoreFacts(kind="redis")
    try:
        if isinstance(pool, SentinelPool):
            facts = replace(facts, sentinels=await _sentinels(pool))
        facts = await _ask(client, facts, pool)
        return replace(facts, default_user=await _default_user(client)) if users else facts
    except AuthenticationError as exc:
        return replace(facts, address=_address(pool), fault=f"it refuses the URL's user or password: {exc}")
    except (RedisError, OSError, TimeoutError) as exc:
        return replace(facts, address=_address(pool), fault=f"it does not answer ({type(exc).__name__})")
    finally:
        await client.aclose()
        await pool.aclose()


async def _sentinels(pool: SentinelPool) -> tuple[int, int]:
    """How many know the primary, and how many there are."""
    asked = pool.sentinel_manager.sentinels
    answers = await asyncio.gather(
        *(sentinel.sentinel_get_master_addr_by_name(pool.service_name) for sentinel in asked), return_exceptions=True
    )
    return sum(isinstance(answer, tuple) for answer in answers), len(asked)


def _address(pool: ConnectionPool) -> str:
    """As redis-cli takes it. Of a primary that no Sentinel names, the first of them."""
    given = pool.connection_kwargs
    if isinstance(pool, SentinelPool):
        first = pool.sentinel_manager.sentinels[0].connection_pool.connection_kwargs
        host, port = pool.master_address or (first["host"], first["port"])
        return f"-h {host} -p {port}"
    return f"-h {given['host']} -p {given.get('port', 6379)}" if "host" in given else f"-s {given.get('path', '')}"


async def _ask(client: Redis, facts: StoreFacts, pool: ConnectionPool) -> StoreFacts:
    await client.ping()
    asked_at = time.time()
    seconds, micros = await client.time()
    skew_s = seconds + micros / 1_000_000 - (asked_at + time.time()) / 2
    info, config = await _info(client), await _config(client)
    return replace(
        facts,
        address=_address(pool),
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


async def _default_user(client: Redis) -> str | None:
    try:
        found = await cast("Awaitable[Mapping[str, Sequence[str]] | None]", client.acl_getuser("default"))
    except ResponseError:  # not permitted, or not there
        return None
    if found is None:
        return None
    # Redis 6 leaves out the signs.
    patterns = [f"{sign}{each.removeprefix(sign)}" for name, sign in _SIGNS.items() for each in found.get(name, ())]
    return " ".join([*patterns, *found["categories"], *found["commands"]])


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
