"""One suite for every Upkeep back end: what keeps records and the places of their requests together."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest
from redis.asyncio import Redis as Client

from broker.backends.memory.results import MemoryResults
from broker.backends.memory.upkeep import MemoryUpkeep
from broker.backends.redis import keys
from broker.backends.redis.store import open_store
from broker.errors import QueueFull
from broker.model import Draft, Job, Outcome, RequestState, Verdict
from broker.ports import Results, Upkeep
from broker.settings import Settings
from infra.local.servers import Redis
from tests.contract.records import job_of
from tests.eventually import eventually

S = RequestState
SETTINGS = Settings()
OUTCOME = Outcome(status=200)
DB = 14
ROOM = 3
TIGHT = Settings(version_requests=ROOM, account_requests=ROOM)
# For stores that tell time in milliseconds.
NOW = -0.01


@dataclass(frozen=True, slots=True)
class Store:
    results: Results
    upkeep: Upkeep

    async def accept(
        self, version_id: str, *, deadline_s: float = 600, queue_timeout_s: float = 0, request_id: str = ""
    ) -> Job:
        draft = Draft(
            id=request_id or str(uuid.uuid4()),
            account="acme",
            function_id="f",
            version_id=version_id,
            digest="",
            deadline_s=deadline_s,
            queue_timeout_s=queue_timeout_s,
        )
        return job_of(await self.results.create(draft, queue_limit=10_000, watch=False))

    async def finish(self, job: Job, state: RequestState = S.FULFILLED) -> None:
        claim = await self.results.claim(job, worker="w", lease_s=30, max_attempts=3)
        assert claim.lease is not None
        assert await self.results.settle(claim.lease, job, state, OUTCOME) is state

    async def state(self, job: Job) -> RequestState | None:
        record = await self.results.read(job.id)
        return record.state if record else None

    async def load(self, version_id: str) -> tuple[int, int]:
        (load,) = await self.results.load([version_id])
        return load.queued, load.running

    async def survey(self) -> dict[RequestState, int]:
        """All of it, in small pieces."""
        states: dict[RequestState, int] = {}
        cursor = 0
        while True:
            seen = await self.upkeep.survey(cursor, limit=7)
            assert not seen.unreadable
            for state, count in seen.states.items():
                states[state] = states.get(state, 0) + count
            cursor = seen.cursor
            if not cursor:
                return states


@pytest.fixture
async def client(redis_server: Redis) -> AsyncIterator[Client]:
    """A database of the product's tests, empty."""
    async with Client.from_url(url(redis_server)) as opened:
        await opened.flushdb()
        yield opened


@pytest.fixture
async def redis_store(client: Client, redis_server: Redis) -> AsyncIterator[Store]:
    async with open_store(url(redis_server), SETTINGS) as opened:
        yield Store(opened.results, opened.upkeep)


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest) -> Store:
    if request.param == "memory":
        results = MemoryResults(SETTINGS)
        return Store(results, MemoryUpkeep(results))
    found: Store = request.getfixturevalue("redis_store")
    return found


def url(server: Redis) -> str:
    return f"{server.url.rpartition('/')[0]}/{DB}"


@pytest.fixture
def version_id() -> str:
    return str(uuid.uuid4())


# -- survey ------------------------------------------------------------------------------------


async def test_every_record_is_counted_once_by_its_state(store: Store, version_id: str) -> None:
    jobs = [await store.accept(version_id) for _ in range(40)]
    for job in jobs[:10]:
        await store.finish(job)
    await store.results.claim(jobs[10], worker="w", lease_s=30, max_attempts=3)
    await store.results.cancel(jobs[11].id, reason="")
    await store.results.end(jobs[12], S.DEAD, reason="")
    assert await store.results.abandon(jobs[13].id, version_id, reason="")
    counted = await store.survey()
    assert counted == {S.ABANDONED: 1, S.FULFILLED: 10, S.RUNNING: 1, S.CANCELLED: 1, S.DEAD: 1, S.QUEUED: 26}


async def test_an_overdue_request_expires_though_no_order_has_it(
    client: Client, redis_store: Store, version_id: str
) -> None:
    job = await redis_store.accept(version_id, deadline_s=0.05)
    await client.delete(keys.waiting(version_id), keys.due(version_id))
    await eventually(redis_store.survey, lambda counted: counted == {S.EXPIRED: 1})
    assert await redis_store.state(job) is S.EXPIRED


