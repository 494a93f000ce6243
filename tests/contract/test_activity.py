"""What a store tells of what versions did lately, on memory and on a real Redis."""

from __future__ import annotations

import itertools
import logging
import re
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from broker.activity import KEPT_MINUTES, Minute, merged, step_of
from broker.backends.memory.results import MemoryResults
from broker.backends.memory.upkeep import MemoryUpkeep
from broker.backends.redis import access, keys
from broker.backends.redis.connection import Connection
from broker.backends.redis.store import open_store
from broker.errors import Unavailable
from broker.model import Draft, Job, Lease, Outcome, RequestState, Timings
from broker.ports import LANDMARKS, Results, Upkeep
from broker.settings import Settings, SidecarSettings
from infra.local.servers import Redis
from tests.eventually import eventually

DB = 4
SETTINGS = Settings(result_ttl_s=60, idempotency_ttl_s=60)
OUTCOME = Outcome(status=200)
TIMINGS = Timings(cold_start_s=5.0)
# So many ends that some of them were counted together.
MANY = 100


@dataclass(frozen=True)
class Store:
    results: Results
    upkeep: Upkeep


@pytest.fixture
def redis_url(redis_server: Redis) -> str:
    return f"{redis_server.url.rpartition('/')[0]}/{DB}"


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "memory":
        results = MemoryResults(SETTINGS)
        yield Store(results, MemoryUpkeep(results))
        return
    async with open_store(request.getfixturevalue("redis_url"), SETTINGS) as opened:
        yield Store(opened.results, opened.upkeep)


@pytest.fixture
def version_id() -> str:
    return str(uuid.uuid4())


async def accept(results: Results, version_id: str, **given: float) -> Job:
    draft = Draft(
        id=str(uuid.uuid4()),
        account="acme",
        function_id="f",
        version_id=version_id,
        digest="d",
        deadline_s=given.get("deadline_s", 60.0),
        queue_timeout_s=given.get("queue_timeout_s", 0.0),
    )
    record = await results.create(draft, queue_limit=100, watch=False)
    return Job(
        id=record.id,
        account="acme",
        function_id="f",
        version_id=version_id,
        subject="key",
        created_at=record.created_at,
        deadline_at=record.deadline_at,
        digest="d",
        queue_deadline_at=record.queue_deadline_at,
    )


async def granted(results: Results, job: Job, lease_s: float = 30.0) -> Lease:
    claim = await results.claim(job, worker="w", lease_s=lease_s, max_attempts=3)
    assert claim.lease is not None
    return claim.lease


async def lately(results: Results, version_id: str) -> Minute:
    """The last two minutes as one, since the store's clock may pass from one to the next."""
    [minutes] = await results.activity([version_id], minutes=2)
    ends = dict(minutes[0].ends)
    for state, count in minutes[1].ends.items():
        ends[state] = ends.get(state, 0) + count
    return Minute(
        at=minutes[1].at,
        ends=ends,
        attempts=sum(minute.attempts for minute in minutes),
        waits=merged(minute.waits for minute in minutes),
        runs=merged(minute.runs for minute in minutes),
        cold_starts=merged(minute.cold_starts for minute in minutes),
        starts=merged(minute.starts for minute in minutes),
        leads=merged(minute.leads for minute in minutes),
    )


