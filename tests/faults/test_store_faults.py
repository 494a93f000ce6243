"""Redis dies, stalls, forgets, or loses its subscribers."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from redis.asyncio import Redis as Client

from broker.backends.redis.store import open_store
from broker.errors import StoreUnavailable
from broker.model import Draft, Job, Outcome, Record, RequestFilter, RequestState, Verdict
from broker.ports import Results
from broker.settings import Settings
from infra.local import binaries
from infra.local.servers import Redis
from tests.contract.records import job_of
from tests.eventually import eventually
from tests.frozen import frozen

OUTCOME = Outcome(status=200, body=b"result")


def make_draft(version_id: str) -> Draft:
    return Draft(
        id=str(uuid.uuid4()), account="acme", function_id="f", version_id=version_id, digest="", deadline_s=600
    )


async def finish(results: Results, job: Job) -> RequestState:
    claimed = await results.claim(job, worker="w", lease_s=30, max_attempts=3)
    assert claimed.lease is not None
    return await results.settle(claimed.lease, job, RequestState.FULFILLED, OUTCOME)


async def replicate(primary: Redis, replica: Redis) -> None:
    async with Client.from_url(replica.url) as client:
        await client.replicaof("127.0.0.1", primary.port)

        async def linked() -> object:
            return (await client.info("replication"))["master_link_status"]

        await eventually(linked, lambda status: status == "up")


class OnStallingDisk(Redis):
    """Its disk stalls from `stall` on, until its process is another one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._shim, self._stalled = self.folder / "stalled_disk.so", self.folder / "stalled"
        source = Path(__file__).with_name("stalled_disk.c")
        compiler = str(binaries.program("tcc"))
        subprocess.run([compiler, "-nostdlib", "-shared", "-o", str(self._shim), str(source)], check=True, timeout=60)

    def environment(self) -> Mapping[str, str]:
        return {**super().environment(), "LD_PRELOAD": str(self._shim), "STALLED": str(self._stalled)}

    def stall(self) -> None:
        self._stalled.touch()

    def spawn(self) -> None:
        self._stalled.unlink(missing_ok=True)
        super().spawn()


async def answers(results: Results) -> bool:
    try:
        await results.ping()
    except StoreUnavailable:
        return False
    return True


async def test_results_survive_a_killed_redis_and_waiters_hear_of_new_ones(new_redis: Callable[[], Redis]) -> None:
    server = await asyncio.to_thread(new_redis)
    version_id = str(uuid.uuid4())
    async with open_store(server.url, Settings(store_timeout_s=1)) as (results, *_):
        jobs = [job_of(await results.create(make_draft(version_id), queue_limit=1000, watch=False)) for _ in range(20)]
        for job in jobs[:10]:
            await finish(results, job)
        async with results.watch(jobs[10].id) as watch:
            await watch.read()
            await asyncio.to_thread(server.kill)
            with pytest.raises(StoreUnavailable):
                await results.read(jobs[0].id)
            await asyncio.to_thread(server.start)
            await eventually(lambda: answers(results), bool)
            records = [await results.read(job.id) for job in jobs]
            assert [record.state for record in records if record] == [RequestState.FULFILLED] * 10 + [
                RequestState.QUEUED
            ] * 10
            await finish(results, jobs[10])

            async def seen() -> Record | None:
                await watch.changed(10)
                return await watch.read()

            await eventually(seen, lambda record: record is not None and record.outcome == OUTCOME)