async def test_a_request_without_a_place_gets_one_that_ends_it_in_time(
    client: Client, redis_store: Store, version_id: str
) -> None:
    job = await redis_store.accept(version_id, deadline_s=1.0)
    await client.delete(keys.waiting(version_id))
    seen = await redis_store.upkeep.survey(0, limit=1000)
    assert (seen.placed, seen.cursor) == (1, 0)
    assert (await redis_store.upkeep.survey(0, limit=1000)).placed == 0
    assert await redis_store.load(version_id) == (0, 0)  # for which nothing is started
    await eventually(lambda: redis_store.results.sweep(version_id, limit=10), lambda changed: changed == 1)
    assert await redis_store.state(job) is S.EXPIRED


async def test_what_is_no_record_is_counted_apart_and_stops_nothing(client: Client, redis_store: Store) -> None:
    await redis_store.accept("v")
    for number, (field, value) in enumerate((("s", b"strange"), ("s", b"queued"), ("v", b"no state"), ("s", b"\xff"))):
        await client.hset(keys.record(f"broken-{number}"), field, value)
    await client.set(keys.record("a-string"), "x")
    seen = await redis_store.upkeep.survey(0, limit=1000)
    assert (seen.unreadable, dict(seen.states)) == (4, {S.QUEUED: 1})


# -- straighten --------------------------------------------------------------------------------


async def test_places_that_agree_are_left_alone(store: Store, version_id: str) -> None:
    jobs = [await store.accept(version_id) for _ in range(5)]
    await store.results.claim(jobs[0], worker="w", lease_s=30, max_attempts=3)
    assert await store.upkeep.straighten(version_id, skip=0, limit=100) == (0, False)
    assert await store.load(version_id) == (4, 1)


async def test_places_of_requests_that_are_over_or_gone_are_taken_away_however_deep(
    client: Client, redis_store: Store, version_id: str
) -> None:
    jobs = [await redis_store.accept(version_id) for _ in range(30)]
    done, gone, fresh = jobs[25], jobs[27], jobs[29]
    await redis_store.finish(done)
    await client.zadd(keys.waiting(version_id), {done.id: time.time() * 1e6, gone.id: 1.0})
    await client.delete(keys.record(gone.id), keys.record(fresh.id))
    changed, skip, more = 0, 0, True
    while more:
        mended, more = await redis_store.upkeep.straighten(version_id, skip=skip, limit=10)
        changed, skip = changed + mended, skip + 10
    assert changed == 2
    # The record of the newest may be on its way.
    assert await redis_store.load(version_id) == (28 + 1 - 1, 0)


async def test_places_are_changed_for_the_right_ones(client: Client, redis_store: Store, version_id: str) -> None:
    waits, runs = [await redis_store.accept(version_id) for _ in range(2)]
    await redis_store.results.claim(runs, worker="w", lease_s=30, max_attempts=3)
    scores = [await client.zscore(keys.waiting(version_id), waits.id), 5.0]
    await client.zrem(keys.waiting(version_id), waits.id)
    await client.zrem(keys.running(version_id), runs.id)
    await client.zadd(keys.running(version_id), {waits.id: scores[0] or 0})
    await client.zadd(keys.waiting(version_id), {runs.id: 5.0})
    assert await redis_store.upkeep.straighten(version_id, skip=0, limit=10) == (2, False)
    assert await redis_store.load(version_id) == (1, 1)
    assert await client.zscore(keys.waiting(version_id), waits.id) == scores[0]


# -- restore -----------------------------------------------------------------------------------


def lost_job(version_id: str) -> Job:
    """Accepted before the store was wiped."""
    now = int(time.time())
    return Job(
        id=str(uuid.uuid4()),
        account="acme",
        function_id="f",
        version_id=version_id,
        subject="",
        created_at=now - 5.0,
        deadline_at=now + 600.0,
        digest="",
    )


