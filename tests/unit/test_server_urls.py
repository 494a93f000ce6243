"""The URLs of servers of which there are several."""

from __future__ import annotations

from typing import Any

import pytest
from redis.asyncio.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection

from broker.backends.rabbitmq.connection import Line
from broker.backends.redis.pools import SentinelPool, open_pool
from broker.errors import ConfigurationError
from broker.settings import Settings


def sentinels(url: str) -> tuple[SentinelPool, list[dict[str, Any]]]:
    pool = open_pool(url, Settings())
    assert isinstance(pool, SentinelPool)
    return pool, [each.connection_pool.connection_kwargs for each in pool.sentinel_manager.sentinels]


def test_a_url_may_name_sentinels_the_primary_and_the_database() -> None:
    pool, asked = sentinels("redis+sentinel://one:1,two,[::1]:3/main/2")
    assert [(each["host"], each["port"]) for each in asked] == [("one", 1), ("two", 26379), ("::1", 3)]
    assert (pool.service_name, pool.connection_kwargs["db"]) == ("main", 2)
    assert pool.connection_class is SentinelManagedConnection


def test_credentials_are_the_primarys_and_sentinels_may_have_their_own() -> None:
    pool, [asked] = sentinels("redis+sentinel://us%65r:p%40ss@one/main?sentinel_user=s&sentinel_password=h%26sh")
    assert (pool.connection_kwargs["username"], pool.connection_kwargs["password"]) == ("user", "p@ss")
    assert (asked["username"], asked["password"]) == ("s", "h&sh")
    _, [asked] = sentinels("redis+sentinel://user:pass@one/main")
    assert (asked["username"], asked["password"]) == (None, None)


def test_tls_is_for_all_of_them() -> None:
    pool, _ = sentinels("rediss+sentinel://one,two/main")
    assert pool.connection_class is SentinelManagedSSLConnection
    assert pool.sentinel_manager.sentinel_kwargs["ssl"] is True


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://",
        "redis+sentinel://one",
        "redis+sentinel:///main",
        "redis+sentinel://one,/main",
        "redis+sentinel://:hush@one:hush/main",
        "redis+sentinel://:hush@one:0/main",
        "redis+sentinel://:hush@one/main/hush",
        "redis+sentinel://:hush@one/main?sentinel_pasword=hush",
        "redis+sentinel://:hush@[one/main",
    ],
)
def test_what_is_no_sentinel_url_is_refused_without_its_secrets(url: str) -> None:
    with pytest.raises(ConfigurationError, match="Sentinels are given as") as refused:
        open_pool(url, Settings())
    assert "hush" not in str(refused.value)


async def test_a_queue_url_may_name_every_node() -> None:
    line = Line("amqp://user:p,ss@one:1,two,[::1]:3/vhost?heartbeat=5", "test", answer_s=1)
    assert line.places == "one:1, two:amqp, ::1:3"


@pytest.mark.parametrize("url", ["amqp://user:hush@one,:2/", "amqp://user:hush@one:hush,two/", "amqp://:hush@one:0,b/"])
async def test_a_queue_url_with_a_node_that_is_none_is_refused_without_its_secrets(url: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Line(url, "test", answer_s=1)
    assert "hush" not in str(refused.value)
