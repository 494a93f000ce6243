"""A connection whose plain requests have one task each: it is used, kept, left and closed as any other. Both ways are
asked the same, over a stand-in for the wire."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from aiohttp import web
from pydantic import SecretStr

from api import shortcut
from api.app import make_app
from api.connections import Connection
from api.front import Front
from api.server import KEEPALIVE_S
from broker import ports
from broker.connect import open_broker
from broker.model import FunctionStatus, Job, Outcome, RequestState, Version
from broker.ports import Broker
from broker.settings import ApiSettings
from tests.eventually import eventually
from tests.unit.test_server import FUNCTION, INVOKE, KEY, NOBODYS, NVCF, VERSION

T = TypeVar("T")

HANG_S = 30.0
NONE: Mapping[str, str] = {}
ACCEPT = {"Prefer": "respond-async"}
# By the query a request takes the ordinary way.
WAYS = ("", "?by=router")
either_way = pytest.mark.parametrize("way", WAYS, ids=["short", "ordinary"])


class Gated:
    """A queue in memory that takes a job when its gate is open."""

    def __init__(self, inner: ports.Queue) -> None:
        self._inner = inner
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def publish(self, job: Job, *, timeout_s: float) -> None:
        self.asked.set()
        await self.gate.wait()
        await self._inner.publish(job, timeout_s=timeout_s)


class Wire(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__({"peername": ("192.0.2.1", 1)})
        self.sent = b""
        self.gone = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += bytes(data)

    def is_closing(self) -> bool:
        return self.gone

    def close(self) -> None:
        self.gone = True

    def abort(self) -> None:
        self.gone = True

    def pause_reading(self) -> None:
        return

    def resume_reading(self) -> None:
        return

    def get_write_buffer_size(self) -> int:
        return 0

    @property
    def statuses(self) -> list[int]:
        return [int(status) for status in re.findall(rb"HTTP/1\.\d (\d{3}) ", self.sent)]

    async def answers(self, count: int) -> list[int]:
        return await seen(lambda: self.statuses, lambda found: len(found) >= count)


async def seen(look: Callable[[], T], until: Callable[[T], object]) -> T:
    async def once() -> T:
        return look()

    return await eventually(once, lambda found: bool(until(found)), within_s=HANG_S)


@dataclass(slots=True, kw_only=True)
class House:
    broker: Broker
    front: Front
    queue: Gated
    make: Callable[[], Connection]
    made: list[Connection] = field(default_factory=list)

    async def connect(self) -> tuple[Connection, Wire]:
        """A connection that is idle."""
        wire, connection = Wire(), self.make()
        connection.connection_made(wire)
        self.made.append(connection)
        await seen(lambda: connection._waiter, lambda waiter: waiter is not None)
        return connection, wire

    async def finish(self) -> None:
        """Run the next job, as a sidecar would."""
        delivery = await self.broker.queue.take(VERSION)
        assert delivery is not None
        claim = await self.broker.results.claim(delivery.job, worker="w", lease_s=60, max_attempts=3)
        assert claim.lease is not None
        await self.broker.results.settle(
            claim.lease, delivery.job, RequestState.FULFILLED, Outcome(status=200, body=b"done")
        )
        await delivery.ack()

    async def states(self) -> list[RequestState]:
        """Of the jobs in the queue."""
        found = []
        while (delivery := await self.broker.queue.take(VERSION)) is not None:
            record = await self.broker.results.read(delivery.job.id)
            assert record is not None
            found.append(record.state)
        return found


@asynccontextmanager
async def opened(folder: Path, **settings: Any) -> AsyncIterator[House]:
    chosen = ApiSettings(
        queue_url=SecretStr("memory://"),
        store_url=SecretStr("memory://"),
        blobs_url=SecretStr("file://"),
        data_dir=folder,
        admin_key=SecretStr(KEY),
        **settings,
    )
    async with open_broker(chosen) as whole:
        queue = Gated(whole.queue)
        broker = replace(whole, queue=cast("ports.Queue", queue))
        version = Version(
            id=VERSION,
            function_id=FUNCTION,
            account="default",
            name="f",
            inference_url="/",
            container_image="i",
            created_at=1.0,
            status=FunctionStatus.ACTIVE,
        )
        await broker.catalog.versions.put(version)
        await broker.queue.declare(VERSION)
        front = Front.over(broker, chosen)
        front.connections.short_way, front.connections.abandon = shortcut.of(front), front.calls.abandon
        runner = web.AppRunner(make_app(front), handler_cancellation=True)
        await runner.setup()
        assert runner.server is not None
        make = front.connections.factory(
            runner.server, access_log=None, keepalive_timeout=KEEPALIVE_S, auto_decompress=False
        )
        house = House(broker=broker, front=front, queue=queue, make=make)
        try:
            yield house
        finally:
            front.calls.interrupt()
            for connection in house.made:
                connection.connection_lost(None)
            await runner.cleanup()
            await front.calls.finish(grace_s=HANG_S)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path) as found:
        yield found


def post(way: str = "", headers: Mapping[str, str] = NONE, body: bytes = b"{}") -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST {INVOKE}{way} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {KEY}\r\n{lines}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def poll(way: str = "") -> bytes:
    return f"GET {NVCF}/pexec/status/{NOBODYS}{way} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()


# -- one after another -------------------------------------------------------------------------


@either_way
async def test_a_connection_is_used_again_and_again(house: House, way: str) -> None:
    connection, wire = await house.connect()
    for number in range(1, 4):
        connection.data_received(post(way, ACCEPT))
        assert (await wire.answers(number))[-1] == 202
        await seen(lambda: connection._waiter, lambda waiter: waiter is not None)
    assert not wire.gone


@either_way
async def test_what_is_asked_all_at_once_is_answered_in_order(house: House, way: str) -> None:
    connection, wire = await house.connect()
    connection.data_received(post(way, ACCEPT) + poll(way) + b"GET /livez HTTP/1.1\r\nHost: h\r\n\r\n")
    assert await wire.answers(3) == [202, 404, 200]
    connection.data_received(poll(way))
    assert (await wire.answers(4))[3] == 404


@either_way
async def test_what_is_asked_while_a_call_is_held_is_answered_behind_it(house: House, way: str) -> None:
    connection, wire = await house.connect()
    connection.data_received(post(way))
    await seen(lambda: house.front.calls.waiters, bool)
    connection.data_received(poll(way))
    connection.data_received(b"GET /livez HTTP/1.1\r\nHost: h\r\n\r\n")
    await house.finish()
    assert await wire.answers(3) == [200, 404, 200]
    assert wire.sent.index(b"done") < wire.sent.index(b"404")


@either_way
async def test_a_body_may_come_later_and_in_pieces(house: House, way: str) -> None:
    connection, wire = await house.connect()
    whole = post(way, ACCEPT, b"x" * 1000)
    for at in range(0, len(whole), 300):
        connection.data_received(whole[at : at + 300])
        await asyncio.sleep(0)
    assert await wire.answers(1) == [202]
    delivery = await house.broker.queue.take(VERSION)
    assert delivery is not None
    assert delivery.job.body == b"x" * 1000


@either_way
async def test_the_rest_of_a_body_that_was_refused_is_no_request(house: House, way: str) -> None:
    connection, wire = await house.connect()
    refused = post(way, {"NVCF-POLL-SECONDS": "soon"}, poll(way))
    head, body = refused[: -len(poll(way))], poll(way)
    connection.data_received(head)
    assert await wire.answers(1) == [400]
    connection.data_received(body)
    connection.data_received(post(way, ACCEPT))
    assert await wire.answers(2) == [400, 202]


@either_way
async def test_what_is_no_http_closes_the_connection(house: House, way: str) -> None:
    connection, wire = await house.connect()
    connection.data_received(post(way, ACCEPT))
    await wire.answers(1)
    await seen(lambda: connection._waiter, lambda waiter: waiter is not None)
    connection.data_received(b"nonsense\r\n\r\n")
    assert await wire.answers(2) == [202, 400]
    await seen(lambda: wire.gone, bool)


@either_way
async def test_a_connection_is_closed_behind_the_answer_if_its_client_says_so(house: House, way: str) -> None:
    connection, wire = await house.connect()
    connection.data_received(post(way, {"Connection": "close", **ACCEPT}))
    assert await wire.answers(1) == [202]
    await seen(lambda: wire.gone, bool)


# -- how long it is kept -----------------------------------------------------------------------


@either_way
async def test_a_call_is_held_for_longer_than_an_idle_connection_is_kept(house: House, way: str) -> None:
    connection, wire = await house.connect()

    def time_passes() -> None:
        connection._next_keepalive_close_time = 0.0
        connection._process_keepalive()

    connection.data_received(post(way))
    await seen(lambda: house.front.calls.waiters, bool)
    time_passes()
    assert not wire.gone
    await house.finish()
    assert await wire.answers(1) == [200]
    await seen(lambda: connection._keepalive_handle, bool)
    time_passes()
    assert wire.gone


# -- who leaves --------------------------------------------------------------------------------


@either_way
@pytest.mark.parametrize(
    ("policy", "state"), [("continue", RequestState.QUEUED), ("cancel", RequestState.CANCELLED)], ids=str
)
async def test_who_leaves_interrupts_no_submission(tmp_path: Path, way: str, policy: str, state: RequestState) -> None:
    async with opened(tmp_path, on_disconnect=policy) as house:
        connection, wire = await house.connect()
        house.queue.gate.clear()
        connection.data_received(post(way))
        await asyncio.wait_for(house.queue.asked.wait(), HANG_S)
        connection.connection_lost(None)
        house.made.clear()
        house.queue.gate.set()
        await seen(lambda: house.front.calls.waiters, lambda waiters: not waiters)
        await house.front.calls.finish(grace_s=HANG_S)
        assert await house.states() == [state]
        assert wire.sent == b""
        assert house.front.bodies.held == 0


@either_way
async def test_who_leaves_while_it_waits_is_not_waited_for(house: House, way: str) -> None:
    connection, _ = await house.connect()
    connection.data_received(post(way))
    await seen(lambda: house.front.calls.waiters, bool)
    await seen(lambda: house.front.bodies.held, lambda held: not held)
    connection.connection_lost(None)
    house.made.clear()
    await seen(lambda: house.front.calls.waiters, lambda waiters: not waiters)
    assert await house.states() == [RequestState.QUEUED]


# -- a server that stops -----------------------------------------------------------------------


@either_way
async def test_who_waits_is_answered_when_the_server_stops_and_its_connection_closed(house: House, way: str) -> None:
    connection, wire = await house.connect()
    connection.data_received(post(way))
    await seen(lambda: house.front.bodies.held, lambda held: not held and house.front.calls.waiters)
    house.front.calls.interrupt()
    connection.close()
    await asyncio.wait_for(connection.shutdown(HANG_S * 2), HANG_S)
    assert wire.statuses == [202]
    assert b"Connection: close" in wire.sent
    assert wire.gone


@either_way
async def test_what_is_being_submitted_when_the_server_stops_is_accepted_and_answered(house: House, way: str) -> None:
    connection, wire = await house.connect()
    house.queue.gate.clear()
    connection.data_received(post(way))
    await asyncio.wait_for(house.queue.asked.wait(), HANG_S)
    house.front.calls.interrupt()
    finishing = asyncio.create_task(house.front.calls.finish(grace_s=HANG_S))
    await asyncio.sleep(0)
    assert not finishing.done()
    house.queue.gate.set()
    await asyncio.wait_for(finishing, HANG_S)
    assert await wire.answers(1) == [202]
    assert await house.states() == [RequestState.QUEUED]
    await seen(lambda: wire.gone, bool)
    assert house.front.bodies.held == 0


@either_way
async def test_who_left_before_the_server_stopped_is_treated_as_set(tmp_path: Path, way: str) -> None:
    async with opened(tmp_path, on_disconnect="cancel") as house:
        connection, _ = await house.connect()
        house.queue.gate.clear()
        connection.data_received(post(way))
        await asyncio.wait_for(house.queue.asked.wait(), HANG_S)
        connection.connection_lost(None)
        house.made.clear()
        house.front.calls.interrupt()
        house.queue.gate.set()
        await seen(lambda: house.front.calls.waiters, lambda waiters: not waiters)
        await house.front.calls.finish(grace_s=HANG_S)
        assert await house.states() == [RequestState.CANCELLED]


@either_way
async def test_what_takes_longer_to_submit_than_a_stopping_server_has_is_given_up(house: House, way: str) -> None:
    connection, _ = await house.connect()
    house.queue.gate.clear()
    connection.data_received(post(way))
    await asyncio.wait_for(house.queue.asked.wait(), HANG_S)
    house.front.calls.interrupt()
    await asyncio.wait_for(house.front.calls.finish(grace_s=0), HANG_S)
    await seen(lambda: house.front.bodies.held, lambda held: not held)
    await seen(lambda: house.front.calls.waiters, lambda waiters: not waiters)


async def test_plain_requests_take_the_short_way(house: House) -> None:
    """The other tests would be none if both ways were one."""
    connection, _ = await house.connect()
    for way, serving in (("", True), ("?by=router", False)):
        connection.data_received(post(way))
        assert (connection._serving is not None) is serving
        await seen(lambda: house.front.calls.waiters, bool)
        await house.finish()
        await seen(lambda: connection._waiter, lambda waiter: waiter is not None)