async def test_a_lost_request_waits_again_at_its_place_and_can_be_claimed(store: Store, version_id: str) -> None:
    job = lost_job(version_id)
    newer = await store.accept(version_id)
    assert await store.upkeep.restore(job) is S.QUEUED
    assert await store.upkeep.restore(job) is S.QUEUED
    assert await store.load(version_id) == (2, 0)
    record = await store.results.read(job.id)
    assert record is not None
    assert (record.account, record.created_at, record.deadline_at) == ("acme", job.created_at, job.deadline_at)
    assert (await store.results.claim(job, worker="w", lease_s=30, max_attempts=3)).verdict is Verdict.GRANTED
    assert await store.state(newer) is S.QUEUED


async def test_restoring_what_is_over_says_so_and_changes_nothing(store: Store, version_id: str) -> None:
    job = await store.accept(version_id)
    await store.finish(job)
    assert await store.upkeep.restore(job) is S.FULFILLED
    assert await store.load(version_id) == (0, 0)


async def test_a_request_that_runs_is_not_put_among_those_that_wait(store: Store, version_id: str) -> None:
    job = await store.accept(version_id)
    await store.results.claim(job, worker="w", lease_s=30, max_attempts=3)
    assert await store.upkeep.restore(job) is S.RUNNING
    assert await store.load(version_id) == (0, 1)


# -- set aside ---------------------------------------------------------------------------------


async def test_what_is_set_aside_counts_for_nothing_and_is_not_abandoned(store: Store, version_id: str) -> None:
    job = await store.accept(version_id)
    assert await store.upkeep.set_aside(version_id, older_than_s=60, limit=10) == 0
    assert await store.upkeep.set_aside(version_id, older_than_s=NOW, limit=10) == 1
    assert await store.upkeep.set_aside(version_id, older_than_s=NOW, limit=10) == 0
    assert await store.load(version_id) == (0, 0)
    record = await store.results.read(job.id)
    assert record is not None
    assert record.state is S.QUEUED
    assert (await store.results.position(record)).rank == 1


async def test_what_was_set_aside_runs_when_its_submitter_published_it_after_all(store: Store, version_id: str) -> None:
    job = await store.accept(version_id)
    await store.upkeep.set_aside(version_id, older_than_s=NOW, limit=10)
    claim = await store.results.claim(job, worker="w", lease_s=30, max_attempts=3)
    assert claim.lease is not None
    assert await store.load(version_id) == (0, 1)
    await store.results.release(claim.lease, refund=True)
    assert await store.load(version_id) == (1, 0)
    await store.finish(job)
    assert await store.load(version_id) == (0, 0)


async def test_what_was_set_aside_waits_again_for_who_submits_it_again(store: Store, version_id: str) -> None:
    job = await store.accept(version_id)
    await store.upkeep.set_aside(version_id, older_than_s=NOW, limit=10)
    await store.accept(version_id, request_id=job.id)
    assert await store.load(version_id) == (1, 0)


async def test_what_was_set_aside_can_still_be_abandoned_or_cancelled(store: Store, version_id: str) -> None:
    jobs = [await store.accept(version_id) for _ in range(2)]
    await store.upkeep.set_aside(version_id, older_than_s=NOW, limit=10)
    assert await store.results.abandon(jobs[0].id, version_id, reason="")
    assert await store.results.cancel(jobs[1].id, reason="") is S.QUEUED
    assert await store.load(version_id) == (0, 0)


@pytest.mark.parametrize("limits", [{"deadline_s": 0.2}, {"queue_timeout_s": 0.2}])
async def test_what_was_set_aside_expires_when_it_is_due(
    store: Store, version_id: str, limits: dict[str, float]
) -> None:
    job = await store.accept(version_id, **limits)  # type: ignore[arg-type]  # floats only
    assert await store.upkeep.set_aside(version_id, older_than_s=NOW, limit=10) == 1
    await eventually(lambda: store.results.sweep(version_id, limit=10), lambda changed: changed == 1)
    assert await store.state(job) is S.EXPIRED


async def test_a_postponed_request_is_not_set_aside(store: Store, version_id: str) -> None:
    job = await store.accept(version_id)
    claim = await store.results.claim(job, worker="w", lease_s=30, max_attempts=3)
    assert claim.lease is not None
    await store.results.postpone(claim.lease, Outcome(status=429), wait_s=60)
    assert await store.upkeep.set_aside(version_id, older_than_s=NOW, limit=10) == 0
    assert await store.load(version_id) == (1, 0)


