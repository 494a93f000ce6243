"""One Redis client per process, and the batching of what it is asked.

Commands that are asked for while an exchange is under way leave together in the next one: a pipelined command
costs about a quarter of one sent alone. The exchange runs in a task of its own, so a caller that is cancelled
never leaves a connection with an unread reply.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from typing import Any, cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeout

from broker.backends.breaker import Breaker, seek
from broker.backends.redis import keys
from broker.backends.redis.pools import SentinelPool, open_pool
from broker.backends.redis.replication import Replication
from broker.backends.redis.scripts import MEND, SCRIPTS
from broker.errors import RecordDamaged, StoreUnavailable
from broker.settings import Settings

logger = logging.getLogger(__name__)

Command = tuple[Any, ...]

_LARGEST_EXCHANGE = 256
_LANES = 2
_AWAY = "the result store does not answer; try again"
# WAIT counts what replicas have acknowledged, be it long ago: those of a primary that was replaced while it was frozen
# would do for what was only read. This makes them acknowledge anew. It reaches the replicas and nobody else, and a
# Redis that is full takes it.
_FENCE: Command = ("PUBLISH", "fnq:h:fence", "")
# An error reply is an answer: a store that is full, or loading, may still be read.
_SILENCE = (LostConnection, RedisTimeout, OSError, TimeoutError)


class TooFewReplicas(StoreUnavailable):
    """It was done, and could be gone again."""


class Connection:
    """`run` is the only way to Redis. Replies are bytes."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._timeout_s = settings.store_timeout_s
        self._replication = Replication(
            least=settings.durable_replicas, every=settings.store_replicas, failover_s=settings.store_failover_s
        )
        self._pool = open_pool(url, settings)
        self.client: Redis = Redis(connection_pool=self._pool)
        self._asked: list[_Asked] = []
        self._exchanges: set[asyncio.Task[None]] = set()
        self._breaker = Breaker("store", after_s=settings.store_timeout_s)
        self._seeking: asyncio.Task[None] | None = None

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
        mended = await self._ask([MEND.call((key,), kind) for key, kind in kinds.items()], durable=False)
        for key, was in zip(kinds, mended, strict=True):
            if was:
                logger.error("key_mended", extra={"key": key})
        return any(mended)

    async def _ask(self, commands: Sequence[Command], *, durable: bool) -> list[Any]:
        if not self._breaker.admits():
            raise StoreUnavailable(_AWAY)
        asked = _Asked(tuple(commands), durable and self._replication.needed)
        self._asked.append(asked)
        if len(self._exchanges) < _LANES:
            self._start()
        return await asked.reply

    async def look_for_replicas(self) -> None:
        """See whether all of them are there, apart from what is asked: those who ask do not wait for one that is known
        to be away. To be called every few seconds, or its absence cannot be told from a fail-over."""
        if not self._replication.needed:
            return
        with suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(self._timeout_s * 2):
                [acknowledged] = await self._pipeline((), self._replication.every)
            if isinstance(acknowledged, int):
                self._replication.safe(acknowledged)

    async def close(self) -> None:
        under_way: list[asyncio.Task[None]] = [*self._exchanges, *([self._seeking] if self._seeking else [])]
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await self.client.aclose()
        await self._pool.aclose()

    def _start(self) -> None:
        exchange = asyncio.get_running_loop().create_task(self._exchange())
        self._exchanges.add(exchange)
        exchange.add_done_callback(self._finished)

    def _finished(self, exchange: asyncio.Task[None]) -> None:
        self._exchanges.discard(exchange)
        if self._asked:
            self._start()

    async def _exchange(self) -> None:
        await asyncio.sleep(0)  # what the rest of this loop turn asks comes along
        batch, self._asked = self._asked[:_LARGEST_EXCHANGE], self._asked[_LARGEST_EXCHANGE:]
        if not batch:
            return
        began_at = self._breaker.now()
        try:
            async with asyncio.timeout(self._timeout_s * 2):
                await self._answer(batch)
            self._breaker.answered()
        except (RedisError, OSError, TimeoutError) as exc:
            _fail(batch, exc)
            if isinstance(exc, _SILENCE) and self._breaker.failed(began_at=began_at):
                self._seeking = asyncio.get_running_loop().create_task(seek(self._breaker, self._ping))
            if self._breaker.open:
                waiting, self._asked = self._asked, []
                if waiting:
                    _fail(waiting, exc)
        except asyncio.CancelledError as exc:
            _fail(batch, exc)
            raise

    async def _ping(self) -> None:
        """Over no connection that is waiting for an answer. Raises StoreUnavailable."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await cast("Awaitable[Any]", self.client.ping())
        except _SILENCE as exc:
            raise StoreUnavailable(_AWAY) from exc
        except RedisError:
            return  # a refusal is an answer

    async def _answer(self, batch: Sequence[_Asked]) -> None:
        durable = any(asked.durable for asked in batch)
        replies = await self._send([command for asked in batch for command in asked.commands], durable=durable)
        replicas = replies.pop() if durable else 0
        enough = durable and isinstance(replicas, int) and self._replication.safe(replicas)
        at = 0
        for asked in batch:
            part = replies[at : at + len(asked.commands)]
            at += len(asked.commands)
            asked.answer(part, enough=enough or not asked.durable)
        if isinstance(self._pool, SentinelPool) and (_lonely(replies) or (durable and not enough)):
            # It may have been replaced without knowing: whoever connects asks the Sentinels.
            await self._pool.disconnect(inuse_connections=False)

    async def _send(self, commands: Sequence[Command], *, durable: bool) -> list[Any]:
        replicas = self._replication.wanted if durable else 0
        replies = await self._pipeline(commands, replicas)
        missing = [at for at, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if missing:
            for script in SCRIPTS:
                await cast("Awaitable[Any]", self.client.script_load(script.source))
            again = await self._pipeline([commands[at] for at in missing], replicas)
            for at, reply in zip(missing, again, strict=False):
                replies[at] = reply
            if durable:
                replies[-1] = again[-1]
        return replies

    async def _pipeline(self, commands: Sequence[Command], replicas: int) -> list[Any]:
        """Their replies and, where replicas are waited for, how many have acknowledged."""
        async with self.client.pipeline(transaction=False) as pipeline:
            for command in commands:
                _add(pipeline, command)
            if replicas:
                _add(pipeline, _FENCE)
                _add(pipeline, ("WAIT", replicas, int(self._timeout_s * 500)))
            replies = list(await pipeline.execute(raise_on_error=False))
            if replicas:
                del replies[-2]
            return replies


class _Asked:
    __slots__ = ("commands", "durable", "reply")

    def __init__(self, commands: tuple[Command, ...], durable: bool) -> None:
        self.commands = commands
        self.durable = durable
        self.reply: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

    def answer(self, replies: list[Any], *, enough: bool) -> None:
        if self.reply.done():
            return
        fault = next((reply for reply in replies if isinstance(reply, BaseException)), None)
        if fault is not None:
            logger.error("store_refused", extra={"cause": str(fault)[:200]})
            if _is_damage(fault):
                self._fail(fault, RecordDamaged("what is stored for this cannot be read"))
            else:
                self._fail(fault)
        elif not enough:
            self.reply.set_exception(TooFewReplicas(_AWAY))
        else:
            self.reply.set_result(replies)

    def fail(self, cause: BaseException) -> None:
        if not self.reply.done():
            self._fail(cause)

    def _fail(self, cause: BaseException, error: Exception | None = None) -> None:
        error = error or StoreUnavailable(_AWAY)
        error.__cause__ = cause
        self.reply.set_exception(error)


def _fail(batch: Sequence[_Asked], cause: BaseException) -> None:
    logger.warning("store_exchange_failed", extra={"commands": len(batch), "cause": type(cause).__name__})
    for asked in batch:
        asked.fail(cause)


def _is_damage(fault: BaseException) -> bool:
    """Whether it is about what a key holds: its type, or a value with which a script cannot count. What is wrong with
    the server has codes of its own (OOM, MISCONF, …); the client takes the common one, ERR, away."""
    if type(fault) is not ResponseError:
        return False
    said = str(fault)
    return said.startswith("WRONGTYPE") or ("user_script" in said and not said.partition(" ")[0].isupper())


def _keys_of(command: Command) -> Sequence[str]:
    if command[0] == "EVALSHA":
        return [key for key in command[3 : 3 + command[2]] if isinstance(key, str)]
    return [key for key in command[1:2] if isinstance(key, str)]


def _lonely(replies: Sequence[Any]) -> bool:
    """Whether something was refused for want of replicas, as by a primary that others have left."""
    return any(isinstance(reply, ResponseError) and str(reply).startswith("NOREPLICAS") for reply in replies)


def _add(pipeline: Pipeline, command: Command) -> None:
    pipeline.execute_command(*command)
