"""What a Results back end keeps of a request beside its result: its limits, its attempts, and its account's list."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from broker.backends.memory.results import MemoryResults
from broker.backends.redis.store import open_store
from broker.errors import QueueFull
from broker.model import (
    MOST_ATTEMPTS_KEPT,
    AttemptEnd,
    Draft,
    Job,
    Lease,
    Outcome,
    Record,
    RequestFilter,
    RequestPage,
    RequestState,
    Timings,
    Verdict,
)
from broker.ports import PAGE_SCAN, Results
from broker.settings import Settings
from infra.local.servers import Redis
from tests.contract.records import job_of
from tests.eventually import eventually

OUTCOME = Outcome(status=201, body=b"done")
TIMINGS = Timings(cold_start_s=1.5, inputs_s=0.002, container_s=12.345, upload_s=0.25)
LISTED = 1200
ALL = RequestFilter()


@pytest.fixture(params=["memory", "redis"])
async def results(request: pytest.FixtureRequest) -> AsyncIterator[Results]:
    settings = Settings(listed_requests=LISTED)
    if request.param == "memory":
        yield MemoryResults(settings)
        return
    server: Redis = request.getfixturevalue("redis_server")
    async with open_store(server.url, settings) as (opened, *_):
        yield opened


def make_draft(**given: object) -> Draft:
    plain = Draft(
        id=str(uuid.uuid4()),
        account=f"acme-{uuid.uuid4()}",
        function_id=str(uuid.uuid4()),
        version_id=str(uuid.uuid4()),
        digest="d",
        deadline_s=60.0,
    )
    return replace(plain, **given)  # type: ignore[arg-type]  # whatever a test gives is a field of the right type


async def accept(results: Results, draft: Draft) -> Job:
    return job_of(await results.create(draft, queue_limit=100_000, watch=False))


async def granted(results: Results, job: Job, *, worker: str = "w1", lease_s: float = 30.0) -> Lease:
    claim = await results.claim(job, worker=worker, lease_s=lease_s, max_attempts=3)
    assert claim.lease is not None, claim
    return claim.lease


async def seen(results: Results, job: Job) -> Record:
    record = await results.glance(job.id)
    assert record is not None
    return record


async def overdue(results: Results, job: Job) -> Record:
    """The record once its queue deadline has passed, which nobody announces."""
    return await eventually(lambda: seen(results, job), lambda record: record.state is RequestState.EXPIRED)


def ends(record: Record) -> list[tuple[int, str, AttemptEnd]]:
    return [(each.number, each.worker, each.end) for each in record.attempts]


# -- limits ------------------------------------------------------------------------------------


async def test_a_record_tells_its_limits(results: Results) -> None:
    draft = make_draft(queue_timeout_s=5, run_timeout_s=2.5)
    created = await results.create(draft, queue_limit=10, watch=False)
    assert created == await results.read(draft.id)
    assert created.queue_deadline_at - created.created_at == pytest.approx(5, abs=0.001)
    assert created.run_timeout_s == 2.5
    plain = await results.create(make_draft(), queue_limit=10, watch=False)
    assert (plain.queue_deadline_at, plain.run_timeout_s, plain.due_at) == (0, 0, plain.deadline_at)


async def test_what_no_worker_took_in_time_expires_and_says_which_limit_it_missed(results: Results) -> None:
    job = await accept(results, make_draft(queue_timeout_s=0.05))
    record = await overdue(results, job)
    assert record.overslept
    assert "queue timeout" in record.reason
    assert record.attempts == ()
    assert (await results.load([job.version_id]))[0].queued == 0


async def test_what_missed_its_deadline_did_not_miss_its_queue_timeout(results: Results) -> None:
    job = await accept(results, make_draft(deadline_s=0.05, queue_timeout_s=30))
    record = await overdue(results, job)
    assert not record.overslept
    assert "deadline" in record.reason


async def test_no_attempt_starts_after_the_queue_timeout(results: Results) -> None:
    job = await accept(results, make_draft(queue_timeout_s=0.05))
    await asyncio.sleep(0.1)
    claim = await results.claim(job, worker="w1", lease_s=30, max_attempts=3)
    assert (claim.verdict, claim.state) == (Verdict.SETTLED, RequestState.EXPIRED)


async def test_a_request_that_started_in_time_has_met_its_queue_timeout(results: Results) -> None:
    job = await accept(results, make_draft(queue_timeout_s=2))
    lease = await granted(results, job)
    await asyncio.sleep(2.1)
    assert (await seen(results, job)).state is RequestState.RUNNING
    await results.release(lease, refund=False)
    assert (await seen(results, job)).state is RequestState.QUEUED
    assert (await granted(results, job)).attempt == 2


async def test_an_attempt_that_never_began_does_not_meet_the_queue_timeout(results: Results) -> None:
    job = await accept(results, make_draft(queue_timeout_s=2))
    await results.release(await granted(results, job), refund=True)
    assert (await overdue(results, job)).overslept


async def test_limits_survive_the_loss_of_a_record(results: Results) -> None:
    known = await accept(results, make_draft(queue_timeout_s=30, run_timeout_s=7))
    lost = replace(known, id=str(uuid.uuid4()))
    await granted(results, lost)
    record = await seen(results, lost)
    assert (record.queue_deadline_at, record.run_timeout_s) == (known.queue_deadline_at, 7)


async def test_a_lost_request_that_is_overdue_never_starts(results: Results) -> None:
    known = await accept(results, make_draft(queue_timeout_s=0.05))
    lost = replace(known, id=str(uuid.uuid4()))
    await asyncio.sleep(0.1)
    assert (await results.claim(lost, worker="w1", lease_s=30, max_attempts=3)).state is RequestState.EXPIRED


async def test_sweep_ends_what_missed_its_queue_timeout_however_far_back_it_stands(results: Results) -> None:
    version_id = str(uuid.uuid4())
    patient = [await accept(results, make_draft(version_id=version_id)) for _ in range(5)]
    hasty = [await accept(results, make_draft(version_id=version_id, queue_timeout_s=0.05)) for _ in range(3)]
    await asyncio.sleep(0.1)
    assert await results.sweep(version_id, limit=4) == 3
    assert (await results.load([version_id]))[0].queued == 5
    assert {(await seen(results, job)).state for job in hasty} == {RequestState.EXPIRED}
    assert {(await seen(results, job)).state for job in patient} == {RequestState.QUEUED}
    assert await results.sweep(version_id, limit=4) == 0


async def test_a_waiting_caller_hears_that_nobody_took_it(results: Results) -> None:
    draft = make_draft(queue_timeout_s=0.05)
    async with results.watch(draft.id) as watch:
        job = job_of(await results.create(draft, queue_limit=10, watch=True))
        heard = asyncio.create_task(watch.changed(30))
        await overdue(results, job)
        await asyncio.wait_for(heard, 20)


# -- attempts ----------------------------------------------------------------------------------


async def test_an_attempt_is_on_the_record_while_it_runs_and_when_it_is_over(results: Results) -> None:
    job = await accept(results, make_draft())
    assert (await seen(results, job)).attempts == ()
    lease = await granted(results, job)
    [running] = (await seen(results, job)).attempts
    assert (running.number, running.worker, running.end, running.ended_at) == (1, "w1", AttemptEnd.RUNNING, 0)
    await results.settle(lease, job, RequestState.FULFILLED, OUTCOME, TIMINGS)
    record = await seen(results, job)
    [done] = record.attempts
    assert done == replace(running, end=AttemptEnd.FULFILLED, ended_at=record.finished_at)
    assert (record.status_code, record.timings, record.outcome) == (201, TIMINGS, None)
    whole = await results.read(job.id)
    assert whole == replace(record, outcome=OUTCOME)


async def test_every_attempt_is_told_with_its_worker_and_its_end(results: Results) -> None:
    job = await accept(results, make_draft())
    await results.release(await granted(results, job, worker="a"), refund=True)
    await results.release(await granted(results, job, worker="b,\n 'ü'"), refund=False, reason='it said "ü"')
    await granted(results, job, worker="c", lease_s=0.05)
    await asyncio.sleep(0.1)
    lease = await granted(results, job, worker="d")
    await results.settle(lease, job, RequestState.TIMED_OUT, OUTCOME)
    record = await seen(results, job)
    assert ends(record) == [
        (1, "a", AttemptEnd.RETURNED),
        (1, "b,\n 'ü'", AttemptEnd.FAILED),
        (2, "c", AttemptEnd.LOST),
        (3, "d", AttemptEnd.TIMED_OUT),
    ]
    assert [each.reason for each in record.attempts] == ["", 'it said "ü"', "", ""]
    assert (record.state, record.state.terminal) == (RequestState.TIMED_OUT, True)
    times = [at for each in record.attempts for at in (each.started_at, each.ended_at)]
    assert times == sorted(times)


async def test_the_last_attempt_of_a_dead_request_was_lost(results: Results) -> None:
    job = await accept(results, make_draft())
    for worker in ("a", "b"):
        await granted(results, job, worker=worker, lease_s=0.02)
        await asyncio.sleep(0.05)
    claim = await results.claim(job, worker="d", lease_s=30, max_attempts=3)
    assert claim.state is RequestState.DEAD
    record = await seen(results, job)
    assert ends(record) == [(number, name, AttemptEnd.LOST) for number, name in enumerate("ab", start=1)]
    assert record.worker == ""


async def test_a_cancelled_attempt_ends_cancelled(results: Results) -> None:
    job = await accept(results, make_draft())
    await granted(results, job)
    await results.cancel(job.id, reason="enough")
    assert ends(await seen(results, job)) == [(1, "w1", AttemptEnd.CANCELLED)]


async def test_attempts_that_cost_nothing_do_not_fill_the_record(results: Results) -> None:
    job = await accept(results, make_draft())
    for number in range(MOST_ATTEMPTS_KEPT + 5):
        await results.release(await granted(results, job, worker=str(number)), refund=True)
    attempts = (await seen(results, job)).attempts
    assert [each.worker for each in attempts] == [str(number) for number in range(5, MOST_ATTEMPTS_KEPT + 5)]


# -- the list of an account --------------------------------------------------------------------


async def pages(results: Results, account: str, wanted: RequestFilter, *, limit: int) -> list[RequestPage]:
    found = [await results.page(account, wanted, limit=limit)]
    while found[-1].after:
        found.append(await results.page(account, wanted, limit=limit, after=found[-1].after))
    return found


async def listed(results: Results, account: str, wanted: RequestFilter = ALL, *, limit: int = 100) -> list[str]:
    return [record.id for page in await pages(results, account, wanted, limit=limit) for record in page.records]


async def test_an_accounts_requests_are_listed_newest_first_page_by_page(results: Results) -> None:
    account = f"acme-{uuid.uuid4()}"
    jobs = [await accept(results, make_draft(account=account)) for _ in range(7)]
    await accept(results, make_draft())
    newest_first = [job.id for job in reversed(jobs)]
    assert await listed(results, account) == newest_first
    cut = await pages(results, account, ALL, limit=3)
    assert [[record.id for record in page.records] for page in cut[:3]] == [
        newest_first[:3],
        newest_first[3:6],
        newest_first[6:],
    ]
    assert await listed(results, f"nobody-{uuid.uuid4()}") == []


async def test_pages_do_not_shift_when_requests_come_in_between(results: Results) -> None:
    account = f"acme-{uuid.uuid4()}"
    jobs = [await accept(results, make_draft(account=account)) for _ in range(4)]
    first = await results.page(account, ALL, limit=2)
    await accept(results, make_draft(account=account))
    second = await results.page(account, ALL, limit=2, after=first.after)
    assert [record.id for record in (*first.records, *second.records)] == [job.id for job in reversed(jobs)]


async def test_requests_accepted_at_once_are_listed_once_each(results: Results) -> None:
    account = f"acme-{uuid.uuid4()}"
    drafts = [make_draft(account=account) for _ in range(300)]
    await asyncio.gather(*(accept(results, draft) for draft in drafts))
    found = await listed(results, account, limit=7)
    assert sorted(found) == sorted(draft.id for draft in drafts)


async def test_a_listed_record_is_as_it_is_read_but_for_its_outcome(results: Results) -> None:
    draft = make_draft()
    job = await accept(results, draft)
    await results.settle(await granted(results, job), job, RequestState.FULFILLED, OUTCOME, TIMINGS)
    [record] = (await results.page(draft.account, ALL, limit=10)).records
    whole = await results.read(job.id)
    assert whole is not None
    assert record == replace(whole, outcome=None)


async def test_the_list_can_be_narrowed(results: Results) -> None:
    account, function_id, version_id = f"acme-{uuid.uuid4()}", str(uuid.uuid4()), str(uuid.uuid4())
    ours = await accept(results, make_draft(account=account, function_id=function_id, version_id=version_id))
    sibling = await accept(results, make_draft(account=account, function_id=function_id))
    other = await accept(results, make_draft(account=account))
    await results.cancel(other.id, reason="")

    async def found(**given: object) -> list[str]:
        wanted = replace(ALL, **given)  # type: ignore[arg-type]  # fields of RequestFilter
        return await listed(results, account, wanted)

    assert await found(function_id=function_id) == [sibling.id, ours.id]
    assert await found(version_id=version_id) == [ours.id]
    assert await found(states=frozenset({RequestState.CANCELLED, RequestState.DEAD})) == [other.id]
    assert await found(states=frozenset({RequestState.RUNNING})) == []


async def test_the_list_can_be_of_a_time(results: Results) -> None:
    account = f"acme-{uuid.uuid4()}"
    jobs = []
    for _ in range(3):
        jobs.append(await accept(results, make_draft(account=account)))
        await asyncio.sleep(0.005)
    middle, last = jobs[1].created_at, jobs[2].created_at

    async def found(since: float, until: float) -> list[str]:
        return await listed(results, account, RequestFilter(since=since, until=until))

    assert await found(middle, 0) == [jobs[2].id, jobs[1].id]
    assert await found(0, middle) == [jobs[0].id]
    assert await found(middle, last) == [jobs[1].id]
    assert await found(last + 3600, 0) == []


async def test_an_overdue_request_is_listed_as_expired(results: Results) -> None:
    draft = make_draft(queue_timeout_s=0.05)
    await accept(results, draft)
    await asyncio.sleep(0.1)
    [record] = (await results.page(draft.account, ALL, limit=10)).records
    assert record.state is RequestState.EXPIRED


async def test_what_was_refused_is_not_listed(results: Results) -> None:
    account, version_id = f"acme-{uuid.uuid4()}", str(uuid.uuid4())
    job = await accept(results, make_draft(account=account, version_id=version_id))
    with pytest.raises(QueueFull):
        await results.create(make_draft(account=account, version_id=version_id), queue_limit=1, watch=False)
    abandoned = await accept(results, make_draft(account=account))
    await results.abandon(abandoned.id, abandoned.version_id, reason="unconfirmed")
    assert await listed(results, account) == [job.id]


async def test_submitting_again_does_not_move_a_request_in_the_list(results: Results) -> None:
    account = f"acme-{uuid.uuid4()}"
    draft = make_draft(account=account)
    first = await accept(results, draft)
    second = await accept(results, make_draft(account=account))
    await accept(results, draft)
    assert await listed(results, account) == [second.id, first.id]


async def test_a_rebuilt_request_is_listed_where_it_was(results: Results) -> None:
    account = f"acme-{uuid.uuid4()}"
    known = await accept(results, make_draft(account=account))
    lost = replace(known, id=str(uuid.uuid4()), created_at=known.created_at - 10)
    await granted(results, lost)
    assert await listed(results, account) == [known.id, lost.id]


async def test_a_page_looks_at_so_many_and_the_next_one_goes_on(results: Results) -> None:
    account, rare = f"acme-{uuid.uuid4()}", str(uuid.uuid4())
    first = await accept(results, make_draft(account=account, function_id=rare))
    await asyncio.gather(*(accept(results, make_draft(account=account)) for _ in range(PAGE_SCAN)))
    found = await pages(results, account, RequestFilter(function_id=rare), limit=10)
    assert [[record.id for record in page.records] for page in found] == [[], [first.id]]


async def test_the_list_holds_the_newest_of_an_account(results: Results) -> None:
    account = f"acme-{uuid.uuid4()}"
    first = await accept(results, make_draft(account=account))
    await asyncio.gather(*(accept(results, make_draft(account=account)) for _ in range(LISTED)))
    found = await listed(results, account, limit=500)
    assert len(found) == LISTED
    assert first.id not in found
    assert (await seen(results, first)).state is RequestState.QUEUED


async def test_a_forgotten_result_leaves_the_list(results: Results) -> None:
    draft = make_draft()
    job = await accept(results, draft)
    await results.cancel(job.id, reason="")
    await results.forget(job.id)
    assert await listed(results, draft.account) == []
