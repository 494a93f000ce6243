"""One suite for every Results back end."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest

from broker.backends.memory.results import MemoryResults
from broker.backends.redis.connection import Connection
from broker.backends.redis.results import RedisResults
from broker.backends.redis.scripts import READ
from broker.backends.redis.store import open_store
from broker.backends.redis.wire import Question, Wire
from broker.errors import IdempotencyKeyReused, QueueFull, StoreUnavailable
from broker.model import (
    AttemptEnd,
    Claim,
    Draft,
    Interest,
    Job,
    Lease,
    Outcome,
    Position,
    Progress,
    RequestState,
    Timings,
    Verdict,
)
from broker.ports import FURTHEST, Results
from broker.settings import Settings
from infra.local.servers import Redis
from tests.eventually import eventually

FULFILLED = RequestState.FULFILLED
OUTCOME = Outcome(status=200, headers=(("Content-Type", "application/json"), ("X-Ünicode", "é")), body=b"\x00\nbytes")


@pytest.fixture(params=["memory", "redis"])
async def results(request: pytest.FixtureRequest) -> AsyncIterator[Results]:
    settings = Settings()
    if request.param == "memory":
        yield MemoryResults(settings)
        return
    server: Redis = request.getfixturevalue("redis_server")
    async with open_store(server.url, settings) as (opened, *_):
        yield opened


@pytest.fixture
def version_id() -> str:
    return str(uuid.uuid4())


def make_draft(version_id: str, *, deadline_s: float = 60.0) -> Draft:
    return Draft(
        id=str(uuid.uuid4()),
        account="acme",
        function_id=str(uuid.uuid4()),
        version_id=version_id,
        digest="d" * 64,
        deadline_s=deadline_s,
    )


async def accept(results: Results, version_id: str, *, deadline_s: float = 60.0) -> Job:
    draft = make_draft(version_id, deadline_s=deadline_s)
    record = await results.create(draft, queue_limit=2000, watch=False)
    return Job(
        id=record.id,
        account=record.account,
        function_id=record.function_id,
        version_id=record.version_id,
        subject="key",
        created_at=record.created_at,
        deadline_at=record.deadline_at,
        digest=draft.digest,
    )


async def claim(
    results: Results, job: Job, *, worker: str = "w1", lease_s: float = 30.0, max_attempts: int = 3
) -> Claim:
    return await results.claim(job, worker=worker, lease_s=lease_s, max_attempts=max_attempts)


async def granted(results: Results, job: Job, *, lease_s: float = 30.0) -> Lease:
    claimed = await claim(results, job, lease_s=lease_s)
    assert claimed.verdict is Verdict.GRANTED
    assert claimed.lease is not None
    return claimed.lease


async def state_of(results: Results, job: Job) -> RequestState | None:
    record = await results.read(job.id)
    return record.state if record else None


async def test_a_created_record_reads_queued_with_its_deadline(results: Results, version_id: str) -> None:
    draft = make_draft(version_id, deadline_s=60)
    created = await results.create(draft, queue_limit=10, watch=False)
    record = await results.read(draft.id)
    assert record == created
    assert record.state is RequestState.QUEUED
    assert record.deadline_at - record.created_at == pytest.approx(60, abs=0.01)
    assert (record.account, record.function_id, record.version_id) == ("acme", draft.function_id, version_id)


@pytest.mark.parametrize("interest", Interest)
@pytest.mark.parametrize("end", [*(state for state in RequestState if state.terminal)])
async def test_who_was_told_of_the_end_reads_what_everybody_reads(
    results: Results, version_id: str, end: RequestState, interest: Interest
) -> None:
    job = await accept(results, version_id)
    async with results.watch(job.id, interest) as watch:
        await watch.read()
        if end in (RequestState.FULFILLED, RequestState.ERRORED):
            outcome = Outcome(status=200, headers=(("a", "b"),), body=b"done")
            await results.settle(await granted(results, job), job, end, outcome, Timings(container_s=0.5))
        elif end is RequestState.CANCELLED:
            await results.cancel(job.id, reason="of no use any more")
        elif end is RequestState.ABANDONED:
            await results.abandon(job.id, version_id, reason="not published")
        else:
            await results.end(job, end, reason="over", cause="rejected" if end is RequestState.DEAD else "")
        await watch.changed(30)
        told = await watch.read()
        assert told is not None
        assert (told.state, told) == (end, await results.read(job.id))


async def test_an_unknown_id_has_no_record(results: Results) -> None:
    assert await results.read(str(uuid.uuid4())) is None


async def test_creating_twice_returns_the_first_record(results: Results, version_id: str) -> None:
    draft = make_draft(version_id)
    first = await results.create(draft, queue_limit=10, watch=False)
    second = await results.create(replace(draft, deadline_s=5), queue_limit=10, watch=False)
    assert second == first
    assert (await results.load([version_id]))[0].queued == 1


async def test_a_full_queue_refuses_and_leaves_nothing_behind(results: Results, version_id: str) -> None:
    drafts = [make_draft(version_id) for _ in range(50)]
    answers = await asyncio.gather(
        *(results.create(draft, queue_limit=10, watch=False) for draft in drafts), return_exceptions=True
    )
    refused = [draft for draft, answer in zip(drafts, answers, strict=True) if isinstance(answer, QueueFull)]
    assert len(refused) == 40
    assert [await results.read(draft.id) for draft in refused] == [None] * 40
    assert (await results.load([version_id]))[0].queued == 10


async def test_an_existing_request_is_returned_although_the_queue_is_full(results: Results, version_id: str) -> None:
    draft = make_draft(version_id)
    first = await results.create(draft, queue_limit=1, watch=False)
    assert await results.create(draft, queue_limit=1, watch=False) == first


async def test_a_result_is_readable_again_and_again(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    lease = await granted(results, job)
    assert await results.settle(lease, job, FULFILLED, OUTCOME) is FULFILLED
    for _ in range(3):
        record = await results.read(job.id)
        assert record is not None
        assert (record.state, record.outcome, record.attempt, record.worker) == (FULFILLED, OUTCOME, 1, "w1")
        assert record.created_at <= record.started_at <= record.finished_at


async def test_first_terminal_record_wins(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    lease = await granted(results, job)
    await results.settle(lease, job, FULFILLED, OUTCOME)
    late = Outcome(status=500, body=b"late")
    assert await results.settle(lease, job, RequestState.ERRORED, late) is FULFILLED
    assert await results.cancel(job.id, reason="too late") is FULFILLED
    assert (await results.end(job, RequestState.DEAD, reason="too late")).state is FULFILLED
    record = await results.read(job.id)
    assert record is not None
    assert record.outcome == OUTCOME


async def test_a_claim_is_granted_once_while_its_lease_lives(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    claims = await asyncio.gather(*(claim(results, job, worker=f"w{n}") for n in range(10)))
    assert sorted(claimed.verdict for claimed in claims) == [Verdict.GRANTED] + [Verdict.HELD] * 9
    assert all(0 < claimed.wait_s <= 30 for claimed in claims if claimed.verdict is Verdict.HELD)


async def test_a_grant_says_what_is_left_until_the_deadline(results: Results, version_id: str) -> None:
    job = await accept(results, version_id, deadline_s=60)
    assert (await claim(results, job)).remaining_s == pytest.approx(60, abs=5)


async def test_a_lapsed_lease_is_granted_again_and_its_old_holder_loses(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    old = await granted(results, job, lease_s=0.1)
    again = await eventually(lambda: claim(results, job), lambda claimed: claimed.verdict is Verdict.GRANTED)
    assert again.lease is not None
    assert again.lease.attempt == 2
    assert await results.renew(old, lease_s=30) is not RequestState.RUNNING
    assert await results.settle(old, job, FULFILLED, OUTCOME) is RequestState.RUNNING
    assert await results.settle(again.lease, job, FULFILLED, OUTCOME) is FULFILLED


async def test_a_renewed_lease_does_not_lapse(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    lease = await granted(results, job, lease_s=10)
    assert await results.renew(lease, lease_s=30) is RequestState.RUNNING
    held = await claim(results, job)
    assert held.verdict is Verdict.HELD
    assert held.wait_s > 20


async def test_attempts_past_the_last_leave_the_request_dead(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    for attempt in (1, 2):
        lease = await granted(results, job)
        assert lease.attempt == attempt
        assert await results.release(lease, refund=False) is RequestState.QUEUED
    claimed = await claim(results, job, max_attempts=2)
    assert (claimed.verdict, claimed.state) == (Verdict.SETTLED, RequestState.DEAD)
    record = await results.read(job.id)
    assert record is not None
    assert "2 attempts" in record.reason
    assert (await results.load([version_id]))[0].queued == 0


async def lose(results: Results, job: Job) -> Lease:
    """A worker takes it and falls silent."""
    lease = await granted(results, job, lease_s=0.02)

    async def wait_s() -> float:
        record = await results.read(job.id)
        epoch = await results.epoch(fresh=True)
        assert record is not None
        return record.started_at + 0.05 - epoch.now

    await eventually(wait_s, lambda left_s: left_s < 0)
    return lease


async def test_a_request_that_two_workers_died_with_is_dead(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    await lose(results, job)
    await lose(results, job)
    for _ in range(2):  # copies of its message change nothing
        claimed = await claim(results, job)
        assert (claimed.verdict, claimed.state) == (Verdict.SETTLED, RequestState.DEAD)
    record = await results.read(job.id)
    assert record is not None
    assert "worker died in 2 attempts" in record.reason
    assert [attempt.end for attempt in record.attempts] == [AttemptEnd.LOST, AttemptEnd.LOST]
    assert (await results.load([version_id]))[0].running == 0


async def test_lost_containers_and_lost_workers_are_counted_apart(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    await lose(results, job)
    await results.release(await granted(results, job), refund=False)
    third = await granted(results, job)
    assert third.attempt == 3
    await results.release(third, refund=False)
    assert (await claim(results, job)).state is RequestState.DEAD
    record = await results.read(job.id)
    assert record is not None
    assert "3 attempts" in record.reason


async def test_what_is_given_back_unspent_is_no_death(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    await lose(results, job)
    for _ in range(3):
        await results.release(await granted(results, job), refund=True)
    assert (await granted(results, job)).attempt == 2


async def test_who_comes_back_after_its_lease_ran_out_did_not_die(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    for _ in range(2):  # as often as workers may die
        lost = await lose(results, job)
        following = await granted(results, job)
        for _ in range(2):
            assert await results.release(lost, refund=True) is RequestState.RUNNING
        await results.release(following, refund=True)
        assert await state_of(results, job) is RequestState.QUEUED
    assert (await granted(results, job)).attempt == 3


async def test_a_claim_tells_which_attempt_it_found_lost(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    await lose(results, job)
    found = [await claim(results, job, worker="w2", lease_s=0.02)]

    async def last() -> Claim:
        found.append(await claim(results, job, worker="w3"))
        return found[-1]

    await eventually(last, lambda claimed: claimed.lost is not None)
    record = await results.read(job.id)
    assert record is not None
    assert record.state is RequestState.DEAD
    lost = [claimed.lost for claimed in found if claimed.lost is not None]
    assert [(attempt.number, attempt.worker, attempt.end) for attempt in lost] == [
        (1, "w1", AttemptEnd.LOST),
        (2, "w2", AttemptEnd.LOST),
    ]
    assert lost[0].started_at < lost[0].ended_at <= lost[1].started_at < lost[1].ended_at
    assert (await claim(results, job)).lost is None


async def test_a_refunded_attempt_costs_nothing(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    for _ in range(5):
        await results.release(await granted(results, job), refund=True)
    assert (await granted(results, job)).attempt == 1


async def test_releasing_twice_gives_back_once(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    lease = await granted(results, job)
    await results.release(lease, refund=True)
    await results.release(lease, refund=True)
    assert (await granted(results, job)).attempt == 1


async def test_a_cancelled_request_never_starts(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    assert await results.cancel(job.id, reason="no longer needed") is RequestState.QUEUED
    claimed = await claim(results, job)
    assert (claimed.verdict, claimed.state) == (Verdict.SETTLED, RequestState.CANCELLED)
    assert (await results.load([version_id]))[0].queued == 0


async def test_cancelling_a_running_request_refuses_its_result(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    lease = await granted(results, job)
    assert await results.cancel(job.id, reason="no longer needed") is RequestState.RUNNING
    assert await results.renew(lease, lease_s=30) is RequestState.CANCELLED
    assert await results.settle(lease, job, FULFILLED, OUTCOME) is RequestState.CANCELLED
    assert await results.cancel(job.id, reason="again") is RequestState.CANCELLED


async def test_cancelling_an_unknown_request_finds_nothing(results: Results) -> None:
    assert await results.cancel(str(uuid.uuid4()), reason="") is None


async def test_an_overdue_request_expires_for_its_reader(results: Results, version_id: str) -> None:
    job = await accept(results, version_id, deadline_s=0.1)
    await eventually(lambda: state_of(results, job), lambda state: state is RequestState.EXPIRED)
    assert (await claim(results, job)).state is RequestState.EXPIRED
    assert (await results.load([version_id]))[0].queued == 0


async def test_no_attempt_starts_after_the_deadline(results: Results, version_id: str) -> None:
    job = await accept(results, version_id, deadline_s=0.05)
    await asyncio.sleep(0.1)
    claimed = await claim(results, job)
    assert (claimed.verdict, claimed.state) == (Verdict.SETTLED, RequestState.EXPIRED)


async def test_a_running_request_outlives_its_deadline_while_it_is_leased(results: Results, version_id: str) -> None:
    job = await accept(results, version_id, deadline_s=0.05)
    lease = await granted(results, job)
    await asyncio.sleep(0.1)
    assert await state_of(results, job) is RequestState.RUNNING
    assert await results.settle(lease, job, FULFILLED, OUTCOME) is FULFILLED


async def test_sweep_expires_what_nobody_reads(results: Results, version_id: str) -> None:
    jobs = [await accept(results, version_id, deadline_s=0.05) for _ in range(5)]
    live = await accept(results, version_id)
    await asyncio.sleep(0.1)
    await results.sweep(version_id, limit=100)
    assert (await results.load([version_id]))[0].queued == 1
    assert [await state_of(results, job) for job in jobs] == [RequestState.EXPIRED] * 5
    assert await state_of(results, live) is RequestState.QUEUED


async def test_an_abandoned_request_never_starts(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    assert await results.abandon(job.id, version_id, reason="unconfirmed")
    assert await results.abandon(job.id, version_id, reason="unconfirmed")
    assert (await claim(results, job)).verdict is Verdict.SETTLED
    assert (await results.load([version_id]))[0].queued == 0


async def test_abandoning_comes_too_late_once_it_runs(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    await granted(results, job)
    assert not await results.abandon(job.id, version_id, reason="unconfirmed")
    assert await state_of(results, job) is RequestState.RUNNING


async def test_a_second_submitter_keeps_a_request_from_being_abandoned(results: Results, version_id: str) -> None:
    draft = make_draft(version_id)
    await results.create(draft, queue_limit=10, watch=False)
    await results.create(draft, queue_limit=10, watch=False)
    assert not await results.abandon(draft.id, version_id, reason="unconfirmed")
    assert await results.abandon(draft.id, version_id, reason="unconfirmed")


async def test_a_lost_record_is_rebuilt_from_its_message(results: Results, version_id: str) -> None:
    known = await accept(results, version_id)
    lost = replace(known, id=str(uuid.uuid4()))
    lease = await granted(results, lost)
    assert await results.settle(lease, lost, FULFILLED, OUTCOME) is FULFILLED
    record = await results.read(lost.id)
    assert record is not None
    assert (record.account, record.version_id, record.outcome) == ("acme", version_id, OUTCOME)


async def test_a_result_whose_record_was_lost_meanwhile_is_kept(results: Results, version_id: str) -> None:
    known = await accept(results, version_id)
    lost = replace(known, id=str(uuid.uuid4()))
    lease = Lease(request_id=lost.id, version_id=version_id, attempt=1, token="t")
    assert await results.renew(lease, lease_s=30) is RequestState.RUNNING
    assert await results.settle(lease, lost, FULFILLED, OUTCOME) is FULFILLED
    assert await state_of(results, lost) is FULFILLED


async def test_ending_a_request_says_why(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    ended = await results.end(job, RequestState.DEAD, reason="delivery limit reached")
    assert (ended.verdict, ended.state) == (Verdict.SETTLED, RequestState.DEAD)
    record = await results.read(job.id)
    assert record is not None
    assert (record.state, record.reason) == (RequestState.DEAD, "delivery limit reached")


async def test_ending_a_leased_request_has_to_wait(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    await granted(results, job)
    ended = await results.end(job, RequestState.DEAD, reason="delivery limit reached")
    assert ended.verdict is Verdict.HELD
    assert ended.wait_s > 0
    assert await state_of(results, job) is RequestState.RUNNING


async def test_position_is_the_exact_rank(results: Results, version_id: str) -> None:
    jobs = [await accept(results, version_id) for _ in range(6)]

    async def ranks() -> list[int]:
        records = [await results.read(job.id) for job in jobs]
        return [(await results.position(record)).rank for record in records if record]

    assert await ranks() == [1, 2, 3, 4, 5, 6]
    first = await granted(results, jobs[0])
    second = await granted(results, jobs[1])
    assert await ranks() == [0, 0, 1, 2, 3, 4]
    await results.settle(second, jobs[1], FULFILLED, OUTCOME)
    await results.cancel(jobs[3].id, reason="")
    assert await ranks() == [0, 0, 1, 0, 2, 3]
    await results.release(first, refund=True)
    assert await ranks() == [1, 0, 2, 0, 3, 4]
    record = await results.read(jobs[5].id)
    assert record is not None
    assert (await results.position(record)).length == 4


async def test_load_counts_waiting_and_running(results: Results, version_id: str) -> None:
    jobs = [await accept(results, version_id) for _ in range(3)]
    lease = await granted(results, jobs[0])
    load, empty = await results.load([version_id, str(uuid.uuid4())])
    assert (load.queued, load.running) == (2, 1)
    assert 0 <= load.oldest_age_s < 30
    assert (empty.queued, empty.running, empty.oldest_age_s) == (0, 0, 0)
    await results.settle(lease, jobs[0], FULFILLED, OUTCOME)
    assert (await results.load([version_id]))[0].running == 0


async def test_a_duplicate_message_of_a_running_request_counts_once(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    await granted(results, job)
    await claim(results, job)
    load = (await results.load([version_id]))[0]
    assert (load.queued, load.running) == (0, 1)


async def test_a_watch_hears_of_the_result(results: Results, version_id: str) -> None:
    draft = make_draft(version_id)
    async with results.watch(draft.id) as watch:
        record = await results.create(draft, queue_limit=10, watch=True)
        job = Job(
            id=draft.id,
            account="acme",
            function_id=draft.function_id,
            version_id=version_id,
            subject="",
            created_at=record.created_at,
            deadline_at=record.deadline_at,
            digest="",
        )
        heard = asyncio.create_task(watch.changed(30))
        lease = await granted(results, job)
        await results.settle(lease, job, FULFILLED, OUTCOME)
        await asyncio.wait_for(heard, 20)
        seen = await watch.read()
        assert seen is not None
        assert seen.outcome == OUTCOME


async def test_a_watch_opened_later_hears_after_its_read(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    async with results.watch(job.id) as watch, results.watch(job.id) as other:
        for each in (watch, other):
            record = await each.read()
            assert record is not None
            assert record.state is RequestState.QUEUED
        heard = asyncio.gather(watch.changed(30), other.changed(30))
        await results.cancel(job.id, reason="")
        await asyncio.wait_for(heard, 20)


async def test_the_worker_hears_of_a_cancel(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    async with results.watch(job.id) as watch:
        lease = await granted(results, job)
        heard = asyncio.create_task(watch.changed(30))
        await results.cancel(job.id, reason="")
        await asyncio.wait_for(heard, 20)
        assert await results.renew(lease, lease_s=30) is RequestState.CANCELLED


async def test_waiting_without_a_change_ends_in_time(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    async with results.watch(job.id) as watch:
        await watch.read()
        await asyncio.wait_for(watch.changed(0.05), 20)
        again = asyncio.create_task(watch.changed(30))
        await asyncio.sleep(0.05)
        assert not again.done()
        again.cancel()
        record = await watch.read()
        assert record is not None
        assert record.state is RequestState.QUEUED


async def test_an_idempotency_key_leads_to_its_first_request(results: Results) -> None:
    account, key, first = "acme", str(uuid.uuid4()), str(uuid.uuid4())
    assert await results.remember_key(account, key, request_id=first, digest="a") == first
    assert await results.remember_key(account, key, request_id=str(uuid.uuid4()), digest="a") == first
    with pytest.raises(IdempotencyKeyReused):
        await results.remember_key(account, key, request_id=str(uuid.uuid4()), digest="b")
    other = str(uuid.uuid4())
    assert await results.remember_key("other", key, request_id=other, digest="b") == other


async def test_a_forgotten_key_is_free_again(results: Results) -> None:
    key, first, second = str(uuid.uuid4()), str(uuid.uuid4()), str(uuid.uuid4())
    await results.remember_key("acme", key, request_id=first, digest="a")
    await results.forget_key("acme", key, request_id=second)
    assert await results.remember_key("acme", key, request_id=second, digest="a") == first
    await results.forget_key("acme", key, request_id=first)
    assert await results.remember_key("acme", key, request_id=second, digest="b") == second


async def test_a_forgotten_result_is_hidden(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    lease = await granted(results, job)
    await results.forget(job.id)
    assert await state_of(results, job) is RequestState.RUNNING
    await results.settle(lease, job, FULFILLED, OUTCOME)
    await results.forget(job.id)
    assert await results.read(job.id) is None
    assert (await claim(results, job)).verdict is Verdict.SETTLED


async def test_the_epoch_stays_the_same(results: Results) -> None:
    first = await results.epoch(fresh=True)
    second = await results.epoch(fresh=True)
    assert (first.number, first.born_at) == (second.number, second.born_at)
    assert 0 <= first.number <= 255
    assert second.now >= first.now >= first.born_at


async def test_a_hundred_concurrent_requests_end_once_each(results: Results, version_id: str) -> None:
    jobs = await asyncio.gather(*(accept(results, version_id) for _ in range(100)))

    async def run(job: Job) -> int:
        claims = await asyncio.gather(*(claim(results, job, worker=f"w{n}") for n in range(3)))
        leases = [claimed.lease for claimed in claims if claimed.lease]
        for lease in leases:
            await results.settle(lease, job, FULFILLED, replace(OUTCOME, body=job.id.encode()))
        return len(leases)

    assert await asyncio.gather(*map(run, jobs)) == [1] * 100
    records = await asyncio.gather(*(results.read(job.id) for job in jobs))
    assert all(record and record.outcome and record.outcome.body == record.id.encode() for record in records)
    load = (await results.load([version_id]))[0]
    assert (load.queued, load.running) == (0, 0)


async def test_ping(results: Results) -> None:
    await results.ping()


# -- postponed ---------------------------------------------------------------------------------

REFUSED = Outcome(status=503, headers=(("Content-Type", "application/problem+json"),), body=b'{"status":503}')


async def test_a_postponed_request_is_queued_and_held_until_its_time(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    behind = await accept(results, version_id)
    assert await results.postpone(await granted(results, job), REFUSED, wait_s=0.2) is RequestState.QUEUED
    held = await claim(results, job)
    assert (held.verdict, held.state) == (Verdict.HELD, RequestState.QUEUED)
    assert 0 < held.wait_s <= 0.2
    record = await results.read(job.id)
    assert record is not None
    assert (record.state, record.outcome) == (RequestState.QUEUED, None)
    [load] = await results.load([version_id])
    assert (load.queued, load.running) == (2, 0)
    assert (await results.position(record)).rank == 1
    assert (await claim(results, behind)).verdict is Verdict.GRANTED


async def test_a_postponed_attempt_costs_nothing(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    for _ in range(5):
        await results.postpone(await granted(results, job), REFUSED, wait_s=0)
    lease = await granted(results, job)
    assert lease.attempt == 1
    assert await results.settle(lease, job, FULFILLED, OUTCOME) is FULFILLED
    record = await results.read(job.id)
    assert record is not None
    assert record.outcome == OUTCOME


async def test_postponing_twice_gives_back_once(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    await results.release(await granted(results, job), refund=False)
    lease = await granted(results, job)
    for _ in range(2):
        assert await results.postpone(lease, REFUSED, wait_s=0) is RequestState.QUEUED
    assert (await granted(results, job)).attempt == 2


async def test_the_last_refusal_is_the_result_at_the_deadline(results: Results, version_id: str) -> None:
    job = await accept(results, version_id, deadline_s=2)
    assert await results.postpone(await granted(results, job), REFUSED, wait_s=0.1) is RequestState.QUEUED
    record = await eventually(lambda: results.read(job.id), lambda seen: seen is not None and seen.state.terminal)
    assert record is not None
    assert (record.state, record.outcome) == (RequestState.ERRORED, REFUSED)
    assert (await claim(results, job)).verdict is Verdict.SETTLED
    assert (await results.load([version_id]))[0].queued == 0


async def test_nothing_is_postponed_beyond_its_deadline(results: Results, version_id: str) -> None:
    job = await accept(results, version_id, deadline_s=5)
    lease = await granted(results, job)
    assert await results.postpone(lease, REFUSED, wait_s=5) is RequestState.RUNNING
    assert await results.settle(lease, job, RequestState.ERRORED, REFUSED) is RequestState.ERRORED


async def test_a_postponed_request_that_starts_again_forgets_the_refusal(results: Results, version_id: str) -> None:
    job = await accept(results, version_id, deadline_s=2)
    await results.postpone(await granted(results, job), REFUSED, wait_s=0)
    await granted(results, job, lease_s=0.05)
    record = await eventually(lambda: results.read(job.id), lambda seen: seen is not None and seen.state.terminal)
    assert record is not None
    assert (record.state, record.outcome) == (RequestState.EXPIRED, None)


async def test_a_cancelled_postponed_request_has_no_result(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    await results.postpone(await granted(results, job), REFUSED, wait_s=30)
    assert await results.cancel(job.id, reason="no more") is RequestState.QUEUED
    record = await results.read(job.id)
    assert record is not None
    assert (record.state, record.outcome) == (RequestState.CANCELLED, None)


async def test_only_the_holder_of_the_lease_postpones(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    old = await granted(results, job, lease_s=0.05)
    await eventually(lambda: claim(results, job), lambda claimed: claimed.verdict is Verdict.GRANTED)
    assert await results.postpone(old, REFUSED, wait_s=30) is RequestState.RUNNING
    assert await state_of(results, job) is RequestState.RUNNING


# -- progress ----------------------------------------------------------------------------------


def update(percent: int, partial: bytes = b"null") -> Progress:
    return Progress(percent=percent, partial=partial)


async def poll(results: Results, job: Job) -> tuple[int, bool] | None:
    """The percentage that one poll is given, and whether it is news."""
    async with results.watch(job.id, Interest.PROGRESS) as watch:
        record = await watch.read()
    assert record is not None
    return (record.progress.percent, record.unread) if record.progress else None


async def test_each_update_is_given_to_one_poll_in_order_and_the_last_one_again(
    results: Results, version_id: str
) -> None:
    job = await accept(results, version_id)
    lease = await granted(results, job)
    assert await poll(results, job) is None
    for sequence, percent in enumerate((10, 40, 30), start=1):
        reported = await results.report(lease, update(percent, b'{"n": 1}\n'), sequence=sequence)
        assert reported is RequestState.RUNNING
    assert [await poll(results, job) for _ in range(5)] == [
        (10, True), (40, True), (30, True), (30, False), (30, False),
    ]  # fmt: skip
    await results.report(lease, update(90), sequence=4)
    assert [await poll(results, job) for _ in range(2)] == [(90, True), (90, False)]


async def test_polls_at_the_same_time_are_given_different_updates(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    lease = await granted(results, job)
    for sequence in range(1, 21):
        await results.report(lease, update(sequence), sequence=sequence)
    given = await asyncio.gather(*(poll(results, job) for _ in range(20)))
    assert sorted(given, key=str) == sorted([(percent, True) for percent in range(1, 21)], key=str)


async def test_whoever_does_not_poll_sees_the_last_update_and_takes_none(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    lease = await granted(results, job)
    await results.report(lease, update(1), sequence=1)
    await results.report(lease, update(2, b'{"a": 2}'), sequence=2)
    record = await results.read(job.id)
    assert record is not None
    assert (record.progress, record.unread) == (Progress(percent=2, partial=b'{"a": 2}', number=2), False)
    async with results.watch(job.id, Interest.STEPS) as watch:
        assert (await watch.read()) == record
    assert [found.percent for found in await results.updates(job.id, after=0, limit=10)] == [1, 2]
    assert await poll(results, job) == (1, True)
    assert [found.number for found in await results.updates(job.id, after=0, limit=10)] == [1, 2]


async def test_whoever_had_no_answer_is_granted_the_same_attempt_again(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    lease = Lease(request_id=job.id, version_id=version_id, attempt=1, token="t" * 32)
    began = set()
    for lease_s in (0.01, 30.0):  # the answer may be so late that the lease is over
        claimed = await results.claim(job, worker="w1", lease_s=lease_s, max_attempts=3, token=lease.token)
        assert claimed.lease is not None
        assert replace(claimed.lease, started_at=0.0) == lease
        began.add(claimed.lease.started_at)
        await asyncio.sleep(0.02)
    assert len(began) == 1
    assert (await claim(results, job, worker="w2")).verdict is Verdict.HELD
    assert await results.settle(lease, job, FULFILLED, OUTCOME) is FULFILLED
    again = await results.claim(job, worker="w1", lease_s=30, max_attempts=3, token="t" * 32)
    assert (again.verdict, again.state) == (Verdict.SETTLED, FULFILLED)


async def test_who_waits_is_shown_what_was_settled_with_the_hint(redis_server: Redis, version_id: str) -> None:
    settings = Settings()
    async with (
        open_store(redis_server.url, settings) as (front, *_),
        open_store(redis_server.url, settings) as (sidecar, *_),
    ):
        connection = Connection(redis_server.url, settings)
        try:
            for times_lost, size in ((0, 10), (0, 9000), (1, 10)):
                job = await accept(front, version_id)
                outcome = replace(OUTCOME, body=b"\n" * size)
                async with front.watch(job.id) as watch:
                    await watch.read()
                    for _ in range(times_lost):
                        await granted(sidecar, job, lease_s=0.01)
                        await asyncio.sleep(0.02)
                    timings = Timings(container_s=7.0)
                    await sidecar.settle(await granted(sidecar, job), job, FULFILLED, outcome, timings)
                    assert await watch.changed(30)
                    stored = await front.read(job.id)
                    assert stored is not None
                    assert stored.outcome == outcome
                    shown = (times_lost, size) == (0, 10)
                    if shown:  # not asked for again
                        await connection.run(("DEL", f"fnq:{{{job.id}}}:r", f"fnq:{{{job.id}}}:b"))
                    assert await watch.read() == stored
                    assert await front.read(job.id) == (None if shown else stored)
        finally:
            await connection.close()


@pytest.mark.parametrize("news", ["", "x", "\x00\x09fulfilled", "\x00\x08running 1\x00\x00\x00\x00"])
async def test_a_hint_that_cannot_be_read_means_read_again(redis_server: Redis, version_id: str, news: str) -> None:
    async with open_store(redis_server.url, Settings()) as (front, *_):
        assert isinstance(front, RedisResults)
        job = await accept(front, version_id)
        connection = Connection(redis_server.url, Settings())
        try:
            async with front.watch(job.id) as watch:
                await connection.run(("PUBLISH", front.channel, f"{job.id}\n{news}"))
                assert await watch.changed(30)
                assert await watch.read() == await front.read(job.id)
        finally:
            await connection.close()


async def test_a_hint_shows_nothing_that_a_replica_has_to_have(redis_server: Redis, version_id: str) -> None:
    async with (
        open_store(redis_server.url, Settings(durable_replicas=1)) as (front, *_),
        open_store(redis_server.url, Settings()) as (sidecar, *_),
    ):
        job = await accept(sidecar, version_id)
        async with front.watch(job.id) as watch:
            with pytest.raises(StoreUnavailable):
                await watch.read()
            await sidecar.settle(await granted(sidecar, job), job, FULFILLED, OUTCOME)
            assert await watch.changed(30)
            with pytest.raises(StoreUnavailable):
                await watch.read()


async def test_a_poll_that_redis_runs_twice_takes_one_update(redis_server: Redis, version_id: str) -> None:
    settings = Settings()
    connection = Connection(redis_server.url, settings)
    try:
        results = RedisResults(connection, settings)
        job = await accept(results, version_id)
        lease = await granted(results, job)
        for sequence in (1, 2):
            await results.report(lease, update(10 * sequence), sequence=sequence)
        keys = (f"fnq:{{{job.id}}}:r", f"fnq:{{{job.id}}}:b")
        replies = await connection.run(*(READ.call(keys, 60_000, "", 1, poll, 0) for poll in ("a", "a", "b", "c")))
        assert [(reply[18], reply[19]) for reply in replies] == [
            (b"1 10 null", 1), (b"1 10 null", 1), (b"2 20 null", 1), (b"2 20 null", 0),
        ]  # fmt: skip
    finally:
        await connection.close()


async def test_the_newest_256_updates_are_kept(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    lease = await granted(results, job)
    for sequence in range(1, 301):
        await results.report(lease, update(sequence % 101), sequence=sequence)
    assert [found.number for found in await results.updates(job.id, after=0, limit=1000)] == list(range(45, 301))
    assert [found.number for found in await results.updates(job.id, after=50, limit=3)] == [51, 52, 53]
    assert await results.updates(job.id, after=300, limit=10) == []
    given = [await poll(results, job) for _ in range(257)]
    assert given == [(number % 101, True) for number in range(45, 301)] + [(300 % 101, False)]


async def test_the_bytes_of_what_is_kept_are_bounded(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    lease = await granted(results, job)
    large = b'"' + b"x" * 1_500_000 + b'"'
    for sequence in range(1, 6):
        await results.report(lease, update(sequence, large), sequence=sequence)
    assert [found.percent for found in await results.updates(job.id, after=0, limit=10)] == [4, 5]


async def test_a_report_that_comes_twice_or_late_counts_once(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    lease = await granted(results, job)
    for sequence in (1, 2, 2, 1):
        assert await results.report(lease, update(sequence), sequence=sequence) is RequestState.RUNNING
    assert [found.percent for found in await results.updates(job.id, after=0, limit=10)] == [1, 2]


async def test_without_the_secret_of_its_lease_nobody_touches_an_attempt(results: Results, version_id: str) -> None:
    """What a worker of another function could know of it at most: the request and which attempt it is."""
    job = await accept(results, version_id)
    lease = await granted(results, job)
    for token in ("", "0" * len(lease.token), lease.token[:-1], lease.token + "0"):
        guessed = replace(lease, token=token)
        assert await results.renew(guessed, lease_s=300) is not RequestState.RUNNING
        assert await results.report(guessed, update(1), sequence=1) is not RequestState.RUNNING
        for change in (
            results.settle(guessed, job, FULFILLED, OUTCOME),
            results.release(guessed, refund=True),
            results.postpone(guessed, OUTCOME, wait_s=1),
        ):
            assert await change is RequestState.RUNNING
        ended = await results.end(job, RequestState.DEAD, reason="not theirs")
        assert (ended.verdict, ended.state) == (Verdict.HELD, RequestState.RUNNING)
        again = await claim(results, job, worker="rogue")
        assert (again.verdict, again.lease) == (Verdict.HELD, None)
    record = await results.read(job.id)
    assert record is not None
    assert (record.state, record.attempt, record.worker) == (RequestState.RUNNING, 1, "w1")
    assert record.progress is None
    assert await results.settle(lease, job, FULFILLED, OUTCOME) is FULFILLED


async def test_only_the_holder_of_the_lease_reports(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    lease = await granted(results, job)
    other = replace(lease, token="another")
    assert await results.report(other, update(1), sequence=1) is RequestState.QUEUED
    await results.settle(lease, job, FULFILLED, OUTCOME)
    assert await results.report(lease, update(1), sequence=1) is FULFILLED
    assert await results.updates(job.id, after=0, limit=10) == []


async def test_the_result_comes_before_updates_that_were_not_read(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    lease = await granted(results, job)
    await results.report(lease, update(50), sequence=1)
    await results.settle(lease, job, FULFILLED, OUTCOME)
    async with results.watch(job.id, Interest.PROGRESS) as watch:
        record = await watch.read()
    assert record is not None
    assert (record.state, record.progress, record.unread) == (FULFILLED, None, False)
    assert [found.percent for found in await results.updates(job.id, after=0, limit=10)] == [50]
    async with results.watch(job.id, Interest.STEPS) as watch:
        record = await watch.read()
    assert record is not None
    assert record.progress is not None


async def test_a_new_attempt_begins_without_progress_and_its_numbers_go_on(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    lease = await granted(results, job)
    for sequence in (1, 2):
        await results.report(lease, update(sequence), sequence=sequence)
    await results.release(lease, refund=False)
    assert await poll(results, job) is None
    lease = await granted(results, job)
    assert await poll(results, job) is None
    assert await results.updates(job.id, after=0, limit=10) == []
    await results.report(lease, update(5), sequence=1)
    assert [found.number for found in await results.updates(job.id, after=0, limit=10)] == [3]
    assert [await poll(results, job) for _ in range(2)] == [(5, True), (5, False)]


async def test_progress_is_hinted_to_polls_and_not_to_who_waits_for_the_end(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    lease = await granted(results, job)
    async with results.watch(job.id) as ending, results.watch(job.id, Interest.PROGRESS) as polling:
        await asyncio.gather(ending.read(), polling.read())
        await results.report(lease, update(1), sequence=1)
        assert await polling.changed(5)
        assert not await ending.changed(0.1)
        await results.settle(lease, job, FULFILLED, OUTCOME)
        assert await ending.changed(5)


async def test_steps_are_hinted_to_who_asked_for_them(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    async with (
        results.watch(job.id, Interest.PROGRESS) as polling,
        results.watch(job.id, Interest.STEPS) as listening,
    ):
        await asyncio.gather(polling.read(), listening.read())
        lease = await granted(results, job)
        assert await listening.changed(5)
        await results.report(lease, update(1), sequence=1)
        assert await listening.changed(5)
        assert await polling.changed(5)
        await results.release(lease, refund=True)
        assert await listening.changed(5)
        assert not await polling.changed(0.1)


async def test_a_watch_that_is_woken_tells_it_from_a_hint(results: Results, version_id: str) -> None:
    job = await accept(results, version_id)
    async with results.watch(job.id, Interest.STEPS) as watch:
        await watch.read()
        watch.wake()
        assert not await watch.changed(5)
        watch.wake()
        await results.cancel(job.id, reason="enough")
        await eventually(lambda: watch.changed(1), lambda hinted: hinted)


@pytest.mark.parametrize("count", [3, 40])
async def test_places_are_those_of_all_who_wait(results: Results, version_id: str, count: int) -> None:
    jobs = [await accept(results, version_id) for _ in range(count)]
    await granted(results, jobs[1])
    asked = [jobs[2].id, jobs[1].id, jobs[0].id, *(job.id for job in jobs[3:])]
    places = await results.places(version_id, asked)
    assert [place.rank for place in places] == [2, 0, 1, *range(3, count)]
    assert {place.length for place in places} == {count - 1}
    assert await results.places(str(uuid.uuid4()), [jobs[0].id]) == [Position(rank=0, length=0)]


async def test_of_many_places_the_furthest_are_told_as_far(results: Results, version_id: str) -> None:
    jobs = await asyncio.gather(*(accept(results, version_id) for _ in range(1002)))
    places = sorted(place.rank for place in await results.places(version_id, [job.id for job in jobs]))
    assert places[:999] == list(range(1, 1000))
    assert all(rank >= FURTHEST for rank in places[999:])


async def test_what_is_asked_while_an_answer_is_to_come_is_asked_together(
    redis_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    first, send = asyncio.Event(), Wire.send

    def noted(wire: Wire, questions: Sequence[Question]) -> None:
        sent.append(len(questions))
        send(wire, questions)
        first.set()

    monkeypatch.setattr(Wire, "send", noted)
    asking, other = (Connection(redis_server.url, Settings()) for _ in range(2))
    held = f"held:{uuid.uuid4()}"
    try:
        slow = asyncio.create_task(asking.run(("BLPOP", held, 30)))
        await asyncio.wait_for(first.wait(), 30)
        waiting = []
        for number in range(10):
            waiting.append(asyncio.create_task(asking.run(("ECHO", str(number)))))
            await asyncio.sleep(0)
        assert sent == [1]
        await other.run(("RPUSH", held, "x"))
        assert [reply for [reply] in await asyncio.gather(*waiting)] == [str(number).encode() for number in range(10)]
        assert (await slow)[0][1] == b"x"
        assert sorted(sent) == [1, 1, 10]
    finally:
        await asyncio.gather(asking.close(), other.close())
