"""What a version and an account may have queued and running, over every Results back end."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

import pytest

from broker.backends.memory.results import MemoryResults
from broker.backends.redis.store import open_store
from broker.errors import AccountFull, QueueFull
from broker.model import Draft, Job, Outcome, Record, RequestState, Verdict
from broker.ports import Results
from broker.settings import Settings
from infra.local.servers import Redis
from tests.contract.records import job_of

Opened = Callable[..., AbstractAsyncContextManager[Results]]
DONE = Outcome(status=200, body=b"done")


@pytest.fixture(params=["memory", "redis"])
def opened(request: pytest.FixtureRequest) -> Opened:
    @asynccontextmanager
    async def make(**limits: int) -> AsyncIterator[Results]:
        settings = Settings(**limits)  # type: ignore[arg-type]  # settings by name
        if request.param == "memory":
            yield MemoryResults(settings)
            return
        server: Redis = request.getfixturevalue("redis_server")
        async with open_store(server.url, settings) as (results, *_):
            yield results

    return make


def draft(*, account: str, version_id: str, size_bytes: int = 10, deadline_s: float = 60.0) -> Draft:
    return Draft(
        id=str(uuid.uuid4()),
        account=account,
        function_id="f",
        version_id=version_id,
        digest="",
        deadline_s=deadline_s,
        size_bytes=size_bytes,
    )


class Place:
    """A version and an account of the test's own."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.account, self.version_id = uuid.uuid4().hex, str(uuid.uuid4())

    async def submit(self, *, size_bytes: int = 10, version_id: str = "", deadline_s: float = 60.0) -> Job:
        wanted = draft(
            account=self.account,
            version_id=version_id or self.version_id,
            size_bytes=size_bytes,
            deadline_s=deadline_s,
        )
        return job_of(await self.results.create(wanted, queue_limit=1000, watch=False))

    async def settle(self, job: Job) -> None:
        claim = await self.results.claim(job, worker="w", lease_s=30, max_attempts=3)
        assert claim.lease is not None
        await self.results.settle(claim.lease, job, RequestState.FULFILLED, DONE)

    async def begin(self, job: Job) -> None:
        claim = await self.results.claim(job, worker="w", lease_s=30, max_attempts=3)
        assert claim.verdict is Verdict.GRANTED


async def test_of_many_at_once_exactly_as_many_as_may_be_are_admitted(opened: Opened) -> None:
    async with opened(account_requests=7) as results:
        place = Place(results)
        versions = [str(uuid.uuid4()) for _ in range(3)]
        ended = await asyncio.gather(
            *(place.submit(version_id=versions[n % 3]) for n in range(60)), return_exceptions=True
        )
        assert [type(each) for each in ended if not isinstance(each, Job)] == [AccountFull] * 53
        loads = await results.load(versions)
        assert sum(load.queued for load in loads) == 7


@pytest.mark.parametrize("limit", ["version_requests", "account_requests", "version_bytes", "account_bytes"])
async def test_a_running_request_still_counts_and_a_finished_one_does_not(opened: Opened, limit: str) -> None:
    async with opened(**{limit: 25 if limit.endswith("bytes") else 2}) as results:
        place = Place(results)
        first, second = await place.submit(), await place.submit()
        await place.begin(second)
        with pytest.raises(QueueFull) as refused:
            await place.submit()
        assert refused.value.limit == limit
        await place.settle(first)
        await place.submit()
        with pytest.raises(QueueFull):
            await place.submit()


async def test_a_refusal_leaves_nothing_behind(opened: Opened) -> None:
    async with opened(account_requests=1) as results:
        place = Place(results)
        job = await place.submit()
        for _ in range(3):
            with pytest.raises(AccountFull):
                await place.submit()
        assert (await results.load([place.version_id]))[0].queued == 1
        await results.cancel(job.id, reason="")
        await place.submit()


