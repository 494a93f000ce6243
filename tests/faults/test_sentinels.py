"""Redis behind Sentinels: the primary changes, and nothing that was acknowledged is gone."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import TypeVar

import pytest
from redis.exceptions import RedisError

from broker.backends.redis.store import open_store
from broker.errors import StoreUnavailable
from broker.examination import examine, profile_kept
from broker.facts import Level
from broker.model import Draft, Job, Outcome, Record, RequestState
from broker.ports import Results
from broker.profiles import store as judge_store
from broker.settings import DoctorSettings, Settings, SidecarSettings, load
from tests.eventually import eventually
from tests.faults.cluster import Replica, Sentries
from tests.frozen import frozen
from tests.unit.container import FUNCTION_ID, VERSION_ID

T = TypeVar("T")
OUTCOME = Outcome(status=200, body=b"result")


@pytest.fixture(scope="module")
def sentries(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentries]:
    started = Sentries(tmp_path_factory.mktemp("sentries"))
    try:
        started.start()
        yield started
    finally:
        started.kill()


@pytest.fixture
async def whole(sentries: Sentries) -> Sentries:
    """Every test begins with a primary and both replicas."""
    await asyncio.to_thread(sentries.await_whole)
    return sentries


def settings_of(sentries: Sentries, **given: object) -> Settings:
    return load(Settings, store_url=sentries.url, profile="C", profile_asserted=True, **given)


@pytest.fixture
async def results(whole: Sentries) -> AsyncIterator[Results]:
    async with open_store(whole.url, settings_of(whole)) as (opened, *_):
        yield opened


async def finished(results: Results) -> Job:
    """Accepted and fulfilled, however often that has to be asked for."""
    draft = Draft(id=str(uuid.uuid4()), account="acme", function_id="f", version_id="v", digest="", deadline_s=3600)

    async def create() -> Record:
        return await results.create(draft, queue_limit=100_000, watch=False)

    record = await insisted(create)
    job = Job(
        id=record.id, account=record.account, function_id=record.function_id, version_id=record.version_id, subject="",
        created_at=record.created_at, deadline_at=record.deadline_at, digest="",
    )  # fmt: skip

    async def settle() -> RequestState:
        claimed = await results.claim(job, worker="w", lease_s=30, max_attempts=100, token=job.id)
        if claimed.lease is None:
            return claimed.state
        return await results.settle(claimed.lease, job, RequestState.FULFILLED, OUTCOME)

    assert await insisted(settle) is RequestState.FULFILLED
    return job


async def insisted(ask: Callable[[], Awaitable[T]]) -> T:
    async with asyncio.timeout(300):
        while True:
            with suppress(StoreUnavailable):
                return await ask()
            await asyncio.sleep(0.05)


async def change_primary_by_freezing(sentries: Sentries) -> None:
    """The old one wakes up beside the new one, and believes that it is the primary still."""
    before = await asyncio.to_thread(sentries.primary)
    with frozen(before.pid):
        await another(sentries, before)


async def change_primary_by_killing(sentries: Sentries) -> None:
    before = await asyncio.to_thread(sentries.primary)
    await asyncio.to_thread(before.kill)
    await another(sentries, before)
    await asyncio.to_thread(before.start)


async def change_primary_by_isolating(sentries: Sentries) -> None:
    """It goes on serving us, alone."""
    before = await asyncio.to_thread(sentries.primary)
    await asyncio.to_thread(before.isolate)
    try:
        await another(sentries, before)
    finally:
        await asyncio.to_thread(before.rejoin)


async def another(sentries: Sentries, before: Replica) -> None:
    await eventually(
        lambda: asyncio.to_thread(named, sentries), lambda port: port not in (0, before.port), within_s=120
    )


def named(sentries: Sentries) -> int:
    """The port of the primary, 0 while there is none."""
    try:
        return sentries.primary().port
    except RedisError:
        return 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("change", [change_primary_by_freezing, change_primary_by_killing, change_primary_by_isolating])
async def test_nothing_that_was_acknowledged_is_gone_after_the_primary_changed(
    whole: Sentries, results: Results, change: Callable[[Sentries], Awaitable[None]]
) -> None:
    done: list[Job] = []
    over, key, first = asyncio.Event(), str(uuid.uuid4()), str(uuid.uuid4())

    async def work() -> None:
        while not over.is_set():
            done.append(await finished(results))

    async with asyncio.TaskGroup() as working:
        for _ in range(16):
            working.create_task(work())
        await eventually(lambda: asyncio.sleep(0, len(done)), lambda count: count >= 50, within_s=120)
        await insisted(partial(results.remember_key, "acme", key, request_id=first, digest="d"))
        await change(whole)
        before = len(done)
        await eventually(lambda: asyncio.sleep(0, len(done)), lambda count: count >= before + 50, within_s=300)
        over.set()
    await asyncio.to_thread(whole.await_whole)
    second = str(uuid.uuid4())
    assert await insisted(partial(results.remember_key, "acme", key, request_id=second, digest="d")) == first
    for job in done:
        record = await insisted(partial(results.read, job.id))
        assert record is not None
        assert (record.state, record.outcome, record.attempt) == (RequestState.FULFILLED, OUTCOME, 1)


async def test_a_read_of_a_primary_that_was_left_alone_says_nothing(whole: Sentries, results: Results) -> None:
    job = await finished(results)
    primary = await asyncio.to_thread(whole.primary)
    async with open_store(primary.url, settings_of(whole, store_failover_s=0)) as (alone, *_):
        assert await alone.read(job.id)
        await asyncio.to_thread(primary.isolate)
        try:
            with pytest.raises(StoreUnavailable):
                await alone.read(job.id)
        finally:
            await asyncio.to_thread(primary.rejoin)


async def test_the_doctor_and_the_profile_know_the_primary_by_its_sentinels(whole: Sentries) -> None:
    settings = load(DoctorSettings, store_url=whole.url, profile="C")
    primary = await asyncio.to_thread(whole.primary)
    facts = (await examine(settings, probe=False)).store
    assert (facts.fault, facts.sentinels, facts.replicas) == ("", (3, 3), 2)
    assert facts.address == f"-h 127.0.0.1 -p {primary.port}"
    assert {each.level for each in judge_store(facts, settings)} == {Level.OK}
    given = {"function_id": FUNCTION_ID, "function_version_id": VERSION_ID, "store_url": whole.url, "profile": "C"}
    stop = asyncio.Event()
    async with profile_kept(load(SidecarSettings, **given), stop):
        assert not stop.is_set()


async def test_sentinels_that_are_away_are_told_of() -> None:
    settings = load(DoctorSettings, store_url="redis+sentinel://127.0.0.1:1,127.0.0.1:2/main", profile="C")
    facts = (await examine(settings, probe=False)).store
    assert facts.sentinels == (0, 2)
    assert facts.fault == "it does not answer (MasterNotFoundError)"
    assert [each.level for each in judge_store(facts, settings)] == [Level.WARN, Level.FAIL]
