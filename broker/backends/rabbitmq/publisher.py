"""Publishing with confirms: many at once on one channel, each with its own end."""

from __future__ import annotations

import asyncio

from broker.backends.rabbitmq.connection import Line, is_loss
from broker.backends.rabbitmq.wire import Channel, Refused, Returned
from broker.errors import PublishRejected, PublishUnconfirmed, QueueMissing, Unavailable

FRAME_SLACK_BYTES = 4096  # the other properties; the header must fit one frame
_UNCONFIRMED = "RabbitMQ did not confirm the job"


class Publisher:
    """One confirming channel. A publish that got no answer retires it with its connection: the answer may still
    come, and since messages are returned by id, would be taken for the answer to the next copy.
    A blocked one stays, to refuse without sending until the broker takes messages again."""

    def __init__(self, line: Line, channel: Channel) -> None:
        self._line = line
        self._channel = channel
        self._connection = channel.wire
        self._loop = asyncio.get_running_loop()
        # By message ID: what the broker is to confirm, and until when.
        self._outstanding: dict[str, tuple[asyncio.Future[None], float]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._unanswered: set[str] = set()
        self._retired = False

    @property
    def usable(self) -> bool:
        return not (self._retired or self._channel.is_closed)

    @property
    def blocked(self) -> bool:
        return self._connection.blocked

    async def ready(self, timeout_s: float) -> None:
        """Raises Unavailable while an alarm blocks this connection, as the first publish under it finds out."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._connection.ready()
        except TimeoutError:
            raise Unavailable("RabbitMQ takes no messages now, it is short of memory or disk") from None

    def measure(self, envelope_bytes: int) -> None:
        """Refuse what would make the broker close the connection, and fail every other publish on it."""
        limit_bytes = self._connection.frame_max - FRAME_SLACK_BYTES
        if envelope_bytes > limit_bytes > 0:
            raise PublishRejected(f"the request's headers take {envelope_bytes} bytes, at most {limit_bytes} fit")

    async def send(
        self,
        routing_key: str,
        message_id: str,
        properties: bytes,
        body: bytes,
        *,
        until: float,
        exchange: str = "",
    ) -> None:
        """`until` is by the loop's clock. Raises QueueMissing, PublishRejected, PublishUnconfirmed."""
        if message_id in self._outstanding:
            await self._turn(message_id, until)
        if message_id in self._unanswered:
            self._retire()
            raise PublishUnconfirmed("an earlier copy of the job may still be confirmed")
        try:
            confirmed = self._channel.publish(routing_key, message_id, properties, body, exchange=exchange)
            self._outstanding[message_id] = (confirmed, until)
            if self._timer is None or self._timer.when() > until:
                self._look_at(until)
            await confirmed
        except Returned as exc:
            raise QueueMissing("the function version has no queue") from exc
        except Refused as exc:
            raise PublishRejected("the queue takes no more jobs") from exc
        except BaseException as exc:
            self._unanswered.add(message_id)
            if not self._connection.blocked:
                self._retire()
            if is_loss(exc):
                raise PublishUnconfirmed(_UNCONFIRMED) from exc
            raise
        finally:
            self._outstanding.pop(message_id, None)
            if self._retired:
                self._close_if_idle()

    async def _turn(self, message_id: str, until: float) -> None:
        """Nobody else sends a message of this ID any more. Raises PublishUnconfirmed."""
        while other := self._outstanding.get(message_id):
            await asyncio.wait([other[0]], timeout=until - self._loop.time())
            if until <= self._loop.time():
                raise PublishUnconfirmed(_UNCONFIRMED)
            await asyncio.sleep(0)  # for its sender to take it out

    def _look_at(self, moment: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(moment, self._look)

    def _look(self) -> None:
        """One timer for all: each ends when its own time has passed."""
        self._timer = None
        now = self._loop.time()
        for confirmed, until in self._outstanding.values():
            if until <= now and not confirmed.done():
                confirmed.set_exception(TimeoutError("no confirmation in time"))
        if waiting := [until for confirmed, until in self._outstanding.values() if not confirmed.done()]:
            self._look_at(min(waiting))

    def _retire(self) -> None:
        self._retired = True
        self._line.forget(self._connection)
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._retired and not self._outstanding:
            self._line.close_soon(self._connection)
