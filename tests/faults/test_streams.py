"""Streams through the whole product: nothing lost, nothing twice, nothing out of order, whoever dies."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil
import pytest

from infra.local.servers import S3, RabbitMQ, Redis
from tests import house
from tests.eventually import eventually
from tests.frozen import frozen
from tests.house import STREAMER, Caller, Function, House
from workers.streams import ABANDONED

STREAMS = 64
EVENTS = 1000
GRACE_S = 3
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def product(
    product_rabbitmq: RabbitMQ, redis_server: Redis, s3: S3, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[House]:
    """Two front ends."""
    servers = house.users(product_rabbitmq, redis_server, s3, database=8)
    settings = {"FNQUEUE_STREAM_GRACE_S": str(GRACE_S), "FNQUEUE_STREAM_BYTES": str(MIB)}
    with house.running(House(tmp_path_factory.mktemp("streams"), *servers, fronts=2, **settings)) as running:
        yield running


@pytest.fixture(scope="module")
async def streamer(product: House) -> Function:
    async with product.caller() as caller:
        return await caller.deploy(STREAMER, concurrency=STREAMS)


class Client:
    """One client of one stream: `numbers` are the events that it has had, `last_id` names the last one."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.last_id = ""
        self.error: dict[str, Any] | None = None
        self.request_id = ""

    async def invoke(self, caller: Caller, function: Function, order: Mapping[str, Any], *, most: int = 0) -> None:
        """Until the end of the stream, or of its connection, or until it has had `most` events."""
        path = f"/v2/nvcf/pexec/functions/{function.id}"
        async with (
            asyncio.timeout(120),
            self._session() as session,
            session.post(caller.url + path, json=order, headers=self._headers(caller)) as response,
        ):
            await self._read(response, most)

    async def resume(self, caller: Caller, *, most: int = 0) -> None:
        path = f"/v2/nvcf/pexec/status/{self.request_id}"
        headers = {**self._headers(caller), "Last-Event-ID": self.last_id}
        async with (
            asyncio.timeout(120),
            self._session() as session,
            session.get(caller.url + path, headers=headers) as response,
        ):
            await self._read(response, most)

    async def _read(self, response: aiohttp.ClientResponse, most: int) -> None:
        assert response.status == 200, await response.text()
        self.request_id = response.headers["NVCF-REQID"]
        while not most or len(self.numbers) < most:
            try:
                block = await response.content.readuntil(b"\n\n")
            except aiohttp.ClientError:
                return
            if not block.endswith(b"\n\n"):
                assert not block, "a part of an event"
                return
            self._take(block.decode())

    def _take(self, block: str) -> None:
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if not fields:
            return
        self.last_id = fields.get("id", self.last_id)
        if fields.get("event") == "error":
            self.error = json.loads(fields["data"])
        else:
            self.numbers.append(int(fields["data"].partition(" ")[0]))

    @staticmethod
    @asynccontextmanager
    async def _session() -> AsyncIterator[aiohttp.ClientSession]:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, read_bufsize=MIB) as session:
            yield session

    @staticmethod
    def _headers(caller: Caller) -> dict[str, str]:
        return {"Authorization": f"Bearer {caller.key}", "Accept": "text/event-stream"}


async def fulfilled(caller: Caller, request_id: str) -> None:
    reply = await caller.result(request_id)
    assert reply.headers["NVCF-STATUS"] == "fulfilled"


async def test_many_streams_at_once_are_whole_and_in_order(product: House, streamer: Function) -> None:
    async with product.caller(0) as first, product.caller(1) as second:
        clients = [Client() for _ in range(STREAMS)]
        await asyncio.gather(
            *(
                client.invoke((first, second)[at % 2], streamer, {"count": EVENTS, "size_bytes": 40})
                for at, client in enumerate(clients)
            )
        )
    assert [client.numbers for client in clients] == [list(range(EVENTS))] * STREAMS
    assert all(client.error is None for client in clients)


@pytest.mark.parametrize("ids", [False, True])
async def test_a_client_goes_on_at_another_front_end_when_its_own_is_killed(
    product: House, streamer: Function, tmp_path: Path, ids: bool
) -> None:
    gate = tmp_path / "gate"
    client = Client()
    async with product.caller(0) as first, product.caller(1) as second:
        order = {"count": 200, "ids": ids, "gates": {"150": str(gate)}}
        calling = asyncio.create_task(client.invoke(first, streamer, order))
        await eventually(lambda: _count(client), lambda seen: seen == 150)
        await asyncio.to_thread(product.fronts[0].kill)
        await calling
        gate.touch()
        await client.resume(second)
        assert client.numbers == list(range(200))
        await fulfilled(second, client.request_id)
    assert product.record.counts("start")[client.request_id] == 1
    await asyncio.to_thread(product.fronts[0].start)


