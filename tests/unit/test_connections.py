"""What one connection, or many of them, may take of a front end: over real sockets where the time does not matter, over
a stand-in for the wire and with given times where it does."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from api.connections import SLOWEST_BYTES_PER_S, SURPLUS, Connection, Connections
from broker.model import Outcome
from broker.settings import MIB, ApiSettings
from tests.eventually import eventually
from tests.unit.test_server import INVOKE, KEY, NOW, NVCF, House, opened

ASK = f"GET {NVCF}/functions HTTP/1.1"
HANGS_S = 30


async def dial(house: House, *, receive_bytes: int = 0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which nothing was sent."""
    host, port = house.url.removeprefix("http://").split(":")
    dialled = socket.socket()
    if receive_bytes:
        dialled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    dialled.setblocking(False)
    await asyncio.get_running_loop().sock_connect(dialled, (host, int(port)))
    return await asyncio.open_connection(sock=dialled, limit=receive_bytes or 2**16)


async def told(reader: asyncio.StreamReader) -> tuple[int, str]:
    """Status and head of an answer."""
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), HANGS_S)).decode()
    return int(head.split(" ", 2)[1]), head.lower()


# -- who asks for nothing ----------------------------------------------------------------------


async def test_who_asks_for_nothing_is_let_go(tmp_path: Path) -> None:
    async with opened(tmp_path, head_timeout_s=0.1) as house:
        dialled = [await dial(house) for _ in range(3)]
        for (_, writer), sent in zip(dialled, (b"", b"GET", b"GET / HTTP/1.1\r\nHost: x\r\n"), strict=True):
            writer.write(sent)
        for reader, writer in dialled:
            assert await asyncio.wait_for(reader.read(), HANGS_S) == b""
            writer.close()


async def test_who_has_asked_may_be_silent(tmp_path: Path) -> None:
    async with opened(tmp_path, head_timeout_s=0.1) as house:
        reader, writer = await house.connect(ASK)
        silent, other = await dial(house)
        assert (await told(reader))[0] == 200
        assert await asyncio.wait_for(silent.read(), HANGS_S) == b""  # by now this one would be gone, too
        writer.write(f"{ASK}\r\nHost: h\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
        await asyncio.wait_for(reader.readuntil(b"HTTP/1.1 200"), HANGS_S)
        for each in (writer, other):
            each.close()


# -- how many ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "status", "kind"),
    [("max_connections", 503, "overloaded"), ("max_address_connections", 429, "too-many-requests")],
)
async def test_one_connection_too_many_is_refused_in_words(tmp_path: Path, limit: str, status: int, kind: str) -> None:
    async with opened(tmp_path, failing=None, failing_queue=None, kind=ApiSettings, **{limit: 2}) as house:
        held = [await house.connect(ASK) for _ in range(2)]
        for reader, _ in held:
            assert (await told(reader))[0] == 200
        reader, surplus = await house.connect(f"POST {INVOKE} HTTP/1.1", "Content-Length: 0", "Prefer: respond-async")
        found, head = await told(reader)
        assert (found, "retry-after: 1" in head, "connection: close" in head) == (status, True, True)
        assert kind.encode() in await asyncio.wait_for(reader.read(), HANGS_S)
        assert await house.queued() == 0
        held[0][1].close()
        surplus.close()

        async def admitted() -> int:
            again, writer = await house.connect(ASK)
            status, _ = await told(again)
            writer.close()
            return status

        await eventually(admitted, lambda seen: seen == 200)
        held[1][1].close()


