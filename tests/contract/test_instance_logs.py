"""One suite for every InstanceLogs back end."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from broker.backends.memory.instance_logs import MemoryInstanceLogs
from broker.backends.redis.store import open_store
from broker.errors import Overloaded
from broker.model import LogBatch, LogLine, Look, Part
from broker.ports import LOGS_KEPT_BYTES, MOST_ACCOUNT_LOOKS, InstanceLogs
from broker.settings import Settings
from infra.local.servers import Redis
from tests.eventually import eventually


@pytest.fixture(params=["memory", "redis"])
async def replicas(request: pytest.FixtureRequest) -> AsyncIterator[tuple[InstanceLogs, InstanceLogs]]:
    """Those of two processes on one store."""
    if request.param == "memory":
        only = MemoryInstanceLogs()
        yield only, only
        return
    server: Redis = request.getfixturevalue("redis_server")
    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(open_store(server.url, Settings())) for _ in range(2)]
        yield opened[0].instance_logs, opened[1].instance_logs


@pytest.fixture
def logs(replicas: tuple[InstanceLogs, InstanceLogs]) -> InstanceLogs:
    return replicas[0]


@pytest.fixture
def look() -> Look:
    return Look(account=f"acme {uuid.uuid4()}", version_id=str(uuid.uuid4()))


def batch(look: Look, *texts: str, instance_id: str = "one", part: Part = Part.CONTAINER) -> LogBatch:
    lines = tuple(LogLine(1000.5 + number, text) for number, text in enumerate(texts))
    return LogBatch(version_id=look.version_id, instance_id=instance_id, part=part, lines=lines)


async def texts(logs: InstanceLogs, look: Look) -> list[str]:
    return [line.text for each in await logs.read(look.version_id, limit=1000) for line in each.lines]


async def test_whoever_looks_is_known_to_all_until_the_time_has_passed(
    replicas: tuple[InstanceLogs, InstanceLogs], look: Look
) -> None:
    one, other = replicas
    narrow = Look(account=look.account, version_id=look.version_id, instance_id=str(uuid.uuid4()))
    await one.look(look, ttl_s=30.0)
    await one.look(narrow, ttl_s=0.05)
    assert look in await other.looks()
    await eventually(other.looks, lambda looks: narrow not in looks, within_s=30.0)
    assert look in await other.looks()


async def test_lines_come_in_order_and_after_the_last_one_that_was_read(
    replicas: tuple[InstanceLogs, InstanceLogs], look: Look
) -> None:
    one, other = replicas
    await one.look(look, ttl_s=30.0)
    assert await one.append(batch(look, "a", "bö"), before="", after="10")
    assert await one.append(batch(look, "c", instance_id="two", part=Part.SIDECAR), before="", after="x")
    assert await one.append(batch(look, "d"), before="10", after="20")
    first, second, third = await other.read(look.version_id, limit=10)
    assert (first.lines, first.instance_id, first.part) == (
        (LogLine(1000.5, "a"), LogLine(1001.5, "bö")),
        "one",
        Part.CONTAINER,
    )
    assert (second.instance_id, second.part) == ("two", Part.SIDECAR)
    assert await other.read(look.version_id, after=second.id, limit=10) == [third]
    assert await other.read(look.version_id, limit=1) == [first]
    assert await other.read(look.version_id, after=third.id, limit=10) == []


async def test_of_two_who_copy_the_same_lines_one_does(replicas: tuple[InstanceLogs, InstanceLogs], look: Look) -> None:
    await replicas[0].look(look, ttl_s=30.0)
    done = await asyncio.gather(*(each.append(batch(look, "once"), before="", after="4") for each in replicas))
    assert sorted(done) == [False, True]
    assert await texts(replicas[0], look) == ["once"]
    assert await replicas[1].positions(look.version_id) == {("one", Part.CONTAINER): "4"}


async def test_a_part_that_wrote_nothing_has_a_position_too(logs: InstanceLogs, look: Look) -> None:
    await logs.look(look, ttl_s=30.0)
    assert await logs.positions(look.version_id) == {}
    assert await logs.append(batch(look), before="", after="0")
    assert await logs.positions(look.version_id) == {("one", Part.CONTAINER): "0"}
    assert await logs.read(look.version_id, limit=10) == []


async def test_a_second_look_finds_what_is_there(logs: InstanceLogs, look: Look) -> None:
    await logs.look(look, ttl_s=30.0)
    await logs.append(batch(look, "a"), before="", after="1")
    await logs.look(Look(account=look.account, version_id=look.version_id, instance_id="one"), ttl_s=30.0)
    assert await texts(logs, look) == ["a"]


async def test_a_look_after_a_pause_begins_anew(logs: InstanceLogs, look: Look) -> None:
    await logs.look(look, ttl_s=0.05)
    await logs.append(batch(look, "a"), before="", after="1")
    await eventually(logs.looks, lambda looks: look not in looks, within_s=30.0)
    await logs.look(look, ttl_s=30.0)
    assert await texts(logs, look) == []
    assert not await logs.append(batch(look, "b"), before="1", after="2"), "by one who knows the earlier look"
    assert await logs.append(batch(look, "a"), before="", after="1")


async def test_the_oldest_lines_make_way(logs: InstanceLogs, look: Look) -> None:
    await logs.look(look, ttl_s=30.0)
    size, count = LOGS_KEPT_BYTES // 8, 20
    for number in range(count):
        assert await logs.append(batch(look, f"{number} {'x' * size}"), before=str(number or ""), after=str(number + 1))
    kept = [int(text.partition(" ")[0]) for text in await texts(logs, look)]
    assert kept == list(range(count - len(kept), count))
    assert 6 <= len(kept) <= 8


async def test_an_account_may_look_at_so_much_at_once(logs: InstanceLogs, look: Look) -> None:
    others = [Look(account=look.account, version_id=str(uuid.uuid4())) for _ in range(MOST_ACCOUNT_LOOKS)]
    for other in others:
        await logs.look(other, ttl_s=30.0)
    with pytest.raises(Overloaded):
        await logs.look(look, ttl_s=30.0)
    await logs.look(others[0], ttl_s=30.0)
    await logs.look(Look(account=f"other {uuid.uuid4()}", version_id=look.version_id), ttl_s=30.0)
