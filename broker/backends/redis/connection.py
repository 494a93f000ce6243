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

from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import MasterDownError, NoScriptError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeout

from broker.backends.breaker import Breaker, seek
from broker.backends.redis import keys
from broker.backends.redis.forms import parts_of
from broker.backends.redis.pools import SentinelPool, open_pool
from broker.backends.redis.replication import Replication
from broker.backends.redis.scripts import MEND, MEND_LEDGER, SOURCES
from broker.backends.redis.wire import Command, Question, Wire
from broker.errors import RecordDamaged, StoreUnavailable
from broker.settings import Settings

logger = logging.getLogger(__name__)

_AWAY = "the result store does not answer; try again"
_RECONNECT_S = 0.5
_CLOSE_S = 1.0
# WAIT counts what replicas have acknowledged, be it long ago: those of a primary that was replaced while it was frozen
# would do for what was only read. This makes them acknowledge anew. It reaches the replicas and nobody else, and a
# Redis that is full takes it.
_FENCE: Command = ("PUBLISH", "fnq:h:fence", "")
# An error reply is an answer: a store that is full, or loading, may still be read.
_SILENCE = (LostConnection, RedisTimeout, OSError, TimeoutError)
# This server is no primary any more: the next connection may find the one that is.
_DEMOTED = (ReadOnlyError, MasterDownError)

Heard = Callable[[bytes], None]


class TooFewReplicas(StoreUnavailable):
    """It was done, and could be gone again."""


class Connection:
    """`run` is the only way to Redis. Replies are bytes."""

    def __init__(self, url: str, settings: Settings) -> None:
        self.timeout_s = settings.store_timeout_s
        self.replication = Replication(
            least=settings.durable_replicas, every=settings.store_replicas, failover_s=settings.store_failover_s
        )
        self._pool = open_pool(url, settings)  # it holds no connection: it only knows how one is made
        self.breaker = Breaker("store", after_s=settings.store_timeout_s)
        self._seeking: asyncio.Task[None] | None = None
        self._plain = _Lane(self)
        # WAIT holds up what comes behind it on its connection.
        self._durable = _Lane(self, durable=True)
        self._looking = _Lane(self)
        self._lanes = (self._plain, self._durable, self._looking)

    async def run(self, *commands: Command, durable: bool = False) -> list[Any]:
        """Replies in order. `durable` also waits until what these commands wrote and read is safe with replicas, as
        configured; it is met by the same connection, as WAIT demands.

        Raises:
            StoreUnavailable: no answer in time, an error reply, or (TooFewReplicas) not durable in time; at once while
                nothing answers.
            RecordDamaged: a key holds what these commands cannot work with, and it is none that can be made anew.
        """
        try:
            return await self._ask(commands, durable=durable)
        except RecordDamaged:
            if not await self._mend(commands):
                raise
        return await self._ask(commands, durable=durable)

    async def each(self, *commands: Command, durable: bool = False) -> list[Any]:
        """As `run`, but that a command which meets a damaged key does not fail the others: its RecordDamaged stands in
        its reply's place."""
        try:
            return await self._ask(commands, durable=durable)
        except RecordDamaged:
            return await asyncio.gather(*(self._alone(command, durable=durable) for command in commands))

    async def _alone(self, command: Command, *, durable: bool) -> Any:
        try:
            [reply] = await self.run(command, durable=durable)
        except RecordDamaged as damaged:
            return damaged
        return reply

    async def _mend(self, commands: Sequence[Command]) -> bool:
        """Whether any key of theirs was damaged, and is one that may be emptied or put right."""
        kinds = {key: kind for command in commands for key in _keys_of(command) if (kind := keys.rebuildable(key))}
        if not kinds:
            return False
        mended = await self._ask(
            [MEND_LEDGER.call((key,)) if kind == "ledger" else MEND.call((key,), kind) for key, kind in kinds.items()],
            durable=False,
        )
        for key, was in zip(kinds, mended, strict=True):
            if was:
                logger.error("key_mended", extra={"key": key})
        return any(mended)

    def _ask(self, commands: Sequence[Command], *, durable: bool) -> asyncio.Future[list[Any]]:
        if not self.breaker.admits():
            raise StoreUnavailable(_AWAY)
        lane = self._durable if durable and self.replication.needed else self._plain
        asked = _Asked(lane, commands)
        lane.ask(asked)
        return asked.reply

    async def look_for_replicas(self) -> None:
        """See whether all of them are there, apart from what is asked: those who ask do not wait for one that is known
        to be away. To be called every few seconds, or its absence cannot be told from a fail-over."""
        if not self.replication.needed or self.breaker.open:
            return
        asked = _Asked(self._looking, (_FENCE, self.wait_for(self.replication.every)))
        self._looking.ask(asked)
        with suppress(StoreUnavailable):
            acknowledged = (await asked.reply)[-1]
            if isinstance(acknowledged, int):
                self.replication.safe(acknowledged)

    def wait_for(self, replicas: int) -> Command:
        return ("WAIT", replicas, int(self.timeout_s * 500))

    async def listen(self, channel: str, heard: Heard, *, gap: Callable[[], None]) -> None:
        """Hand what is published on `channel` to `heard`, across reconnects, until cancelled. `gap` is called whenever
        something may have been missed, so when it begins to listen, too. Once in the life of a Connection."""
        await self._plain.listen(channel, heard, gap)

    async def close(self) -> None:
        if self._seeking is not None:
            self._seeking.cancel()
            await asyncio.wait([self._seeking])
        await asyncio.gather(*(lane.close() for lane in self._lanes))
        await self._pool.aclose()

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
        if isinstance(cause, _SILENCE) and self.breaker.failed(began_at=min(each.asked_at for each in asked)):
            self._seeking = asyncio.get_running_loop().create_task(seek(self.breaker, self._ping))
        if self.breaker.open:
            for lane in self._lanes:
                lane.give_up(cause)

    def doubt(self, cause: BaseException) -> None:
        """This primary may have been replaced without knowing: whoever connects asks the Sentinels."""
        if isinstance(self._pool, SentinelPool):
            for lane in self._lanes:
                lane.leave(cause)

    async def _ping(self) -> None:
        """Over no connection that is waiting for an answer: to make one takes answers. Raises StoreUnavailable."""
        wire = Wire(heard=_unheard, lost=_unused, idle=_nothing)
        try:
            await self.connect(wire)
        except _SILENCE as exc:
            raise StoreUnavailable(_AWAY) from exc
        except RedisError:
            return  # a refusal is an answer
        wire.close()