# -- ledgers -----------------------------------------------------------------------------------


@pytest.fixture
async def tight_redis(client: Client, redis_server: Redis) -> AsyncIterator[Store]:
    async with open_store(url(redis_server), TIGHT) as opened:
        yield Store(opened.results, opened.upkeep)


@pytest.fixture(params=["memory", "redis"])
def tight(request: pytest.FixtureRequest) -> Store:
    """Room for three requests of a version and of an account."""
    if request.param == "memory":
        results = MemoryResults(TIGHT)
        return Store(results, MemoryUpkeep(results))
    found: Store = request.getfixturevalue("tight_redis")
    return found


async def room(store: Store, version_id: str) -> tuple[int, int]:
    """How many more a version and its account may have."""
    return await fitting(store, version_id), await fitting(store, str(uuid.uuid4()))


async def fitting(store: Store, version_id: str) -> int:
    jobs: list[Job] = []
    with suppress(QueueFull):
        while len(jobs) <= ROOM:
            jobs.append(await store.accept(version_id))
    for job in jobs:
        await store.results.cancel(job.id, reason="")
    return len(jobs)


async def test_a_restored_request_takes_one_place_until_it_is_over(tight: Store, version_id: str) -> None:
    job = lost_job(version_id)
    for _ in range(2):
        assert await tight.upkeep.restore(job) is S.QUEUED
        assert await room(tight, version_id) == (ROOM - 1, ROOM - 1)
    await tight.finish(job)
    assert await room(tight, version_id) == (ROOM, ROOM)
    assert await tight.upkeep.restore(job) is S.FULFILLED
    assert await room(tight, version_id) == (ROOM, ROOM)


async def test_a_lost_request_that_is_overdue_takes_no_place(tight: Store, version_id: str) -> None:
    job = replace(lost_job(version_id), deadline_at=time.time() - 1)
    assert await tight.upkeep.restore(job) is S.EXPIRED
    assert await room(tight, version_id) == (ROOM, ROOM)


async def test_what_is_set_aside_takes_no_place_however_it_ends(tight: Store, version_id: str) -> None:
    jobs = [await tight.accept(version_id, deadline_s=30 if number else 0.2) for number in range(3)]
    assert await room(tight, version_id) == (0, 0)
    assert await tight.upkeep.set_aside(version_id, older_than_s=NOW, limit=10) == 3
    assert await room(tight, version_id) == (ROOM, ROOM)
    await tight.accept(version_id)
    await eventually(lambda: tight.results.sweep(version_id, limit=10), lambda changed: changed == 1)
    assert await tight.results.abandon(jobs[1].id, version_id, reason="")
    assert await tight.results.cancel(jobs[2].id, reason="") is S.QUEUED
    assert await room(tight, version_id) == (ROOM - 1, ROOM - 1)


@pytest.mark.parametrize("by", ["claim", "submit", "restore"])
async def test_what_was_set_aside_takes_its_place_again(tight: Store, version_id: str, by: str) -> None:
    job = await tight.accept(version_id)
    assert await tight.upkeep.set_aside(version_id, older_than_s=NOW, limit=10) == 1
    match by:
        case "claim":
            await tight.results.claim(job, worker="w", lease_s=30, max_attempts=3)
        case "submit":
            await tight.accept(version_id, request_id=job.id)
        case _:
            assert await tight.upkeep.restore(job) is S.QUEUED
    assert await room(tight, version_id) == (ROOM - 1, ROOM - 1)
    await tight.results.cancel(job.id, reason="")
    assert await room(tight, version_id) == (ROOM, ROOM)


@pytest.mark.parametrize("by", ["survey", "sweep"])
async def test_what_expires_gives_its_place_back(tight: Store, version_id: str, by: str) -> None:
    job = await tight.accept(version_id, deadline_s=0.05)
    await tight.accept(version_id)
    if by == "survey":
        await eventually(tight.survey, lambda counted: counted == {S.EXPIRED: 1, S.QUEUED: 1})
    else:
        await eventually(lambda: tight.results.sweep(version_id, limit=10), lambda changed: changed == 1)
    assert await tight.state(job) is S.EXPIRED
    assert await room(tight, version_id) == (ROOM - 1, ROOM - 1)
