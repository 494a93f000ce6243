"""A channel has two ends, and either of them may die."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
import redis
from aiohttp import WSMsgType

from infra.local.servers import S3, RabbitMQ, Redis
from tests.eventually import eventually
from tests.house import CONTAINERS, Caller, Function, House, Reply, running, users

TALKER = "tests/talker:latest"
GONE = "The front end that held the caller's connection has gone"


@pytest.fixture(scope="module")
def shared(
    product_rabbitmq: RabbitMQ, redis_server: Redis, s3: S3, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("channels")
    images = folder / "talker.toml"
    command, record = json.dumps([sys.executable, str(CONTAINERS / "talker.py")]), json.dumps(str(folder / "record"))
    images.write_text(f"[{json.dumps(TALKER)}]\ncommand = {command}\nenv = {{ RECORD = {record} }}\n")
    store_url = f"{redis_server.url.rpartition('/')[0]}/8"
    with redis.Redis.from_url(store_url) as store:
        store.flushdb()  # no deployment of an earlier test is this controller's to keep
    servers = users(product_rabbitmq, redis_server, s3, database=8)
    settings = {"FNQUEUE_IMAGES_FILE": str(images), "FNQUEUE_CHANNEL_DRAIN_S": "1", "FNQUEUE_DRAIN_S": "3"}
    with running(House(folder, *servers, fronts=2, **settings)) as found:
        yield found


@pytest.fixture
def house(shared: House) -> House:
    """Two front ends: the first one is there to be killed."""
    shared.fronts[0].start()
    return shared


@pytest.fixture(scope="module")
async def function(shared: House) -> AsyncIterator[Function]:
    """One instance with one slot."""
    async with shared.caller(front=1) as caller:
        yield await caller.deploy(TALKER)


@asynccontextmanager
async def websocket(
    house: House, function: Function, name: str, *, front: int = 0
) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """One that the container knows by `name`."""
    sent = {"Authorization": f"Bearer {house.key}", "function-id": function.id, "X-Name": name}
    async with (
        aiohttp.ClientSession(headers=sent) as client,
        client.ws_connect(f"{house.fronts[front].url}/ws") as ws,
    ):
        yield ws


async def request_of(ws: aiohttp.ClientWebSocketResponse) -> str:
    await ws.send_str("tell")
    told = json.loads(await ws.receive_str())
    return str(next(value for name, value in told["headers"] if name == "NVCF-REQID"))


async def serves(house: House, function: Function) -> None:
    async with websocket(house, function, "another", front=1) as ws:
        await ws.send_str("hi")
        assert await ws.receive_str() == "echo hi"


async def errored(caller: Caller, request_id: str) -> Reply:
    reply = await caller.result(request_id)
    assert reply.headers["NVCF-STATUS"] == "errored"
    return reply


async def test_a_front_end_killed_while_it_is_connected_ends_the_request_and_frees_the_slot(
    house: House, function: Function
) -> None:
    async with websocket(house, function, "connected") as ws:
        request_id = await request_of(ws)
        await asyncio.to_thread(house.fronts[0].kill)
        assert (await ws.receive()).type in (WSMsgType.CLOSED, WSMsgType.ERROR)
    reply = await errored(function.caller, request_id)
    assert (reply.status, GONE in reply.json["detail"]) == (500, True)
    await house.record.saw("done", "connected 1001")
    assert house.record.counts("start")["connected"] == 1
    await serves(house, function)


async def test_a_front_end_killed_while_its_call_is_queued_has_no_container_called(
    house: House, function: Function
) -> None:
    async with websocket(house, function, "holds the slot", front=1) as holding:
        await request_of(holding)
        asking = asyncio.create_task(fails(house, function, "queued"))
        await eventually(lambda: waiting(function), lambda depth: depth == 1, within_s=30)
        await asyncio.to_thread(house.fronts[0].kill)
        assert await asking
    await eventually(lambda: waiting(function), lambda depth: depth == 0)
    await serves(house, function)
    assert house.record.counts("start")["queued"] == 0


async def test_a_killed_sidecar_closes_the_connection_and_nothing_is_run_again(
    house: House, function: Function
) -> None:
    async with websocket(house, function, "loses its sidecar") as ws:
        request_id = await request_of(ws)
        [sidecar] = house.sidecars()
        sidecar.kill()
        message = await ws.receive()
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1011)
        assert message.extra == "the worker that ran this call was lost"
    reply = await errored(function.caller, request_id)
    assert (reply.status, reply.json["type"]) == (500, "urn:fnqueue:problem-details:request-dead")
    await serves(house, function)
    assert house.record.counts("start")["loses its sidecar"] == 1


async def test_a_front_end_that_is_told_to_stop_says_so_to_who_is_connected(house: House, function: Function) -> None:
    async with websocket(house, function, "stopped") as ws:
        request_id = await request_of(ws)
        stopping = asyncio.create_task(asyncio.to_thread(house.fronts[0].stop))
        message = await ws.receive()
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1012)
        await stopping
    assert (await function.caller.result(request_id)).status == 410
    await serves(house, function)


async def fails(house: House, function: Function, name: str) -> bool:
    """Whether the handshake came to nothing."""
    try:
        async with websocket(house, function, name):
            return False
    except aiohttp.ClientError:
        return True


async def waiting(function: Function) -> int:
    [queue] = (await function.caller.depth(function.id)).json["queues"]
    return int(queue["queueDepth"])
