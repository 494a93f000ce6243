"""`fnqueue api --processes 2`: one that dies is missed by nobody, and a stop answers all who wait."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from broker.connect import open_broker
from broker.model import FunctionStatus, Version
from broker.settings import ApiSettings, load
from infra.local.servers import S3, RabbitMQ, Redis
from tests.eventually import eventually
from tests.house import Caller, House, Reply

DB = 5


@pytest.fixture
def house(product_rabbitmq: RabbitMQ, redis_server: Redis, s3: S3, tmp_path: Path) -> Iterator[House]:
    """Two processes of one front end, and nobody who works."""
    servers = {
        "FNQUEUE_QUEUE_URL": product_rabbitmq.url,
        "FNQUEUE_STORE_URL": f"{redis_server.url.rpartition('/')[0]}/{DB}",
        "FNQUEUE_BLOBS_URL": s3.url,
    }
    made = House(tmp_path, servers, FNQUEUE_PROCESSES="2")
    try:
        made.fronts[0].start()
        yield made
    finally:
        made.stop()


async def callable_function(house: House) -> str:
    """One whose requests are accepted and never taken."""
    environment = house.fronts[0].environment()
    names = ("queue_url", "store_url", "blobs_url", "secret_key")
    settings = load(ApiSettings, **{name: environment[f"FNQUEUE_{name.upper()}"] for name in names})
    version = Version(
        id=str(uuid.uuid4()),
        function_id=str(uuid.uuid4()),
        account="default",
        name="held",
        inference_url="/",
        container_image="a/b:c",
        created_at=time.time(),
        status=FunctionStatus.ACTIVE,
    )
    async with open_broker(settings) as broker:
        await broker.catalog.versions.put(version)
        await broker.queue.declare(version.id)
    return version.function_id


async def processes(house: House, *, but: int = 0) -> list[psutil.Process]:
    """Both of them, and neither is that one."""

    async def look() -> list[psutil.Process]:
        return [each for each in psutil.Process(house.fronts[0].pid).children() if each.pid != but]

    return await eventually(look, lambda seen: len(seen) == 2, within_s=60)


async def waited_for(caller: Caller, function_id: str, count: int) -> list[asyncio.Task[Reply]]:
    """Calls that wait until they are told to go, each on a connection of its own."""
    waiting = [asyncio.create_task(caller.invoke(function_id, wait_s=300)) for _ in range(count)]

    async def queued() -> int:
        listed = await caller.call("GET", "/v2/nvcf/requests?status=queued&limit=100")
        return len(listed.json["requests"])

    await eventually(queued, lambda seen: seen >= count, within_s=60)
    return waiting


async def test_one_that_is_killed_is_missed_by_nobody_and_a_stop_answers_all_who_wait(house: House) -> None:
    first, second = await processes(house)
    async with house.caller() as caller:
        function_id = await callable_function(house)
        await asyncio.to_thread(first.kill)

        async def answered() -> int:
            try:
                return (await caller.invoke(function_id, wait_s=1)).status
            except OSError:  # of a connection that the dead one had been given
                return 0

        await eventually(answered, lambda seen: seen == 202, within_s=60)
        both = await processes(house, but=first.pid)
        assert second in both

        waiting = await waited_for(caller, function_id, 12)
        psutil.Process(house.fronts[0].pid).terminate()
        assert {(await call).status for call in waiting} == {202}
    gone, _ = await asyncio.to_thread(psutil.wait_procs, both, 60)
    assert len(gone) == 2


async def test_they_end_with_the_process_that_started_them(house: House) -> None:
    both = await processes(house)
    await asyncio.to_thread(psutil.Process(house.fronts[0].pid).kill)
    gone, _ = await asyncio.to_thread(psutil.wait_procs, both, 60)
    assert len(gone) == 2