async def test_a_client_goes_on_at_another_front_end_when_its_own_is_stopped(
    product: House, streamer: Function, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    client = Client()
    async with product.caller(0) as first, product.caller(1) as second:
        calling = asyncio.create_task(client.invoke(first, streamer, {"count": 200, "gates": {"100": str(gate)}}))
        await eventually(lambda: _count(client), lambda seen: seen == 100)
        stopping = asyncio.create_task(asyncio.to_thread(product.fronts[0].stop))
        await calling
        gate.touch()
        await client.resume(second)
        await stopping
    assert client.numbers == list(range(200))
    await asyncio.to_thread(product.fronts[0].start)


async def test_a_client_that_comes_and_goes_gets_each_event_once(product: House, streamer: Function) -> None:
    client = Client()
    async with product.caller(0) as first, product.caller(1) as second:
        await client.invoke(first, streamer, {"count": 300, "pause_s": 0.001}, most=40)
        at = 0
        while len(client.numbers) < 300:
            at += 1
            await client.resume((first, second)[at % 2], most=len(client.numbers) + 40)
        await fulfilled(first, client.request_id)
    assert client.numbers == list(range(300))


async def test_a_slow_reader_makes_the_container_wait_and_nobody_grow(product: House, streamer: Function) -> None:
    """40 MiB, of which a client that does not read can hold a part, and the processes between next to nothing."""
    events, size_bytes = 40 * 64, 16 * 1024
    async with product.caller() as caller:
        front, [sidecar] = psutil.Process(product.fronts[0].pid), _alive(product)
        before = [process.memory_info().rss for process in (front, sidecar)]
        reader, writer = await _slow(caller, streamer, {"count": events, "size_bytes": size_bytes})
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        request_id = next(line[12:] for line in head.splitlines() if line.lower().startswith("nvcf-reqid"))
        sent = await _settled(lambda: product.record.counts("sent")[request_id])
        assert sent * 100 < events * 3 / 4
        for process, rss in zip((front, sidecar), before, strict=True):
            assert process.memory_info().rss - rss < 24 * MIB
        received = 0
        while block := await reader.read(MIB):
            received += block.count(b"data: ")
            if block.endswith(b"0\r\n\r\n"):
                break
        writer.close()
        assert received == events
        reply = await caller.result(request_id)
        assert reply.status == 410  # more than is kept; but it is known how it ended
        assert reply.json["type"].endswith("stream-not-kept")


async def test_a_client_that_leaves_for_good_cancels_the_request(
    product: House, streamer: Function, tmp_path: Path
) -> None:
    client = Client()
    async with product.caller() as caller:
        order = {"count": 200, "gates": {"100": str(tmp_path / "never")}}
        await client.invoke(caller, streamer, order, most=100)
        await product.record.saw("aborted", client.request_id, within_s=GRACE_S + 10)
        reply = await caller.status(client.request_id)
        assert (reply.status, reply.json["detail"]) == (410, ABANDONED)


async def test_a_frozen_front_end_is_not_taken_for_one_that_reads(
    product: House, streamer: Function, tmp_path: Path
) -> None:
    """Its client goes elsewhere, and nobody waits for the frozen one."""
    gate = tmp_path / "gate"
    client = Client()
    async with product.caller(0) as first, product.caller(1) as second:
        await client.invoke(first, streamer, {"count": 200, "gates": {"100": str(gate)}}, most=50)
        with frozen(product.fronts[0].pid):
            gate.touch()
            await client.resume(second)
    assert client.numbers == list(range(200))


async def test_a_worker_that_is_killed_ends_the_stream_with_an_error(
    product: House, streamer: Function, tmp_path: Path
) -> None:
    client = Client()
    async with product.caller() as caller:
        order = {"count": 200, "gates": {"100": str(tmp_path / "never")}}
        calling = asyncio.create_task(client.invoke(caller, streamer, order))
        await eventually(lambda: _count(client), lambda seen: seen == 100)
        [sidecar] = _alive(product)
        sidecar.kill()
        await calling
        assert client.numbers == list(range(100))
        assert client.error is not None
        assert (client.error["status"], client.error["requestId"]) == (502, client.request_id)
        reply = await caller.status(client.request_id)
        assert (reply.status, reply.headers["NVCF-STATUS"]) == (502, "errored")
    assert product.record.counts("start")[client.request_id] == 1


async def test_a_container_that_dies_ends_the_stream_with_an_error(product: House, streamer: Function) -> None:
    client = Client()
    async with product.caller() as caller:
        await client.invoke(caller, streamer, {"count": 200, "die": 100, "pause_s": 0.002})
        assert client.numbers == list(range(len(client.numbers)))
        assert client.error is not None
        assert client.error["status"] == 500
    assert product.record.counts("start")[client.request_id] == 1


def _alive(product: House) -> list[psutil.Process]:
    return [process for process in product.sidecars() if process.is_running()]


async def _count(client: Client) -> int:
    return len(client.numbers)


async def _settled(look: Callable[[], int]) -> int:
    """What is seen twice in a row, a second apart."""
    seen, before = look(), -1
    while seen != before:
        await asyncio.sleep(1)
        seen, before = look(), seen
    return seen


async def _slow(
    caller: Caller, function: Function, order: Mapping[str, Any]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A call over a connection that takes little at once."""
    at = urlsplit(caller.url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (at.hostname, at.port))
    reader, writer = await asyncio.open_connection(sock=connection)
    body = json.dumps(order).encode()
    head = (
        f"POST /v2/nvcf/pexec/functions/{function.id} HTTP/1.1",
        f"Host: {at.netloc}",
        f"Authorization: Bearer {caller.key}",
        "Accept: text/event-stream",
        f"Content-Length: {len(body)}",
    )
    writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
    return reader, writer