async def test_what_was_acknowledged_while_the_disk_stalled_outlives_a_kill(
    programs: None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    server = OnStallingDisk(tmp_path_factory.mktemp("stalling-redis"))
    version_id = str(uuid.uuid4())
    acknowledged: list[str] = []

    async def create(results: Results) -> None:
        with contextlib.suppress(StoreUnavailable):
            while True:
                record = await results.create(make_draft(version_id), queue_limit=1_000_000, watch=False)
                acknowledged.append(record.id)

    with contextlib.ExitStack() as running:
        await asyncio.to_thread(running.enter_context, server)
        async with open_store(server.url, Settings(store_timeout_s=30)) as (results, *_):
            creating = [asyncio.create_task(create(results)) for _ in range(8)]
            await eventually(lambda: answers(results), lambda _: len(acknowledged) > 8)
            server.stall()
            await asyncio.sleep(4)  # within the second stall, when `everysec` has acknowledged what it holds in memory
            await asyncio.to_thread(server.kill)
            await asyncio.gather(*creating)
            await asyncio.to_thread(server.start)
            await eventually(lambda: answers(results), bool)
            assert [request_id for request_id in acknowledged if await results.read(request_id) is None] == []


async def test_five_hundred_waiters_are_told_after_their_subscription_was_cut(new_redis: Callable[[], Redis]) -> None:
    server = await asyncio.to_thread(new_redis)
    version_id = str(uuid.uuid4())
    async with (
        open_store(server.url, Settings()) as (results, *_),
        open_store(server.url, Settings()) as (worker, *_),
        Client.from_url(server.url) as client,
    ):
        records = [await results.create(make_draft(version_id), queue_limit=1000, watch=False) for _ in range(500)]
        reading = 0
        all_read = asyncio.Event()

        async def wait(request_id: str) -> RequestState:
            nonlocal reading
            async with results.watch(request_id) as watch:
                record = await watch.read()
                reading += 1
                if reading == len(records):
                    all_read.set()
                while record is None or not record.state.terminal:
                    await watch.changed(60)
                    record = await watch.read()
                return record.state

        waiting = [asyncio.create_task(wait(record.id)) for record in records]
        await all_read.wait()
        await client.client_kill_filter(_type="pubsub")
        await asyncio.gather(*(finish(worker, job_of(record)) for record in records))
        assert await asyncio.wait_for(asyncio.gather(*waiting), 30) == [RequestState.FULFILLED] * 500


async def test_a_result_is_neither_acknowledged_nor_shown_before_a_replica_has_it(
    new_redis: Callable[[], Redis],
) -> None:
    primary, replica = await asyncio.to_thread(new_redis), await asyncio.to_thread(new_redis)
    await replicate(primary, replica)
    settings = Settings(store_timeout_s=0.4, durable_replicas=1)
    async with open_store(primary.url, settings) as (results, *_):
        job = job_of(await results.create(make_draft(str(uuid.uuid4())), queue_limit=10, watch=False))
        claimed = await results.claim(job, worker="w", lease_s=30, max_attempts=3)
        assert claimed.lease is not None
        with frozen(replica.pid):
            with pytest.raises(StoreUnavailable):
                await results.settle(claimed.lease, job, RequestState.FULFILLED, OUTCOME)
            with pytest.raises(StoreUnavailable):
                await results.read(job.id)
            with pytest.raises(StoreUnavailable):
                await results.page(job.account, RequestFilter(), limit=1)
            refused = make_draft(job.version_id)
            with pytest.raises(StoreUnavailable):
                await results.create(refused, queue_limit=10, watch=False)

        async def settled() -> RequestState | None:
            try:
                assert claimed.lease is not None
                return await results.settle(claimed.lease, job, RequestState.FULFILLED, OUTCOME)
            except StoreUnavailable:
                return None

        assert await eventually(settled, lambda state: state is not None) is RequestState.FULFILLED
        record = await eventually(
            lambda: results.read(job.id), lambda seen: seen is not None and seen.state is RequestState.FULFILLED
        )
        assert record is not None
        assert record.outcome == OUTCOME
        assert await results.read(refused.id) is None
        assert [load.queued for load in await results.load([job.version_id])] == [0]


async def test_one_replica_is_not_enough_while_the_other_may_have_been_promoted(new_redis: Callable[[], Redis]) -> None:
    primary, promoted, other = [await asyncio.to_thread(new_redis) for _ in range(3)]
    await replicate(primary, promoted)
    await replicate(primary, other)
    settings = Settings(durable_replicas=1, store_replicas=2, store_failover_s=300)
    async with open_store(primary.url, settings) as (results, *_):

        async def created() -> Record | None:
            try:
                return await results.create(make_draft(str(uuid.uuid4())), queue_limit=10, watch=False)
            except StoreUnavailable:
                return None

        record = await eventually(created, lambda made: made is not None)
        assert record is not None
        async with Client.from_url(promoted.url) as client:
            await client.replicaof("NO", "ONE")
        assert await created() is None
        with pytest.raises(StoreUnavailable):
            await results.read(record.id)
    async with open_store(primary.url, settings.model_copy(update={"store_failover_s": 0})) as (results, *_):
        assert await results.read(record.id) == record


async def test_a_store_without_memory_refuses_what_is_new_and_keeps_what_it_has(
    new_redis: Callable[[], Redis],
) -> None:
    server, version_id = await asyncio.to_thread(new_redis), str(uuid.uuid4())
    async with open_store(server.url, Settings()) as (results, *_), Client.from_url(server.url) as client:
        done, running = [
            job_of(await results.create(make_draft(version_id), queue_limit=10, watch=False)) for _ in range(2)
        ]
        await finish(results, done)
        claimed = await results.claim(running, worker="w", lease_s=60, max_attempts=3)
        assert claimed.lease is not None
        await client.config_set("maxmemory", 1)
        refused = make_draft(version_id)
        with pytest.raises(StoreUnavailable):
            await results.create(refused, queue_limit=10, watch=False)
        with pytest.raises(StoreUnavailable):
            await results.settle(claimed.lease, running, RequestState.FULFILLED, OUTCOME)
        await client.config_set("maxmemory", 0)

        async def settled() -> RequestState | None:
            try:
                assert claimed.lease is not None
                return await results.settle(claimed.lease, running, RequestState.FULFILLED, OUTCOME)
            except StoreUnavailable:
                return None

        assert await eventually(settled, lambda state: state is not None) is RequestState.FULFILLED
        for job in (done, running):
            record = await results.read(job.id)
            assert record is not None
            assert (record.state, record.outcome) == (RequestState.FULFILLED, OUTCOME)
        assert await results.read(refused.id) is None
        assert (await client.info("stats"))["evicted_keys"] == 0
        await results.create(make_draft(version_id), queue_limit=10, watch=False)


async def test_cancelled_callers_never_get_each_others_replies(new_redis: Callable[[], Redis]) -> None:
    server = await asyncio.to_thread(new_redis)
    async with open_store(server.url, Settings()) as (results, *_):
        version_id = str(uuid.uuid4())
        records = [await results.create(make_draft(version_id), queue_limit=1000, watch=False) for _ in range(200)]

        async def read(number: int) -> None:
            record = records[number % len(records)]
            try:
                async with asyncio.timeout(0.0005 * (number % 7)):
                    seen = await results.read(record.id)
            except TimeoutError:
                return
            assert seen is not None
            assert seen.id == record.id
            assert seen.created_at == record.created_at

        for _ in range(10):
            await asyncio.gather(*(read(number) for number in range(500)))
        assert await asyncio.gather(*(results.read(record.id) for record in records)) == records


async def test_a_wiped_store_starts_a_new_epoch_and_heals_by_claim(new_redis: Callable[[], Redis]) -> None:
    server = await asyncio.to_thread(new_redis)
    async with open_store(server.url, Settings()) as (results, *_), Client.from_url(server.url) as client:
        job = job_of(await results.create(make_draft(str(uuid.uuid4())), queue_limit=10, watch=False))
        before = await results.epoch(fresh=True)
        await client.flushall()
        await client.script_flush()
        after = await results.epoch(fresh=True)
        assert after.born_at > before.born_at
        claimed = await results.claim(job, worker="w", lease_s=30, max_attempts=3)
        assert claimed.verdict is Verdict.GRANTED
        assert claimed.lease is not None
        await client.flushall()
        assert await results.settle(claimed.lease, job, RequestState.FULFILLED, OUTCOME) is RequestState.FULFILLED
        record = await results.read(job.id)
        assert record is not None
        assert record.outcome == OUTCOME
