"""One Redis client per process, and the batching of what it is asked.

Commands that are asked for while an exchange is under way leave together in the next one: a pipelined command
costs about a quarter of one sent alone. The exchange runs in a task of its own, so a caller that is cancelled
never leaves a connection with an unread reply.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from typing import Any, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.exceptions import ConnectionError as LostConnection
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeout

from broker.backends.breaker import Breaker, seek
from broker.backends.redis import keys
from broker.backends.redis.scripts import MEND, SCRIPTS
from broker.errors import ConfigurationError, RecordDamaged, StoreUnavailable
from broker.settings import Settings

logger = logging.getLogger(__name__)

Command = tuple[Any, ...]

_LARGEST_EXCHANGE = 256
_LANES = 2
_AWAY = "the result store does not answer; try again"
# An error reply is an answer: a store that is full, or loading, may still be read.
_SILENCE = (LostConnection, RedisTimeout, OSError, TimeoutError)


class Connection:
    """`run` is the only way to Redis. Replies are bytes."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._timeout_s = settings.store_timeout_s
        self._replicas = settings.durable_replicas
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=16,
                timeout=settings.store_timeout_s,
                protocol=3,
                socket_timeout=settings.store_timeout_s,
                socket_connect_timeout=settings.store_timeout_s,
                socket_keepalive=True,
                health_check_interval=15,
                # Every script may run twice, so one silent retry over a fresh connection is safe.
                retry=Retry(ConstantBackoff(0.05), 1),
                retry_on_error=[ConnectionError],
                driver_info=None,  # our users may not CLIENT SETINFO, a command that Redis 7.0 does not know
            )
        except ValueError as exc:
            raise ConfigurationError("FNQUEUE_STORE_URL: not a Redis URL") from exc
        self.client: Redis = Redis(connection_pool=pool)
        self._asked: list[_Asked] = []
        self._exchanges: set[asyncio.Task[None]] = set()
        self._breaker = Breaker("store", after_s=settings.store_timeout_s)
        self._seeking: asyncio.Task[None] | None = None

    async def run(self, *commands: Command, durable: bool = False) -> list[Any]:
        """Replies in order. `durable` also waits until the configured number of replicas has what these
        commands wrote; it is met by the same connection, as WAIT demands.

        Raises:
            StoreUnavailable: no answer in time, an error reply, or too few replicas; at once while nothing answers.
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
        asked = _Asked(tuple(commands), durable and self._replicas > 0)
        self._asked.append(asked)
        if len(self._exchanges) < _LANES:
            self._start()
        return await asked.reply

    async def close(self) -> None:
        under_way: list[asyncio.Task[None]] = [*self._exchanges, *([self._seeking] if self._seeking else [])]
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await self.client.aclose()
        await self.client.connection_pool.disconnect()

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
        at = 0
        for asked in batch:
            part = replies[at : at + len(asked.commands)]
            at += len(asked.commands)
            asked.answer(part, enough=not asked.durable or (isinstance(replicas, int) and replicas >= self._replicas))

    async def _send(self, commands: Sequence[Command], *, durable: bool) -> list[Any]:
        replies = await self._pipeline(commands, durable=durable)
        missing = [at for at, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if missing:
            for script in SCRIPTS:
                await cast("Awaitable[Any]", self.client.script_load(script.source))
            again = await self._pipeline([commands[at] for at in missing], durable=durable)
            for at, reply in zip(missing, again, strict=False):
                replies[at] = reply
            if durable:
                replies[-1] = again[-1]
        return replies

    async def _pipeline(self, commands: Sequence[Command], *, durable: bool) -> list[Any]:
        async with self.client.pipeline(transaction=False) as pipeline:
            for command in commands:
                _add(pipeline, command)
            if durable:
                _add(pipeline, ("WAIT", self._replicas, int(self._timeout_s * 500)))
            return list(await pipeline.execute(raise_on_error=False))


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
            self._fail(TimeoutError("too few replicas confirmed the write"))
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


def _add(pipeline: Pipeline, command: Command) -> None:
    pipeline.execute_command(*command)
