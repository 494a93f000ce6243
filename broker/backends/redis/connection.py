"""The one way of a process to Redis.

What is asked in one turn of the loop leaves together, and nobody waits for the answers of others before he may ask.
Nothing that a caller does, such as being cancelled, touches the connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import MasterDownError, NoScriptError, ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeout

from broker.backends.breaker import Breaker
from broker.backends.redis.scripts import SOURCES
from broker.backends.redis.wire import Command, Question, Wire
from broker.errors import ConfigurationError, StoreUnavailable
from broker.settings import Settings

logger = logging.getLogger(__name__)

_AWAY = "the result store does not answer; try again"
_RECONNECT_S = 0.5
_CLOSE_S = 1.0
# An error reply is an answer: a store that is full, or loading, may still be read.
_SILENCE = (LostConnection, RedisTimeout, OSError, TimeoutError)
# This server is no primary any more: the next connection may find the one that is.
_DEMOTED = (ReadOnlyError, MasterDownError)

Heard = Callable[[bytes], None]


class Connection:
    """`run` is the only way to Redis. Replies are bytes."""

    def __init__(self, url: str, settings: Settings) -> None:
        self.timeout_s = settings.store_timeout_s
        self._replicas = settings.durable_replicas
        self._pool = _pool(url, settings)
        self.breaker = Breaker("store", after_s=settings.store_timeout_s)
        self._plain = _Lane(self)
        # WAIT holds up what comes behind it on its connection.
        self._durable = _Lane(self, replicas=self._replicas)

    async def run(self, *commands: Command, durable: bool = False) -> list[Any]:
        """Replies in order. `durable` also waits until the configured number of replicas has what these
        commands wrote; it is met by the same connection, as WAIT demands.

        Raises:
            StoreUnavailable: no answer in time, an error reply, or too few replicas; at once while nothing answers.
        """
        lane = self._durable if durable and self._replicas else self._plain
        # One that waits here is the probe: it must not take another's turn.
        if self.breaker.open and not lane.waits and not self.breaker.admits():
            raise StoreUnavailable(_AWAY)
        asked = _Asked(lane, commands)
        lane.ask(asked)
        return await asked.reply

    async def listen(self, channel: str, heard: Heard, *, gap: Callable[[], None]) -> None:
        """Hand what is published on `channel` to `heard`, across reconnects, until cancelled. `gap` is called whenever
        something may have been missed, so when it begins to listen, too. Once in the life of a Connection."""
        await self._plain.listen(channel, heard, gap)

    async def close(self) -> None:
        await asyncio.gather(self._plain.close(), self._durable.close())

    async def connect(self, wire: Wire) -> None:
        """Raises RedisError, OSError, TimeoutError."""
        async with asyncio.timeout(self.timeout_s):
            await wire.connect(self._pool.make_connection())  # type: ignore[no-untyped-call]  # redis-py's

    def failed(self, asked: Sequence[_Asked], cause: BaseException) -> None:
        """Nothing came back to these."""
        if not asked:
            return
        logger.warning("store_exchange_failed", extra={"commands": len(asked), "cause": type(cause).__name__})
        for each in asked:
            each.fail(cause)
        if isinstance(cause, _SILENCE):
            self.breaker.failed(began_at=min(each.asked_at for each in asked))
        if self.breaker.open:
            self._plain.give_up(cause)
            self._durable.give_up(cause)


class _Asked:
    """What one caller asks, and gets."""

    __slots__ = ("answer_by", "asked_at", "commands", "lane", "replies", "reply", "twice")

    def __init__(self, lane: _Lane, commands: Sequence[Command]) -> None:
        self.lane = lane
        self.commands = commands
        self.replies: list[Any] = []
        self.reply: asyncio.Future[list[Any]] = lane.loop.create_future()
        self.asked_at = lane.connection.breaker.now()
        self.answer_by = 0.0
        self.twice = False

    def answered(self) -> None:
        if not self.lane.replicas:  # else WAIT follows
            self.conclude()

    def conclude(self) -> None:
        self.lane.connection.breaker.answered()
        for reply in self.replies:
            if isinstance(reply, BaseException):
                self.refused(reply)
                return
        self.succeed(self.replies)

    def refused(self, reply: BaseException) -> None:
        if isinstance(reply, NoScriptError) and self._unknown():
            self.lane.ask(_Taught(self, self._unknown()))
            return
        logger.error("store_refused", extra={"cause": str(reply)[:200]})
        self.fail(reply)
        if isinstance(reply, _DEMOTED):
            self.lane.leave(reply)

    def succeed(self, replies: list[Any]) -> None:
        if not self.reply.done():
            self.reply.set_result(replies)

    def fail(self, cause: BaseException) -> None:
        if not self.reply.done():
            error = StoreUnavailable(_AWAY)
            error.__cause__ = cause
            self.reply.set_exception(error)

    def _unknown(self) -> list[int]:
        """Which commands need scripts that the server does not know."""
        return [at for at, reply in enumerate(self.replies) if isinstance(reply, NoScriptError)]


class _Taught(_Asked):
    """Another one's commands whose scripts were not known, behind the scripts: a server that was restarted, or is
    another one, knows none."""

    __slots__ = ("_first", "_places")

    def __init__(self, first: _Asked, places: Sequence[int]) -> None:
        commands = [first.commands[at] for at in places]
        scripts = dict.fromkeys(str(command[1]) for command in commands)
        super().__init__(first.lane, [*(("SCRIPT", "LOAD", SOURCES[sha]) for sha in scripts), *commands])
        self._first = first
        self._places = places
        self.asked_at, self.reply = first.asked_at, first.reply

    def succeed(self, replies: list[Any]) -> None:
        for at, reply in zip(self._places, replies[-len(self._places) :], strict=True):
            self._first.replies[at] = reply
        self._first.conclude()

    def _unknown(self) -> list[int]:
        return []  # once is enough


class _Wait:
    """Behind commands whose effects have to be on replicas."""

    __slots__ = ("_replicas", "answer_by", "asked", "commands", "replies")

    def __init__(self, asked: Sequence[_Asked], *, replicas: int, timeout_s: float) -> None:
        self.asked = asked
        self._replicas = replicas
        self.commands: Sequence[Command] = (("WAIT", replicas, int(timeout_s * 500)),)
        self.replies: list[Any] = []
        self.answer_by = asked[0].answer_by

    def answered(self) -> None:
        [reached] = self.replies
        enough = isinstance(reached, int) and reached >= self._replicas
        for asked in self.asked:
            if enough or any(isinstance(reply, BaseException) for reply in asked.replies):
                asked.conclude()
            else:
                asked.fail(TimeoutError("too few replicas confirmed the write"))


class _Subscription:
    """Its answer is a push, or an error."""

    __slots__ = ("_gap", "answer_by", "commands", "replies")

    def __init__(self, channel: str, gap: Callable[[], None], answer_by: float) -> None:
        self.commands: Sequence[Command] = (("SUBSCRIBE", channel),)
        self._gap = gap
        self.replies: list[Any] = []
        self.answer_by = answer_by

    def answered(self) -> None:
        if isinstance(self.replies[0], BaseException):
            logger.error("hints_refused", extra={"cause": str(self.replies[0])[:200]})
        else:
            self._gap()


class _Lane:
    """One connection, made when it is needed. What was under way when it was lost is asked once more, over the next
    one: every script may run twice."""

    def __init__(self, connection: Connection, *, replicas: int = 0) -> None:
        self.connection = connection
        self.replicas = replicas
        self.loop = asyncio.get_running_loop()
        self._asked: list[_Asked] = []
        self._wire: Wire | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._flushing = False
        self._closed = False
        self._cut = asyncio.Event()
        self._channel = ""
        self._heard: Heard = _to_nobody
        self._gap: Callable[[], None] = _nothing

    @property
    def waits(self) -> bool:
        return bool(self._asked)

    def ask(self, asked: _Asked) -> None:
        self._asked.append(asked)
        if self._wire is None:
            self._connect()
        elif not self._flushing:
            self._flushing = True
            self.loop.call_soon(self._flush)  # what the rest of this loop turn asks comes along

    async def listen(self, channel: str, heard: Heard, gap: Callable[[], None]) -> None:
        self._channel, self._heard, self._gap = channel, heard, gap
        if self._wire is not None:
            self._subscribe(self._wire)
        failing = False
        while True:
            self._cut.clear()
            if self._wire is None:
                await asyncio.wait([self._connect()])
            if self._wire is not None:
                failing = False
                await self._cut.wait()
                continue
            if not failing:
                failing = True
                logger.warning("hints_lost")
            await asyncio.sleep(_RECONNECT_S)

    def leave(self, cause: BaseException) -> None:
        """Use another connection from now on."""
        if self._wire is not None:
            self._wire.abort(cause)

    def give_up(self, cause: BaseException) -> None:
        """What was not sent yet."""
        waiting, self._asked = self._asked, []
        self.connection.failed(waiting, cause)

    async def close(self) -> None:
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        if self._wire is not None:
            self._flush()
            self._cut.clear()
            self._wire.close()
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await self._cut.wait()

    def _connect(self) -> asyncio.Task[None]:
        if self._connecting is None:
            self._connecting = self.loop.create_task(self._open())
        return self._connecting

    async def _open(self) -> None:
        wire = Wire(heard=self._told, lost=self._lost)
        try:
            if self._closed:
                raise LostConnection("closed")
            await self.connection.connect(wire)
        except (RedisError, OSError, TimeoutError) as exc:
            self._connecting = None
            self.give_up(exc)
        except BaseException as exc:
            self._connecting = None
            self.give_up(exc)
            raise
        else:
            self._connecting, self._wire = None, wire
            if self._channel:
                self._subscribe(wire)
            self._flush()

    def _subscribe(self, wire: Wire) -> None:
        wire.send([_Subscription(self._channel, self._gap, self._answer_by())])

    def _flush(self) -> None:
        self._flushing = False
        wire, asked = self._wire, self._asked
        if wire is None or not asked:
            return
        self._asked = []
        answer_by = self._answer_by()
        for each in asked:
            each.answer_by = answer_by
        questions: list[Question] = list(asked)
        if self.replicas:
            questions.append(_Wait(asked, replicas=self.replicas, timeout_s=self.connection.timeout_s))
        wire.send(questions)

    def _answer_by(self) -> float:
        return self.loop.time() + self.connection.timeout_s

    def _lost(self, wire: Wire, cause: BaseException, questions: Sequence[Question]) -> None:
        self._wire = None
        self._cut.set()
        cut: dict[_Asked, None] = {}
        for question in questions:
            if isinstance(question, _Asked):
                cut[question] = None
            elif isinstance(question, _Wait):
                cut |= dict.fromkeys(question.asked)
        open_ = [asked for asked in cut if not asked.reply.done()]
        again = [asked for asked in open_ if not asked.twice and not self._closed]
        self.connection.failed([asked for asked in open_ if asked not in again], cause)
        for asked in again:
            asked.twice, asked.replies = True, []
        self._asked[:0] = again
        if self._asked:
            self._connect()

    def _told(self, push: Sequence[Any]) -> None:
        if push[0] == b"message":
            self._heard(push[2])


def _to_nobody(message: bytes) -> None:
    return


def _nothing() -> None:
    return


def _pool(url: str, settings: Settings) -> ConnectionPool:
    """It holds no connection: it only knows how one is made."""
    try:
        return ConnectionPool.from_url(
            url,
            protocol=3,
            socket_timeout=settings.store_timeout_s,
            socket_connect_timeout=settings.store_timeout_s,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError as exc:
        raise ConfigurationError("FNQUEUE_STORE_URL: not a Redis URL") from exc
