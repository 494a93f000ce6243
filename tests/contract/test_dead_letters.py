"""What a DeadLetters back end promises, and the verbs over it, on memory and on a real Redis."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from broker.backends.memory.dead_letters import MemoryDeadLetters
from broker.backends.memory.results import MemoryResults
from broker.backends.redis.store import open_store
from broker.model import DeadCause, DeadLetterFilter, Draft, Job, RequestState
from broker.ports import DeadLetters, Results
from broker.settings import Settings
from infra.local.servers import Redis
from tests.eventually import eventually

DB = 15
KEPT = 12
SETTINGS = Settings(dead_letters_kept=KEPT, max_worker_deaths=2, result_ttl_s=60, idempotency_ttl_s=60)
ALL = DeadLetterFilter()
LEASE_S = 0.001


@dataclass(frozen=True)
class Store:
    results: Results
    letters: DeadLetters


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "memory":
        results = MemoryResults(SETTINGS)
        yield Store(results, MemoryDeadLetters(results, SETTINGS))
        return
    server: Redis = request.getfixturevalue("redis_server")
    async with open_store(f"{server.url.rpartition('/')[0]}/{DB}", SETTINGS) as opened:
        yield Store(opened.results, opened.dead_letters)


@pytest.fixture
def account() -> str:
    return f"acme-{uuid.uuid4()}"


async def accept(store: Store, account: str, **given: str) -> Job:
    draft = Draft(
        id=str(uuid.uuid4()),
        account=account,
        function_id=given.get("function_id", "f"),
        version_id=given.get("version_id", str(uuid.uuid4())),
        digest="d",
        deadline_s=60.0,
    )
    record = await store.results.create(draft, queue_limit=100_000, watch=False)
    return Job(
        id=record.id,
        account=account,
        function_id=record.function_id,
        version_id=record.version_id,
        subject="key",
        created_at=record.created_at,
        deadline_at=record.deadline_at,
        digest="d",
        headers=(("Content-Type", "text/plain"),),
        body=b"\x00input\xff",
        assets=(str(uuid.uuid4()), str(uuid.uuid4())),
    )


async def die(store: Store, account: str, cause: str = DeadCause.REJECTED, **given: str) -> Job:
    """A dead request whose letter is kept."""
    job = await accept(store, account, **given)
    await store.results.end(job, RequestState.DEAD, reason="why", cause=cause)
    assert await store.letters.keep(job, size_bytes=len(job.body))
    return job


async def ids(store: Store, account: str, wanted: DeadLetterFilter = ALL) -> list[str]:
    return [letter.id for letter in (await store.letters.page(account, wanted, limit=200)).letters]


# -- causes ------------------------------------------------------------------------------------


async def test_a_request_that_loses_its_workers_says_that_they_died(store: Store, account: str) -> None:
    job = await accept(store, account)

    async def claimed() -> RequestState:
        return (await store.results.claim(job, worker="w", lease_s=LEASE_S, max_attempts=3)).state

    await eventually(claimed, lambda state: state is RequestState.DEAD)
    record = await store.results.read(job.id)
    assert record is not None
    assert (record.cause, record.attempt) == (DeadCause.WORKER_DEATHS, 2)


async def test_a_request_whose_container_is_lost_each_time_says_that_its_attempts_are_used_up(
    store: Store, account: str
) -> None:
    job = await accept(store, account)
    for _ in range(3):
        claim = await store.results.claim(job, worker="w", lease_s=60, max_attempts=3)
        assert claim.lease is not None
        await store.results.release(claim.lease, refund=False)
    await store.results.claim(job, worker="w", lease_s=60, max_attempts=3)
    record = await store.results.glance(job.id)
    assert record is not None
    assert record.cause == DeadCause.ATTEMPTS


async def test_who_ends_a_request_says_why_and_the_first_one_is_believed(store: Store, account: str) -> None:
    job = await accept(store, account)
    await store.results.end(job, RequestState.DEAD, reason="full", cause=DeadCause.QUEUE_FULL)
    await store.results.end(job, RequestState.DEAD, reason="refused", cause=DeadCause.REJECTED)
    record = await store.results.glance(job.id)
    assert record is not None
    assert (record.cause, record.reason) == (DeadCause.QUEUE_FULL, "full")


async def test_only_the_dead_have_a_cause(store: Store, account: str) -> None:
    job = await accept(store, account)
    await store.results.cancel(job.id, reason="enough")
    record = await store.results.glance(job.id)
    assert record is not None
    assert record.cause == ""


# -- keeping and reading -----------------------------------------------------------------------


async def test_what_is_kept_is_read_again_with_all_of_its_input(store: Store, account: str) -> None:
    job = await die(store, account)
    letter = await store.letters.read(job.id)
    assert letter is not None
    assert letter.job == job
    assert (letter.cause, letter.reason, letter.size_bytes) == (DeadCause.REJECTED, "why", len(job.body))
    assert letter.kept_until == pytest.approx(letter.died_at + SETTINGS.dead_letter_ttl_s, abs=30)
    assert await store.letters.glance(job.id) == replace(letter, job=None)


async def test_only_a_dead_request_is_kept(store: Store, account: str) -> None:
    job = await accept(store, account)
    assert not await store.letters.keep(job, size_bytes=0)
    await store.results.cancel(job.id, reason="enough")
    assert not await store.letters.keep(job, size_bytes=0)
    assert await ids(store, account) == []


async def test_keeping_twice_keeps_one(store: Store, account: str) -> None:
    job = await die(store, account)
    assert await store.letters.keep(job, size_bytes=0)
    assert await ids(store, account) == [job.id]


async def test_what_was_dropped_is_not_kept_again(store: Store, account: str) -> None:
    job = await die(store, account)
    dropped = await store.letters.drop(account, job.id)
    assert dropped is not None
    assert dropped.id == job.id
    assert await store.letters.drop(account, job.id) is None
    assert not await store.letters.keep(job, size_bytes=0)  # another copy of its message
    assert await store.letters.read(job.id) is None
    assert await ids(store, account) == []
    record = await store.results.read(job.id)
    assert record is not None
    assert record.state is RequestState.DEAD


async def test_the_unknown_is_none(store: Store, account: str) -> None:
    unknown = str(uuid.uuid4())
    assert await store.letters.read(unknown) is None
    assert await store.letters.glance(unknown) is None
    assert await store.letters.bind(unknown, "x") is None
    await store.letters.unbind(unknown, "x")
    await store.letters.redriven(unknown, "x")
    assert await store.letters.read(unknown) is None


# -- lists -------------------------------------------------------------------------------------


async def test_pages_show_each_once_the_latest_first(store: Store, account: str) -> None:
    jobs = [await die(store, account) for _ in range(7)]
    await die(store, f"{account}-other")
    seen, after = [], 0
    while True:
        page = await store.letters.page(account, ALL, limit=3, after=after)
        seen += [letter.id for letter in page.letters]
        assert all(letter.job is None for letter in page.letters)
        after = page.after
        if not after:
            break
    assert sorted(seen) == sorted(job.id for job in jobs)
    died = {letter.id: letter.died_at for letter in (await store.letters.page(account, ALL, limit=10)).letters}
    assert [died[each] for each in seen] == sorted(died.values(), reverse=True)


async def test_a_filter_asks_for_version_cause_and_time(store: Store, account: str) -> None:
    old = await die(store, account, DeadCause.ATTEMPTS, version_id="v1")
    await asyncio.sleep(0.002)  # the store's clock tells milliseconds
    new = await die(store, account, DeadCause.REJECTED, version_id="v2", function_id="g")
    letter = await store.letters.glance(new.id)
    assert letter is not None
    assert await ids(store, account, DeadLetterFilter(version_id="v1")) == [old.id]
    assert await ids(store, account, DeadLetterFilter(function_id="g")) == [new.id]
    assert await ids(store, account, DeadLetterFilter(causes=frozenset({DeadCause.ATTEMPTS}))) == [old.id]
    assert await ids(store, account, DeadLetterFilter(since=letter.died_at)) == [new.id]
    assert await ids(store, account, DeadLetterFilter(until=letter.died_at)) == [old.id]


async def test_a_tally_counts_by_version_and_cause(store: Store, account: str) -> None:
    for cause, version_id in ((DeadCause.ATTEMPTS, "v1"), (DeadCause.REJECTED, "v1"), (DeadCause.ATTEMPTS, "v1")):
        await die(store, account, cause, version_id=version_id)
    tallies = await store.letters.tally(account, ALL)
    assert [(tally.version_id, tally.cause, tally.count) for tally in tallies] == [
        ("v1", DeadCause.ATTEMPTS, 2),
        ("v1", DeadCause.REJECTED, 1),
    ]
    assert tallies[0].first_at <= tallies[0].last_at
    [one] = await store.letters.tally(account, DeadLetterFilter(causes=frozenset({DeadCause.REJECTED})))
    assert one.count == 1


async def test_the_oldest_make_way(store: Store, account: str) -> None:
    jobs = [await die(store, account) for _ in range(KEPT)]
    newest = await die(store, account)
    assert sum(tally.count for tally in await store.letters.tally(account, ALL)) == KEPT
    gone = [job.id for job in jobs if await store.letters.read(job.id) is None]
    assert len(gone) == 1
    assert await store.letters.read(newest.id) is not None


# -- starting again ----------------------------------------------------------------------------

ONE, TWO, THREE, ANOTHER = (str(uuid.uuid4()) for _ in range(4))


async def test_a_redrive_keeps_the_id_that_was_settled_first(store: Store, account: str) -> None:
    job = await die(store, account)
    first = await store.letters.bind(job.id, ONE)
    assert first is not None
    assert (first.id, first.done) == (ONE, False)
    again = await store.letters.bind(job.id, TWO)
    assert again is not None
    assert (again.id, again.done) == (ONE, False)
    await store.letters.redriven(job.id, ONE)
    done = await store.letters.bind(job.id, THREE)
    assert done is not None
    assert (done.id, done.done) == (ONE, True)


async def test_record_and_letter_name_the_request_that_was_made(store: Store, account: str) -> None:
    job = await die(store, account)
    await store.letters.bind(job.id, ONE)
    assert await ids(store, account, DeadLetterFilter(redriven=False)) == [job.id]
    await store.letters.redriven(job.id, ONE)
    record, letter = await store.results.read(job.id), await store.letters.glance(job.id)
    assert record is not None
    assert (record.state, record.redriven_as) == (RequestState.DEAD, ONE)
    assert letter is not None
    assert letter.redriven_as == ONE
    assert letter.redriven_at >= letter.died_at
    assert await ids(store, account, DeadLetterFilter(redriven=False)) == []
    assert await ids(store, account, DeadLetterFilter(redriven=True)) == [job.id]


async def test_an_id_that_came_to_nothing_is_forgotten(store: Store, account: str) -> None:
    job = await die(store, account)
    await store.letters.bind(job.id, ONE)
    await store.letters.unbind(job.id, ANOTHER)
    await store.letters.unbind(job.id, ONE)
    bound = await store.letters.bind(job.id, TWO)
    assert bound is not None
    assert bound.id == TWO


async def test_once_more_needs_the_last_one_named(store: Store, account: str) -> None:
    job = await die(store, account)
    await store.letters.bind(job.id, ONE)
    await store.letters.redriven(job.id, ONE)
    for candidate in (TWO, THREE):  # asked twice, settled once
        bound = await store.letters.bind(job.id, candidate, after=ONE)
        assert bound is not None
        assert (bound.id, bound.done) == (TWO, False)
