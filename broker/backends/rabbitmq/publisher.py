"""Publishing with confirms: many at once on one channel, each with its own end."""

from __future__ import annotations

import asyncio

from broker.backends.rabbitmq.connection import Line, answering
from broker.backends.rabbitmq.wire import Channel, Refused, Returned
from broker.errors import PublishRejected, PublishUnconfirmed, QueueMissing, Unavailable

FRAME_SLACK_BYTES = 4096  # the other properties; the header must fit one frame


class Publisher:
    """One confirming channel. A publish that got no answer retires it with its connection: the answer may still
    come, and since messages are returned by id, would be taken for the answer to the next copy.
    A blocked one stays, to refuse without sending until the broker takes messages again."""

    def __init__(self, line: Line, channel: Channel) -> None:
        self._line = line
        self._channel = channel
        self._connection = channel.wire
        self._outstanding: dict[str, asyncio.Event] = {}
        self._unanswered: set[str] = set()
        self._retired = False

    @property
    def usable(self) -> bool:
        return not (self._retired or self._channel.is_closed)

    async def ready(self, timeout_s: float) -> None:
        """Raises Unavailable while an alarm blocks this connection, as the first publish under it finds out."""
        if not self._connection.blocked:
            return
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
        timeout_s: float,
        exchange: str = "",
    ) -> None:
        async with answering(timeout_s, PublishUnconfirmed, "RabbitMQ did not confirm the job"):
            while other := self._outstanding.get(message_id):
                await other.wait()
            if message_id in self._unanswered:
                self._retire()
                raise PublishUnconfirmed("an earlier copy of the job may still be confirmed")
            self._outstanding[message_id] = asyncio.Event()
            try:
                await self._channel.publish(routing_key, message_id, properties, body, exchange=exchange)
            except Returned as exc:
                raise QueueMissing("the function version has no queue") from exc
            except Refused as exc:
                raise PublishRejected("the queue takes no more jobs") from exc
            except BaseException:
                self._unanswered.add(message_id)
                if not self._connection.blocked:
                    self._retire()
                raise
            finally:
                self._outstanding.pop(message_id).set()
                self._close_if_idle()

    def _retire(self) -> None:
        self._retired = True
        self._line.forget(self._connection)
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._retired and not self._outstanding:
            self._line.close_soon(self._connection)
