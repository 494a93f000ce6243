"""Consuming: a subscription that outlives its channels, and the messages on loan over each."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable

from aiormq.exceptions import ChannelInvalidStateError

from broker.backends.codec import Unreadable
from broker.backends.rabbitmq.connection import Line, answering
from broker.backends.rabbitmq.messages import can_die, claims_to_be, death, queue_name, read
from broker.backends.rabbitmq.wire import Channel, Message
from broker.errors import Unavailable
from broker.model import Job
from broker.ports import Delivery
from broker.signatures import NotOurs, Signatures

logger = logging.getLogger(__name__)

_CONSUMER = "jobs"  # its tag; a channel has one
RETRY_S = (0.1, 5.0)  # first and longest pause of a consumer between two tries


class Deliveries:
    """What `async for` sees. It subscribes when it is first asked, and again whenever the subscription is lost;
    no task of its own runs. `version_id` is "" for the dead letters."""

    def __init__(
        self,
        line: Line,
        version_id: str,
        prefetch: int,
        *,
        signatures: Signatures,
        renew_s: float,
        prepare: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._signatures = signatures
        self._renew_s = renew_s
        self._line = line
        self._version_id = version_id
        self._queue = queue_name(version_id)
        self._prefetch = prefetch
        self._prepare = prepare
        self._lane: Lane | None = None
        self._subscribing = asyncio.Lock()
        self._closed = asyncio.Event()
        self._failures = 0

    def __aiter__(self) -> Deliveries:
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

    async def _replace(self, lane: Lane | None) -> None:
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
        lane = self._lane = Lane(self._line, await self._line.channel(), self._version_id, self._signatures)
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


class Lane:
    """One channel and the messages on loan over it. Ended, it stays open until the last loan has."""

    def __init__(self, line: Line, channel: Channel, version_id: str, signatures: Signatures) -> None:
        self.channel = channel
        self.arrivals: deque[Loan] = deque()
        self.loans = 0
        self._line = line
        self._version_id = version_id
        self._signatures = signatures
        self._queue = queue_name(version_id)
        self._consuming = False
        self._changed = asyncio.Event()
        self._heard_at = 0.0  # loop time
        self._ended = False
        channel.on_cancel = self._on_cancel
        channel.on_end = self._changed.set

    @property
    def subscribed(self) -> bool:
        return self._consuming and not self.channel.is_closed

    async def subscribe(self, prefetch: int) -> None:
        """Raises Unavailable."""
        async with answering(self._line.answer_s, Unavailable, f"cannot consume from {self._queue}"):
            await self.channel.prefetch(prefetch)
            await self.channel.consume(self._queue, self._on_message, tag=_CONSUMER)
        self._consuming = True
        self._hear()

    async def unsubscribe(self) -> None:
        """Once this returns nothing arrives any more. A broker that does not answer loses the channel."""
        consuming, self._consuming = self._consuming, False
        self._changed.set()
        if consuming and not self.channel.is_closed:
            try:
                async with answering(self._line.answer_s, Unavailable, self._line.away):
                    await self.channel.cancel(_CONSUMER)
            except Unavailable as exc:
                logger.info("unsubscribe_failed", extra={"queue": self._queue, "cause": repr(exc.__cause__)})

    async def hears_within(self, silence_s: float) -> bool:
        """Wait for an arrival or the subscription's end; false once the silence is `silence_s` old, and again when it
        has lasted as long once more."""
        self._changed.clear()
        try:
            async with asyncio.timeout_at(self._heard_at + silence_s):
                await self._changed.wait()
        except TimeoutError:
            self._heard_at = asyncio.get_running_loop().time()
            return False
        return True

    async def take(self) -> Loan | None:
        while True:
            message = await self.channel.get(self._queue)
            if message is None:
                return None
            loan = self._lend(message)
            if loan is not None:
                return loan

    def end(self) -> None:
        self._ended = True
        self._close_if_idle()

    def settle(self, send: Callable[[int], None], tag: int) -> None:
        """End one loan. On a lost channel there is nothing to end: the broker delivers the message again."""
        try:
            send(tag)
        except ChannelInvalidStateError as exc:
            logger.info("loan_lost", extra={"queue": self._queue, "cause": repr(exc.__cause__)})
        self.loans -= 1
        if self._ended:
            self._close_if_idle()

    def _on_message(self, message: Message) -> None:
        loan = self._lend(message)
        if loan is not None:
            self.arrivals.append(loan)
            self._hear()

    def _lend(self, message: Message) -> Loan | None:
        """None for a message that is not ours to run: to the dead letters. One that is there already is lent with its
        fault if it names a request, and is away if not; so is one that RabbitMQ could not move there."""
        tag = message.delivery_tag
        self.loans += 1
        try:
            job = read(message, self._version_id, self._signatures)
            return Loan(self, tag, job, death(message))
        except (Unreadable, NotOurs) as exc:
            fault = str(exc)
            facts = {"queue": self._queue, "message_id": message.message_id, "cause": fault}
            logger.error("message_unreadable", extra=facts)
        if self._version_id and can_die(message):
            self.settle(self.channel.reject, tag)
        elif not self._version_id and (claimed := claims_to_be(message)) is not None:
            return Loan(self, tag, claimed, death(message), fault=fault)
        else:
            self.settle(self.channel.ack, tag)
        return None

    def _hear(self) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        self._changed.set()

    def _on_cancel(self, _: str) -> None:
        self._consuming = False
        self._changed.set()

    def _close_if_idle(self) -> None:
        if self._ended and not self.loans and not self.channel.is_closed:
            self._line.close_soon(self.channel)


class Loan:
    """The port's Delivery. Its second verb does nothing: the broker would close the channel for it."""

    __slots__ = ("_lane", "_open", "_tag", "death", "fault", "job")

    def __init__(self, lane: Lane, tag: int, job: Job, death: str, *, fault: str = "") -> None:
        self.job = job
        self.death = death
        self.fault = fault
        self._lane = lane
        self._tag = tag
        self._open = True

    async def ack(self) -> None:
        self._end(self._lane.channel.ack)

    async def requeue(self) -> None:
        self._end(self._lane.channel.requeue)

    async def reject(self) -> None:
        self._end(self._lane.channel.reject)

    def _end(self, send: Callable[[int], None]) -> None:
        if self._open:
            self._open = False
            self._lane.settle(send, self._tag)
