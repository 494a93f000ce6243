"""Dead letters on Redis: a hash beside each record, and one sorted set per account to find them by."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from broker.backends.codec import Unreadable, pack_job, unpack_job
from broker.backends.redis import keys, scripts
from broker.backends.redis.connection import Connection
from broker.backends.redis.results import reading
from broker.backends.tallies import tallied
from broker.errors import RecordDamaged
from broker.model import DeadLetter, DeadLetterFilter, DeadLetterPage, Job, Redrive, Tally
from broker.ports import PAGE_SCAN
from broker.settings import Settings

logger = logging.getLogger(__name__)

_FIELDS = ("a", "f", "v", "c", "m", "n", "s", "e", "u", "z", "k", "r", "R")
_BATCH = 250
# Of one account, made room for at once.
_MOST_DROPPED = 100


class RedisDeadLetters:
    """Opened by `broker.backends.redis.store`."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self._connection = connection
        self._settings = settings
        self._ttl_ms = int(settings.dead_letter_ttl_s * 1000)

    async def keep(self, job: Job, *, size_bytes: int) -> bool:
        try:
            return await self._keep(job, size_bytes)
        except RecordDamaged:
            # What is in the letter's place is none that can be read: the message makes it anew.
            await self._connection.run(("DEL", keys.letter(job.id)))
            return await self._keep(job, size_bytes)

    async def _keep(self, job: Job, size_bytes: int) -> bool:
        envelope, body = pack_job(job)
        [died_ms] = await self._connection.run(
            scripts.LETTER_KEEP.call(
                (keys.record(job.id), keys.letter(job.id)), envelope, body, job.body_key, size_bytes, self._ttl_ms
            ),
            durable=True,
        )
        if not died_ms:
            return False
        place = keys.letters(job.account)
        _, count = await self._connection.run(
            # Trimmed below instead, where the letters go too.
            scripts.FILE.call((place,), _member(job.id), int(died_ms) * 1000, 2**31, self._ttl_ms),
            ("ZCARD", place),
            durable=True,
        )
        if (excess := int(count) - self._settings.dead_letters_kept) > 0:
            [oldest] = await self._connection.run(("ZRANGE", place, 0, min(excess, _MOST_DROPPED) - 1))
            ids = [_id(member) for member in oldest]
            await self._connection.run(*(("DEL", keys.letter(each)) for each in ids), ("ZREM", place, *oldest))
        return True

    async def read(self, request_id: str) -> DeadLetter | None:
        [reply] = await self._connection.run(("HMGET", keys.letter(request_id), *_FIELDS, "j", "b"))
        with reading(request_id):
            return _parse(request_id, reply)

    async def glance(self, request_id: str) -> DeadLetter | None:
        [letter] = await self._glance_all([request_id])
        if isinstance(letter, RecordDamaged):
            raise letter
        return letter

    async def page(self, account: str, wanted: DeadLetterFilter, *, limit: int, after: int = 0) -> DeadLetterPage:
        found: list[DeadLetter] = []
        looked = 0
        async for order, letter in self._walk(account, wanted, after, first=limit):
            looked += 1
            if letter is not None and wanted.keeps(letter):
                found.append(letter)
            if len(found) == limit or looked == PAGE_SCAN:
                return DeadLetterPage(letters=tuple(found), after=order)
        return DeadLetterPage(letters=tuple(found))

    async def tally(self, account: str, wanted: DeadLetterFilter) -> list[Tally]:
        walk = self._walk(account, wanted, 0, first=_BATCH)
        return tallied([letter async for _, letter in walk if letter is not None and wanted.keeps(letter)])

    async def bind(self, request_id: str, candidate: str, *, after: str = "") -> Redrive | None:
        known_ms = int(self._settings.result_ttl_s * 1000)
        [bound] = await self._connection.run(
            scripts.LETTER_BIND.call((keys.letter(request_id),), candidate, after, known_ms), durable=True
        )
        with reading(request_id):
            return Redrive(id=str(uuid.UUID(_text(bound[0]))), done=bool(bound[1])) if bound is not None else None

    async def unbind(self, request_id: str, redrive_id: str) -> None:
        await self._connection.run(scripts.LETTER_UNBIND.call((keys.letter(request_id),), redrive_id))

    async def redriven(self, request_id: str, redrive_id: str) -> None:
        places = keys.letter(request_id), keys.record(request_id)
        await self._connection.run(scripts.LETTER_REDRIVEN.call(places, redrive_id), durable=True)

    async def drop(self, account: str, request_id: str) -> DeadLetter | None:
        key = keys.letter(request_id)
        reply, _, _ = await self._connection.run(
            ("HMGET", key, *_FIELDS), ("DEL", key), ("ZREM", keys.letters(account), _member(request_id)), durable=True
        )
        with reading(request_id):
            return _parse(request_id, reply)

    async def _walk(
        self, account: str, wanted: DeadLetterFilter, after: int, *, first: int
    ) -> AsyncIterator[tuple[int, DeadLetter | None]]:
        """The account's letters from the place `after` on, the latest first, each with its own, or None where it
        cannot be read; those that went are dropped from the list on the way. `first` are asked for at first."""
        place = keys.letters(account)
        lowest = int(wanted.since * 1e6) if wanted.since else "-inf"
        upper = [bound for bound in (after, int(wanted.until * 1e6)) if bound]
        highest, batch = f"({min(upper)}" if upper else "+inf", first
        while True:
            [entries] = await self._connection.run(
                ("ZRANGE", place, highest, lowest, "BYSCORE", "REV", "LIMIT", 0, batch, "WITHSCORES")
            )
            letters = await self._glance_all([_id(member) for member, _ in entries])
            gone = [member for (member, _), letter in zip(entries, letters, strict=True) if letter is None]
            if gone:
                await self._connection.run(("ZREM", place, *gone))
            for (_, score), letter in zip(entries, letters, strict=True):
                yield int(score), None if isinstance(letter, RecordDamaged) else letter
            if len(entries) < batch:
                return
            highest, batch = f"({int(entries[-1][1])}", _BATCH

    async def _glance_all(self, request_ids: Sequence[str]) -> list[DeadLetter | RecordDamaged | None]:
        if not request_ids:
            return []
        replies = await self._connection.each(*(("HMGET", keys.letter(each), *_FIELDS) for each in request_ids))
        return [_read(each, reply) for each, reply in zip(request_ids, replies, strict=True)]


