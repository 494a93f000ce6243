"""AMQP 0-9-1 for messages: publishing with confirms, consuming and acknowledging, as bytes over one connection.

What is rare goes through pamqp. What is done for every job is not: aiormq passes each frame through three tasks and
as many queues, which costs ten times what is here. Topology is aio-pika's.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TypeVar, cast

import aiormq
from aiormq import exceptions as amqp
from aiormq.auth import AuthMechanism
from aiormq.connection import SSLContextProvider
from pamqp import commands, decode, frame
from pamqp.base import Frame
from pamqp.common import FieldTable
from pamqp.header import ProtocolHeader

logger = logging.getLogger(__name__)

# While the broker sends on without them, acknowledgements wait for each other: one that is sent alone is an entry of
# its own in the log of a quorum queue. What they are about is settled by then, so that to lose one costs a claim.
GATHER_S = 0.02
# An open connection that is silent for so many heartbeats is lost.
_SILENT_BEATS = 2.5

_METHOD, _HEADER, _BODY, _HEARTBEAT, _END = 1, 2, 3, 8, 0xCE
_DELIVER, _ACK, _NACK, _REJECT = (60 << 16 | method for method in (60, 80, 120, 90))
_CHANNEL_ERRORS: Mapping[int, type[amqp.ChannelClosed]] = {
    403: amqp.ChannelAccessRefused,
    404: amqp.ChannelNotFoundEntity,
    405: amqp.ChannelLockedResource,
    406: amqp.ChannelPreconditionFailed,
}
_CAPABILITIES: FieldTable = {
    "authentication_failure_close": True,
    "basic.nack": True,
    "connection.blocked": True,
    "consumer_cancel_notify": True,
    "publisher_confirms": True,
}

_head = struct.Struct(">BHI")
_u32 = struct.Struct(">I")
_u64 = struct.Struct(">Q")
_settling = struct.Struct(">BHIIQBB")
_content = struct.Struct(">BHIHHQ")
_PUBLISH = struct.pack(">HHH", 60, 40, 0)
_MANDATORY = 1
_REQUEUE = 2

Answer = TypeVar("Answer", bound=Frame)
Received = Callable[["Message"], None]


class Returned(amqp.AMQPError):
    """No queue took the message."""


class Refused(amqp.AMQPError):
    """The broker did not take the message."""


class Message:
    """One that was delivered or returned. `headers` are those of its sender."""

    __slots__ = ("body", "delivery_tag", "headers", "message_id")

    def __init__(self, delivery_tag: int, headers: Mapping[str, object], message_id: str, body: bytes) -> None:
        self.delivery_tag = delivery_tag
        self.headers = headers
        self.message_id = message_id
        self.body = body


class Wire(asyncio.Protocol):
    """One connection; whoever connects it closes it. Its errors are aiormq's. `gather_s` is how long an acknowledgement
    may wait for others."""

    def __init__(self, url: str, name: str, *, gather_s: float = GATHER_S) -> None:
        # It reads the URL, with all that can be asked for there, and is never connected.
        self._wanted = aiormq.Connection(url)
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._out: list[bytes] = []
        self._flushing = False
        self._gather_s = gather_s
        self._settling: asyncio.TimerHandle | None = None
        self._channels: dict[int, Channel] = {}
        self._highest = 0
        self._channel_max = 2047
        self.frame_max = 131_072
        self.server_properties: Mapping[str, object] = {}
        self._answer: asyncio.Future[Frame] | None = None
        self._unblocked = asyncio.Event()
        self._unblocked.set()
        self._cause: BaseException | None = None
        self._opened = False
        self._beat: asyncio.TimerHandle | None = None
        self._heard_at = self._said_at = self._loop.time()

    @property
    def is_opened(self) -> bool:
        return self._opened and self._cause is None

    async def connect(self) -> None:
        """To be bounded by its caller. Raises amqp.AMQPError, OSError."""
        wanted = self._wanted
        context = None
        if wanted.url.scheme == "amqps":
            provider = SSLContextProvider(ssl_context=None, ssl_certs=wanted.ssl_certs, loop=self._loop)
            context = await provider.get_context()
        try:
            host, port = wanted.url.host or "", wanted.url.port or 0
            await self._loop.create_connection(lambda: self, host, port, ssl=context)
            await self._shake_hands()
        except BaseException:
            self.abort(amqp.AMQPConnectionError("not connected"))
            raise
        self._opened = True
        if wanted.heartbeat_timeout:
            self._keep_alive()

    async def ready(self) -> None:
        """Return once no alarm of the broker blocks this connection."""
        await self._unblocked.wait()

    @property
    def blocked(self) -> bool:
        return not self._unblocked.is_set()

    async def channel(self) -> Channel:
        """A new one; its owner closes it."""
        number = next((n for n in range(1, self._highest + 1) if n not in self._channels), self._highest + 1)
        if number > self._channel_max:
            raise amqp.ChannelInvalidStateError(f"the connection has all of its {self._channel_max} channels")
        self._highest = max(self._highest, number)
        channel = self._channels[number] = Channel(self, number)
        try:
            await channel.call(commands.Channel.Open())
        except BaseException:
            self.forget(channel)
            raise
        return channel

    async def close(self, cause: BaseException | None = None) -> None:
        """Say good-bye and wait for the answer; bounded by its caller."""
        if self.is_opened:
            self._cause = cause or amqp.ConnectionClosed(200, "closed by us")
            answer = self._answer = self._loop.create_future()
            self.send(frame.marshal(commands.Connection.Close(200, "closed by us", 0, 0), 0))
            try:
                await answer
            finally:
                self.abort(self._cause)

    def abort(self, cause: BaseException) -> None:
        self._cause = self._cause or cause
        if self._transport is not None:
            self._transport.abort()

    def send(self, data: bytes) -> None:
        """What is sent in one turn of the loop leaves in one piece."""
        self._out.append(data)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def settle_soon(self) -> None:
        """Have channels say what they have to settle when this turn's bytes leave."""
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def settle_later(self) -> None:
        """As `settle_soon`, but that others may come along."""
        if self._settling is None and not self._flushing:
            self._settling = self._loop.call_later(self._gather_s, self._flush)

    def forget(self, channel: Channel) -> None:
        if self._channels.get(channel.number) is channel:
            del self._channels[channel.number]

    # -- asyncio.Protocol -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if self._cause is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._beat is not None:
            self._beat.cancel()
        cause = self._cause = self._cause or exc or amqp.AMQPConnectionError("the broker closed the connection")
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(_as_lost(cause))
        for channel in list(self._channels.values()):
            channel.end(_as_lost(cause))
        self._channels.clear()

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        channels, unpack, largest = self._channels, _head.unpack_from, self.frame_max
        try:
            while end - at >= 8:
                kind, number, size = unpack(data, at)
                after = at + 8 + size
                if after > end and size <= largest:
                    break
                if size > largest or data[after - 1] != _END:
                    raise amqp.InvalidFrameError(f"{size} bytes without an end")
                channel = channels.get(number)
                if channel is None:
                    self._take(kind, number, data[at:after])
                elif kind == _METHOD:
                    channel.heard(data, at, after)
                elif kind == _HEADER:
                    channel.head(data, at + 7, after - 1)
                elif kind == _BODY:
                    channel.part(data[at + 7 : after - 1])
                at = after
        except Exception as exc:  # noqa: BLE001  whatever it is, it is not AMQP, and nobody else would hear of it
            logger.warning("queue_unreadable", extra={"cause": repr(exc)[:200]})
            self.abort(amqp.InvalidFrameError(str(exc)))
            return
        self._rest = data[at:]

    # -- pieces -----------------------------------------------------------------------------------

    def _take(self, kind: int, number: int, data: bytes) -> None:
        """What is for no channel that there is."""
        if number == 0 and kind == _METHOD:
            self._control(cast("Frame", frame.unmarshal(data)[2]))

    def _control(self, said: Frame) -> None:
        match said:
            case commands.Connection.Close():
                self.send(frame.marshal(commands.Connection.CloseOk(), 0))
                self._flush()
                kind = amqp.ProbableAuthenticationError if said.reply_code == 403 else amqp.ConnectionClosed
                self._cause = self._cause or kind(said.reply_code, said.reply_text)
                if self._transport is not None:
                    self._transport.close()
            case commands.Connection.Blocked():
                logger.warning("queue_blocked", extra={"cause": str(said.reason)[:200]})
                self._unblocked.clear()
            case commands.Connection.Unblocked():
                logger.warning("queue_unblocked")
                self._unblocked.set()
            case _:
                if self._answer is not None and not self._answer.done():
                    self._answer.set_result(said)

    async def _shake_hands(self) -> None:
        wanted = self._wanted
        start = await self._ask(ProtocolHeader().marshal(), commands.Connection.Start)
        self.server_properties = dict(start.server_properties or {})
        mechanism = wanted.url.query.get("auth", "plain").upper()
        if mechanism not in start.mechanisms.split() or mechanism not in AuthMechanism.__members__:
            raise amqp.AuthenticationError(start.mechanisms, [known.name for known in AuthMechanism])
        properties: FieldTable = {"product": "fnqueue", "connection_name": self._name, "capabilities": _CAPABILITIES}
        response = AuthMechanism[mechanism].value(wanted).marshal()
        begin = commands.Connection.StartOk(properties, mechanism, response)
        tune = await self._ask(frame.marshal(begin, 0), commands.Connection.Tune)
        self.frame_max = tune.frame_max or self.frame_max
        self._channel_max = tune.channel_max or self._channel_max
        agreed = commands.Connection.TuneOk(tune.channel_max, tune.frame_max, int(wanted.heartbeat_timeout))
        self.send(frame.marshal(agreed, 0))
        opening = frame.marshal(commands.Connection.Open(virtual_host=wanted.vhost), 0)
        await self._ask(opening, commands.Connection.OpenOk)

    async def _ask(self, data: bytes, wanted: type[Answer]) -> Answer:
        answer = self._answer = self._loop.create_future()
        self.send(data)
        found = await answer
        if not isinstance(found, wanted):
            raise amqp.InvalidFrameError(f"{found!r} in place of {wanted.name}")
        return found

    def _flush(self) -> None:
        self._flushing = False
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None
        # First, for a channel that is closed has nothing to say any more.
        settled = [channel.settlements() for channel in self._channels.values() if channel.settled]
        out, self._out = settled + self._out, []
        if out and self._transport is not None and not self._transport.is_closing():
            self._said_at = self._loop.time()
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))

    def _keep_alive(self) -> None:
        beat_s = float(self._wanted.heartbeat_timeout)
        now = self._loop.time()
        if now - self._heard_at > beat_s * _SILENT_BEATS:
            self.abort(amqp.AMQPConnectionError("the broker is silent"))
            return
        if now - self._said_at >= beat_s / 3:
            self.send(_head.pack(_HEARTBEAT, 0, 0) + b"\xce")
        self._beat = self._loop.call_later(beat_s / 3, self._keep_alive)