async def test_as_many_calls_of_an_account_wait_as_set_and_others_may_too(tmp_path: Path) -> None:
    async with opened(tmp_path, account_calls=1) as house:
        waiting = asyncio.create_task(house.invoke())
        await house.some_queued()
        status, headers, _ = await house.invoke()
        assert (status, headers["Retry-After"]) == (429, "1")
        assert (await house.invoke(NOW))[0] == 202, "this one does not wait"
        await house.finish()
        assert (await asyncio.wait_for(waiting, HANGS_S))[0] == 200
        again = asyncio.create_task(house.invoke())
        await house.some_queued(2)
        again.cancel()
        await asyncio.wait([again])


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health"])
async def test_whoever_watches_this_server_is_answered_all_the_same(tmp_path: Path, path: str) -> None:
    async with opened(tmp_path, max_connections=1) as house:
        reader, writer = await house.connect(ASK)
        await told(reader)
        watching, watcher = await house.connect(f"GET {path} HTTP/1.1")
        assert (await told(watching))[0] == 200
        for each in (writer, watcher):
            each.close()


# -- by the minute -----------------------------------------------------------------------------


class Wire(asyncio.Transport):
    def __init__(self, address: str = "192.0.2.1") -> None:
        super().__init__({"peername": (address, 1)})
        self.owed_bytes = 0
        self.gone = False

    def get_write_buffer_size(self) -> int:
        return self.owed_bytes

    def is_closing(self) -> bool:
        return self.gone

    def close(self) -> None:
        self.gone = True

    def abort(self) -> None:
        self.gone = True


class Listener:
    """Connections without sockets, at times that a test says."""

    def __init__(self, *, most: int = 10_000, most_per_address: int = 0) -> None:
        self.connections = Connections(ApiSettings(), most=most, most_per_address=most_per_address)
        self.make = self.connections.factory(web.Server(self._answer))
        self.made: list[Connection] = []

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        raise AssertionError("nobody asks")

    def connect(self, address: str = "192.0.2.1") -> tuple[Connection, Wire]:
        wire, connection = Wire(address), self.make()
        connection.connection_made(wire)
        self.made.append(connection)
        return connection, wire


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    found = Listener()
    yield found
    for each in found.made:
        each.connection_lost(None)
    assert len(found.connections) == 0


async def test_who_takes_nothing_of_an_answer_is_cut_after_its_time(listener: Listener) -> None:
    connection, wire = listener.connect()
    listener.connections.met(connection)
    now = asyncio.get_running_loop().time()
    listener.connections.look(now)
    wire.owed_bytes = 5 * MIB
    for after_s, gone in ((0, False), (30, False), (31, True)):
        listener.connections.look(now + after_s)
        assert wire.gone is gone, after_s


async def test_who_takes_it_slowly_is_given_the_time_that_the_slowest_pace_takes(listener: Listener) -> None:
    (first, steady), (second, crawling) = listener.connect(), listener.connect()
    for each in (first, second):
        listener.connections.met(each)
    steady.owed_bytes = crawling.owed_bytes = 5 * MIB
    now = asyncio.get_running_loop().time()
    for after_s in range(60):
        listener.connections.look(now + after_s)
        steady.owed_bytes -= SLOWEST_BYTES_PER_S
        crawling.owed_bytes -= SLOWEST_BYTES_PER_S // 4
    assert (steady.gone, crawling.gone) == (False, True)


async def test_who_has_taken_it_all_starts_anew_with_the_next_answer(listener: Listener) -> None:
    connection, wire = listener.connect()
    listener.connections.met(connection)
    now = asyncio.get_running_loop().time()
    for after_s, owed_bytes in ((0, 1000), (29, 1000), (30, 0), (31, 1000), (60, 1000)):
        wire.owed_bytes = owed_bytes
        listener.connections.look(now + after_s)
    assert not wire.gone


async def test_what_was_closed_with_something_unsent_is_cut_too() -> None:
    listener = Listener()
    connection, wire = listener.connect()
    listener.connections.met(connection)
    connection.force_close()
    assert wire.gone
    wire.gone, wire.owed_bytes = False, 1000
    now = asyncio.get_running_loop().time()
    for after_s in (0, 31):
        listener.connections.look(now + after_s)
    assert wire.gone
    connection.connection_lost(None)
    assert len(listener.connections) == 0