async def test_a_version_without_ends_has_empty_minutes_up_to_now(store: Store, version_id: str) -> None:
    epoch = await store.results.epoch(fresh=True)
    [minutes, others] = await store.results.activity([version_id, str(uuid.uuid4())], minutes=KEPT_MINUTES)
    assert len(minutes) == KEPT_MINUTES
    assert minutes[-1].at == pytest.approx(epoch.now // 60 * 60, abs=60)
    assert [later.at - minute.at for minute, later in itertools.pairwise(minutes)] == [60.0] * 1439
    assert {minute.waits.count + sum(minute.ends.values()) for minute in (*minutes, *others)} == {0}
    assert await store.results.activity([], minutes=1) == []


async def test_a_settled_request_counts_once_with_its_times(store: Store, version_id: str) -> None:
    job = await accept(store.results, version_id)
    lease = await granted(store.results, job)
    assert lease.started_at >= job.created_at
    early = replace(lease, started_at=lease.started_at - 8)
    accepted = replace(job, created_at=job.created_at - 40)
    for _ in range(2):
        if isinstance(store.results, MemoryResults):
            entry = store.results.entry(job.id)
            assert entry is not None
            entry.created_at, entry.started_at = accepted.created_at, early.started_at
        timings = Timings(cold_start_s=5.0, container_s=7.0, start_s=4.0, lead_s=1.0)
        stands = await store.results.settle(early, accepted, RequestState.FULFILLED, OUTCOME, timings)
        assert stands is RequestState.FULFILLED
    found = await lately(store.results, version_id)
    assert (found.ends, found.attempts) == ({RequestState.FULFILLED: 1}, 1)
    assert (found.waits.count, found.runs.count) == (1, 1)
    assert found.waits.sum_s == pytest.approx(32, abs=2)
    assert found.runs.sum_s == pytest.approx(8, abs=2)
    assert (found.cold_starts.counts, found.cold_starts.sum_s) == ({step_of(5): 1}, 5)
    assert (found.starts.counts, found.starts.sum_s) == ({step_of(4): 1}, 4)
    assert (found.leads.counts, found.leads.sum_s) == ({step_of(1): 1}, 1)


async def test_every_end_counts_as_what_it_is(store: Store, version_id: str) -> None:
    results = store.results
    for state in (RequestState.ERRORED, RequestState.TIMED_OUT):
        job = await accept(results, version_id)
        await results.settle(await granted(results, job), job, state, OUTCOME)
    for _ in range(2):
        job = await accept(results, version_id)
        for _ in range(2):
            await results.cancel(job.id, reason="changed my mind")
    job = await accept(results, version_id)
    for _ in range(2):
        await results.end(job, RequestState.DEAD, reason="bad", cause="rejected")
    job = await accept(results, version_id)
    await results.abandon(job.id, version_id, reason="never published")
    found = await lately(results, version_id)
    assert found.ends == {
        RequestState.ERRORED: 1,
        RequestState.TIMED_OUT: 1,
        RequestState.CANCELLED: 2,
        RequestState.DEAD: 1,
    }
    assert (found.attempts, found.waits.count, found.runs.count) == (2, 2, 2)


async def test_a_request_that_expired_counts_when_that_is_seen(store: Store, version_id: str) -> None:
    job = await accept(store.results, version_id, queue_timeout_s=0.001)

    async def state() -> RequestState | None:
        record = await store.results.read(job.id)
        return record.state if record else None

    for _ in range(2):
        await eventually(state, lambda seen: seen is RequestState.EXPIRED)
    found = await lately(store.results, version_id)
    assert (found.ends, found.waits.count) == ({RequestState.EXPIRED: 1}, 0)


async def test_attempts_that_came_to_nothing_count_with_the_one_that_ended_it(store: Store, version_id: str) -> None:
    job = await accept(store.results, version_id)
    await store.results.release(await granted(store.results, job), refund=False)
    await store.results.settle(await granted(store.results, job), job, RequestState.FULFILLED, OUTCOME)
    found = await lately(store.results, version_id)
    assert (found.ends, found.attempts, found.runs.count) == ({RequestState.FULFILLED: 1}, 2, 1)


async def test_a_message_that_comes_again_after_the_end_counts_nothing(store: Store, version_id: str) -> None:
    job = await accept(store.results, version_id, queue_timeout_s=50)
    await store.results.settle(await granted(store.results, job), job, RequestState.FULFILLED, OUTCOME)
    for _ in range(2):
        await store.results.claim(job, worker="w", lease_s=30.0, max_attempts=3)
        await store.upkeep.restore(job)
    assert (await lately(store.results, version_id)).ends == {RequestState.FULFILLED: 1}


async def test_a_request_that_was_set_aside_counts_when_it_ends(store: Store, version_id: str) -> None:
    settled, cancelled = [await accept(store.results, version_id) for _ in range(2)]
    aside = 0
    while aside < 2:  # what was accepted in the present millisecond is not yet older than that
        aside += await store.upkeep.set_aside(version_id, older_than_s=0, limit=10)
    await store.results.settle(await granted(store.results, settled), settled, RequestState.FULFILLED, OUTCOME)
    for _ in range(2):
        await store.results.cancel(cancelled.id, reason="why")
    assert (await lately(store.results, version_id)).ends == {RequestState.FULFILLED: 1, RequestState.CANCELLED: 1}


async def test_a_line_has_its_ends_and_landmarks_between(store: Store, version_id: str) -> None:
    assert (await store.results.line(version_id)).landmarks == ()
    jobs = [await accept(store.results, version_id) for _ in range(3 * LANDMARKS)]
    await granted(store.results, jobs[0])
    line = await store.results.line(version_id)
    assert (line.queued, line.running, len(line.landmarks)) == (3 * LANDMARKS - 1, 1, LANDMARKS)
    assert [line.landmarks[0][0], line.landmarks[-1][0]] == [1, line.queued]
    for rank, accepted_at in line.landmarks:
        assert accepted_at == pytest.approx(jobs[rank].created_at, abs=5)
    assert line.at >= jobs[-1].created_at


async def test_one_alone_in_a_line_is_its_landmark(store: Store, version_id: str) -> None:
    await accept(store.results, version_id)
    [(rank, _)] = (await store.results.line(version_id)).landmarks
    assert rank == 1


async def test_a_new_request_knows_its_rank(store: Store, version_id: str) -> None:
    made = [
        await store.results.create(
            Draft(id=name, account="acme", function_id="f", version_id=version_id, digest="d", deadline_s=60.0),
            queue_limit=100,
            watch=False,
        )
        for name in map(str, (uuid.uuid4(), uuid.uuid4()))
    ]
    assert [record.rank for record in made] == [1, 2]
    found = await store.results.read(made[1].id)
    assert found is not None
    assert found.rank == 0


async def test_a_minute_is_kept_for_a_day(version_id: str) -> None:
    now = [600_000.0]
    results = MemoryResults(SETTINGS, now=lambda: now[0])
    await results.cancel((await accept(results, version_id)).id, reason="why")
    now[0] += 60 * (KEPT_MINUTES - 1)
    [minutes] = await results.activity([version_id], minutes=KEPT_MINUTES)
    assert minutes[0].ends == {RequestState.CANCELLED: 1}
    now[0] += 60
    await results.cancel((await accept(results, version_id)).id, reason="why")
    [minutes] = await results.activity([version_id], minutes=KEPT_MINUTES)
    assert [bool(minute.ends) for minute in (minutes[0], minutes[-1])] == [False, True]


async def test_redis_counts_ends_together_and_forgets_them_after_a_day(redis_url: str, version_id: str) -> None:
    async with open_store(redis_url, SETTINGS) as (results, *_):
        begun = await results.epoch(fresh=True)
        for _ in range(MANY // 2):
            await results.cancel((await accept(results, version_id)).id, reason="why")
            job = await accept(results, version_id)
            await results.settle(await granted(results, job), job, RequestState.FULFILLED, OUTCOME, TIMINGS)
        [minutes] = await results.activity([version_id], minutes=10)
        over = await results.epoch(fresh=True)
        connection = Connection(redis_url, SETTINGS)
        try:
            named = [keys.minute(version_id, at) for at in range(int(begun.now // 60), int(over.now // 60) + 1)]
            hours = [keys.hour(version_id, at) for at in range(int(begun.now // 3600), int(over.now // 3600) + 1)]
            lives = await connection.run(*(("PTTL", key) for key in (*named, *hours)))
            waiting = await connection.run(*(("STRLEN", key) for key in hours))
        finally:
            await connection.close()
    assert sum(sum(minute.ends.values()) for minute in minutes) == MANY
    assert sum(minute.attempts for minute in minutes) == MANY // 2
    found = merged(minute.cold_starts for minute in minutes)
    assert (found.counts, found.sum_s) == ({step_of(5): MANY // 2}, 5 * MANY // 2)
    assert merged(minute.runs for minute in minutes).count == MANY // 2
    assert sum(waiting) < MANY * 30
    assert max(lives[: len(named)]) > 0
    assert all(life <= KEPT_MINUTES * 60_000 for life in lives[: len(named)])
    assert all(life <= (KEPT_MINUTES + 60) * 60_000 for life in lives)
    assert -1 not in lives


async def test_a_damaged_minute_fails_no_request(redis_url: str, version_id: str) -> None:
    async with open_store(redis_url, SETTINGS) as (results, *_):
        [[_, present]] = await results.activity([version_id], minutes=2)
        minutes = [keys.minute(version_id, int(present.at) // 60 + ahead) for ahead in range(3)]
        hours = [keys.hour(version_id, int(present.at) // 3600 + ahead) for ahead in range(2)]
        connection = Connection(redis_url, SETTINGS)
        try:
            await connection.run(*(("SET", key, "what") for key in minutes))
            await connection.run(*(("LPUSH", key, "what") for key in hours))
            assert (await lately(results, version_id)).ends == {}
            job = await accept(results, version_id)
            lease = await granted(results, job)
            assert await results.settle(lease, job, RequestState.FULFILLED, OUTCOME) is RequestState.FULFILLED
            job = await accept(results, version_id)
            await results.cancel(job.id, reason="why")
            assert (await lately(results, version_id)).ends.get(RequestState.CANCELLED) == 1
            for _ in range(MANY):
                await results.cancel((await accept(results, version_id)).id, reason="why")
            assert (await lately(results, version_id)).ends.get(RequestState.CANCELLED, 0) > MANY // 2
            await connection.run(*(("DEL", key) for key in (*minutes, *hours)))
        finally:
            await connection.close()


async def test_a_sidecars_user_notes_what_it_settles_and_reads_nothing(redis_server: Redis, version_id: str) -> None:
    settings = SidecarSettings.model_construct(**SETTINGS.model_dump())
    async with (
        open_store(redis_server.url_for("api", DB), SETTINGS) as (front, *_),
        open_store(redis_server.url_for("sidecar", DB), settings) as (sidecar, *_),
    ):
        for _ in range(MANY):
            job = await accept(front, version_id)
            lease = await granted(sidecar, job)
            assert await sidecar.settle(lease, job, RequestState.FULFILLED, OUTCOME) is RequestState.FULFILLED
        [minutes] = await front.activity([version_id], minutes=10)
        assert sum(minute.runs.count for minute in minutes) == MANY
        with pytest.raises(Unavailable):
            await sidecar.line(version_id)
        assert (await lately(sidecar, version_id)).ends == {}


async def test_a_user_that_may_not_note_ends_fails_no_request(
    redis_server: Redis, version_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As with the rules of a release that knew of no such lines."""
    caplog.set_level(logging.ERROR)
    rules = access.SIDECAR.replace(" (+append +del +getdel +pexpire ~fnq:{*}:e:*)", "")
    assert rules != access.SIDECAR
    settings = SidecarSettings.model_construct(**SETTINGS.model_dump())
    operator = Connection(redis_server.url_for("operator", DB), SETTINGS)
    try:
        await operator.run(("ACL", "SETUSER", "older", "on", ">older", *_parts(rules)))
        url = redis_server.url_for("sidecar", DB)
        older = f"redis://older:older@{url.rpartition('@')[2]}"
        async with (
            open_store(redis_server.url_for("api", DB), SETTINGS) as (front, *_),
            open_store(older, settings) as (sidecar, *_),
        ):
            job = await accept(front, version_id)
            lease = await granted(sidecar, job)
            assert await sidecar.settle(lease, job, RequestState.FULFILLED, OUTCOME) is RequestState.FULFILLED
            assert "store_refused" not in caplog.text
            assert (await front.load([version_id]))[0].running == 0
            assert (await lately(front, version_id)).ends == {}
    finally:
        await operator.run(("ACL", "DELUSER", "older"))
        await operator.close()


def _parts(rules: str) -> list[str]:
    """A selector is one part."""
    return re.findall(r"\([^)]*\)|\S+", rules)
