"""The Queue port on RabbitMQ."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aio_pika import ExchangeType
from aiormq import exceptions as amqp
from pamqp.common import FieldValue

from broker.backends.breaker import Breaker, seek
from broker.backends.codec import pack_job
from broker.backends.rabbitmq.connection import Line, Refused, answering
from broker.backends.rabbitmq.deliveries import Deliveries, Lane
from broker.backends.rabbitmq.messages import DEAD, exchange_name, properties, queue_name
from broker.backends.rabbitmq.publisher import Publisher
from broker.errors import CircuitOpen, ConfigurationError, PublishRejected, QueueMissing, Unavailable
from broker.model import Job
from broker.ports import Delivery
from broker.settings import Settings, SidecarSettings
from broker.signatures import NO_SIGNATURES, Signatures

logger = logging.getLogger(__name__)

UNBLOCK_S = 0.2  # waiting out a memory or disk alarm before refusing
RENEW_S = 60.0  # silence after which a consumer subscribes anew
# Measured on 3.10.8: a node that is killed within 0.7 s of a quorum queue's creation may lose it, and what is in it.
SETTLE_S = 1.5

_QUORUM: dict[str, FieldValue] = {"x-queue-type": "quorum"}


@asynccontextmanager
async def open_queue(
    url: str,
    settings: Settings,
    signatures: Signatures = NO_SIGNATURES,
    *,
    renew_s: float = RENEW_S,
    settle_s: float = SETTLE_S,
) -> AsyncIterator[RabbitQueue]:
    """The queue at `amqp[s]://user:password@host:port/vhost`, closed on exit. Messages are signed and checked by
    `signatures`.

    A broker that is away does not fail the opening: the first use does, and `ping` tells. A consumer that heard
    nothing for `renew_s` seconds subscribes anew; a queue that is new is left alone for `settle_s` seconds.

    Raises:
        ConfigurationError: a bad URL, refused credentials, or a `fnq.dead` that is not ours.
    """
    queue = RabbitQueue(url, settings, signatures, renew_s=renew_s, settle_s=settle_s)
    try:
        await queue.prepare()
        yield queue
    finally:
        await queue.close()


class RabbitQueue:
    """Publishes and consumes over two connections, since an alarm blocks all of a connection that publishes."""

    def __init__(
        self,
        url: str,
        settings: Settings,
        signatures: Signatures = NO_SIGNATURES,
        *,
        renew_s: float = RENEW_S,
        settle_s: float = SETTLE_S,
    ) -> None:
        self._signatures = signatures
        self._renew_s = renew_s
        self._settle_s = settle_s
        # It may use what is there for its version, and nothing else.
        self._confined = isinstance(settings, SidecarSettings)
        self._answer_s = settings.publish_timeout_s
        # As long as the first caller is kept waiting: a leader that moves, or a restart, costs nobody an error.
        self._breaker = Breaker("queue", after_s=settings.accept_timeout_s - UNBLOCK_S)
        self._publishing = Line(url, "publish", answer_s=self._answer_s, connected=self._breaker.connected)
        self._consuming = Line(url, "consume", answer_s=self._answer_s, connected=self._breaker.connected)
        self._publisher: Publisher | None = None
        self._publisher_lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._prepared = False
        self._seeking: asyncio.Task[None] | None = None

    @property
    def circuit(self) -> Breaker:
        return self._breaker

    async def prepare(self) -> None:
        """Make the dead letters' place exist, or leave it to the first use when the broker is away, and to those who
        may. Raises ConfigurationError."""
        try:
            if self._confined:
                async with self._consuming.question():
                    pass  # whether it may come in at all
            else:
                await self._ensure_dead_letters()
        except Unavailable as exc:
            if isinstance(exc.__cause__, amqp.AuthenticationError | amqp.ProbableAuthenticationError):
                raise ConfigurationError(f"{exc}: it refuses the URL's user or password") from exc
            logger.warning("queue_away_at_start", extra={"cause": repr(exc.__cause__ or exc)})

    async def declare(self, version_id: str) -> None:
        """As the port says. Of a queue that is new it returns only once a crash of the broker would not lose it."""
        if not self._prepared:
            await self._ensure_dead_letters()
        existed = await self.depth(version_id) is not None
        async with self._consuming.question() as channel:
            queue = await channel.declare_queue(queue_name(version_id), durable=True, arguments=_QUORUM)
            await queue.bind(
                await channel.declare_exchange(exchange_name(version_id), ExchangeType.FANOUT, durable=True)
            )
        if not existed:
            await asyncio.sleep(self._settle_s)

    async def delete(self, version_id: str) -> None:
        async with self._consuming.question() as channel:
            await channel.queue_delete(queue_name(version_id))
            await channel.exchange_delete(exchange_name(version_id))

    async def publish(self, job: Job, *, timeout_s: float) -> None:
        """As the port says; Unavailable when nothing was sent: no connection, or the broker takes no messages.

        Concurrent publishes share one channel and await their confirms together. One id at a time.
        """
        if not self._breaker.admits():
            raise CircuitOpen(self._publishing.away)
        began_at = self._breaker.now()
        until = self._loop.time() + timeout_s
        try:
            publisher = self._publisher
            if publisher is None or not publisher.usable or publisher.blocked:
                publisher = await self._ready_publisher(timeout_s)
            envelope, body = pack_job(job)
            publisher.measure(len(envelope))
            await publisher.send(
                queue_name(job.version_id),
                job.id,
                properties(job, envelope, self._signatures.sign(job.version_id, envelope, body)),
                body,
                until=until,
                exchange=exchange_name(job.version_id) if self._confined else "",
            )
        except (PublishRejected, QueueMissing):
            self._breaker.answered()
            raise
        except Unavailable:
            if self._breaker.failed(began_at=began_at):
                self._seeking = asyncio.get_running_loop().create_task(seek(self._breaker, self._look))
            raise
        self._breaker.answered()

    async def _ready_publisher(self, timeout_s: float) -> Publisher:
        """One that takes messages now. Raises Unavailable."""
        publisher = self._publisher
        if publisher is None or not publisher.usable:
            async with answering(timeout_s, Unavailable, self._publishing.away):
                publisher = await self._new_publisher()
        if publisher.blocked:
            await publisher.ready(min(UNBLOCK_S, timeout_s))
        return publisher

    @asynccontextmanager
    async def consume(self, version_id: str, *, prefetch: int) -> AsyncIterator[AsyncIterator[Delivery]]:
        deliveries = Deliveries(
            self._consuming, version_id, prefetch, signatures=self._signatures, renew_s=self._renew_s
        )
        try:
            yield deliveries
        finally:
            await deliveries.close()

    @asynccontextmanager
    async def dead_letters(self, *, prefetch: int) -> AsyncIterator[AsyncIterator[Delivery]]:
        deliveries = Deliveries(
            self._consuming,
            "",
            prefetch,
            signatures=self._signatures,
            renew_s=self._renew_s,
            prepare=self._ensure_dead_letters,
        )
        try:
            yield deliveries
        finally:
            await deliveries.close()

    async def take(self, version_id: str) -> Delivery | None:
        async with answering(self._answer_s, Unavailable, self._consuming.away):
            lane = Lane(self._consuming, await self._consuming.channel(), version_id, self._signatures)
            try:
                return await lane.take()
            except amqp.ChannelNotFoundEntity:
                return None
            finally:
                lane.end()

    async def depth(self, version_id: str) -> int | None:
        """Asked on a throw-away channel, which knows nothing from before."""
        try:
            async with self._consuming.question() as channel:
                found = await channel.declare_queue(queue_name(version_id), passive=True)
        except Unavailable as exc:
            if isinstance(exc.__cause__, amqp.ChannelNotFoundEntity):
                return None
            raise
        return found.declaration_result.message_count or 0

    async def ping(self) -> None:
        if self._breaker.hopeless:
            raise CircuitOpen(self._publishing.away)
        await self._look()

    async def _look(self) -> None:
        async with answering(self._answer_s, Unavailable, self._publishing.away):
            publisher = await self._new_publisher()
            await publisher.ready(UNBLOCK_S)
            async with self._publishing.question():
                pass  # opening and closing a channel are the question

    async def close(self) -> None:
        """End every loan and connection. Bounded and quiet."""
        if self._seeking is not None:
            self._seeking.cancel()
            await asyncio.gather(self._seeking, return_exceptions=True)
        await asyncio.gather(self._publishing.close(), self._consuming.close())

    async def _new_publisher(self) -> Publisher:
        async with self._publisher_lock:
            if self._publisher is None or not self._publisher.usable:
                channel = await self._publishing.channel(confirms=True)
                self._publisher = Publisher(self._publishing, channel)
            return self._publisher

    async def _ensure_dead_letters(self) -> None:
        """Front ends may not make them. They begin without: a controller makes them, and until then a version's queue
        keeps what is dead."""
        try:
            await self._declare_dead_letters()
        except Refused as exc:
            logger.info("dead_letters_left_to_controllers", extra={"cause": str(exc)})
        self._prepared = True

    async def _declare_dead_letters(self) -> None:
        async with self._consuming.question() as channel:
            exchange = await channel.declare_exchange(DEAD, ExchangeType.FANOUT, durable=True)
            queue = await channel.declare_queue(DEAD, durable=True, arguments=_QUORUM)
            await queue.bind(exchange)
