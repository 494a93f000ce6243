"""The protocol's own steps, over the in-process back ends and a queue that can be made to fail."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any, cast

import pytest

from broker import accounts, invocations, request_ids
from broker.backends.hints import RecordWatch
from broker.backends.memory.queue import MemoryQueue
from broker.backends.memory.results import MemoryResults
from broker.errors import (
    AlreadyFinished,
    BlobsUnavailable,
    FnqueueError,
    Forbidden,
    IdempotencyKeyReused,
    NotFound,
    PublishRejected,
    PublishUnconfirmed,
    QueueFull,
    QueueMissing,
    RequestExpired,
    StoreUnavailable,
    Unavailable,
)
from broker.invocations import Submission
from broker.model import (
    FunctionStatus,
    Interest,
    Job,
    Lease,
    Outcome,
    Principal,
    Record,
    RequestFilter,
    RequestState,
    Verdict,
    Version,
)
from broker.ports import Blobs, Broker, Delivery

PRINCIPAL = Principal(account="acme", subject="key-1", scopes=frozenset(accounts.SCOPES))
STRANGER = Principal(account="acme2", subject="key-2", scopes=frozenset(accounts.SCOPES))
OUTCOME = Outcome(status=200, body=b"done")


class UnreliableQueue:
    """A MemoryQueue whose publishes meet the given ends, in order, before they go through.

    An end may be an error that is raised instead of publishing, or one raised after publishing."""

    def __init__(self, *ends: FnqueueError, landed: bool = False) -> None:
        self.inner = MemoryQueue()
        self.ends = list(ends)
        self.landed = landed

    async def declare(self, version_id: str) -> None:
        await self.inner.declare(version_id)

    async def delete(self, version_id: str) -> None:
        await self.inner.delete(version_id)

    async def publish(self, job: Job, *, timeout_s: float) -> None:
        if not self.ends:
            return await self.inner.publish(job, timeout_s=timeout_s)
        if self.landed:
            await self.inner.publish(job, timeout_s=timeout_s)
        raise self.ends.pop(0)

    def consume(self, version_id: str, *, prefetch: int) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        return self.inner.consume(version_id, prefetch=prefetch)

    def dead_letters(self, *, prefetch: int) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        return self.inner.dead_letters(prefetch=prefetch)

    async def take(self, version_id: str) -> Delivery | None:
        return await self.inner.take(version_id)

    async def depth(self, version_id: str) -> int | None:
        return await self.inner.depth(version_id)

    async def ping(self) -> None:
        await self.inner.ping()


@pytest.fixture
async def version(memory_broker: Broker) -> Version:
    made = Version(
        id=str(uuid.uuid4()),
        function_id=str(uuid.uuid4()),
        account="acme",
        name="echo",
        inference_url="/echo",
        container_image="fnqueue/echo:latest",
        created_at=0.0,
        status=FunctionStatus.ACTIVE,
    )
    await memory_broker.queue.declare(made.id)
    return made


class Tasks:
    """Tasks that outlive their caller; what they raise goes to whoever awaits them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Record]] = set()

    def __call__(self, work: Coroutine[Any, Any, Record]) -> asyncio.Future[Record]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        return asyncio.shield(task)

    async def finish(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    spawned = Tasks()
    yield spawned
    await spawned.finish()


def submission(version: Version, **changes: Any) -> Submission:
    plain = Submission(
        principal=PRINCIPAL,
        function_id=version.function_id,
        version_id="",
        headers=(("X-Color", "red"),),
        body=b"hello",
    )
    return replace(plain, **changes)


async def invoke(broker: Broker, version: Version, tasks: Tasks, *, wait_s: float = 0.0, **changes: Any) -> Record:
    return await invocations.invoke(broker, submission(version, **changes), version, wait_s=wait_s, spawn=tasks)


async def over(broker: Broker, version: Version, *ends: FnqueueError, landed: bool = False) -> Broker:
    queue = UnreliableQueue(*ends, landed=landed)
    await queue.declare(version.id)
    settings = broker.settings.model_copy(update={"accept_timeout_s": 1.0})
    return replace(broker, queue=queue, settings=settings)


async def run_one(broker: Broker, version: Version) -> Record:
    delivery = await broker.queue.take(version.id)
    assert delivery is not None
    claimed = await broker.results.claim(delivery.job, worker="w", lease_s=30, max_attempts=3)
    assert isinstance(claimed.lease, Lease)
    await broker.results.settle(claimed.lease, delivery.job, RequestState.FULFILLED, OUTCOME)
    await delivery.ack()
    record = await broker.results.read(delivery.job.id)
    assert record is not None
    return record


async def test_an_accepted_request_waits_in_the_queue_with_all_that_its_run_needs(
    memory_broker: Broker, version: Version, tasks: Tasks
) -> None:
    record = await invoke(memory_broker, version, tasks, passthrough=True, poll_s=9)
    assert record.state is RequestState.QUEUED
    delivery = await memory_broker.queue.take(version.id)
    assert delivery is not None
    job = delivery.job
    assert (job.id, job.account, job.subject, job.body) == (record.id, "acme", "key-1", b"hello")
    assert (job.headers, job.passthrough, job.poll_s) == ((("X-Color", "red"),), True, 9)
    assert (job.created_at, job.deadline_at) == (record.created_at, record.deadline_at)


async def test_a_waiting_caller_gets_the_result(memory_broker: Broker, version: Version, tasks: Tasks) -> None:
    waiting = asyncio.create_task(invoke(memory_broker, version, tasks, wait_s=30))
    async with memory_broker.queue.consume(version.id, prefetch=1) as deliveries:
        delivery = await anext(aiter(deliveries))
        claimed = await memory_broker.results.claim(delivery.job, worker="w", lease_s=30, max_attempts=3)
        assert claimed.lease is not None
        await memory_broker.results.settle(claimed.lease, delivery.job, RequestState.FULFILLED, OUTCOME)
        record = await asyncio.wait_for(waiting, 20)
    assert (record.state, record.outcome) == (RequestState.FULFILLED, OUTCOME)


async def test_a_body_too_large_for_a_message_waits_in_the_blob_store(
    memory_broker: Broker, version: Version, tasks: Tasks
) -> None:
    body = b"x" * (memory_broker.settings.inline_body_bytes + 1)
    await invoke(memory_broker, version, tasks, body=body)
    delivery = await memory_broker.queue.take(version.id)
    assert delivery is not None
    assert delivery.job.body == b""
    assert await memory_broker.blobs.get(delivery.job.body_key, limit_bytes=len(body)) == body
    assert delivery.job.body_sha256 == hashlib.sha256(body).hexdigest()


async def test_a_body_whose_blob_store_is_away_is_refused_and_leaves_nothing(
    memory_broker: Broker, version: Version, tasks: Tasks
) -> None:
    class Away:
        async def put(self, *_: object, **__: object) -> None:
            raise BlobsUnavailable("the blob store does not answer")

    broker = replace(memory_broker, blobs=cast("Blobs", Away()))
    body = b"x" * (memory_broker.settings.inline_body_bytes + 1)
    with pytest.raises(BlobsUnavailable):
        await invoke(broker, version, tasks, body=body, idempotency_key="k")
    assert (await memory_broker.results.load([version.id]))[0].queued == 0
    assert await memory_broker.queue.take(version.id) is None
    assert (await invoke(memory_broker, version, tasks, body=body, idempotency_key="k")).state is RequestState.QUEUED


async def test_a_full_queue_refuses_and_parks_nothing(memory_broker: Broker, version: Version, tasks: Tasks) -> None:
    broker = replace(memory_broker, settings=memory_broker.settings.model_copy(update={"queue_limit": 1}))
    await invoke(broker, version, tasks)
    with pytest.raises(QueueFull):
        await invoke(broker, version, tasks, body=b"x" * 300_000, idempotency_key="k")
    assert await broker.blobs.list("inputs/acme/") == []
    await run_one(broker, version)
    record = await invoke(broker, version, tasks, body=b"x" * 300_000, idempotency_key="k")
    assert record.state is RequestState.QUEUED


async def test_the_same_key_and_body_lead_to_the_same_request(
    memory_broker: Broker, version: Version, tasks: Tasks
) -> None:
    records = await asyncio.gather(
        *(invoke(memory_broker, version, tasks, idempotency_key="order-17") for _ in range(10))
    )
    assert len({record.id for record in records}) == 1
    done = await run_one(memory_broker, version)
    again = await invoke(memory_broker, version, tasks, idempotency_key="order-17", wait_s=5)
    assert again == done


class Unreadable(MemoryResults):
    """Takes everything, and shows nothing."""

    def watch(self, request_id: str, interest: Interest = Interest.END) -> RecordWatch:
        async def read(_: str, __: Interest) -> Record | None:
            raise StoreUnavailable("the store is away")

        return RecordWatch(self.hints, request_id, interest, read)


async def test_a_retry_by_key_is_not_refused_because_the_request_cannot_be_read(
    memory_broker: Broker, version: Version, tasks: Tasks
) -> None:
    broker = replace(memory_broker, results=Unreadable(memory_broker.settings))
    first = await invoke(broker, version, tasks, idempotency_key="k")
    again = await invoke(broker, version, tasks, idempotency_key="k", wait_s=5)
    assert (again.id, again.state) == (first.id, RequestState.QUEUED)
    await broker.results.cancel(first.id, reason="")
    with pytest.raises(Unavailable) as unknown:
        await invoke(broker, version, tasks, idempotency_key="k", wait_s=5)
    assert unknown.value.outcome_unknown


async def test_the_same_key_with_another_request_is_refused(
    memory_broker: Broker, version: Version, tasks: Tasks
) -> None:
    await invoke(memory_broker, version, tasks, idempotency_key="order-17")
    different: tuple[dict[str, Any], ...] = (
        {"body": b"other"},
        {"function_id": str(uuid.uuid4())},
        {"version_id": version.id},
    )
    for changes in different:
        with pytest.raises(IdempotencyKeyReused):
            await invoke(memory_broker, version, tasks, idempotency_key="order-17", **changes)


async def test_a_key_is_the_account_s_own(memory_broker: Broker, version: Version, tasks: Tasks) -> None:
    mine = await invoke(memory_broker, version, tasks, idempotency_key="order-17")
    theirs = await invoke(memory_broker, version, tasks, idempotency_key="order-17", principal=STRANGER, body=b"other")
    assert mine.id != theirs.id


async def test_a_retry_by_key_publishes_what_a_dead_front_end_only_created(
    memory_broker: Broker, version: Version, tasks: Tasks
) -> None:
    first = await invoke(memory_broker, version, tasks, idempotency_key="order-17")
    lost = await memory_broker.queue.take(version.id)
    assert lost is not None
    await lost.ack()
    again = await invoke(memory_broker, version, tasks, idempotency_key="order-17")
    assert again.id == first.id
    assert (await run_one(memory_broker, version)).id == first.id


async def test_an_unconfirmed_publish_is_tried_again_under_the_same_id(
    memory_broker: Broker, version: Version, tasks: Tasks
) -> None:
    broker = await over(memory_broker, version, PublishUnconfirmed("lost"), landed=True)
    record = await invoke(broker, version, tasks)
    first, second = await broker.queue.take(version.id), await broker.queue.take(version.id)
    assert first is not None
    assert second is not None
    assert first.job.id == second.job.id == record.id
    one = await broker.results.claim(first.job, worker="w", lease_s=30, max_attempts=3)
    two = await broker.results.claim(second.job, worker="w", lease_s=30, max_attempts=3)
    assert (one.verdict, two.verdict) == (Verdict.GRANTED, Verdict.HELD)


@pytest.mark.parametrize(
    ("cause", "raised"),
    [
        (PublishRejected("full"), QueueFull),
        (QueueMissing("no queue"), QueueMissing),
        (PublishUnconfirmed("lost"), Unavailable),
        (Unavailable("away"), Unavailable),
    ],
)
async def test_a_refused_request_never_starts_even_if_its_message_landed(
    memory_broker: Broker,
    version: Version,
    tasks: Tasks,
    cause: FnqueueError,
    raised: type[FnqueueError],
) -> None:
    broker = await over(memory_broker, version, *[cause] * 1000, landed=True)
    with pytest.raises(raised) as refused:
        await invoke(broker, version, tasks)
    assert not getattr(refused.value, "outcome_unknown", False)
    delivery = await broker.queue.take(version.id)
    assert delivery is not None
    claimed = await broker.results.claim(delivery.job, worker="w", lease_s=30, max_attempts=3)
    assert (claimed.verdict, claimed.state) == (Verdict.SETTLED, RequestState.ABANDONED)
    with pytest.raises(NotFound):
        await invocations.status(broker, PRINCIPAL, delivery.job.id, wait_s=0)


async def test_a_key_whose_request_was_refused_can_be_used_again(
    memory_broker: Broker, version: Version, tasks: Tasks
) -> None:
    broker = await over(memory_broker, version, QueueMissing("no queue"))
    with pytest.raises(QueueMissing):
        await invoke(broker, version, tasks, idempotency_key="order-17")
    record = await invoke(broker, version, tasks, idempotency_key="order-17")
    assert (await run_one(broker, version)).id == record.id


async def test_a_request_that_already_runs_counts_as_accepted_although_its_confirm_was_lost(
    memory_broker: Broker, version: Version, tasks: Tasks
) -> None:
    broker = await over(memory_broker, version, *[PublishUnconfirmed("lost")] * 1000, landed=True)
    invoking = asyncio.create_task(invoke(broker, version, tasks, wait_s=30))
    async with broker.queue.consume(version.id, prefetch=1) as deliveries:
        delivery = await anext(aiter(deliveries))
        claimed = await broker.results.claim(delivery.job, worker="w", lease_s=30, max_attempts=3)
        assert claimed.lease is not None
        await broker.results.settle(claimed.lease, delivery.job, RequestState.FULFILLED, OUTCOME)
    assert (await asyncio.wait_for(invoking, 20)).outcome == OUTCOME


async def test_a_caller_who_leaves_does_not_interrupt_acceptance(
    memory_broker: Broker, version: Version, tasks: Tasks
) -> None:
    invoking = asyncio.create_task(invoke(memory_broker, version, tasks, wait_s=30))
    await asyncio.sleep(0)
    invoking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await invoking
    async with memory_broker.queue.consume(version.id, prefetch=1) as deliveries:
        delivery = await asyncio.wait_for(anext(aiter(deliveries)), 20)
    record = await memory_broker.results.read(delivery.job.id)
    assert record is not None
    assert record.state is RequestState.QUEUED


async def test_foreign_random_and_guessed_ids_are_all_unknown(
    memory_broker: Broker, version: Version, tasks: Tasks
) -> None:
    record = await invoke(memory_broker, version, tasks)
    verbs: list[Callable[[str], Coroutine[Any, Any, Any]]] = [
        lambda request_id: invocations.status(memory_broker, STRANGER, request_id, wait_s=0),
        lambda request_id: invocations.receipt(memory_broker, STRANGER, request_id),
        lambda request_id: invocations.cancel(memory_broker, STRANGER, request_id),
        lambda request_id: invocations.position(memory_broker, STRANGER, request_id),
    ]
    for verb in verbs:
        said = set()
        for request_id in (record.id, str(uuid.uuid4())):
            with pytest.raises(NotFound) as refused:
                await verb(request_id)
            said.add((type(refused.value), str(refused.value)))
        assert len(said) == 1


async def test_an_id_of_ours_without_a_record_has_expired(memory_broker: Broker) -> None:
    secret = memory_broker.settings.secret_key.get_secret_value().encode()[:64]
    epoch = await memory_broker.results.epoch()
    with pytest.raises(RequestExpired):
        await invocations.status(memory_broker, PRINCIPAL, request_ids.mint(secret, "acme", epoch.number), wait_s=0)


async def test_an_id_from_before_the_store_was_wiped_is_pending(memory_broker: Broker) -> None:
    secret = memory_broker.settings.secret_key.get_secret_value().encode()[:64]
    epoch = await memory_broker.results.epoch()
    lost = request_ids.mint(secret, "acme", (epoch.number + 1) % 256)
    record = await invocations.status(memory_broker, PRINCIPAL, lost, wait_s=0)
    assert (record.id, record.state) == (lost, RequestState.QUEUED)


async def test_a_request_has_its_own_limits_or_its_functions(
    memory_broker: Broker, version: Version, tasks: Tasks
) -> None:
    limited = replace(version, queue_timeout_s=30.0, run_timeout_s=7.0)
    plain = await invoke(memory_broker, version, tasks)
    theirs = await invoke(memory_broker, limited, tasks, region="eu")
    own = await invoke(memory_broker, limited, tasks, queue_timeout_s=5.0, run_timeout_s=60.0)
    told = [(round(record.queue_deadline_at - record.created_at, 3), record.run_timeout_s) for record in (theirs, own)]
    assert (plain.queue_deadline_at, plain.run_timeout_s) == (0, 0)
    assert told == [(30, 7), (5, 60)]
    jobs = [delivery.job for _ in range(3) if (delivery := await memory_broker.queue.take(version.id))]
    assert [(job.queue_deadline_at, job.run_timeout_s) for job in jobs] == [
        (record.queue_deadline_at, record.run_timeout_s) for record in (plain, theirs, own)
    ]
    assert [job.region for job in jobs] == ["", "eu", ""]


async def test_a_waiting_caller_is_told_at_once_that_nobody_took_it(
    memory_broker: Broker, version: Version, tasks: Tasks
) -> None:
    invoking = invoke(memory_broker, version, tasks, wait_s=120, queue_timeout_s=0.1)
    record = await asyncio.wait_for(invoking, 20)
    assert record.overslept


async def test_a_key_for_one_function_lists_only_its_requests(
    memory_broker: Broker, version: Version, tasks: Tasks
) -> None:
    other = replace(version, id=str(uuid.uuid4()), function_id=str(uuid.uuid4()))
    await memory_broker.queue.declare(other.id)
    mine = await invoke(memory_broker, version, tasks)
    hidden = await invoke(memory_broker, other, tasks)
    narrow = replace(PRINCIPAL, resources=frozenset({f"function/{version.function_id}/*"}))
    for principal, seen in ((PRINCIPAL, [hidden.id, mine.id]), (narrow, [mine.id]), (STRANGER, [])):
        page = await invocations.page(memory_broker, principal, RequestFilter(), limit=10)
        assert [record.id for record in page.records] == seen
    with pytest.raises(Forbidden):
        await invocations.receipt(memory_broker, narrow, hidden.id)


async def test_cancel_is_final_and_can_be_repeated(memory_broker: Broker, version: Version, tasks: Tasks) -> None:
    record = await invoke(memory_broker, version, tasks)
    for _ in range(2):
        assert (await invocations.cancel(memory_broker, PRINCIPAL, record.id)).state is RequestState.CANCELLED
    assert (await invocations.status(memory_broker, PRINCIPAL, record.id, wait_s=0)).state is RequestState.CANCELLED


async def test_a_finished_request_cannot_be_cancelled(memory_broker: Broker, version: Version, tasks: Tasks) -> None:
    record = await invoke(memory_broker, version, tasks)
    await run_one(memory_broker, version)
    with pytest.raises(AlreadyFinished):
        await invocations.cancel(memory_broker, PRINCIPAL, record.id)


async def test_position_counts_from_one_and_is_zero_when_done(
    memory_broker: Broker, version: Version, tasks: Tasks
) -> None:
    records = [await invoke(memory_broker, version, tasks) for _ in range(3)]
    ranks = [(await invocations.position(memory_broker, PRINCIPAL, record.id))[1].rank for record in records]
    assert ranks == [1, 2, 3]
    await run_one(memory_broker, version)
    ranks = [(await invocations.position(memory_broker, PRINCIPAL, record.id))[1].rank for record in records]
    assert ranks == [0, 1, 2]


async def test_withdrawing_takes_a_request_out_of_the_queue(
    memory_broker: Broker, version: Version, tasks: Tasks
) -> None:
    record = await invoke(memory_broker, version, tasks)
    assert (await invocations.withdraw(memory_broker, record)).state is RequestState.CANCELLED
    assert (await memory_broker.results.load([version.id]))[0].queued == 0
