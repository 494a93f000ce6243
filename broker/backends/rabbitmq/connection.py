"""One connection to the broker for one purpose, made anew when it is lost, and the ways of losing it."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Generic, Protocol, TypeVar
from urllib.parse import SplitResult, urlsplit

import aio_pika
from aio_pika.abc import AbstractChannel as TopologyChannel
from aio_pika.abc import AbstractConnection as PikaConnection
from aiormq import exceptions as amqp
from pamqp.common import FieldValue
from pamqp.exceptions import PAMQPException
from yarl import URL

from broker.backends.rabbitmq.wire import Channel, Wire
from broker.errors import ConfigurationError, Unavailable

logger = logging.getLogger(__name__)

HEARTBEAT_S = 30
REFUSED_S = 0.2  # a connect that failed speaks for those that follow it this closely
CLOSE_S = 5.0
MOST_CHANNELS = 65_535  # AMQP's own limit, where the broker names none

_BAD_URL = "the queue's URL must look like amqp://user:password@host:5672/vhost, with host:5672,host:5672 for a cluster"
_LOST = (
    TimeoutError,
    amqp.AMQPError,
    OSError,
    RuntimeError,  # aiormq's "… closed", ChannelInvalidStateError among them
    StopAsyncIteration,  # aiormq's end of file
    PAMQPException,
)


class Refused(ConfigurationError):
    """The URL's user may not do this."""


class Closable(Protocol):
    def close(self) -> Awaitable[object]: ...


Opened = TypeVar("Opened", bound=Closable)


class Line:
    """One connection for messages and one for topology, to any node, each made when it is asked for and made anew once
    it is lost."""

    def __init__(self, url: str, purpose: str, *, answer_s: float, connected: Callable[[], None] | None = None) -> None:
        """`connected` is told of each connection that was made."""
        self.answer_s = answer_s
        self._connected = connected
        # Callers read this one; where the broker is, is for the log alone.
        self.away = "the job queue does not answer; try again"
        self._nodes = _nodes(url)
        self._at = random.randrange(len(self._nodes))  # noqa: S311  spreads load
        self._purpose = purpose
        self._messages: _Link[Wire] = _Link(self, self._open_wire, lambda wire: wire.is_opened)
        self._topology: _Link[PikaConnection] = _Link(self, self._open_topology, _is_open)
        self._closers: set[asyncio.Task[None]] = set()
        self._last_number = 0
        self.closed = False

    async def channel(self, *, confirms: bool = False) -> Channel:
        """A new channel for messages; its owner closes it. Raises Unavailable."""
        async with answering(self.answer_s, Unavailable, self.away):
            channel = await (await self._messages.connected()).channel()
            if confirms:
                await channel.confirm()
            return channel

    @asynccontextmanager
    async def question(self) -> AsyncIterator[TopologyChannel]:
        """A throw-away channel, since a question that fails closes the channel it was asked on.

        Raises Unavailable, or ConfigurationError when the answer will always be no; Refused is one.
        """
        channel: TopologyChannel | None = None
        try:
            async with answering(self.answer_s, Unavailable, self.away):
                connection = await self._topology.connected()
                channel = connection.channel(self._next_number(connection), publisher_confirms=False)
                await channel.initialize()
                yield channel
        except Unavailable as exc:
            if isinstance(exc.__cause__, amqp.ChannelPreconditionFailed | amqp.ChannelLockedResource):
                raise ConfigurationError(f"RabbitMQ has this name for something else: {exc.__cause__}") from exc
            if isinstance(exc.__cause__, amqp.ChannelAccessRefused):
                raise Refused(f"RabbitMQ's user lacks a permission: {exc.__cause__}") from exc
            raise
        finally:
            if channel is not None and not channel.is_closed:
                self.close_soon(channel)

    def _next_number(self, connection: PikaConnection) -> int | None:
        """aiormq takes a number for free once the broker has closed its channel, and may open another one of that
        number before the broker was told that this is known: the broker ends the connection then. Taken in turn, a
        number comes again late."""
        assert connection.transport is not None, "it is connected"
        wire = connection.transport.connection
        most = wire.connection_tune.channel_max or MOST_CHANNELS
        numbers = (number % most + 1 for number in range(self._last_number, self._last_number + most))
        self._last_number = next((number for number in numbers if number not in wire.channels), 0)
        return self._last_number or None

    def forget(self, wire: Wire) -> None:
        """The next channel comes of a new connection; whoever uses this one still closes it."""
        if self._messages.forget(wire):
            self._at += 1

    def close_soon(self, what: Closable) -> None:
        """Close without making anybody wait for the broker's answer."""
        closer = asyncio.get_running_loop().create_task(_close(what))
        self._closers.add(closer)
        closer.add_done_callback(self._closers.discard)

    async def close(self) -> None:
        self.closed = True
        self._messages.end()
        self._topology.end()
        if self._closers:
            await asyncio.wait(self._closers, timeout=CLOSE_S)

    @property
    def place(self) -> str:
        """The node that is asked now, without credentials."""
        return _place(self._node)

    @property
    def places(self) -> str:
        """All nodes, without credentials."""
        return ", ".join(_place(node) for node in self._nodes)

    @property
    def _node(self) -> SplitResult:
        return self._nodes[self._at % len(self._nodes)]

    async def _to_a_node(self, connect: Callable[[str], Awaitable[Opened]]) -> Opened:
        """To the first node that takes it. One that keeps silent uses up the time of this call, and the next call
        begins behind it."""
        for _ in self._nodes[1:]:
            with suppress(*_LOST):
                return await self._to_this_node(connect)
        return await self._to_this_node(connect)

    async def _to_this_node(self, connect: Callable[[str], Awaitable[Opened]]) -> Opened:
        try:
            made = await connect(self._node.geturl())
        except BaseException:
            self._at += 1
            raise
        if self._connected is not None:
            self._connected()
        return made

    async def _open_wire(self) -> Wire:
        async def connect(url: str) -> Wire:
            wire = Wire(url, f"fnqueue {self._purpose}")
            await wire.connect()
            return wire

        return await self._to_a_node(connect)

    async def _open_topology(self) -> PikaConnection:
        return await self._to_a_node(self._connect_topology)

    async def _connect_topology(self, url: str) -> PikaConnection:
        """What comes to nothing is closed here: aio-pika would do it at its garbage collection, which may be when no
        loop runs."""
        name: dict[str, FieldValue] = {"connection_name": f"fnqueue {self._purpose} topology"}
        connection = aio_pika.Connection(URL(url), client_properties=name)
        try:
            await connection.connect()
        except BaseException:
            self.close_soon(connection)
            raise
        return connection