class _Asked:
    """What one caller asks, and gets."""

    __slots__ = ("_breaker", "answer_by", "asked_at", "commands", "lane", "replies", "reply", "twice")

    def __init__(self, lane: _Lane, commands: Sequence[Command]) -> None:
        self._breaker = breaker = lane.connection.breaker
        self.lane = lane
        self.commands = commands
        self.replies: list[Any] = []
        self.reply: asyncio.Future[list[Any]] = lane.loop.create_future()
        self.asked_at = breaker.now()
        self.answer_by = 0.0
        self.twice = False

    def answered(self) -> None:
        if not self.lane.durable:  # else WAIT follows
            self.conclude()

    def conclude(self) -> None:
        self._breaker.answered()
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
        self.fail(reply, RecordDamaged("what is stored for this cannot be read") if _is_damage(reply) else None)
        if isinstance(reply, _DEMOTED):
            self.lane.leave(reply)
        elif _is_lonely(reply):
            self.lane.connection.doubt(reply)

    def succeed(self, replies: list[Any]) -> None:
        if not self.reply.done():
            self.reply.set_result(replies)

    def fail(self, cause: BaseException, error: Exception | None = None) -> None:
        if not self.reply.done():
            error = error or StoreUnavailable(_AWAY)
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
        scripts = dict.fromkeys(_text(_parts(command)[1]) for command in commands)
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

    __slots__ = ("_connection", "answer_by", "asked", "commands", "replies")

    def __init__(self, asked: Sequence[_Asked], connection: Connection) -> None:
        self.asked = asked
        self._connection = connection
        self.commands: Sequence[Command] = (_FENCE, connection.wait_for(connection.replication.wanted))
        self.replies: list[Any] = []
        self.answer_by = asked[0].answer_by

    def answered(self) -> None:
        self._connection.breaker.answered()
        reached = self.replies[-1]
        enough = isinstance(reached, int) and self._connection.replication.safe(reached)
        lack = TooFewReplicas(_AWAY)
        for asked in self.asked:
            if enough or any(isinstance(reply, BaseException) for reply in asked.replies):
                asked.conclude()
            else:
                asked.fail(lack, TooFewReplicas(_AWAY))
        if not enough:
            self._connection.doubt(lack)


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

    def __init__(self, connection: Connection, *, durable: bool = False) -> None:
        self.connection = connection
        self.durable = durable
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
        else:
            self._flush_soon()

    def _flush_soon(self) -> None:
        """What the rest of this loop turn asks comes along, and so does all that is asked while something is under way:
        the server would take it behind that anyway, and of many that come together each costs both sides less."""
        if self._asked and not self._flushing and self._wire is not None and not self._wire.busy:
            self._flushing = True
            self.loop.call_soon(self._flush)

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
        wire = Wire(heard=self._told, lost=self._lost, idle=self._flush_soon)
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
            self.connection.breaker.connected()
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
        if self.durable:
            questions.append(_Wait(asked, self.connection))
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


def _unheard(push: Sequence[Any]) -> None:
    return


def _unused(wire: Wire, cause: BaseException, questions: Sequence[Question]) -> None:
    return


def _is_damage(fault: BaseException) -> bool:
    """Whether it is about what a key holds: its type, or a value with which a script cannot count. What is wrong with
    the server has codes of its own (OOM, MISCONF, …); the wire takes the common one, ERR, away."""
    if type(fault) is not ResponseError:
        return False
    said = str(fault)
    return said.startswith("WRONGTYPE") or ("user_script" in said and not said.partition(" ")[0].isupper())


def _is_lonely(fault: BaseException) -> bool:
    """Whether it was refused for want of replicas, as by a primary that others have left."""
    return isinstance(fault, ResponseError) and str(fault).startswith("NOREPLICAS")


def _keys_of(command: Command) -> Sequence[str]:
    parts = _parts(command)
    if _text(parts[0]) == "EVALSHA":
        return [_text(key) for key in parts[3 : 3 + int(parts[2])]]
    return [_text(key) for key in parts[1:2] if isinstance(key, str | bytes)]


def _parts(command: Command) -> Sequence[Any]:
    return parts_of(command) if isinstance(command, bytes) else command


def _text(part: str | bytes) -> str:
    return part.decode(errors="replace") if isinstance(part, bytes) else part
