"""What RabbitMQ, Redis and S3 forget, and what processes leave behind that die between two of them: on real servers."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
import redis
from redis.asyncio import Redis as Client

from broker import deployments, functions
from broker.connect import open_broker
from broker.errors import StoreUnavailable, Unavailable
from broker.functions import Definition
from broker.model import Draft, Gpu, GpuSpecification, Job, Outcome, Principal, RequestState
from broker.ports import Broker, Upkeep
from broker.settings import ControllerSettings, load
from infra.local.process import LOOPBACK, free_port
from infra.local.servers import S3, RabbitMQ, Redis
from tests.eventually import eventually
from tests.house import RECORDER, Caller, House, users
from tests.house import running as running_house
from workers.controller.auditor import RESTORED_AT_ONCE, Auditor, Walk

DB = 14
OURS = Principal(account="ours", subject="me", scopes=frozenset())
S = RequestState
OFFER = Gpu(name="CPU", instance_type="CPU", backend="local", capacity=1)
CROWD = 1000


def store_url(server: Redis) -> str:
    return f"{server.url.rpartition('/')[0]}/{DB}"


# -- the whole product -------------------------------------------------------------------------


@pytest.fixture
def make_house(
    product_rabbitmq: RabbitMQ, redis_server: Redis, s3: S3, tmp_path: Path
) -> Iterator[Callable[..., House]]:
    """Starts a house on an empty database; one per test."""
    with contextlib.ExitStack() as started:

        def make(*, status_port: int = 0, **settings: str) -> House:
            with redis.Redis.from_url(store_url(redis_server)) as client:
                client.flushdb()
            fronts, controllers = users(product_rabbitmq, redis_server, s3, database=DB)
            controllers["FNQUEUE_STATUS_PORT"] = str(status_port)
            return started.enter_context(running_house(House(tmp_path, fronts, controllers, fronts=1, **settings)))

        yield make


async def results(caller: Caller, ids: list[str]) -> list[int]:
    """The status of each, once it is final."""
    at_once = asyncio.Semaphore(20)

    async def result(request_id: str) -> int:
        async with at_once:
            return (await caller.result(request_id, within_s=100)).status

    return await asyncio.gather(*(result(request_id) for request_id in ids))


async def queue_up(caller: Caller, function_id: str, count: int, order: Mapping[str, Any]) -> list[str]:
    at_once = asyncio.Semaphore(20)

    async def submit() -> str:
        async with at_once:
            return await caller.submit(function_id, dict(order))

    return await asyncio.gather(*(submit() for _ in range(count)))


async def test_all_that_was_queued_runs_and_is_readable_after_redis_was_wiped(
    make_house: Callable[..., House], redis_server: Redis, tmp_path: Path
) -> None:
    house = await asyncio.to_thread(make_house, FNQUEUE_AUDIT_S="1")
    gate = tmp_path / "gate"
    async with house.caller() as caller:
        function = await caller.deploy(RECORDER, concurrency=16)
        ids = await queue_up(caller, function.id, CROWD, {"gate": str(gate)})
        async with Client.from_url(store_url(redis_server)) as client:
            await client.flushdb()
        gate.touch()
        assert await results(caller, ids) == [200] * CROWD
        done = house.record.counts("done")
        assert all(done[request_id] >= 1 for request_id in ids)


async def test_lost_records_of_a_version_without_instances_bring_one_back(
    make_house: Callable[..., House], redis_server: Redis
) -> None:
    """Nobody claims what no instance is started for, and no instance is started for what is not on the books."""
    port = free_port()
    house = await asyncio.to_thread(make_house, FNQUEUE_AUDIT_S="0.5", status_port=port)
    async with house.caller() as caller:
        function = await caller.deploy(RECORDER, instances=0)
        await asyncio.to_thread(house.controller.kill)
        ids = await queue_up(caller, function.id, 30, {})
        async with Client.from_url(store_url(redis_server)) as client:
            lost = [key async for key in client.scan_iter("fnq:{*}:[rbqxd]")]
            assert len(lost) >= len(ids)
            await client.delete(*lost)
        await asyncio.to_thread(house.controller.start)
        for request_id in ids:  # unknown until it is restored or claimed
            await eventually(partial(caller.status, request_id), lambda reply: reply.status == 200, within_s=60)

        async def counted() -> dict[str, Any]:
            url = f"http://{LOOPBACK}:{port}/v1/conservation"
            async with aiohttp.ClientSession() as session, session.get(url) as answer:
                found: dict[str, Any] = await answer.json()
                return found

        facts = await eventually(
            counted, lambda seen: seen["conservation"] is not None and seen["conservation"]["done"] == 30, within_s=60
        )
        assert facts["leads"] is True
        assert facts["mended"]["restored"] == RESTORED_AT_ONCE
        conserved = facts["conservation"]
        assert (conserved["accepted"], conserved["queued"], conserved["running"], conserved["dead"]) == (30, 0, 0, 0)
        assert conserved["balanced"] is True


# -- the auditor alone -------------------------------------------------------------------------


@asynccontextmanager
async def servers(rabbitmq: RabbitMQ, redis_url: str, s3: S3 | None, folder: Path) -> AsyncIterator[Broker]:
    blobs_url = s3.url if s3 else f"file://{folder}/blobs"
    settings = load(
        ControllerSettings,
        queue_url=rabbitmq.url,
        store_url=redis_url,
        blobs_url=blobs_url,
        store_timeout_s=1,
        publish_timeout_s=2,
    )
    async with open_broker(settings) as broker:
        yield broker


@pytest.fixture
async def broker(rabbitmq: RabbitMQ, redis_server: Redis, s3: S3, tmp_path: Path) -> AsyncIterator[Broker]:
    async with Client.from_url(store_url(redis_server)) as client:
        await client.flushdb()
    async with servers(rabbitmq, store_url(redis_server), s3, tmp_path) as opened:
        yield opened


@pytest.fixture
async def version_id(broker: Broker) -> AsyncIterator[str]:
    version_id = await deployed(broker)
    yield version_id
    await broker.queue.delete(version_id)


async def deployed(broker: Broker) -> str:
    await broker.catalog.offer([OFFER], ttl_s=600)
    version = await functions.create(broker, OURS, Definition(name="f", inference_url="/", container_image="i"))
    specification = GpuSpecification(id="", gpu="CPU", instance_type="CPU", min_instances=0, max_instances=1)
    await deployments.deploy(broker, OURS, version.function_id, version.id, (specification,))
    return version.id


def auditor_of(broker: Broker, *, stray_s: float = 600.0) -> Auditor:
    return Auditor(broker, ControllerSettings(), leads=lambda: True, stray_s=stray_s)


async def accept(broker: Broker, version_id: str, *, published: bool = True) -> Job:
    draft = Draft(
        id=str(uuid.uuid4()), account="ours", function_id="f", version_id=version_id, digest="", deadline_s=600
    )
    record = await broker.results.create(draft, queue_limit=10_000, watch=False)
    job = Job(
        id=record.id,
        account="ours",
        function_id="f",
        version_id=version_id,
        subject="me",
        created_at=record.created_at,
        deadline_at=record.deadline_at,
        digest="",
    )
    if published:
        await broker.queue.publish(job, timeout_s=5)
    return job


async def finish(broker: Broker, job: Job, *, blob_key: str = "") -> RequestState:
    claim = await broker.results.claim(job, worker="w", lease_s=30, max_attempts=3)
    assert claim.lease is not None
    outcome = Outcome(status=302 if blob_key else 200, blob_key=blob_key)
    return await broker.results.settle(claim.lease, job, S.FULFILLED, outcome)


async def a_pass(walk: Walk) -> None:
    rest_s = walk._rest_s
    while True:
        await walk.step()
        if walk.pause_s() == rest_s:
            return


async def queued(broker: Broker, version_id: str) -> int:
    (load,) = await broker.results.load([version_id])
    return load.queued


async def depth(broker: Broker, version_id: str, ready: int) -> None:
    await eventually(lambda: broker.queue.depth(version_id), lambda seen: seen == ready)


async def test_a_stray_of_a_dead_front_end_is_set_aside_and_of_a_paused_one_still_runs(
    broker: Broker, version_id: str
) -> None:
    jobs = [await accept(broker, version_id, published=False) for _ in range(2)]
    auditor = auditor_of(broker, stray_s=-1)
    await a_pass(auditor.versions)
    assert await queued(broker, version_id) == 2
    await a_pass(auditor.versions)
    assert await queued(broker, version_id) == 0
    assert auditor.mended.set_aside == 2
    await a_pass(auditor.records)  # it has a place: by its end
    assert auditor.mended.placed == 0
    records = [await broker.results.read(job.id) for job in jobs]
    assert [record.state for record in records if record] == [S.QUEUED, S.QUEUED]
    paused = jobs[0]
    await broker.queue.publish(paused, timeout_s=5)
    await depth(broker, version_id, 1)
    await a_pass(auditor.versions)
    await a_pass(auditor.versions)
    assert await queued(broker, version_id) == 1
    assert await finish(broker, paused) is S.FULFILLED


async def test_what_a_stopped_auditor_had_borrowed_goes_back(broker: Broker, version_id: str) -> None:
    jobs = [await accept(broker, version_id) for _ in range(5)]
    await depth(broker, version_id, 5)
    client = Client.from_url(broker.settings.store_url.get_secret_value())
    await client.delete(f"fnq:{{{version_id}}}:q", *(f"fnq:{{{job.id}}}:r" for job in jobs))
    await client.aclose()
    reached = asyncio.Event()

    class Hanging:
        """Of which the third answer does not come."""

        asked = 0

        async def restore(self, job: Job) -> RequestState:
            self.asked += 1
            if self.asked == 3:
                reached.set()
                await asyncio.Event().wait()
            return await broker.upkeep.restore(job)

        async def straighten(self, version_id: str, *, skip: int, limit: int) -> tuple[int, bool]:
            return 0, False

    stopped = auditor_of(replace(broker, upkeep=cast(Upkeep, Hanging())))
    await a_pass(stopped.versions)
    working = asyncio.create_task(a_pass(stopped.versions))
    async with asyncio.timeout(30):
        await reached.wait()
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    await depth(broker, version_id, 5)
    assert await queued(broker, version_id) == 2  # as much as was done
    taken = set()
    for _ in jobs:
        delivery = await broker.queue.take(version_id)
        assert delivery is not None
        taken.add(delivery.job.id)
        assert await finish(broker, delivery.job) is S.FULFILLED
        await delivery.ack()
    # Not in their order: each was borrowed over a channel of its own, and RabbitMQ keeps none between channels.
    assert taken == {job.id for job in jobs}


async def test_orphans_leave_the_bucket_and_the_rest_stays(broker: Broker, version_id: str) -> None:
    jobs = [await accept(broker, version_id) for _ in range(3)]
    bodies = [f"inputs/ours/{job.id}" for job in jobs]
    late, mine = (f"results/ours/{jobs[1].id}/{uuid.uuid4()}.zip" for _ in range(2))
    fresh, asset = f"inputs/ours/{uuid.uuid4()}", f"assets/ours/{uuid.uuid4()}"
    for key in (*bodies, late, mine, fresh, asset):
        await broker.blobs.put(key, b"bytes", content_type="text/plain")
    await broker.results.cancel(jobs[0].id, reason="")
    await finish(broker, jobs[1], blob_key=mine)
    auditor = auditor_of(broker)
    await a_pass(auditor.objects)
    left = [key for key in (*bodies, late, mine, fresh, asset) if await broker.blobs.head(key)]
    assert left == [bodies[2], mine, fresh, asset]
    before = auditor.mended.objects_deleted
    await a_pass(auditor.objects)
    assert auditor.mended.objects_deleted == before


async def test_an_auditor_goes_on_once_the_store_is_back(
    rabbitmq: RabbitMQ, new_redis: Callable[[], Redis], tmp_path: Path
) -> None:
    server = await asyncio.to_thread(new_redis)
    async with servers(rabbitmq, server.url, None, tmp_path) as broker:
        version_id = await deployed(broker)
        try:
            jobs = [await accept(broker, version_id) for _ in range(600)]
            auditor = auditor_of(broker)
            await auditor.records.step()
            await asyncio.to_thread(server.kill)
            for walk in (auditor.records, auditor.versions):
                with pytest.raises(StoreUnavailable):
                    await walk.step()
            await asyncio.to_thread(server.start)
            await eventually(lambda: answers(broker), bool, within_s=30)
            await a_pass(auditor.versions)
            await a_pass(auditor.records)
            counted = auditor.conservation
            assert counted is not None
            assert (counted.accepted, counted.queued, counted.messages) == (len(jobs), len(jobs), len(jobs))
            assert auditor.mended.set_aside == auditor.mended.restored == 0
        finally:
            await broker.queue.delete(version_id)


async def test_nothing_is_mended_by_what_a_queue_that_is_away_does_not_say(
    new_rabbitmq: Callable[[], RabbitMQ], redis_server: Redis, tmp_path: Path
) -> None:
    server = await asyncio.to_thread(new_rabbitmq)
    async with Client.from_url(store_url(redis_server)) as client:
        await client.flushdb()
    async with servers(server, store_url(redis_server), None, tmp_path) as broker:
        version_id = await deployed(broker)
        await accept(broker, version_id, published=False)
        auditor = auditor_of(broker, stray_s=-1)
        await a_pass(auditor.versions)
        await asyncio.to_thread(server.kill)
        for _ in range(2):
            with pytest.raises(Unavailable):
                await auditor.versions.step()
        assert await queued(broker, version_id) == 1


async def answers(broker: Broker) -> bool:
    try:
        await broker.results.ping()
    except StoreUnavailable:
        return False
    return True
