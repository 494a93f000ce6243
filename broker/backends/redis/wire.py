"""One connection to Redis, shared by all who ask: commands go out as they come, replies come back in order.

redis-py makes the connection, with everything that a URL can ask of it: TLS, credentials, a database, Sentinels. From
then on bytes pass without it, because its pools, its streams and its parsing cost ten times what Redis does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, cast

import hiredis
from redis import exceptions
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

# Its parts, or what `forms` packed of them.
Command = tuple[Any, ...] | bytes

# Error replies that somebody tells apart, by their first word.
_ERRORS: dict[str, type[RedisError]] = {
    "NOSCRIPT": exceptions.NoScriptError,
    "READONLY": exceptions.ReadOnlyError,
    "LOADING": exceptions.BusyLoadingError,
    "MASTERDOWN": exceptions.MasterDownError,
    "NOAUTH": exceptions.AuthenticationError,
    "NOPERM": exceptions.NoPermissionError,
}
_NOTHING = object()


class Question(Protocol):
    """Commands that are asked together. `answer_by` is when the connection is given up, by the loop's clock."""

    commands: Sequence[Command]
    replies: list[Any]
    answer_by: float

    def answered(self) -> None:
        """All replies are there."""


class Wire(asyncio.Protocol):
    """Owned by whoever connects it, who closes it. `heard` is given what is published. `lost` is called once it was
    connected and is no more, with the cause and what got no answer; `idle` whenever all that was asked is answered."""

    def __init__(
        self,
        *,
        heard: Callable[[Sequence[Any]], None],
        lost: Callable[[Wire, BaseException, Sequence[Question]], None],
        idle: Callable[[], None],
    ) -> None:
        self._heard = heard
        self._lost = lost
        self._idle = idle
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(
            replyError=_error, protocolError=exceptions.InvalidResponse, notEnoughData=_NOTHING
        )
        self._waiting: deque[Question] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._cause: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether an answer is yet to come."""
        return bool(self._waiting)

    async def connect(self, connection: AbstractConnection) -> None:
        """Take over a connection that redis-py is yet to connect. Raises RedisError, OSError."""
        try:
            await cast("Awaitable[None]", connection.connect())  # type: ignore[no-untyped-call]  # redis-py's
        except BaseException:
            await cast("Awaitable[None]", connection.disconnect(nowait=True))
            raise
        # redis-py has no public name for these; the contract suite notices when they are gone. Left to it, it would
        # close the transport when it is collected, and so would the writer.
        writer, connection._writer, connection._reader = connection._writer, None, None
        assert writer is not None, "it is connected"
        self._writer, self._transport = writer, writer.transport
        if self._transport.is_closing():
            raise exceptions.ConnectionError("the server closed the connection")
        self._transport.set_protocol(self)

    def send(self, questions: Sequence[Question]) -> None:
        assert self._transport is not None, "it is connected"
        pack = hiredis.pack_command
        self._waiting.extend(questions)
        self._transport.write(
            b"".join(
                [
                    command if isinstance(command, bytes) else pack(command)
                    for question in questions
                    for command in question.commands
                ]
            )
        )
        if self._timer is None and questions:
            self._timer = self._loop.call_at(questions[0].answer_by, self._look)

    def data_received(self, data: bytes) -> None:
        gets, waiting, push = self._reader.gets, self._waiting, hiredis.PushNotification
        try:
            self._reader.feed(data)
            while (reply := gets()) is not _NOTHING:
                if type(reply) is push and reply[0] != b"subscribe":
                    self._heard(reply)
                    continue
                question = waiting[0]
                replies = question.replies
                replies.append(reply)
                if len(replies) == len(question.commands):
                    waiting.popleft()
                    question.answered()
            if not waiting:
                self._idle()
        except (RedisError, IndexError) as exc:  # not what was asked for: whose the next reply is, nobody knows
            self.abort(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        questions, self._waiting = tuple(self._waiting), deque()
        cause = self._cause or exc or exceptions.ConnectionError("the server closed the connection")
        self._lost(self, cause, questions)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self, cause: BaseException) -> None:
        """Close it at once, whatever is under way."""
        self._cause = self._cause or cause
        if self._transport is not None:
            self._transport.abort()

    def _look(self) -> None:
        """One timer for all: the oldest question ends its own wait and, with the connection, everybody's."""
        self._timer = None
        if not self._waiting:
            return
        due = self._waiting[0].answer_by
        if due <= self._loop.time():
            self.abort(exceptions.TimeoutError("no reply in time"))
        else:
            self._timer = self._loop.call_at(due, self._look)


def _error(text: str) -> RedisError:
    code, _, said = text.partition(" ")
    return _ERRORS.get(code, exceptions.ResponseError)(said if code == "ERR" else text)