class Channel:
    """Opened by `Wire.channel`. `on_cancel` is told the tag of a consumer that the broker ended, `on_end` that nothing
    comes or goes any more."""

    def __init__(self, wire: Wire, number: int) -> None:
        self.wire = wire
        self.number = number
        self.on_cancel: Callable[[str], None] = _ignore
        self.on_end: Callable[[], None] = _nothing
        self.settled: dict[int, None] = {}
        self._loop = asyncio.get_running_loop()
        self._ended: BaseException | None = None
        self._asked: deque[asyncio.Future[Frame]] = deque()
        self._calling = asyncio.Lock()
        self._consumers: dict[bytes, Received] = {}
        self._published = 0
        self._unconfirmed: dict[int, tuple[asyncio.Future[None], str]] = {}
        self._returned: set[str] = set()
        self._lent: dict[int, None] = {}
        self._prefetch = 0
        self._receiver: Received | None = None
        self._tag = 0
        self._left = 0
        self._headers: Mapping[str, object] = {}
        self._message_id = ""
        self._parts: list[bytes] = []
        self._publishing: dict[tuple[str, str], bytes] = {}

    @property
    def is_closed(self) -> bool:
        return self._ended is not None or not self.wire.is_opened

    # -- one at a time ----------------------------------------------------------------------------

    async def call(self, method: Frame) -> Frame:
        """The broker's answer to a method that has one."""
        self._check()
        answer: asyncio.Future[Frame] = self._loop.create_future()
        self._asked.append(answer)
        self.wire.send(frame.marshal(method, self.number))
        return await answer

    async def confirm(self) -> None:
        """Have every publish confirmed from now on."""
        await self.call(commands.Confirm.Select())

    async def prefetch(self, count: int) -> None:
        self._prefetch = count
        await self.call(commands.Basic.Qos(prefetch_count=count))

    async def consume(self, queue: str, received: Received, *, tag: str) -> None:
        self._consumers[tag.encode()] = received
        try:
            await self.call(commands.Basic.Consume(queue=queue, consumer_tag=tag))
        except BaseException:
            self._consumers.pop(tag.encode(), None)
            raise

    async def cancel(self, tag: str) -> None:
        """Once this returns, nothing arrives any more."""
        await self.call(commands.Basic.Cancel(tag))
        self._consumers.pop(tag.encode(), None)

    async def get(self, queue: str) -> Message | None:
        """The queue's first message, None if it is empty."""
        async with self._calling:
            fetched: asyncio.Future[Message] = self._loop.create_future()
            self._receiver = fetched.set_result
            answer = await self.call(commands.Basic.Get(queue=queue))
            if isinstance(answer, commands.Basic.GetEmpty):
                self._receiver = None
                return None
            assert isinstance(answer, commands.Basic.GetOk), "there is no other answer"
            return await fetched

    async def close(self) -> None:
        """Messages on loan go back to their queues. To be bounded by its caller."""
        if not self.is_closed:
            try:
                await self.call(commands.Channel.Close(200, "closed by us", 0, 0))
            finally:
                # Without an answer its number stays taken: what still comes is not for another channel.
                self.end(amqp.ChannelClosed(200, "closed by us"), forget=False)

    # -- for every job ----------------------------------------------------------------------------

    def publish(
        self, routing_key: str, message_id: str, properties: bytes, body: bytes, *, exchange: str = ""
    ) -> asyncio.Future[None]:
        """Send it to the exchange, by default that which leads to the queue that the routing key names; `properties`
        are those of a content header, `message_id` among them.

        The future ends with the broker's confirmation, or with Returned or Refused. No two of one ID at a time.
        """
        self._check()
        number, room = self.number, self.wire.frame_max - 8
        method = self._publishing.get((exchange, routing_key))
        if method is None:
            payload = _PUBLISH + _short(exchange) + _short(routing_key) + bytes((_MANDATORY,))
            method = self._publishing[exchange, routing_key] = (
                _head.pack(_METHOD, number, len(payload)) + payload + b"\xce"
            )
            if len(self._publishing) > 10_000:
                self._publishing.clear()
        pieces = [method, _content.pack(_HEADER, number, 12 + len(properties), 60, 0, len(body)), properties, b"\xce"]
        for at in range(0, len(body), room):
            piece = body[at : at + room]
            pieces += (_head.pack(_BODY, number, len(piece)), piece, b"\xce")
        self.wire.send(b"".join(pieces))
        self._published += 1
        confirmed: asyncio.Future[None] = self._loop.create_future()
        self._unconfirmed[self._published] = (confirmed, message_id)
        return confirmed

    def ack(self, delivery_tag: int) -> None:
        self._check()
        self.settled[delivery_tag] = None
        if len(self._lent) < self._prefetch:
            self.wire.settle_later()
        else:  # the broker sends no more, or may be told now as well as later
            self.wire.settle_soon()

    def requeue(self, delivery_tag: int) -> None:
        # nack, not reject: from RabbitMQ 4.3 on only reject counts towards the delivery limit
        self._check()
        self._lent.pop(delivery_tag, None)
        self.wire.send(_settling.pack(_METHOD, self.number, 13, _NACK, delivery_tag, _REQUEUE, _END))

    def reject(self, delivery_tag: int) -> None:
        """Never to be delivered again, but to the dead letters."""
        self._check()
        self._lent.pop(delivery_tag, None)
        self.wire.send(_settling.pack(_METHOD, self.number, 13, _REJECT, delivery_tag, 0, _END))

    def settlements(self) -> bytes:
        """All acknowledgements since the last: one for everything up to the first that is still on loan, and one for
        each behind it."""
        settled, self.settled = self.settled, {}
        last, count = 0, 0
        for tag in self._lent:
            if tag not in settled:
                break
            last, count = tag, count + 1
        frames = []
        if count > 1:
            frames.append(_settling.pack(_METHOD, self.number, 13, _ACK, last, 1, _END))
        for tag in settled:
            self._lent.pop(tag, None)
            if count <= 1 or tag > last:
                frames.append(_settling.pack(_METHOD, self.number, 13, _ACK, tag, 0, _END))
        return b"".join(frames)

    # -- what the wire hears ----------------------------------------------------------------------

    def heard(self, data: bytes, at: int, after: int) -> None:
        """A method's frame is there from `at` to `after`."""
        (method,) = _u32.unpack_from(data, at + 7)
        if method == _DELIVER:  # its header and body follow
            tag_at = at + 12 + data[at + 11]
            self._receiver = self._consumers.get(data[at + 12 : tag_at], _ignore)
            (self._tag,) = _u64.unpack_from(data, tag_at)
            self._lent[self._tag] = None
            if self.settled and len(self._lent) >= self._prefetch:
                self.wire.settle_soon()
        elif method == _ACK:
            self._confirmed(_u64.unpack_from(data, at + 11)[0], multiple=bool(data[at + 19] & 1))
        else:
            self._take(cast("Frame", frame.unmarshal(data[at:after])[2]))

    def head(self, data: bytes, at: int, end: int) -> None:
        (self._left,) = _u64.unpack_from(data, at + 4)
        self._headers, self._message_id = _properties(data, at + 12, end)
        self._parts = []
        if not self._left:
            self._complete(b"")

    def part(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left > 0:
            self._parts.append(data)
        elif self._parts:
            self._complete(b"".join((*self._parts, data)))
        else:
            self._complete(data)

    def _confirmed(self, tag: int, *, multiple: bool) -> None:
        if not multiple:
            self._conclude(tag)
            return
        while self._unconfirmed and (first := next(iter(self._unconfirmed))) <= tag:
            self._conclude(first)

    def _take(self, said: Frame) -> None:
        match said:
            case commands.Basic.Nack():
                error = Refused("the queue took no message")
                tags = [tag for tag in self._unconfirmed if tag <= (said.delivery_tag or 0)]
                for tag in tags if said.multiple else [said.delivery_tag or 0]:
                    self._conclude(tag, error)
            case commands.Basic.Return():
                self._receiver = self._was_returned
            case commands.Basic.GetOk():
                self._tag = said.delivery_tag or 0
                self._lent[self._tag] = None
                self._reply(said)
            case commands.Basic.Cancel():
                consumer = said.consumer_tag or ""
                self._consumers.pop(consumer.encode(), None)
                self.on_cancel(consumer)
            case commands.Channel.Close():
                self.wire.send(frame.marshal(commands.Channel.CloseOk(), self.number))
                kind = _CHANNEL_ERRORS.get(said.reply_code or 0)
                self.end(kind(said.reply_text) if kind else amqp.ChannelClosed(said.reply_code, said.reply_text))
            case commands.Channel.CloseOk():
                self.wire.forget(self)
                self._reply(said)
            case _:
                self._reply(said)

    def end(self, cause: BaseException, *, forget: bool = True) -> None:
        """Nothing comes or goes any more."""
        if self._ended is not None:
            return
        self._ended = cause
        if forget:
            self.wire.forget(self)
        asked, self._asked = self._asked, deque()
        unconfirmed, self._unconfirmed = self._unconfirmed, {}
        self._lent, self.settled, self._consumers = {}, {}, {}
        confirms = [confirmed for confirmed, _ in unconfirmed.values()]
        for waiting in cast("list[asyncio.Future[object]]", [*asked, *confirms]):
            if not waiting.done():
                waiting.set_exception(cause)
                waiting.exception()  # whoever still waits is told; a publish may be waited for by nobody
        self.on_end()

    # -- pieces -----------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._ended is not None or not self.wire.is_opened:
            raise amqp.ChannelInvalidStateError("the channel is closed") from self._ended

    def _reply(self, said: Frame) -> None:
        if self._asked:
            answer = self._asked.popleft()
            if not answer.done():
                answer.set_result(said)

    def _complete(self, body: bytes) -> None:
        receiver, self._receiver, self._parts = self._receiver, None, []
        if receiver is not None:
            receiver(Message(self._tag, self._headers, self._message_id, body))

    def _was_returned(self, message: Message) -> None:
        """The confirmation follows."""
        self._returned.add(message.message_id)

    def _conclude(self, tag: int, error: Exception | None = None) -> None:
        confirmed, message_id = self._unconfirmed.pop(tag, (None, ""))
        if self._returned and message_id in self._returned:
            self._returned.discard(message_id)
            error = error or Returned("no queue took the message")
        if confirmed is None or confirmed.done():
            return
        if error is None:
            confirmed.set_result(None)
        else:
            confirmed.set_exception(error)
            confirmed.exception()


def properties(
    headers: Mapping[str, bytes], *, content_type: str, expiration: str, message_id: str, app_id: str
) -> bytes:
    """Of a persistent message, as its content header spells them; `headers` are texts.

    Raises ValueError: a name is too long.
    """
    table = b"".join([_entry(name) + _u32.pack(len(value)) + value for name, value in headers.items()])
    return b"".join(
        (
            _FLAGS,
            _named(content_type),
            _u32.pack(len(table)),
            table,
            b"\x02",
            _named(expiration),
            _short(message_id),
            _named(app_id),
        )
    )


@lru_cache(maxsize=64)
def _entry(name: str) -> bytes:
    """How an entry of a table begins whose value is a text."""
    return _short(name) + b"S"


# Which properties there are, in this order: content type, headers, delivery mode, expiration, message ID, app ID.
_FLAGS = struct.pack(">H", 1 << 15 | 1 << 13 | 1 << 12 | 1 << 8 | 1 << 7 | 1 << 3)


def _properties(data: bytes, at: int, end: int) -> tuple[Mapping[str, object], str]:
    """Headers and message ID of a content header. Raises ValueError, struct.error, IndexError."""
    if data[at : at + 2] == _FLAGS:  # as we send them
        table_at = at + 7 + data[at + 2]
        (size,) = _u32.unpack_from(data, table_at - 4)
        expiration_at = table_at + size + 1
        id_at = expiration_at + 1 + data[expiration_at]
        after_id = id_at + 1 + data[id_at]
        if after_id + 1 + data[after_id] > end:
            raise ValueError("properties that are longer than their frame")
        return _table(data, table_at, table_at + size), data[id_at + 1 : after_id].decode()
    flags = data[at] << 8 | data[at + 1]
    at += 2
    headers: Mapping[str, object] = {}
    message_id = ""
    for bit in range(15, 0, -1):
        if not flags >> bit & 1:
            continue
        if bit == 13:
            (size,) = _u32.unpack_from(data, at)
            headers = _table(data, at + 4, at + 4 + size)
            at += 4 + size
        elif bit in (12, 11):  # delivery mode, priority
            at += 1
        elif bit == 6:  # timestamp
            at += 8
        else:
            after = at + 1 + data[at]
            if bit == 7:
                message_id = data[at + 1 : after].decode()
            at = after
    if at > end:
        raise ValueError("properties that are longer than their frame")
    return headers, message_id


def _table(data: bytes, at: int, end: int) -> Mapping[str, object]:
    """Of nothing but texts, which is what we send; of anything else, as pamqp reads it."""
    found: dict[str, object] = {}
    first = at
    while at < end:
        after = at + 1 + data[at]
        if data[after] != 0x53:  # S
            return decode.field_table(data[first - 4 : end])[1]
        name = data[at + 1 : after].decode()
        (size,) = _u32.unpack_from(data, after + 1)
        at = after + 5 + size
        value = data[after + 5 : at]
        try:
            found[name] = value.decode()
        except UnicodeDecodeError:
            found[name] = value
    return found


def _short(text: str) -> bytes:
    raw = text.encode()
    return bytes((len(raw),)) + raw


# For those that are the same for many messages.
_named = lru_cache(maxsize=256)(_short)


def _as_lost(cause: BaseException) -> BaseException:
    return cause if isinstance(cause, amqp.AMQPError) else amqp.AMQPConnectionError(repr(cause))


def _ignore(_: object) -> None:
    return


def _nothing() -> None:
    return