def _read(request_id: str, reply: Sequence[Any] | RecordDamaged) -> DeadLetter | RecordDamaged | None:
    if isinstance(reply, RecordDamaged):
        return reply
    try:
        with reading(request_id):
            return _parse(request_id, reply)
    except RecordDamaged as damaged:
        logger.error("dead_letter_unreadable", extra={"request_id": request_id})
        return damaged


def _parse(request_id: str, reply: Sequence[Any]) -> DeadLetter | None:
    account, cause, reason, attempts, accepted, died, until, size, key, redrive, redriven = (
        _text(part or b"") for part in (reply[0], *reply[3 : len(_FIELDS)])
    )
    if not died:
        return None
    return DeadLetter(
        id=request_id,
        account=account,
        function_id=keys.unpacked(reply[1] or b""),
        version_id=keys.unpacked(reply[2] or b""),
        cause=cause,
        reason=reason,
        attempts=int(attempts),
        created_at=int(accepted) / 1000,
        died_at=int(died) / 1000,
        kept_until=int(until) / 1000,
        size_bytes=int(size),
        body_key=key,
        redriven_as=redrive,
        redriven_at=int(redriven or 0) / 1000,
        job=_job(request_id, *reply[len(_FIELDS) :]),
    )


def _job(request_id: str, envelope: bytes = b"", body: bytes = b"") -> Job | None:
    if not envelope:
        return None
    try:
        return unpack_job(envelope, body)
    except Unreadable:
        logger.error("dead_letter_unreadable", extra={"request_id": request_id})
        return None


def _member(request_id: str) -> bytes:
    return uuid.UUID(request_id).bytes


def _id(member: bytes) -> str:
    return str(uuid.UUID(bytes=member))


def _text(raw: bytes | str) -> str:
    return raw.decode() if isinstance(raw, bytes) else raw
