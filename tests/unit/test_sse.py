"""A response that carries events: how they are written, and how it ends when something goes wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from api import events
from api.front import Front
from api.middleware import answer_errors
from broker.ports import Broker
from broker.settings import ApiSettings

Chunks = Callable[[], AsyncGenerator[bytes, None]]


@asynccontextmanager
async def streaming(front: Front, chunks: Chunks, *, write_s: float = 5.0) -> AsyncIterator[str]:
    """The URL of a server that answers with these."""

    async def handle(request: web.Request) -> web.StreamResponse:
        return await events.serve(front, request, web.StreamResponse(), chunks(), write_s=write_s)

    app = web.Application(middlewares=[answer_errors])
    app.router.add_get("/", handle)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with asyncio.timeout(20):
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


@pytest.fixture
def front(memory_broker: Broker, tmp_path: Path) -> Front:
    return Front.over(memory_broker, ApiSettings(data_dir=tmp_path))


async def read(url: str) -> tuple[int, bytes]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.read()


@pytest.mark.parametrize(
    ("encoded", "expected"),
    [
        (events.encode("done", b'{"a":1}'), b'event: done\ndata: {"a":1}\n\n'),
        (events.encode("x", b"a\nb\n", event_id="1.2"), b"id: 1.2\nevent: x\ndata: a\ndata: b\ndata: \n\n"),
        (events.encode("x", b""), b"event: x\ndata: \n\n"),
    ],
)
def test_an_event_as_it_is_written(encoded: bytes, expected: bytes) -> None:
    assert encoded == expected


async def test_events_and_when_to_come_back(front: Front) -> None:
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield events.KEEP_ALIVE
        yield events.encode("a", b"1")

    async with streaming(front, chunks) as url:
        assert await read(url) == (200, b"retry: 1000\n\n:\n\nevent: a\ndata: 1\n\n")


async def test_a_fault_ends_the_stream_and_is_logged(front: Front, caplog: pytest.LogCaptureFixture) -> None:
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield events.encode("a", b"1")
        raise LookupError("a bug")

    async with streaming(front, chunks) as url:
        with caplog.at_level(logging.ERROR):
            assert await read(url) == (200, b"retry: 1000\n\nevent: a\ndata: 1\n\n")
    [line] = [line for line in caplog.records if line.getMessage() == "fault"]
    assert line.exc_info is not None


async def test_a_server_that_stops_begins_none(front: Front) -> None:
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield b""

    front.calls.interrupt()
    async with streaming(front, chunks) as url:
        status, body = await read(url)
    assert status == 503
    assert b"this server is stopping" in body


async def test_a_client_that_does_not_read_is_cut_off_and_its_events_are_closed(front: Front) -> None:
    closed = asyncio.Event()

    async def chunks() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield events.encode("a", b"x" * 1_000_000)
        finally:
            closed.set()

    async with streaming(front, chunks, write_s=0.2) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2].strip("/")), limit=1024)
        writer.write(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        await closed.wait()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1 << 40)
        writer.close()


async def test_a_client_that_leaves_closes_the_events(front: Front) -> None:
    closed = asyncio.Event()

    async def chunks() -> AsyncGenerator[bytes, None]:
        try:
            yield events.encode("a", b"1")
            await asyncio.Event().wait()
        finally:
            closed.set()

    async with streaming(front, chunks) as url:
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            await response.content.readline()
        await closed.wait()
