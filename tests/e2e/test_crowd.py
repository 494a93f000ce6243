"""Thousands of jobs in one container at once, on the production shape."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import pytest

from infra.local.servers import S3, RabbitMQ, Redis
from tests.house import RECORDER, Caller, Function, House, Reply, running

JOBS = 500
AT_ONCE = 100


@pytest.fixture(scope="module")
def house(
    product_rabbitmq: RabbitMQ, redis_server: Redis, s3: S3, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[House]:
    servers = {
        "FNQUEUE_QUEUE_URL": product_rabbitmq.url,
        "FNQUEUE_STORE_URL": f"{redis_server.url.rpartition('/')[0]}/11",  # what other tests store is not deployed here
        "FNQUEUE_BLOBS_URL": s3.url,
    }
    with running(House(tmp_path_factory.mktemp("crowd"), servers)) as made:
        yield made


async def submitted(caller: Caller, function: Function) -> list[str]:
    """Ids of jobs none of which ends before all of them are in the container."""
    doors = asyncio.Semaphore(AT_ONCE)

    async def submit() -> str:
        async with doors:
            return await caller.submit(function.id, {"crowd": JOBS})

    return await asyncio.gather(*(submit() for _ in range(JOBS)))


async def results(caller: Caller, request_ids: Sequence[str]) -> list[Reply]:
    doors = asyncio.Semaphore(AT_ONCE)

    async def result(request_id: str) -> Reply:
        async with doors:
            return await caller.result(request_id)

    return await asyncio.gather(*(result(request_id) for request_id in request_ids))


async def test_five_hundred_slow_jobs_run_at_once_in_one_container(house: House) -> None:
    async with asyncio.timeout(180), house.caller() as caller:
        function = await caller.deploy(RECORDER, concurrency=JOBS)
        request_ids = await submitted(caller, function)
        replies = await results(caller, request_ids)
        assert {reply.status for reply in replies} == {200}
        assert house.record.counts("done").total() == JOBS
        await function.undeploy()


async def test_a_function_may_have_as_many_slots_as_the_contract_allows(house: House) -> None:
    async with asyncio.timeout(90), house.caller() as caller:
        function = await caller.deploy(RECORDER, concurrency=16_384)
        assert (await caller.invoke(function.id)).status == 200
        await function.undeploy()
