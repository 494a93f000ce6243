"""WebSockets and streams in both directions, as a client of the whole product sees them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType

from tests.e2e.conftest import QUEUE_LIMIT, TALKER, Site
from tests.eventually import eventually
from tests.house import Caller, Function

CLIENTS = 100


@pytest.fixture(scope="module")
async def talker(caller: Caller) -> AsyncIterator[Function]:
    function = await caller.deploy(TALKER, concurrency=CLIENTS)
    yield function
    await function.undeploy()


@asynccontextmanager
async def session(site: Site, function: Function) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of the function in its own name, which sends and reads at once."""
    sent = {
        "Authorization": f"Bearer {site.key}",
        "function-id": function.id,
        "nvcf-feature-enable-only-stream-full-request": "true",
    }
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(site.url, connector=connector, headers=sent) as client:
        yield client


async def state(caller: Caller, request_id: str, *words: str) -> None:
    """Return once the request is known to be one of these."""
    await eventually(
        lambda: caller.status(request_id), lambda reply: reply.headers.get("NVCF-STATUS") in words, within_s=20
    )


async def exhaust(answer: aiohttp.ClientResponse) -> None:
    while await answer.content.readany():
        pass


async def test_a_websocket_talks_to_the_container(site: Site, caller: Caller, talker: Function) -> None:
    async with session(site, talker) as client:
        ws: Any
        async with client.ws_connect("/ws?a=b", protocols=("soap", "chat")) as ws:
            assert ws.protocol == "chat"
            await ws.send_str("hällo")
            assert await ws.receive_str() == "echo hällo"
            await ws.send_bytes(bytes(range(256)) * 1000)
            assert await ws.receive_bytes() == bytes(range(256)) * 1000
            await ws.send_str("tell")
            told = json.loads(await ws.receive_str())
            assert told["path"] == "/ws?a=b"
            request_id = next(value for name, value in told["headers"] if name == "NVCF-REQID")
            assert (await caller.status(request_id)).headers["NVCF-STATUS"] == "in-progress"
            await ws.send_str("close 4321 so long")
            message = await ws.receive()
            assert (message.type, message.data, message.extra) == (WSMsgType.CLOSE, 4321, "so long")
        await state(caller, request_id, "fulfilled")


async def test_a_body_and_its_answer_flow_at_the_same_time(site: Site, talker: Function) -> None:
    turns: asyncio.Queue[bytes] = asyncio.Queue()

    async def body() -> AsyncIterator[bytes]:
        yield b""  # so that the head is sent
        while piece := await turns.get():
            yield piece

    async with session(site, talker) as client, client.patch("/talk", data=body()) as answer:
        assert (answer.status, answer.headers["X-Mine"], answer.headers["NVCF-STATUS"]) == (201, "1", "fulfilled")
        for number in range(10):
            await turns.put(b"%d" % number)
            assert await answer.content.readexactly(6) == b"pong %d" % number
        await turns.put(b"")
        assert await answer.read() == b"bye"


async def test_a_hundred_websockets_at_once(site: Site, talker: Function) -> None:
    all_open, connecting = asyncio.Barrier(CLIENTS), asyncio.Semaphore(QUEUE_LIMIT // 2)

    async def talk(client: aiohttp.ClientSession, number: int) -> int:
        async with connecting:
            ws = await client.ws_connect("/ws")
        await all_open.wait()
        for turn in range(3):
            await ws.send_str(f"{number} {turn}")
            assert await ws.receive_str() == f"echo {number} {turn}"
        await ws.send_str(f"close {4000 + number} bye")
        return int((await ws.receive()).data)

    async with session(site, talker) as client:
        closed = await asyncio.gather(*(talk(client, number) for number in range(CLIENTS)))
    assert closed == [4000 + number for number in range(CLIENTS)]


async def test_a_cancelled_request_loses_its_connection(site: Site, caller: Caller, talker: Function) -> None:
    async with session(site, talker) as client, client.get("/talk", headers={"X-Talk": "pour"}) as answer:
        request_id = answer.headers["NVCF-REQID"]
        assert (await caller.cancel(request_id)).status == 202
        with pytest.raises(aiohttp.ClientError):
            await exhaust(answer)
        await site.record.saw("aborted", request_id)
        await state(caller, request_id, "rejected")


async def test_a_client_that_leaves_takes_its_request_along(site: Site, caller: Caller, talker: Function) -> None:
    async with session(site, talker) as client:
        async with client.get("/talk", headers={"X-Talk": "pour"}) as answer:
            request_id = answer.headers["NVCF-REQID"]
            await answer.content.readexactly(1000)
        await site.record.saw("aborted", request_id)
        reply = await caller.result(request_id)
        assert (reply.status, reply.json["detail"]) == (410, "its client has gone")