class _Link(Generic[Opened]):
    """One connection of a line."""

    def __init__(self, line: Line, make: Callable[[], Awaitable[Opened]], is_open: Callable[[Opened], bool]) -> None:
        self._line = line
        self._make = make
        self._is_open = is_open
        self._connection: Opened | None = None
        self._connecting = asyncio.Lock()
        self._refusal: Unavailable | None = None
        self._refused_until = 0.0

    async def connected(self) -> Opened:
        if self._connection is not None and self._is_open(self._connection):
            return self._connection
        loop = asyncio.get_running_loop()
        async with self._connecting:
            if self._connection is not None and self._is_open(self._connection):
                return self._connection
            if self._line.closed:
                raise Unavailable("the queue is closed")
            if self._refusal is not None and loop.time() < self._refused_until:
                raise Unavailable(str(self._refusal)) from self._refusal.__cause__
            if self._connection is not None:  # lost
                self._line.close_soon(self._connection)
                self._connection = None
            try:
                async with answering(self._line.answer_s, Unavailable, self._line.away):
                    self._connection = await self._make()
            except Unavailable as exc:
                if self._refusal is None:
                    logger.warning("queue_away", extra={"at": self._line.place, "cause": repr(exc.__cause__ or exc)})
                self._refusal, self._refused_until = exc, loop.time() + REFUSED_S
                raise
            self._refusal = None
            return self._connection

    def forget(self, connection: Opened) -> bool:
        """Whether it was this one's."""
        if self._connection is not connection:
            return False
        self._connection = None
        return True

    def end(self) -> None:
        if self._connection is not None:
            self._line.close_soon(self._connection)
            self._connection = None


class answering:  # noqa: N801  reads like the context manager it is; a generator would cost a tenth of a publish
    """Bound one exchange with the broker, and turn every way of losing it into `error`."""

    __slots__ = ("_error", "_message", "_timeout")

    def __init__(self, timeout_s: float, error: type[Unavailable], message: str) -> None:
        self._timeout = asyncio.timeout(timeout_s)
        self._error = error
        self._message = message

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, exc, trace)
        except TimeoutError as late:
            raise self._error(self._message) from late
        if exc is not None and is_loss(exc):
            raise self._error(self._message) from exc


def is_loss(exc: BaseException) -> bool:
    """Whether an exchange with the broker ended so for want of an answer."""
    if isinstance(exc, asyncio.CancelledError):
        # aiormq cancels whoever waits on a channel that closes; that is not our caller's cancellation
        task = asyncio.current_task()
        return task is not None and not task.cancelling()
    # aiormq raises a bare Exception when a connection ended without a reason
    return isinstance(exc, _LOST) or type(exc) is Exception


async def _close(what: Closable) -> None:
    try:
        async with asyncio.timeout(CLOSE_S):
            await what.close()
    except _LOST as exc:
        logger.debug("close_failed", extra={"cause": repr(exc)})


def _is_open(connection: PikaConnection) -> bool:
    """What aio-pika's connection stands on is None once it is closed."""
    return connection.transport is not None and connection.transport.connection.is_opened


def _place(node: SplitResult) -> str:
    return f"{node.hostname}:{node.port or node.scheme}"


def _nodes(url: str) -> list[SplitResult]:
    """One URL for each host of `amqp://user:password@host:5672,host:5672/vhost`. Raises ConfigurationError."""
    try:
        parts = urlsplit(url)
        user, at, hosts = parts.netloc.rpartition("@")
        query = parts.query
        if "heartbeat=" not in query:
            query = "&".join(filter(None, (query, f"heartbeat={HEARTBEAT_S}")))
        found = [parts._replace(netloc=f"{user}{at}{host}", query=query) for host in hosts.split(",")]
        known = all(node.hostname and node.port != 0 for node in found)
    except ValueError:  # its text could hold a part of the password
        raise ConfigurationError(_BAD_URL) from None
    if not known:
        raise ConfigurationError(_BAD_URL)
    return found
