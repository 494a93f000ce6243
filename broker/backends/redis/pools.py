"""From the store's URL to a pool of connections: to one Redis, or to whichever its Sentinels say is the primary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import ConstantBackoff, NoBackoff

from broker.errors import ConfigurationError
from broker.settings import Settings

SCHEMES = ("redis", "rediss", "redis+sentinel", "rediss+sentinel")
SENTINEL_PORT = 26_379
_MOST_CONNECTIONS = 16
_BAD_URL = "FNQUEUE_STORE_URL: not a Redis URL"
_BAD_SENTINEL_URL = (
    "FNQUEUE_STORE_URL: Sentinels are given as redis+sentinel://user:password@host:26379,host:26379/primary/0, with "
    "the name that they know the primary by"
)


class SentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """Connections to the primary. The Sentinels are asked for it before each new one."""

    sentinel_manager: Sentinel
    service_name: str
    master_address: tuple[str, int] | None

    async def aclose(self) -> None:
        """The connections to Sentinels, too."""
        await super().aclose()
        await self.sentinel_manager.aclose()


def open_pool(url: str, settings: Settings, **changed: Any) -> BlockingConnectionPool:
    """Nothing is connected yet. `changed` are options of redis-py's connections.

    Raises:
        ConfigurationError: the URL cannot be read.
    """
    options: dict[str, Any] = {
        "max_connections": _MOST_CONNECTIONS,
        "timeout": settings.store_timeout_s,
        "protocol": 3,
        "socket_timeout": settings.store_timeout_s,
        "socket_connect_timeout": settings.store_timeout_s,
        "socket_keepalive": True,
        "health_check_interval": 15,
        # Every script may run twice, so one silent retry over a fresh connection is safe.
        "retry": Retry(ConstantBackoff(0.05), 1),
        "retry_on_error": [ConnectionError],
        "driver_info": None,  # our users may not CLIENT SETINFO, a command that Redis 7.0 does not know
        **changed,
    }
    if url.partition("://")[0].endswith("+sentinel"):
        # They are asked one after the other.
        return _behind_sentinels(url, options, answer_s=settings.store_timeout_s / 3)
    try:
        return BlockingConnectionPool.from_url(url, **options)
    except ValueError as exc:
        raise ConfigurationError(_BAD_URL) from exc


def _behind_sentinels(url: str, options: Mapping[str, Any], *, answer_s: float) -> SentinelPool:
    try:
        parts = urlsplit(url)
        sentinels = _sentinels(parts)
        primary, _, database = parts.path.strip("/").partition("/")
        credentials = {"username": _plain(parts.username), "password": _plain(parts.password), "db": int(database or 0)}
        own = parse_qs(parts.query, strict_parsing=bool(parts.query))
    except ValueError:  # its text could hold a part of the password
        raise ConfigurationError(_BAD_SENTINEL_URL) from None
    if not primary or own.keys() - {"sentinel_user", "sentinel_password"}:
        raise ConfigurationError(_BAD_SENTINEL_URL)
    asking = {
        "username": own.get("sentinel_user", [None])[0],
        "password": own.get("sentinel_password", [None])[0],
        "socket_timeout": answer_s,
        "socket_connect_timeout": answer_s,
        "retry": Retry(NoBackoff(), 0),
        "ssl": parts.scheme.startswith("rediss"),
        "driver_info": None,
    }
    return SentinelPool(  # type: ignore[no-untyped-call]  # of redis-py
        primary,
        Sentinel(sentinels, sentinel_kwargs=asking),  # type: ignore[no-untyped-call]  # of redis-py
        ssl=asking["ssl"],
        **options,
        **credentials,
    )


def _sentinels(parts: SplitResult) -> list[tuple[str, int]]:
    """Raises ValueError."""
    found = []
    for place in parts.netloc.rpartition("@")[2].split(","):
        one = urlsplit(f"//{place}")
        if not one.hostname or one.port == 0:
            raise ValueError(place)
        found.append((one.hostname, one.port or SENTINEL_PORT))
    return found


def _plain(part: str | None) -> str | None:
    return unquote(part) if part else None
