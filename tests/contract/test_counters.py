"""One suite for every Counters back end."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from redis.asyncio import Redis as Client
from redis.crc import key_slot

from broker.backends.memory.counters import MemoryCounters
from broker.backends.redis.store import open_store
from broker.errors import StoreUnavailable
from broker.model import Rate, Taken, Window
from broker.ports import WINDOW_PARTS, Counters
from broker.settings import Settings
from infra.local.servers import Redis

SECOND, MINUTE, HOUR, DAY = 1, 60, 3600, 86_400


@pytest.fixture(params=["memory", "redis"])
async def replicas(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Counters, Counters]]:
    """The counters of two processes on one store."""
    if request.param == "memory":
        only = MemoryCounters()
        yield only, only
        return
    server: Redis = request.getfixturevalue("redis_server")
    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(open_store(server.url, Settings())) for _ in range(2)]
        yield opened[0].counters, opened[1].counters


@pytest.fixture
def counters(replicas: tuple[Counters, Counters]) -> Counters:
    return replicas[0]


@pytest.fixture
def version_id() -> str:
    return str(uuid.uuid4())


def window(limit: int, window_s: int = DAY, *, counter: str = "a:acme") -> Window:
    return Window(counter=counter, policy=f"every-{window_s}", rate=Rate(limit=limit, window_s=window_s))


def remaining(taken: Taken) -> list[int]:
    return [quota.remaining for quota in taken.quotas]


async def test_takes_are_granted_until_nothing_is_left(counters: Counters, version_id: str) -> None:
    taken = [await counters.take(version_id, [window(3)]) for _ in range(5)]
    assert [each.granted for each in taken] == [True, True, True, False, False]
    assert [remaining(each) for each in taken] == [[2], [1], [0], [0], [0]]


async def test_a_quota_carries_its_window_and_when_more_comes(counters: Counters, version_id: str) -> None:
    taken = await counters.take(version_id, [window(3, HOUR)])
    [quota] = taken.quotas
    assert (quota.policy, quota.rate) == ("every-3600", Rate(limit=3, window_s=HOUR))
    assert HOUR - 1 < quota.reset_s <= HOUR + HOUR / WINDOW_PARTS


async def test_a_refusal_says_when_to_come_again(counters: Counters, version_id: str) -> None:
    await counters.take(version_id, [window(1, MINUTE), window(9, HOUR)])
    refused = await counters.take(version_id, [window(1, MINUTE), window(9, HOUR)])
    assert not refused.granted
    assert MINUTE - 5 < refused.retry_after_s <= MINUTE + MINUTE / WINDOW_PARTS


async def test_a_refused_take_counts_in_no_window(counters: Counters, version_id: str) -> None:
    await counters.take(version_id, [window(1, MINUTE), window(9, HOUR)])
    for _ in range(3):
        refused = await counters.take(version_id, [window(1, MINUTE), window(9, HOUR)])
        assert remaining(refused) == [0, 8]
    assert remaining(await counters.take(version_id, [window(9, HOUR)])) == [7]


async def test_counters_and_partitions_are_apart(counters: Counters, version_id: str) -> None:
    assert (await counters.take(version_id, [window(1)])).granted
    assert (await counters.take(version_id, [window(1, counter="a:other")])).granted
    assert (await counters.take(str(uuid.uuid4()), [window(1)])).granted
    assert not (await counters.take(version_id, [window(1)])).granted


async def test_a_new_limit_holds_for_what_was_taken_before(counters: Counters, version_id: str) -> None:
    for _ in range(5):
        await counters.take(version_id, [window(5)])
    assert remaining(await counters.take(version_id, [window(8)])) == [2]
    lowered = await counters.take(version_id, [window(2)])
    assert (lowered.granted, remaining(lowered)) == (False, [0])


@pytest.mark.parametrize("names", ["u:a:{x}}", "u:a:ü ü", "u:a:" + "x" * 2000])
async def test_any_name_is_a_counter(counters: Counters, version_id: str, names: str) -> None:
    assert (await counters.take(version_id, [window(1, counter=names)])).granted
    assert not (await counters.take(version_id, [window(1, counter=names)])).granted


@pytest.mark.parametrize("_repeat", range(3))
async def test_replicas_at_once_grant_exactly_the_limit(
    replicas: tuple[Counters, Counters], version_id: str, _repeat: int
) -> None:
    wanted = [window(100, DAY), window(400, DAY, counter="u:acme:me"), window(1000, HOUR)]
    taken = await asyncio.gather(*(replicas[at % 2].take(version_id, wanted) for at in range(500)))
    assert Counter(each.granted for each in taken) == {True: 100, False: 400}
    assert sorted(each.quotas[0].remaining for each in taken if each.granted) == list(range(100))


async def test_no_span_of_a_window_sees_more_than_the_limit(
    replicas: tuple[Counters, Counters], version_id: str
) -> None:
    """Both replicas take as fast as they can for a few windows. A take happens between its call and its answer."""
    limit, spans = 20, 2.5
    granted: list[tuple[float, float]] = []

    async def hammer(counters: Counters) -> None:
        while time.monotonic() < until:
            called_at = time.monotonic()
            if (await counters.take(version_id, [window(limit, SECOND)])).granted:
                granted.append((called_at, time.monotonic()))
            await asyncio.sleep(0.001)

    until = time.monotonic() + spans
    await asyncio.gather(*(hammer(replica) for replica in replicas))
    granted.sort()
    pairs = zip(granted, granted[limit:], strict=False)
    assert all(later_answered_at - called_at > 1 for (called_at, _), (_, later_answered_at) in pairs)
    assert len(granted) > limit * (spans - 1)


async def test_what_was_taken_comes_back_as_promised(counters: Counters, version_id: str) -> None:
    promised_s = 0.0
    for _ in range(5):
        promised_s = (await counters.take(version_id, [window(5, SECOND)])).retry_after_s
    await asyncio.sleep(promised_s + 0.001)
    assert (await counters.take(version_id, [window(5, SECOND)])).granted


# -- by the clock ------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("window_s", [SECOND, MINUTE, HOUR, DAY])
async def test_a_take_comes_back_after_its_window_and_at_most_a_part_later(window_s: int) -> None:
    clock = Clock()
    counters = MemoryCounters(now=clock)
    await counters.take("v", [window(1, window_s)])
    clock.now += window_s
    assert not (await counters.take("v", [window(1, window_s)])).granted
    clock.now += window_s / WINDOW_PARTS
    assert (await counters.take("v", [window(1, window_s)])).granted


@pytest.mark.parametrize("seed", range(20))
async def test_the_limit_holds_in_every_span_of_a_window_at_any_rate_of_calls(seed: int) -> None:
    dice, clock, granted_at = random.Random(seed), Clock(), []
    counters = MemoryCounters(now=clock)
    for _ in range(2000):
        clock.now += dice.expovariate(dice.choice([1, 20, 400])) if dice.random() < 0.9 else 0
        if (await counters.take("v", [window(10, SECOND)])).granted:
            granted_at.append(int(clock.now * 1000))
    assert len(granted_at) > 100
    assert all(later - first > 1000 for first, later in zip(granted_at, granted_at[10:], strict=False))


async def test_a_clock_that_was_set_back_blocks_nobody_for_long() -> None:
    clock = Clock()
    counters = MemoryCounters(now=clock)
    await counters.take("v", [window(1, MINUTE)])
    clock.now -= DAY
    assert (await counters.take("v", [window(1, MINUTE)])).granted


async def test_counters_that_have_passed_are_forgotten() -> None:
    clock = Clock()
    counters = MemoryCounters(now=clock)
    for at in range(1000):
        await counters.take("v", [window(5, SECOND, counter=f"a:{at}")])
        clock.now += 0.01
    assert sum(len(kept) for kept in counters._counts.values()) < 110


# -- on Redis ----------------------------------------------------------------------------------


async def test_keys_of_a_version_share_a_slot_and_expire_with_their_window(
    redis_server: Redis, version_id: str
) -> None:
    async with (
        open_store(redis_server.url, Settings()) as (_, _, counters, *_),
        Client.from_url(redis_server.url) as client,
    ):
        await counters.take(version_id, [window(5, SECOND), window(5, DAY), window(5, HOUR, counter="u:acme:{me}")])
        keys = [key async for key in client.scan_iter(match=f"*{version_id}*")]
        assert len({key_slot(key) for key in keys}) == 1
        lives_s = sorted([await client.ttl(key) for key in keys])
        assert [round(life_s / span_s) for life_s, span_s in zip(lives_s, (SECOND, HOUR, DAY), strict=True)] == [1] * 3


@pytest.mark.parametrize(
    ("back", "used"),
    [(range(51), 51), (range(0, 51, 7), 8), (range(200), 51), (range(100, 200), 0), (range(300, 400), 0)],
)
async def test_what_left_the_window_is_neither_counted_nor_kept(
    redis_server: Redis, version_id: str, back: range, used: int
) -> None:
    """A day of takes, written here as the script would have."""
    async with (
        open_store(redis_server.url, Settings()) as (_, _, counters, *_),
        Client.from_url(redis_server.url) as client,
    ):
        key = f"fnq:l:{{{version_id}}}:a:acme:{DAY}"
        width_s = DAY / WINDOW_PARTS
        this_part = int(time.time() / width_s)
        past: dict[Any, Any] = {this_part - ago: 1 for ago in back}
        await client.hset(key, mapping=past | {"t": len(past), "o": min(past)})
        taken = await counters.take(version_id, [window(1000)])
        kept = {name: int(count) for name, count in (await client.hgetall(key)).items()}
        total, oldest = kept.pop(b"t"), kept.pop(b"o")
        assert remaining(taken) == [1000 - used - 1]
        assert (total, oldest) == (used + 1, min(int(part) for part in kept))
        assert sum(kept.values()) == total
        [quota] = taken.quotas
        assert quota.reset_s == pytest.approx((oldest + WINDOW_PARTS + 1) * width_s - time.time(), abs=5)


async def test_parts_of_a_clock_that_ran_ahead_are_let_go(redis_server: Redis, version_id: str) -> None:
    async with (
        open_store(redis_server.url, Settings()) as (_, _, counters, *_),
        Client.from_url(redis_server.url) as client,
    ):
        key, ahead = f"fnq:l:{{{version_id}}}:a:acme:{MINUTE}", int((time.time() + DAY) * WINDOW_PARTS / MINUTE)
        await client.hset(key, mapping={str(ahead): 5, "t": 5, "o": ahead})
        assert remaining(await counters.take(version_id, [window(5, MINUTE)])) == [4]


async def test_a_store_that_is_away_is_told(version_id: str) -> None:
    settings = Settings(store_timeout_s=0.2)
    async with open_store("redis://127.0.0.1:1/0", settings) as (_, _, counters, *_):
        with pytest.raises(StoreUnavailable):
            await counters.take(version_id, [window(1)])
