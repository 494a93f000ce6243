"""What a Webhooks back end promises, on memory and on a real Redis."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest
import redis.asyncio

from broker.backends.memory.results import MemoryResults
from broker.backends.memory.upkeep import MemoryUpkeep
from broker.backends.memory.webhooks import MemoryWebhooks
from broker.backends.redis.store import open_store
from broker.model import (
    Callback,
    DeadCause,
    DeliveryState,
    Draft,
    Job,
    Outcome,
    RequestState,
    WebhookDelivery,
    WebhookFilter,
    WebhookLoan,
    WebhookTry,
)
from broker.ports import MOST_TRIES, Results, Upkeep, Webhooks
from broker.settings import Settings
from infra.local.servers import Redis
from tests.eventually import eventually

DB = 3
KEPT = 12
SETTINGS = Settings(webhooks_kept=KEPT)
HERE = Callback(url="https://example.com/hook?x=1")
ALL = WebhookFilter()
OK = Outcome(status=200, headers=(), body=b"{}")
GOOD = WebhookTry(took_s=0.5, status=204)
BAD = WebhookTry(took_s=1.5, status=500, error="status")


@dataclass(frozen=True)
class Store:
    results: Results
    webhooks: Webhooks
    upkeep: Upkeep


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "memory":
        results = MemoryResults(SETTINGS)
        yield Store(results, MemoryWebhooks(results, SETTINGS), MemoryUpkeep(results))
        return
    server: Redis = request.getfixturevalue("redis_server")
    async with open_store(f"{server.url.rpartition('/')[0]}/{DB}", SETTINGS) as opened:
        yield Store(opened.results, opened.webhooks, opened.upkeep)


@pytest.fixture
def account() -> str:
    return f"acme-{uuid.uuid4()}"


async def accept(
    store: Store, account: str, callback: Callback | None = HERE, *, lasts_s: float = 60.0, function_id: str = "f"
) -> Job:
    draft = Draft(
        id=str(uuid.uuid4()),
        account=account,
        function_id=function_id,
        version_id=str(uuid.uuid4()),
        digest="d",
        deadline_s=lasts_s,
        callback=callback,
    )
    record = await store.results.create(draft, queue_limit=100_000, watch=False)
    return job_of(draft, record.created_at, record.deadline_at)


def job_of(draft: Draft, created_at: float, deadline_at: float) -> Job:
    return Job(
        id=draft.id,
        account=draft.account,
        function_id=draft.function_id,
        version_id=draft.version_id,
        subject="key",
        created_at=created_at,
        deadline_at=deadline_at,
        digest="d",
        callback=draft.callback,
    )


async def settle(store: Store, job: Job, state: RequestState = RequestState.FULFILLED) -> None:
    claim = await store.results.claim(job, worker="w", lease_s=60, max_attempts=3)
    assert claim.lease is not None
    await store.results.settle(claim.lease, job, state, OK)


async def take(store: Store, account: str, *, lease_s: float = 600.0) -> list[WebhookLoan]:
    """All that are due of the account. Those of other tests that are due on the same server are taken too."""
    mine: list[WebhookLoan] = []
    while True:
        loans, more = await store.webhooks.take(limit=100, lease_s=lease_s)
        mine += [loan for loan in loans if loan.delivery.account == account]
        if not more:
            return mine


async def ask(server: Redis, *command: str | bytes | int) -> object:
    client = redis.asyncio.Redis.from_url(f"{server.url.rpartition('/')[0]}/{DB}")
    async with client:
        return await client.execute_command(*command)  # type: ignore[no-untyped-call]  # not typed by its authors


async def fulfilled(store: Store, job: Job) -> None:
    await settle(store, job)


async def errored(store: Store, job: Job) -> None:
    await settle(store, job, RequestState.ERRORED)


async def timed_out(store: Store, job: Job) -> None:
    await settle(store, job, RequestState.TIMED_OUT)


async def cancelled(store: Store, job: Job) -> None:
    await store.results.cancel(job.id, reason="why")


async def cancelled_while_it_runs(store: Store, job: Job) -> None:
    await store.results.claim(job, worker="w", lease_s=60, max_attempts=3)
    await store.results.cancel(job.id, reason="why")


async def dead_lettered(store: Store, job: Job) -> None:
    await store.results.end(job, RequestState.DEAD, reason="why", cause=DeadCause.REJECTED)


async def without_attempts_left(store: Store, job: Job) -> None:
    claim = await store.results.claim(job, worker="w", lease_s=60, max_attempts=1)
    assert claim.lease is not None
    await store.results.release(claim.lease, refund=False)
    await store.results.claim(job, worker="w", lease_s=60, max_attempts=1)


ENDS = [
    (fulfilled, RequestState.FULFILLED),
    (errored, RequestState.ERRORED),
    (timed_out, RequestState.TIMED_OUT),
    (cancelled, RequestState.CANCELLED),
    (cancelled_while_it_runs, RequestState.CANCELLED),
    (dead_lettered, RequestState.DEAD),
    (without_attempts_left, RequestState.DEAD),
]


@pytest.mark.parametrize(("end", "state"), ENDS, ids=[end.__name__ for end, _ in ENDS])
async def test_every_end_is_due_at_once_and_only_then(
    store: Store, account: str, end: Callable[[Store, Job], Awaitable[None]], state: RequestState
) -> None:
    job = await accept(store, account)
    assert await take(store, account) == []
    await end(store, job)
    [loan] = await take(store, account)
    delivery = loan.delivery
    assert (delivery.request_id, delivery.request_state, delivery.callback) == (job.id, state, HERE)
    assert (delivery.account, delivery.version_id, delivery.event) == (account, job.version_id, f"request.{state}")
    assert delivery.created_at == pytest.approx(job.created_at, abs=0.002)
    assert delivery.created_at <= delivery.finished_at
    assert await store.webhooks.read(job.id) == delivery


async def test_a_deadline_that_passes_is_due_once_anybody_looks(store: Store, account: str) -> None:
    job = await accept(store, account, lasts_s=0.05)

    async def looked() -> list[WebhookLoan]:
        await store.results.sweep(job.version_id, limit=10)
        return await take(store, account)

    [loan] = await eventually(looked, bool)
    assert loan.delivery.request_state is RequestState.EXPIRED
    assert loan.delivery.reason


async def test_the_result_is_told_in_numbers(store: Store, account: str) -> None:
    job = await accept(store, account)
    await settle(store, job)
    [loan] = await take(store, account)
    assert (loan.delivery.status_code, loan.delivery.attempts) == (200, 1)
    assert loan.delivery.timings is not None
    assert loan.delivery.started_at >= loan.delivery.created_at


async def test_without_a_callback_nothing_is_due(store: Store, account: str) -> None:
    job = await accept(store, account, None)
    await settle(store, job)
    assert await take(store, account) == []
    assert await store.webhooks.read(job.id) is None


async def test_only_the_ends_that_were_asked_for_are_told(store: Store, account: str) -> None:
    wanted = Callback(url=HERE.url, events=("dead", "timed-out"))
    told, untold = await accept(store, account, wanted), await accept(store, account, wanted)
    await settle(store, told, RequestState.TIMED_OUT)
    await settle(store, untold)
    assert [loan.delivery.request_id for loan in await take(store, account)] == [told.id]


async def test_what_never_started_for_its_submitter_is_not_told(store: Store, account: str) -> None:
    job = await accept(store, account)
    assert await store.results.abandon(job.id, job.version_id, reason="why")
    assert await take(store, account) == []


async def test_a_record_that_was_lost_has_its_callback_again_from_the_message(store: Store, account: str) -> None:
    draft = Draft(
        id=str(uuid.uuid4()),
        account=account,
        function_id="f",
        version_id=str(uuid.uuid4()),
        digest="d",
        deadline_s=60,
        callback=HERE,
    )
    now = (await store.results.epoch(fresh=True)).now
    lost = job_of(draft, now, now + 60)
    await settle(store, lost)
    assert [loan.delivery.request_id for loan in await take(store, account)] == [lost.id]


async def test_on_loan_it_is_nobody_elses_and_a_lapsed_loan_is_given_again(store: Store, account: str) -> None:
    job = await accept(store, account)
    await settle(store, job)
    [first] = await take(store, account, lease_s=0.05)
    [second] = await eventually(lambda: take(store, account), bool)
    assert second.delivery == first.delivery
    assert await take(store, account) == []


async def test_what_is_due_is_counted_until_it_is_taken(store: Store, account: str) -> None:
    await take(store, account)
    before = await store.webhooks.backlog()
    assert before.count == 0
    assert before.late_s == 0
    for _ in range(3):
        await settle(store, await accept(store, account))
    due = await eventually(store.webhooks.backlog, lambda seen: seen.late_s > 0)
    assert due.count == 3
    assert len(await take(store, account)) == 3
    assert (await store.webhooks.backlog()).count == 0


async def test_what_is_due_longest_is_taken_first(store: Store, account: str) -> None:
    ids = []
    for _ in range(5):
        job = await accept(store, account)
        ids.append(job.id)
        await settle(store, job)
        await asyncio.sleep(0.002)  # another millisecond of the store's clock
    taken = [loan.delivery.request_id for loan in await take(store, account)]
    assert taken == ids


async def test_several_take_each_one_once(store: Store, account: str) -> None:
    jobs = [await accept(store, account) for _ in range(KEPT)]
    for job in jobs:
        await settle(store, job)
    found = await asyncio.gather(*(take(store, account) for _ in range(4)))
    assert sorted(loan.delivery.request_id for loans in found for loan in loans) == sorted(job.id for job in jobs)


async def test_a_try_in_vain_is_noted_and_due_again_later(store: Store, account: str) -> None:
    job = await accept(store, account)
    await settle(store, job)
    [loan] = await take(store, account)
    assert await store.webhooks.note(loan, BAD, state=DeliveryState.PENDING, wait_s=0.05)
    noted = await store.webhooks.read(job.id)
    assert noted is not None
    [tried] = noted.tries
    assert (tried.number, tried.status, tried.error, tried.took_s) == (1, 500, "status", 1.5)
    assert (noted.state, noted.tried, noted.series) == (DeliveryState.PENDING, 1, 1)
    [again] = await eventually(lambda: take(store, account), bool)
    assert again.delivery.tried == 1


@pytest.mark.parametrize("state", [DeliveryState.DELIVERED, DeliveryState.FAILED])
async def test_what_is_done_is_not_due_again(store: Store, account: str, state: DeliveryState) -> None:
    job = await accept(store, account)
    await settle(store, job)
    [loan] = await take(store, account)
    assert await store.webhooks.note(loan, GOOD, state=state)
    noted = await store.webhooks.read(job.id)
    assert noted is not None
    assert noted.state is state
    # A worker that had no answer settles again.
    await store.results.end(job, RequestState.DEAD, reason="late")
    assert await take(store, account) == []


async def test_one_try_is_noted_once(store: Store, account: str) -> None:
    job = await accept(store, account)
    await settle(store, job)
    [first] = await take(store, account, lease_s=0.05)
    [second] = await eventually(lambda: take(store, account), bool)
    assert await store.webhooks.note(second, GOOD, state=DeliveryState.DELIVERED)
    assert not await store.webhooks.note(first, BAD, state=DeliveryState.PENDING, wait_s=0)
    noted = await store.webhooks.read(job.id)
    assert noted is not None
    assert (noted.state, noted.tried) == (DeliveryState.DELIVERED, 1)
    assert await take(store, account) == []


async def test_what_is_put_back_was_not_tried(store: Store, account: str) -> None:
    job = await accept(store, account)
    await settle(store, job)
    [loan] = await take(store, account)
    await store.webhooks.put_back(loan, wait_s=0.05)
    assert await take(store, account) == []
    [again] = await eventually(lambda: take(store, account), bool)
    assert again.delivery.tried == 0


async def test_asked_for_again_it_is_due_and_its_tries_begin_anew(store: Store, account: str) -> None:
    job = await accept(store, account)
    await settle(store, job)
    [loan] = await take(store, account)
    await store.webhooks.note(loan, BAD, state=DeliveryState.FAILED)
    asked = await store.webhooks.again(job.id)
    assert asked is not None
    assert (asked.state, asked.tried, asked.series, len(asked.tries)) == (DeliveryState.PENDING, 1, 0, 1)
    [again] = await take(store, account)
    assert await store.webhooks.note(again, GOOD, state=DeliveryState.DELIVERED)
    noted = await store.webhooks.read(job.id)
    assert noted is not None
    assert [tried.number for tried in noted.tries] == [1, 2]


async def test_nothing_is_asked_for_again_that_never_was(store: Store, account: str) -> None:
    unknown = str(uuid.uuid4())
    assert await store.webhooks.again(unknown) is None
    assert await store.webhooks.read(unknown) is None
    job = await accept(store, account)
    assert await store.webhooks.again(job.id) is None


async def test_the_log_of_tries_has_an_end(store: Store, account: str) -> None:
    job = await accept(store, account)
    await settle(store, job)
    for _ in range(MOST_TRIES + 3):
        [loan] = await eventually(lambda: take(store, account), bool)
        await store.webhooks.note(loan, BAD, state=DeliveryState.PENDING, wait_s=0)
    noted = await store.webhooks.read(job.id)
    assert noted is not None
    assert (len(noted.tries), noted.tries[-1].number) == (MOST_TRIES, MOST_TRIES + 3)


async def pages(store: Store, account: str, wanted: WebhookFilter, limit: int) -> list[WebhookDelivery]:
    found: list[WebhookDelivery] = []
    after = 0
    while True:
        page = await store.webhooks.page(account, wanted, limit=limit, after=after)
        found += page.deliveries
        after = page.after
        if not after:
            return found


async def test_an_account_finds_its_own_page_by_page_the_latest_first(store: Store, account: str) -> None:
    taken = []
    for at in range(5):
        job = await accept(store, account, function_id="even" if at % 2 == 0 else "odd")
        await settle(store, job)
        [loan] = await take(store, account)
        await store.webhooks.note(loan, GOOD, state=DeliveryState.FAILED if at == 4 else DeliveryState.DELIVERED)
        taken.append(job.id)
    newest = taken[::-1]
    assert [each.request_id for each in await pages(store, account, ALL, 2)] == newest
    failed = WebhookFilter(states=frozenset({DeliveryState.FAILED}))
    assert [each.request_id for each in await pages(store, account, failed, 2)] == newest[:1]
    assert [each.request_id for each in await pages(store, account, WebhookFilter(function_id="odd"), 1)] == newest[
        1::2
    ]
    assert await pages(store, f"other-{account}", ALL, 10) == []


async def test_the_oldest_of_an_account_make_way(store: Store, account: str, caplog: pytest.LogCaptureFixture) -> None:
    jobs = [await accept(store, account) for _ in range(KEPT + 2)]
    for job in jobs:
        await settle(store, job)
        await take(store, account)
    assert [each.request_id for each in await pages(store, account, ALL, 100)] == [job.id for job in jobs[:1:-1]]
    assert await store.webhooks.read(jobs[0].id) is None
    assert await store.webhooks.read(jobs[2].id) is not None
    assert any(record.message == "webhooks_dropped" for record in caplog.records)


async def test_who_ends_a_request_and_dies_before_he_said_so_makes_it_late_and_not_lost(
    redis_server: Redis, account: str
) -> None:
    """What `leaving` does behind the script that ends it, does not happen: the auditor's walk finds it."""
    async with open_store(f"{redis_server.url.rpartition('/')[0]}/{DB}", SETTINGS) as opened:
        store = Store(opened.results, opened.webhooks, opened.upkeep)
        job = await accept(store, account)
        await settle(store, job)
        assert await ask(redis_server, "ZREM", "fnq:{webhooks}:w", uuid.UUID(job.id).bytes) == 1
        assert await take(store, account) == []
        cursor = -1
        while cursor:
            survey = await store.upkeep.survey(max(cursor, 0), limit=200)
            cursor = survey.cursor
        assert [loan.delivery.request_id for loan in await take(store, account)] == [job.id]


async def test_an_entry_that_is_none_stops_nobody(redis_server: Redis, account: str) -> None:
    async with open_store(f"{redis_server.url.rpartition('/')[0]}/{DB}", SETTINGS) as opened:
        store = Store(opened.results, opened.webhooks, opened.upkeep)
        job, damaged = await accept(store, account), await accept(store, account)
        await settle(store, job)
        await settle(store, damaged)
        await ask(redis_server, "HSET", f"fnq:{{{damaged.id}}}:h", "d", "nonsense")
        await ask(redis_server, "ZADD", "fnq:{webhooks}:w", 0, b"no id", 0, uuid.uuid4().bytes)
        assert [loan.delivery.request_id for loan in await take(store, account)] == [job.id]
        assert await ask(redis_server, "ZSCORE", "fnq:{webhooks}:w", b"no id") is None