@pytest.mark.parametrize("end", ["cancelled", "abandoned", "expired", "dead", "settled twice", "ended twice"])
async def test_however_a_request_ends_its_place_is_given_back_once(opened: Opened, end: str) -> None:
    async with opened(version_requests=2, account_bytes=20) as results:
        place = Place(results)
        await place.submit()
        job = await place.submit(deadline_s=0.001 if end == "expired" else 60)
        match end:
            case "cancelled":
                await results.cancel(job.id, reason="")
                await results.cancel(job.id, reason="")
            case "abandoned":
                assert await results.abandon(job.id, job.version_id, reason="")
                assert await results.abandon(job.id, job.version_id, reason="")
            case "expired":
                await asyncio.sleep(0.01)  # the store's clock has to pass the deadline
                record = await results.read(job.id)
                assert record is not None
                assert record.state is RequestState.EXPIRED
            case "dead" | "ended twice":
                for _ in range(2 if end == "ended twice" else 1):
                    await results.end(job, RequestState.DEAD, reason="")
            case _:
                await place.settle(job)
                assert (await results.claim(job, worker="w", lease_s=1, max_attempts=3)).verdict is Verdict.SETTLED
        await place.submit()
        with pytest.raises(QueueFull):
            await place.submit()


async def test_a_request_that_goes_back_to_the_queue_keeps_its_one_place(opened: Opened) -> None:
    async with opened(account_requests=1) as results:
        place = Place(results)
        job = await place.submit()
        claim = await results.claim(job, worker="w", lease_s=30, max_attempts=3)
        assert claim.lease is not None
        await results.release(claim.lease, refund=True)
        with pytest.raises(AccountFull):
            await place.submit()
        await place.settle(job)
        await place.submit()


async def test_the_same_request_again_takes_no_second_place(opened: Opened) -> None:
    async with opened(account_requests=1, account_bytes=10) as results:
        place = Place(results)
        wanted = draft(account=place.account, version_id=place.version_id)
        first = await results.create(wanted, queue_limit=1000, watch=False)
        assert await results.create(wanted, queue_limit=1000, watch=False) == first
        await place.settle(job_of(first))
        assert (await results.create(wanted, queue_limit=1000, watch=False)).state is RequestState.FULFILLED
        await place.submit()


async def test_a_lost_request_that_is_rebuilt_counts_its_body_wherever_that_is(opened: Opened) -> None:
    async with opened(version_bytes=100) as results:
        place = Place(results)
        record = Record(
            id=str(uuid.uuid4()),
            account=place.account,
            function_id="f",
            version_id=place.version_id,
            state=RequestState.QUEUED,
            created_at=(await results.epoch(fresh=True)).now,
            deadline_at=(await results.epoch()).now + 60,
        )
        lost = replace(job_of(record), body_key="inputs/x", blob_bytes=95)
        await place.begin(lost)
        with pytest.raises(QueueFull) as refused:
            await place.submit(size_bytes=10)
        assert refused.value.limit == "version_bytes"
        await place.submit(size_bytes=5)
        await results.cancel(lost.id, reason="")
        await place.submit(size_bytes=95)


@pytest.mark.parametrize("limit", ["queue_limit", "version_requests", "account_requests", "account_bytes"])
async def test_a_limit_that_was_met_is_met_again_until_there_is_room_and_lets_the_same_request_pass(
    opened: Opened, limit: str
) -> None:
    """Whatever a back end remembers of a limit that it met."""
    limits = {"account_bytes": 20} if limit == "account_bytes" else {} if limit == "queue_limit" else {limit: 2}
    async with opened(**limits) as results:
        place = Place(results)
        wanted = [draft(account=place.account, version_id=place.version_id) for _ in range(3)]

        async def create(which: int) -> Record:
            return await results.create(wanted[which], queue_limit=2 if limit == "queue_limit" else 100, watch=False)

        first, second = await create(0), await create(1)
        for _ in range(3):
            with pytest.raises(QueueFull):
                await create(2)
        assert await create(1) == second
        await results.cancel(first.id, reason="")
        assert (await create(2)).state is RequestState.QUEUED
        wanted.append(draft(account=place.account, version_id=place.version_id))
        with pytest.raises(QueueFull):
            await create(3)


async def test_what_a_crash_left_counted_is_found_by_the_sweep(redis_server: Redis) -> None:
    """Of a request whose worker died between the terminal record and what follows it."""
    async with open_store(redis_server.url, Settings(version_requests=1, account_requests=1)) as (results, *_):
        place = Place(results)
        job = await place.submit()
        keys = [f"fnq:{{{job.version_id}}}:{each}" for each in "qx"]
        await results._connection.run(  # type: ignore[attr-defined]  # a crash has no port
            ("HSET", f"fnq:{{{job.id}}}:r", "s", "fulfilled"), ("DEL", *keys)
        )
        with pytest.raises(QueueFull):
            await place.submit()
        assert await results.sweep(job.version_id, limit=100) == 1
        await place.submit()
