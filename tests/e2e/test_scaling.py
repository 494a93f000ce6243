"""Instances come and go with the load, whichever of two controllers is alive, and nothing that was accepted is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
import redis

from infra.local.servers import S3, RabbitMQ, Redis
from tests.eventually import eventually
from tests.house import RECORDER, Caller, Function, House, running, users

NVCF = "/v2/nvcf"
REQUESTS = 100
MOST = 4
IDLE_S = 4


@pytest.fixture(scope="module")
def store(redis_server: Redis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(f"{redis_server.url.rpartition('/')[0]}/7") as client:
        client.flushdb()  # no deployment of an earlier test is these controllers' to keep
        yield client


@pytest.fixture(scope="module")
def house(
    product_rabbitmq: RabbitMQ,
    redis_server: Redis,
    s3: S3,
    store: redis.Redis,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[House]:
    """With two controllers over one data folder."""
    settings = {
        "FNQUEUE_IDLE_S": str(IDLE_S),
        "FNQUEUE_RECONCILE_S": "0.5",
        "FNQUEUE_DRAIN_S": "5",
    }
    servers = users(product_rabbitmq, redis_server, s3, database=7)
    made = House(tmp_path_factory.mktemp("scaling"), *servers, fronts=1, **settings)
    made.add_controller()
    with running(made) as found:
        yield found


@pytest.fixture
async def caller(house: House) -> AsyncIterator[Caller]:
    async with house.caller() as found:
        yield found


async def instances(function: Function) -> int:
    seen = await function.caller.call("GET", f"{NVCF}/functions/{function.id}/versions/{function.version_id}")
    assert seen.json["function"]["status"] == "ACTIVE", seen
    return len(seen.json["function"]["activeInstances"])


async def test_a_burst_takes_a_function_from_nothing_to_its_maximum_and_back(caller: Caller) -> None:
    function = await caller.deploy(RECORDER, instances=0, most=MOST)
    assert await instances(function) == 0
    sent = [caller.invoke(function.id, {"id": f"burst-{n}", "delay_s": 0.3}, wait_s=60) for n in range(REQUESTS)]
    counts: list[int] = []

    async def watch() -> None:
        while True:
            counts.append(await instances(function))
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    replies = await asyncio.gather(*sent)
    watching.cancel()
    assert {reply.status for reply in replies} == {200}
    assert {reply.json["id"] for reply in replies} == {f"burst-{n}" for n in range(REQUESTS)}
    assert max(counts) == MOST
    await eventually(lambda: instances(function), lambda count: count == 0, within_s=30)
    # And from nothing again.
    assert (await caller.invoke(function.id, wait_s=60)).status == 200
    await function.undeploy()


def leader(store: redis.Redis) -> int:
    """The process that holds the lease, 0 when none does."""
    holder = store.get("fnq:leader")
    return int(holder.split(b"-")[-2]) if isinstance(holder, bytes) else 0


def begun(house: House, function: Function) -> int:
    """How many instances of the function any controller ever started."""
    logs = "".join(program.log.read_text() for program in house.controllers)
    return sum("instance_started" in line and function.version_id in line for line in logs.splitlines())


@pytest.mark.timeout(180)
async def test_a_second_controller_takes_over_and_starts_nothing_twice(
    house: House, caller: Caller, store: redis.Redis, tmp_path: Path
) -> None:
    function = await caller.deploy(RECORDER, instances=2)
    gate = tmp_path / "gate"
    held = await caller.submit(function.id, {"id": "held", "gate": str(gate)})
    await house.record.saw("start", "held")
    before = {process.pid for process in house.containers()}
    old = leader(store)
    psutil.Process(old).kill()

    async def leads() -> int:
        return leader(store)

    await eventually(leads, lambda pid: pid not in (0, old))
    # It acts: what dies is replaced, and what lives is left alone.
    queued = await caller.submit(function.id, {"id": "queued"})
    gate.touch()
    assert (await caller.result(held)).status == 200
    assert (await caller.result(queued)).status == 200
    assert {process.pid for process in house.containers()} == before
    assert begun(house, function) == 2
    house.containers()[0].kill()

    async def whole() -> set[int]:
        return {process.pid for process in house.containers() if process.is_running()}

    await eventually(whole, lambda pids: len(pids) == 2 and pids != before)
    assert begun(house, function) == 3
    assert house.record.counts("start")["held"] == 1
    await function.undeploy()


@pytest.mark.timeout(180)
async def test_a_canary_gets_its_part_and_the_old_version_finishes_what_is_queued(
    house: House, caller: Caller, tmp_path: Path
) -> None:
    old = await caller.deploy(RECORDER)
    made = await caller.call(
        "POST",
        f"{NVCF}/functions/{old.id}/versions",
        data={
            "name": "canary",
            "inferenceUrl": "/",
            "containerImage": RECORDER,
            "health": {
                "protocol": "HTTP",
                "uri": "/health",
                "port": 8000,
                "timeout": "PT10S",
                "expectedStatusCode": 200,
            },
        },
    )
    new = Function(caller, old.id, made.json["function"]["versionId"])
    weights = f"{NVCF}/functions/{old.id}/weights"

    async def weigh(weight: float) -> None:
        body = {"weights": [{"functionVersionId": new.version_id, "weight": weight}]}
        told = await caller.call("PUT", weights, data=body)
        assert told.status == 200, told

    await weigh(0)
    await new.deploy(instances=1)
    assert await served(caller, old, 20) == {old.version_id}
    await weigh(50)
    assert await served(caller, old, 20) == {old.version_id, new.version_id}
    await weigh(0)
    gate = tmp_path / "gate"
    waiting = [await caller.submit(old.id, {"gate": str(gate)}) for _ in range(5)]
    await weigh(100)
    await caller.call("DELETE", f"{old.deployment_path}?graceful=true")
    assert await served(caller, old, 5) == {new.version_id}
    gate.touch()
    for request_id in waiting:
        reply = await caller.result(request_id)
        assert reply.status == 200
        assert version_of(reply.json["headers"]) == old.version_id
    await new.undeploy()


async def served(caller: Caller, function: Function, times: int) -> set[str]:
    """The versions that answered so many calls of the function."""
    replies = await asyncio.gather(*(caller.invoke(function.id) for _ in range(times)))
    assert {reply.status for reply in replies} == {200}
    return {version_of(reply.json["headers"]) for reply in replies}


def version_of(headers: dict[str, str]) -> str:
    return next(value for name, value in headers.items() if name.lower() == "nvcf-function-version-id")