async def test_a_flood_of_silent_connections_keeps_nobody_out() -> None:
    listener = Listener(most=3)
    now = asyncio.get_running_loop().time()
    asking, _ = listener.connect()
    listener.connections.met(asking)
    flood = [listener.connect() for _ in range(2)]
    for connection, _ in flood:
        listener.connections._silent[connection] = now - 2
    newcomer, _ = listener.connect()
    assert [wire.gone for _, wire in flood] == [True, False]
    assert listener.connections.met(newcomer) is None


async def test_connections_beyond_the_surplus_are_cut_and_counted_no_more() -> None:
    listener = Listener(most=1)
    made = [listener.connect() for _ in range(1 + SURPLUS + 1)]
    assert [wire.gone for _, wire in made] == [False] * (1 + SURPLUS) + [True]
    made[-1][0].connection_lost(None)
    assert len(listener.connections) == 1 + SURPLUS
    for connection, _ in made[:-1]:
        connection.connection_lost(None)
    assert len(listener.connections) == 0


async def test_an_address_keeps_out_nobody_but_itself() -> None:
    listener = Listener(most_per_address=1)
    (first, _), (second, _), (other, _) = (
        listener.connect("192.0.2.1"),
        listener.connect("192.0.2.1"),
        listener.connect("192.0.2.2"),
    )
    assert [listener.connections.met(each) is None for each in (first, second, other)] == [True, False, True]
    first.connection_lost(None)
    again, _ = listener.connect("192.0.2.1")
    assert listener.connections.met(again) is not None, "the refused one still counts"
    for each in (second, again, other):
        each.connection_lost(None)
    fresh, _ = listener.connect("192.0.2.1")
    assert listener.connections.met(fresh) is None
    fresh.connection_lost(None)


# -- bodies ------------------------------------------------------------------------------------


async def test_of_a_hundred_large_bodies_at_once_as_many_as_fit_are_held(tmp_path: Path) -> None:
    """Their heads alone: what is announced is reserved."""
    async with opened(tmp_path) as house:
        heads = [f"POST {INVOKE} HTTP/1.1", f"Content-Length: {5 * MIB}", "Prefer: respond-async"]
        made = [await house.connect(*heads) for _ in range(100)]
        refused = asyncio.Semaphore(0)

        async def answered(reader: asyncio.StreamReader) -> str:
            status, head = await told(reader)
            assert (status, "retry-after: 1" in head) == (503, True)
            refused.release()
            return head

        readings = [asyncio.create_task(answered(reader)) for reader, _ in made]
        for _ in range(49):
            await asyncio.wait_for(refused.acquire(), HANGS_S)
        assert sum(reading.done() for reading in readings) == 49
        assert (await house.invoke(NOW, b"small"))[0] == 202
        for reading in readings:
            reading.cancel()
        await asyncio.wait(readings)
        for _, writer in made:
            writer.close()

        async def fits() -> int:
            return (await house.invoke(NOW, b"x" * 5 * MIB))[0]

        await eventually(fits, lambda seen: seen == 202)


# -- answers -----------------------------------------------------------------------------------


async def test_who_does_not_read_its_answer_loses_the_connection_and_not_the_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="api.connections")
    async with opened(tmp_path, send_timeout_s=0.1) as house:
        request_id = await house.submit()
        await house.finish(Outcome(status=200, body=b"x" * 16 * MIB))
        _, writer = await dial(house, receive_bytes=4096)
        path = f"{NVCF}/pexec/status/{request_id}"
        writer.write(f"GET {path} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())

        async def lines() -> list[str]:
            return [line.getMessage() for line in caplog.records]

        await eventually(lines, lambda seen: "slow_reader_cut" in seen)
        async with house.client.get(path) as response:
            assert len(await response.read()) == 16 * MIB
        writer.close()
