"""The undertaker: dead letters and overdue requests come to an end that can be read."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, field, replace
from typing import cast

import pytest

from broker import functions
from broker.backends.memory.results import MemoryResults
from broker.errors import StoreUnavailable
from broker.functions import Definition
from broker.model import Claim, Draft, Job, Outcome, Principal, Record, RequestState
from broker.ports import Broker, Results
from broker.settings import Settings
from workers.controller import undertaker

OURS = Principal(account="ours", subject="me", scopes=frozenset())
FUNCTION = Definition(name="f", inference_url="/", container_image="i")


class Clock:
    """A store's clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass(slots=True)
class Loan:
    """A Delivery that notes how it ended."""

    job: Job
    death: str = ""
    fault: str = ""
    ended: list[str] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    async def ack(self) -> None:
        self._end("ack")

    async def requeue(self) -> None:
        self._end("requeue")

    async def reject(self) -> None:
        self._end("reject")

    def _end(self, verb: str) -> None:
        self.ended.append(verb)
        self.over.set()


def job_of(version_id: str = "v", *, created_at: float = 1000.0) -> Job:
    return Job(
        id=str(uuid.uuid4()),
        account="ours",
        function_id="f",
        version_id=version_id,
        subject="me",
        created_at=created_at,
        deadline_at=created_at + 3600,
        digest="",
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def broker(memory_broker: Broker, clock: Clock) -> Broker:
    return replace(memory_broker, results=MemoryResults(Settings(), now=clock))


async def read(broker: Broker, job: Job) -> Record:
    record = await broker.results.read(job.id)
    assert record is not None
    return record


@pytest.mark.parametrize(
    ("death", "state"),
    [
        ("expired", RequestState.EXPIRED),
        ("delivery_limit", RequestState.DEAD),
        ("rejected", RequestState.DEAD),
        ("maxlen", RequestState.DEAD),
        ("a word of a later release", RequestState.DEAD),
    ],
)
async def test_every_dead_letter_becomes_a_terminal_record_with_a_reason(
    broker: Broker, death: str, state: RequestState
) -> None:
    loan = Loan(job_of(), death=death)
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(undertaker.serve(replace(broker, queue=OneDeadLetter(loan))))  # type: ignore[arg-type]  # all of a Queue that it uses
        await asyncio.wait_for(loan.over.wait(), 20)
        serving.cancel()
    record = await read(broker, loan.job)
    assert record.state is state
    assert record.reason
    assert loan.ended == ["ack"]


async def test_of_a_message_that_is_not_ours_only_the_waiting_request_is_ended(broker: Broker, clock: Clock) -> None:
    draft = Draft(
        id=str(uuid.uuid4()), account="ours", function_id="f", version_id="v", deadline_s=60.0, digest=""
    )  # fmt: skip
    await broker.results.create(draft, queue_limit=10, watch=False)
    forged = replace(job_of("another version"), id=draft.id, account="theirs")
    await undertaker.disown(broker, loan := Loan(forged, fault="it was altered after it was signed"))
    record = await read(broker, forged)
    assert (record.state, record.account, record.version_id) == (RequestState.DEAD, "ours", "v")
    assert record.reason == "its message was refused: it was altered after it was signed"
    assert loan.ended == ["ack"]


async def test_a_message_that_is_not_ours_neither_stops_a_running_request_nor_makes_a_record(broker: Broker) -> None:
    running, unknown = job_of(), job_of()
    await broker.results.claim(running, worker="w", lease_s=15, max_attempts=3)
    for job in (running, unknown):
        await undertaker.disown(broker, loan := Loan(job, fault="it is not signed"))
        assert loan.ended == ["ack"]
    assert (await read(broker, running)).state is RequestState.RUNNING
    assert await broker.results.read(unknown.id) is None


class OneDeadLetter:
    """A queue with one dead letter, and none after it."""

    def __init__(self, loan: Loan) -> None:
        self._loan: Loan | None = loan

    def dead_letters(self, *, prefetch: int) -> OneDeadLetter:
        assert prefetch > 1
        return self

    async def __aenter__(self) -> OneDeadLetter:
        return self

    async def __aexit__(self, *_: object) -> None:
        return

    def __aiter__(self) -> OneDeadLetter:
        return self

    async def __anext__(self) -> Loan:
        loan, self._loan = self._loan, None
        if loan is None:
            await asyncio.Event().wait()
        return cast(Loan, loan)


async def test_a_rejected_message_is_buried_from_the_real_dead_letters(memory_broker: Broker) -> None:
    await memory_broker.queue.declare("v")
    job = job_of()
    await memory_broker.queue.publish(job, timeout_s=1)
    async with asyncio.TaskGroup() as group, memory_broker.results.watch(job.id) as watch:
        await watch.read()
        burying = group.create_task(undertaker.serve(memory_broker))
        delivery = await memory_broker.queue.take("v")
        assert delivery is not None
        await delivery.reject()
        async with asyncio.timeout(20):
            while (record := await watch.read()) is None or not record.state.terminal:
                await watch.changed(0.01)
        burying.cancel()
    assert record.state is RequestState.DEAD


async def test_the_first_terminal_record_stands(broker: Broker) -> None:
    job = job_of()
    claim = await broker.results.claim(job, worker="w", lease_s=15, max_attempts=3)
    assert claim.lease is not None
    await broker.results.settle(claim.lease, job, RequestState.FULFILLED, Outcome(status=200))
    loan = Loan(job)
    assert await undertaker.bury(broker, loan, undertaker.End(RequestState.DEAD, "late"))
    assert (await read(broker, job)).state is RequestState.FULFILLED
    assert loan.ended == ["ack"]


async def test_a_request_that_a_worker_holds_is_ended_when_the_lease_is(broker: Broker, clock: Clock) -> None:
    job = job_of()
    await broker.results.claim(job, worker="w", lease_s=0.2, max_attempts=3)
    loan = Loan(job)
    async with asyncio.TaskGroup() as group:
        burying = group.create_task(undertaker.bury(broker, loan, undertaker.End(RequestState.DEAD, "lost")))
        await asyncio.sleep(0)
        assert loan.ended == []
        assert (await read(broker, job)).state is RequestState.RUNNING
        clock.now += 1
    assert burying.result()
    assert (await read(broker, job)).state is RequestState.DEAD


async def test_a_message_is_not_kept_on_loan_for_ever(broker: Broker) -> None:
    job = job_of()
    await broker.results.claim(job, worker="w", lease_s=15, max_attempts=3)
    loan = Loan(job)
    assert not await undertaker.bury(broker, loan, undertaker.End(RequestState.DEAD, "lost"), hold_s=0.05)
    assert loan.ended == ["requeue"]
    assert (await read(broker, job)).state is RequestState.RUNNING


async def test_an_interrupted_burial_gives_the_message_back(broker: Broker) -> None:
    job = job_of()
    await broker.results.claim(job, worker="w", lease_s=15, max_attempts=3)
    loan = Loan(job)
    burying = asyncio.ensure_future(undertaker.bury(broker, loan, undertaker.End(RequestState.DEAD, "lost")))
    await asyncio.sleep(0)
    burying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await burying
    assert loan.ended == ["requeue"]


class AwayOnce(MemoryResults):
    """A store that does not answer the first time."""

    answers = False

    async def end(self, job: Job, state: RequestState, *, reason: str, cause: str = "") -> Claim:
        if not self.answers:
            self.answers = True
            raise StoreUnavailable("away")
        return await super().end(job, state, reason=reason, cause=cause)


async def test_a_store_that_is_away_is_waited_for(broker: Broker) -> None:
    broker = replace(broker, results=cast(Results, AwayOnce(Settings())))
    loan = Loan(job_of())
    assert await undertaker.bury(broker, loan, undertaker.End(RequestState.DEAD, "lost"))
    assert loan.ended == ["ack"]


async def test_clearing_cancels_all_that_is_queued(memory_broker: Broker) -> None:
    await memory_broker.queue.declare("v")
    jobs = [job_of() for _ in range(5)]
    for job in jobs:
        await memory_broker.queue.publish(job, timeout_s=1)
    assert await undertaker.clear(memory_broker, "v")
    assert {(await read(memory_broker, job)).state for job in jobs} == {RequestState.CANCELLED}
    assert await memory_broker.queue.take("v") is None


async def test_clearing_a_queue_that_is_missing_is_done(memory_broker: Broker) -> None:
    assert await undertaker.clear(memory_broker, "nobody's")


async def test_the_sweep_expires_what_is_overdue(broker: Broker, clock: Clock) -> None:
    version = await functions.create(broker, OURS, FUNCTION)
    job = job_of(version.id)
    claim = await broker.results.claim(job, worker="w", lease_s=15, max_attempts=3)
    assert claim.lease is not None
    clock.now += 7200
    await undertaker.sweep(broker)
    (load,) = await broker.results.load([version.id])
    assert (load.queued, load.running) == (0, 0)
    assert (await read(broker, job)).state is RequestState.EXPIRED
