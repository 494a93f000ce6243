"""Queue on RabbitMQ: a quorum queue per version, publisher confirms, dead letters for all versions in one place.

Built on aiormq, the protocol layer of aio-pika: what aio-pika adds (reconnecting channels that cache state, a task
more per delivery, publishes that hang while the broker is away) is what this module has to do differently.

Limits and dead-lettering are policies on `^fnq\\.v\\.` (infra/rabbitmq/definitions.json), never declare arguments: a
changed argument would make every later declare fail.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import cast
from urllib.parse import SplitResult, urlsplit

import aiormq
from aiormq import exceptions as amqp
from aiormq.abc import AbstractChannel, AbstractConnection, DeliveredMessage
from pamqp.commands import Basic
from pamqp.common import FieldValue
from pamqp.exceptions import PAMQPException

from broker.backends.codec import Unreadable, pack_job, unpack_job
from broker.errors import ConfigurationError, PublishRejected, PublishUnconfirmed, QueueMissing, Unavailable
from broker.model import Job
from broker.ports import Delivery
from broker.settings import Settings

logger = logging.getLogger(__name__)

DEAD = "fnq.dead"  # the exchange and its queue
ENVELOPE = "fnq"  # the header that holds all of a job but its body
RESIDENCE_S = 60.0  # how long past its deadline a message may stay; the undertaker's sweep comes first
HEARTBEAT_S = 30
UNBLOCK_S = 0.2  # waiting out a memory or disk alarm before refusing
REFUSED_S = 0.2  # a connect that failed speaks for those that follow it this closely
RETRY_S = (0.1, 5.0)  # first and longest pause of a consumer between two tries
RENEW_S = 60.0  # silence after which a consumer subscribes anew
CLOSE_S = 5.0
MAX_EXPIRATION_MS = 2**32 - 1
FRAME_SLACK_BYTES = 4096  # the other properties; the header must fit one frame

_QUORUM: dict[str, FieldValue] = {"x-queue-type": "quorum"}
_BAD_URL = "the queue's URL must look like amqp://user:password@host:5672/vhost"
_LOST = (
    TimeoutError,
    amqp.AMQPError,
    OSError,
    RuntimeError,  # aiormq's "… closed", ChannelInvalidStateError among them
    StopAsyncIteration,  # aiormq's end of file
    PAMQPException,
)


@asynccontextmanager
async def open_queue(url: str, settings: Settings, *, renew_s: float = RENEW_S) -> AsyncIterator[RabbitQueue]:
    """The queue at `amqp[s]://user:password@host:port/vhost`, closed on exit.

    A broker that is away does not fail the opening: the first use does, and `ping` tells. A consumer that heard
    nothing for `renew_s` seconds subscribes anew.

    Raises:
        ConfigurationError: a bad URL, refused credentials, or a `fnq.dead` that is not ours.
    """
    queue = RabbitQueue(url, settings, renew_s=renew_s)
    try:
        await queue.prepare()
        yield queue
    finally:
        await queue.close()


class RabbitQueue:
    """Publishes and consumes over two connections, since an alarm blocks all of a connection that publishes."""

    def __init__(self, url: str, settings: Settings, *, renew_s: float = RENEW_S) -> None:
        self._renew_s = renew_s
        self._answer_s = settings.publish_timeout_s
        self._publishing = _Line(url, "publish", answer_s=self._answer_s)
        self._consuming = _Line(url, "consume", answer_s=self._answer_s)
        self._publisher: _Publisher | None = None
        self._publisher_lock = asyncio.Lock()
        self._prepared = False

    async def prepare(self) -> None:
        """Make the dead letters' place exist, or leave it to the first use when the broker is away."""
        try:
            await self._declare_dead_letters()
        except Unavailable as exc:
            if isinstance(exc.__cause__, amqp.AuthenticationError | amqp.ProbableAuthenticationError):
                raise ConfigurationError(f"{exc}: it refuses the URL's user or password") from exc
            logger.warning("queue_away_at_start", extra={"cause": repr(exc.__cause__ or exc)})

    async def declare(self, version_id: str) -> None:
        if not self._prepared:
            await self._declare_dead_letters()
        async with self._consuming.question() as channel:
            await channel.queue_declare(_queue_name(version_id), durable=True, arguments=_QUORUM)

    async def delete(self, version_id: str) -> None:
        async with self._consuming.question() as channel:
            await channel.queue_delete(_queue_name(version_id))

    async def publish(self, job: Job, *, timeout_s: float) -> None:
        """As the port says; Unavailable when nothing was sent: no connection, or the broker takes no messages.

        Concurrent publishes share one channel and await their confirms together. One id at a time.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        envelope, body = pack_job(job)
        properties = Basic.Properties(
            headers={ENVELOPE: envelope.decode()},
            message_id=job.id,
            delivery_mode=2,
            expiration=_expiration_ms(job),
            content_type="application/octet-stream",
            app_id="fnqueue",
        )
        publisher = self._publisher
        if publisher is None or not publisher.usable:
            async with _answer(timeout_s, Unavailable, self._publishing.away):
                publisher = await self._new_publisher()
        await publisher.ready(min(UNBLOCK_S, timeout_s))
        publisher.measure(len(envelope))
        await publisher.send(_queue_name(job.version_id), properties, body, timeout_s=until - loop.time())

    @asynccontextmanager
    async def consume(self, version_id: str, *, prefetch: int) -> AsyncIterator[AsyncIterator[Delivery]]:
        deliveries = _Deliveries(self._consuming, version_id, prefetch, renew_s=self._renew_s)
        try:
            yield deliveries
        finally:
            await deliveries.close()

    @asynccontextmanager
    async def dead_letters(self, *, prefetch: int) -> AsyncIterator[AsyncIterator[Delivery]]:
        deliveries = _Deliveries(
            self._consuming, "", prefetch, renew_s=self._renew_s, prepare=self._declare_dead_letters
        )
        try:
            yield deliveries
        finally:
            await deliveries.close()

    async def take(self, version_id: str) -> Delivery | None:
        async with _answer(self._answer_s, Unavailable, self._consuming.away):
            lane = _Lane(self._consuming, await self._consuming.channel(), version_id)
            try:
                return await lane.take()
            except amqp.ChannelNotFoundEntity:
                return None
            finally:
                lane.end()

    async def ping(self) -> None:
        async with _answer(self._answer_s, Unavailable, self._publishing.away):
            publisher = await self._new_publisher()
            await publisher.ready(UNBLOCK_S)
            async with self._publishing.question():
                pass  # opening and closing a channel are the question

    async def close(self) -> None:
        """End every loan and connection. Bounded and quiet."""
        await asyncio.gather(self._publishing.close(), self._consuming.close())

    async def _new_publisher(self) -> _Publisher:
        async with self._publisher_lock:
            if self._publisher is None or not self._publisher.usable:
                channel = await self._publishing.channel(confirms=True)
                self._publisher = _Publisher(self._publishing, channel)
            return self._publisher

    async def _declare_dead_letters(self) -> None:
        async with self._consuming.question() as channel:
            await channel.exchange_declare(DEAD, exchange_type="fanout", durable=True)
            await channel.queue_declare(DEAD, durable=True, arguments=_QUORUM)
            await channel.queue_bind(DEAD, DEAD)
        self._prepared = True


class _Publisher:
    """One confirming channel. A publish that got no answer retires it with its connection: the answer may still
    come, and aiormq, which matches returned messages by id, would take it for the answer to the next copy.
    A blocked one stays, to refuse without sending until the broker takes messages again."""

    def __init__(self, line: _Line, channel: AbstractChannel) -> None:
        self._line = line
        self._channel = cast(aiormq.Channel, channel)  # the abstract one knows no `wait`
        self._connection = channel.connection
        self._outstanding: dict[str, asyncio.Event] = {}
        self._unanswered: set[str] = set()
        self._retired = False

    @property
    def usable(self) -> bool:
        return not (self._retired or self._channel.is_closed) and self._connection.is_opened

    async def ready(self, timeout_s: float) -> None:
        """Raises Unavailable while an alarm blocks this connection, as the first publish under it finds out."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._connection.ready()
        except TimeoutError:
            raise Unavailable("RabbitMQ takes no messages now, it is short of memory or disk") from None

    def measure(self, envelope_bytes: int) -> None:
        """Refuse what would make the broker close the connection, and fail every other publish on it."""
        limit_bytes = self._connection.connection_tune.frame_max - FRAME_SLACK_BYTES
        if envelope_bytes > limit_bytes > 0:
            raise PublishRejected(f"the request's headers take {envelope_bytes} bytes, at most {limit_bytes} fit")

    async def send(self, routing_key: str, properties: Basic.Properties, body: bytes, *, timeout_s: float) -> None:
        message_id = str(properties.message_id)
        async with _answer(timeout_s, PublishUnconfirmed, "RabbitMQ did not confirm the job"):
            while other := self._outstanding.get(message_id):
                await other.wait()
            if message_id in self._unanswered:
                self._retire()
                raise PublishUnconfirmed("an earlier copy of the job may still be confirmed")
            self._outstanding[message_id] = asyncio.Event()
            try:
                # Waiting for the socket would hold the channel's lock for a loop turn a message: a quarter of the CPU.
                await self._channel.basic_publish(
                    body, routing_key=routing_key, properties=properties, mandatory=True, wait=False
                )
            except amqp.PublishError as exc:
                raise QueueMissing("the function version has no queue") from exc
            except amqp.DeliveryError as exc:
                raise PublishRejected("the queue takes no more jobs") from exc
            except BaseException:
                self._unanswered.add(message_id)
                if not await self._blocked():
                    self._retire()
                raise
            finally:
                self._outstanding.pop(message_id).set()
                self._close_if_idle()

    async def _blocked(self) -> bool:
        try:
            async with asyncio.timeout(0):
                await self._connection.ready()
        except TimeoutError:
            return True
        return False

    def _retire(self) -> None:
        self._retired = True
        self._line.forget(self._connection)
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._retired and not self._outstanding:
            self._line.close_soon(self._connection)


