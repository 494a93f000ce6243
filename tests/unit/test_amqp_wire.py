"""What goes over an AMQP connection for every job, byte by byte. What a broker makes of it is in tests/contract."""

from __future__ import annotations

import asyncio
import struct
from typing import cast

import pytest
from aiormq.exceptions import AMQPError
from pamqp import commands, frame
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.common import FieldTable
from pamqp.header import ContentHeader

from broker.backends.rabbitmq import wire
from broker.backends.rabbitmq.wire import Channel, Message, Refused, Returned, Wire
from tests.eventually import eventually


class Sent(asyncio.Transport):
    """A transport that keeps what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.data = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.data += bytes(data)

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        return

    def frames(self) -> list[object]:
        found: list[object] = []
        data, self.data = self.data, b""
        while data:
            size, _, read = frame.unmarshal(data)
            found.append(read)
            data = data[size:]
        return found


class Bench:
    """A channel of a connection that needs no server."""

    def __init__(self, *, gather_s: float = 3600.0) -> None:
        self.sent = Sent()
        self.wire = Wire("amqp://guest:guest@localhost/", "test", gather_s=gather_s)
        self.wire.connection_made(self.sent)
        self.wire._opened = True  # as after the handshake
        self.wire.frame_max = 4096
        self.channel = Channel(self.wire, 1)
        self.wire._channels[1] = self.channel

    def hear(self, *said: Frame | ContentHeader | ContentBody) -> None:
        self.wire.data_received(b"".join(frame.marshal(each, 1) for each in said))

    async def flushed(self) -> list[object]:
        await asyncio.sleep(0)
        return self.sent.frames()

    async def consume(self, *, prefetch: int = 0) -> list[Message]:
        arrived: list[Message] = []
        if prefetch:
            limiting = asyncio.create_task(self.channel.prefetch(prefetch))
            await asyncio.sleep(0)
            self.hear(commands.Basic.QosOk())
            await limiting
        consuming = asyncio.create_task(self.channel.consume("queue", arrived.append, tag="jobs"))
        await asyncio.sleep(0)
        self.hear(commands.Basic.ConsumeOk("jobs"))
        await consuming
        await self.flushed()
        return arrived


def delivery(tag: int, body: bytes, headers: FieldTable | None = None) -> list[Frame | ContentHeader | ContentBody]:
    properties = commands.Basic.Properties(headers=headers or {}, message_id=f"id-{tag}", priority=3, user_id="guest")
    return [
        commands.Basic.Deliver("jobs", tag, False, "", "queue"),
        ContentHeader(0, len(body), properties),
        *(ContentBody(body[at : at + 1000]) for at in range(0, len(body), 1000)),
    ]


def properties_of(message_id: str) -> bytes:
    return wire.properties(
        {"fnq": b"{}"}, content_type="x/y", expiration="1000", message_id=message_id, app_id="fnqueue"
    )


async def test_a_published_message_is_what_a_client_library_reads() -> None:
    bench, body = Bench(), b"b" * 10_000
    properties = wire.properties(
        {"fnq": '{"ü": 1}'.encode(), "sig": b"k:1"},
        content_type="x/y",
        expiration="7",
        message_id="m",
        app_id="fnqueue",
    )
    bench.channel.publish("queue", "m", properties, body)
    publish, header, *parts = await bench.flushed()
    assert isinstance(publish, commands.Basic.Publish)
    assert (publish.exchange, publish.routing_key, publish.mandatory) == ("", "queue", True)
    assert isinstance(header, ContentHeader)
    read = header.properties
    assert (header.body_size, read.headers, read.delivery_mode) == (len(body), {"fnq": '{"ü": 1}', "sig": "k:1"}, 2)
    assert (read.content_type, read.expiration, read.message_id, read.app_id) == ("x/y", "7", "m", "fnqueue")
    assert b"".join(cast("ContentBody", part).value for part in parts) == body
    assert all(len(cast("ContentBody", part).value) <= bench.wire.frame_max - 8 for part in parts)


@pytest.mark.parametrize("step", [1, 7, 100, 5000])
async def test_a_delivery_is_the_same_however_it_is_cut(step: int) -> None:
    bench = Bench()
    arrived = await bench.consume()
    headers: FieldTable = {"fnq": "envelope", "signature": "k:2"}
    data = b"".join(frame.marshal(each, 1) for tag in (1, 2) for each in delivery(tag, b"x" * 2500, headers))
    for at in range(0, len(data), step):
        bench.wire.data_received(data[at : at + step])
    assert [(each.delivery_tag, each.message_id, each.headers, each.body) for each in arrived] == [
        (tag, f"id-{tag}", headers, b"x" * 2500) for tag in (1, 2)
    ]


async def test_headers_of_other_kinds_are_read_too() -> None:
    bench = Bench()
    arrived = await bench.consume()
    headers: FieldTable = {"fnq": "e", "x-death": [{"reason": "rejected", "count": 2}], "n": 5}
    bench.hear(*delivery(1, b"", headers))
    assert arrived[0].headers == headers


async def test_acknowledgements_in_a_row_leave_as_one() -> None:
    bench = Bench()
    await bench.consume()
    for tag in range(1, 7):
        bench.hear(*delivery(tag, b""))
    for tag in (3, 1, 2, 5):
        bench.channel.ack(tag)
    acks = cast("list[commands.Basic.Ack]", await bench.flushed())
    assert [(ack.delivery_tag, ack.multiple) for ack in acks] == [(3, True), (5, False)]
    bench.channel.ack(4)
    bench.channel.requeue(6)
    ack, nack = cast("list[commands.Basic.Ack]", await bench.flushed())
    assert isinstance(nack, commands.Basic.Nack)
    assert (ack.delivery_tag, ack.multiple) == (4, False)


async def test_acknowledgements_wait_for_others_while_the_broker_sends_on() -> None:
    bench = Bench()
    await bench.consume(prefetch=3)
    for tag in (1, 2):
        bench.hear(*delivery(tag, b""))
    for tag in (2, 1):
        bench.channel.ack(tag)
        assert await bench.flushed() == []
    bench.hear(*delivery(3, b""))
    [ack] = cast("list[commands.Basic.Ack]", await bench.flushed())
    assert (ack.delivery_tag, ack.multiple) == (2, True)


async def test_an_acknowledgement_without_others_is_said_too() -> None:
    bench = Bench(gather_s=0.001)
    await bench.consume(prefetch=3)
    bench.hear(*delivery(1, b""))
    bench.channel.ack(1)
    [ack] = cast("list[commands.Basic.Ack]", await eventually(bench.flushed, bool))
    assert (ack.delivery_tag, ack.multiple) == (1, False)


@pytest.mark.parametrize("first", ["ack", "delivery"])
async def test_acknowledgements_do_not_wait_where_the_broker_does(first: str) -> None:
    bench = Bench()
    await bench.consume(prefetch=3)
    for tag in (1, 2):
        bench.hear(*delivery(tag, b""))
    if first == "delivery":
        bench.hear(*delivery(3, b""))
    bench.channel.ack(1)
    if first == "ack":
        bench.hear(*delivery(3, b""))
    [ack] = cast("list[commands.Basic.Ack]", await bench.flushed())
    assert (ack.delivery_tag, ack.multiple) == (1, False)


async def test_what_was_acknowledged_is_said_before_the_channel_closes() -> None:
    bench = Bench()
    await bench.consume(prefetch=3)
    bench.hear(*delivery(1, b""))
    bench.channel.ack(1)
    closing = asyncio.create_task(bench.channel.close())
    ack, close = await eventually(bench.flushed, bool)
    assert isinstance(ack, commands.Basic.Ack)
    assert isinstance(close, commands.Channel.Close)
    bench.hear(commands.Channel.CloseOk())
    await closing


async def test_each_publish_ends_with_its_own_answer() -> None:
    bench = Bench()
    published = [bench.channel.publish("queue", f"m{at}", properties_of(f"m{at}"), b"") for at in range(6)]
    bench.hear(
        commands.Basic.Return(312, "NO_ROUTE", "", "queue"),
        ContentHeader(0, 0, commands.Basic.Properties(message_id="m3")),
        commands.Basic.Ack(2, True),
        commands.Basic.Nack(3, False, False),
        commands.Basic.Ack(5, False),
        commands.Basic.Ack(4, False),
    )
    outcomes = await asyncio.gather(*published[:5], return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), type(None), Refused, Returned, type(None)]
    assert not published[5].done()
    bench.wire.connection_lost(None)
    assert published[5].exception() is not None


async def test_what_is_not_amqp_ends_the_connection() -> None:
    bench = Bench()
    waiting = bench.channel.publish("queue", "m", properties_of("m"), b"")
    bench.wire.data_received(struct.pack(">BHI", 1, 1, 2**31) + b"\0")
    assert not bench.wire.is_opened
    bench.wire.connection_lost(None)
    with pytest.raises(AMQPError):
        await waiting