class _Deliveries:
    """What `async for` sees. It subscribes when it is first asked, and again whenever the subscription is lost;
    no task of its own runs. `version_id` is "" for the dead letters."""

    def __init__(
        self,
        line: _Line,
        version_id: str,
        prefetch: int,
        *,
        renew_s: float,
        prepare: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._renew_s = renew_s
        self._line = line
        self._version_id = version_id
        self._queue = _queue_name(version_id)
        self._prefetch = prefetch
        self._prepare = prepare
        self._lane: _Lane | None = None
        self._subscribing = asyncio.Lock()
        self._closed = asyncio.Event()
        self._failures = 0

    def __aiter__(self) -> _Deliveries:
        return self

    async def __anext__(self) -> Delivery:
        while not self._closed.is_set():
            lane = self._lane
            if lane is None or not lane.subscribed:
                await self._replace(lane)
            elif lane.arrivals:
                return lane.arrivals.popleft()
            elif not await lane.hears_within(self._renew_s) and lane.loans < self._prefetch:
                await self._replace(lane)
        raise StopAsyncIteration

    async def close(self) -> None:
        """Stop the subscription and give back what nobody took; what was taken stays valid."""
        self._closed.set()
        async with self._subscribing:
            await self._leave()

    async def _replace(self, lane: _Lane | None) -> None:
        """Subscribe anew, unless another reader of this iterator already did. A silent subscription may be lost
        without a word: RabbitMQ 3.10 cancels no consumer of a queue that is declared again within 100 ms of its
        deletion, counts it as one, and lends it messages that it never gets until its channel closes."""
        async with self._subscribing:
            if self._closed.is_set() or self._lane is not lane:
                return
            try:
                await self._subscribe()
            except Unavailable as exc:
                if not self._failures:
                    logger.warning("consume_failed", extra={"queue": self._queue, "cause": repr(exc.__cause__ or exc)})
                await self._pause()
            else:
                if self._failures:
                    logger.info("consume_resumed", extra={"queue": self._queue, "failures": self._failures})
                self._failures = 0

    async def _subscribe(self) -> None:
        """Always over a new channel; the loans of the old one stay valid."""
        if self._prepare is not None:
            await self._prepare()
        await self._leave()
        lane = self._lane = _Lane(self._line, await self._line.channel(), self._version_id)
        await lane.subscribe(self._prefetch)

    async def _leave(self) -> None:
        lane, self._lane = self._lane, None
        if lane is not None:
            await lane.unsubscribe()
            while lane.arrivals:
                await lane.arrivals.popleft().requeue()
            lane.end()

    async def _pause(self) -> None:
        first_s, longest_s = RETRY_S
        pause_s = min(longest_s, first_s * 2.0 ** min(self._failures, 10))
        self._failures += 1
        try:
            async with asyncio.timeout(random.uniform(pause_s / 2, pause_s)):  # noqa: S311  spreads load
                await self._closed.wait()
        except TimeoutError:
            return


class _Lane:
    """One channel and the messages on loan over it. Ended, it stays open until the last loan has."""

    def __init__(self, line: _Line, channel: AbstractChannel, version_id: str) -> None:
        self.channel = channel
        self.arrivals: deque[_Loan] = deque()
        self.loans = 0
        self._line = line
        self._version_id = version_id
        self._queue = _queue_name(version_id)
        self._consumer_tag = ""
        self._changed = asyncio.Event()
        self._heard_at = 0.0  # loop time
        self._ended = False
        channel.on_consumer_cancel_callbacks.add(self._on_cancel)
        channel.closing.add_done_callback(lambda _: self._changed.set())

    @property
    def subscribed(self) -> bool:
        return bool(self._consumer_tag) and not self.channel.is_closed

    async def subscribe(self, prefetch: int) -> None:
        """Raises Unavailable."""
        async with _answer(self._line.answer_s, Unavailable, f"cannot consume from {self._queue}"):
            await self.channel.basic_qos(prefetch_count=prefetch)
            self._consumer_tag = (await self.channel.basic_consume(self._queue, self._on_message)).consumer_tag or ""
        self._hear()

    async def unsubscribe(self) -> None:
        """Once this returns nothing arrives any more. A broker that does not answer loses the channel."""
        consumer_tag, self._consumer_tag = self._consumer_tag, ""
        self._changed.set()
        if consumer_tag and not self.channel.is_closed:
            try:
                async with _answer(self._line.answer_s, Unavailable, self._line.away):
                    await self.channel.basic_cancel(consumer_tag)
            except Unavailable as exc:
                logger.info("unsubscribe_failed", extra={"queue": self._queue, "cause": repr(exc.__cause__)})

    async def hears_within(self, silence_s: float) -> bool:
        """Wait for an arrival or the subscription's end; false once the silence is `silence_s` old."""
        self._changed.clear()
        try:
            async with asyncio.timeout_at(self._heard_at + silence_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def take(self) -> _Loan | None:
        while True:
            message = await self.channel.basic_get(self._queue)
            if message.delivery_tag is None:
                return None
            loan = await self._lend(message)
            if loan is not None:
                return loan

    def end(self) -> None:
        self._ended = True
        self._close_if_idle()

    async def settle(self, send: Callable[[], Awaitable[None]]) -> None:
        """End one loan. On a lost channel there is nothing to end: the broker delivers the message again."""
        if not self.channel.is_closed:
            try:
                async with _answer(self._line.answer_s, Unavailable, self._line.away):
                    await send()
            except Unavailable as exc:
                logger.info("loan_lost", extra={"queue": self._queue, "cause": repr(exc.__cause__)})
        self.loans -= 1
        self._close_if_idle()

    async def _on_message(self, message: DeliveredMessage) -> None:
        """aiormq runs one task per delivery, in order; nothing here waits before the loan is in line."""
        loan = await self._lend(message)
        if loan is not None:
            self.arrivals.append(loan)
            self._hear()

    async def _lend(self, message: DeliveredMessage) -> _Loan | None:
        """None for a message that is not ours to read: to the dead letters, or away if it is there already."""
        tag = message.delivery_tag or 0
        self.loans += 1
        try:
            return _Loan(self, tag, _read(message, self._version_id), _death(message))
        except Unreadable as exc:
            facts = {"queue": self._queue, "message_id": message.header.properties.message_id, "cause": str(exc)}
            logger.error("message_unreadable", extra=facts)
        if self._version_id:
            await self.settle(lambda: self.channel.basic_reject(tag, requeue=False, wait=False))
        else:
            await self.settle(lambda: self.channel.basic_ack(tag, wait=False))
        return None

    def _hear(self) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        self._changed.set()

    def _on_cancel(self, frame: Basic.Cancel) -> None:
        if frame.consumer_tag == self._consumer_tag:
            self._consumer_tag = ""
            self._changed.set()

    def _close_if_idle(self) -> None:
        if self._ended and not self.loans and not self.channel.is_closed:
            self._line.close_soon(self.channel)


class _Loan:
    """The port's Delivery. Its second verb does nothing: the broker would close the channel for it."""

    __slots__ = ("_lane", "_open", "_tag", "death", "job")

    def __init__(self, lane: _Lane, tag: int, job: Job, death: str) -> None:
        self.job = job
        self.death = death
        self._lane = lane
        self._tag = tag
        self._open = True

    async def ack(self) -> None:
        await self._end(lambda: self._lane.channel.basic_ack(self._tag, wait=False))

    async def requeue(self) -> None:
        # nack, not reject: from RabbitMQ 4.3 on only reject counts towards the delivery limit
        await self._end(lambda: self._lane.channel.basic_nack(self._tag, requeue=True, wait=False))

    async def reject(self) -> None:
        await self._end(lambda: self._lane.channel.basic_reject(self._tag, requeue=False, wait=False))

    async def _end(self, send: Callable[[], Awaitable[None]]) -> None:
        if self._open:
            self._open = False
            try:
                await self._lane.settle(send)
            except asyncio.CancelledError:
                self._open = True  # cancelled before anything was sent: the caller may try again
                raise


class _Line:
    """One connection, made when it is asked for and made anew once it is lost."""

    def __init__(self, url: str, purpose: str, *, answer_s: float) -> None:
        parts = _split(url)
        self.answer_s = answer_s
        self.away = f"RabbitMQ at {parts.hostname}:{parts.port or parts.scheme} is away"
        self._url = url if "heartbeat=" in parts.query else f"{url}{'&' if parts.query else '?'}heartbeat={HEARTBEAT_S}"
        self._purpose = purpose
        self._connection: AbstractConnection | None = None
        self._connecting = asyncio.Lock()
        self._refusal: Unavailable | None = None
        self._refused_until = 0.0
        self._closers: set[asyncio.Task[None]] = set()
        self._closed = False

    async def channel(self, *, confirms: bool = False) -> AbstractChannel:
        """A new channel; its owner closes it. Raises Unavailable."""
        async with _answer(self.answer_s, Unavailable, self.away):
            connection = await self._connected()
            return await connection.channel(publisher_confirms=confirms, on_return_raises=confirms)

    @asynccontextmanager
    async def question(self) -> AsyncIterator[AbstractChannel]:
        """A throw-away channel, since a question that fails closes the channel it was asked on.

        Raises Unavailable, or ConfigurationError when the answer will always be no.
        """
        channel: AbstractChannel | None = None
        try:
            async with _answer(self.answer_s, Unavailable, self.away):
                channel = await self.channel()
                yield channel
        except Unavailable as exc:
            if isinstance(exc.__cause__, amqp.ChannelPreconditionFailed | amqp.ChannelLockedResource):
                raise ConfigurationError(f"RabbitMQ has this name for something else: {exc.__cause__}") from exc
            if isinstance(exc.__cause__, amqp.ChannelAccessRefused):
                raise ConfigurationError(f"RabbitMQ's user lacks a permission: {exc.__cause__}") from exc
            raise
        finally:
            if channel is not None and not channel.is_closed:
                self.close_soon(channel)

    def forget(self, connection: AbstractConnection) -> None:
        """The next question goes over a new connection; whoever uses this one still closes it."""
        if self._connection is connection:
            self._connection = None

    def close_soon(self, what: AbstractConnection | AbstractChannel) -> None:
        """Close without making anybody wait for the broker's answer."""
        closer = asyncio.get_running_loop().create_task(_close(what))
        self._closers.add(closer)
        closer.add_done_callback(self._closers.discard)

    async def close(self) -> None:
        self._closed = True
        if self._connection is not None:
            self.close_soon(self._connection)
        if self._closers:
            await asyncio.wait(self._closers, timeout=CLOSE_S)

    async def _connected(self) -> AbstractConnection:
        if self._connection is not None and self._connection.is_opened:
            return self._connection
        loop = asyncio.get_running_loop()
        async with self._connecting:
            if self._connection is not None and self._connection.is_opened:
                return self._connection
            if self._closed:
                raise Unavailable("the queue is closed")
            if self._refusal is not None and loop.time() < self._refused_until:
                raise Unavailable(str(self._refusal)) from self._refusal.__cause__
            try:
                async with _answer(self.answer_s, Unavailable, self.away):
                    name: dict[str, FieldValue] = {"connection_name": f"fnqueue {self._purpose}"}
                    self._connection = await aiormq.connect(self._url, client_properties=name)
            except Unavailable as exc:
                self._refusal, self._refused_until = exc, loop.time() + REFUSED_S
                raise
            self._refusal = None
            return self._connection


@asynccontextmanager
async def _answer(timeout_s: float, error: type[Unavailable], message: str) -> AsyncIterator[None]:
    """Bound one exchange with the broker, and turn every way of losing it into `error`."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except _LOST as exc:
        raise error(message) from exc
    except asyncio.CancelledError as exc:
        # aiormq cancels whoever waits on a channel that closes; that is not our caller's cancellation
        if (task := asyncio.current_task()) is None or task.cancelling():
            raise
        raise error(message) from exc
    except Exception as exc:
        # aiormq raises a bare Exception when a connection ended without a reason
        if type(exc) is not Exception:
            raise
        raise error(message) from exc


async def _close(what: AbstractConnection | AbstractChannel) -> None:
    try:
        async with asyncio.timeout(CLOSE_S):
            await what.close(amqp.ConnectionClosed(200, "closed by us"))
    except _LOST as exc:
        logger.debug("close_failed", extra={"cause": repr(exc)})


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        known = bool(parts.hostname) and parts.port != 0
    except ValueError:  # its text could hold a part of the password
        raise ConfigurationError(_BAD_URL) from None
    if not known:
        raise ConfigurationError(_BAD_URL)
    return parts


def _queue_name(version_id: str) -> str:
    return f"fnq.v.{version_id}" if version_id else DEAD


def _expiration_ms(job: Job) -> str:
    """Both times are the store's, so no clock of ours is in it."""
    residence_s = max(0.0, job.deadline_at - job.created_at + RESIDENCE_S)
    return str(min(MAX_EXPIRATION_MS, int(residence_s * 1000)))


def _read(message: DeliveredMessage, version_id: str) -> Job:
    envelope = _headers(message).get(ENVELOPE)
    if not isinstance(envelope, str | bytes):
        raise Unreadable("not a job")
    job = unpack_job(envelope, message.body)
    if version_id and job.version_id != version_id:
        raise Unreadable("another version's job")
    return job


def _death(message: DeliveredMessage) -> str:
    """RabbitMQ puts the newest death first."""
    headers = _headers(message)
    deaths = headers.get("x-death")
    newest = deaths[0] if isinstance(deaths, list) and deaths else None
    reason = newest.get("reason") if isinstance(newest, dict) else headers.get("x-first-death-reason")
    return reason if isinstance(reason, str) else ""


def _headers(message: DeliveredMessage) -> Mapping[str, object]:
    return message.header.properties.headers or {}
