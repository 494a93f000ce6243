"""Upkeep on Redis: a walk over all records by SCAN, and over the places of a version by rank, in small pieces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from broker.backends.redis import keys, scripts
from broker.backends.redis.connection import Connection
from broker.backends.redis.results import RedisResults, leaving, noted, reading, told
from broker.backends.redis.wire import Command
from broker.errors import RecordDamaged
from broker.model import DeliveryState, Job, RequestState, Survey
from broker.settings import Settings

_RECORDS = keys.record("*")
# An entry that has been there for less may be of a record that is being made.
_STRAY_AFTER_S = 60.0
# What reading a record raises that is none.
_GARBLED = (ValueError, TypeError, AttributeError, OverflowError)
_QUEUED = RequestState.QUEUED.encode()
_RUNNING = RequestState.RUNNING.encode()
_PENDING = DeliveryState.PENDING.encode()


class RedisUpkeep:
    """Opened by `broker.backends.redis.store`."""

    def __init__(self, connection: Connection, settings: Settings, results: RedisResults) -> None:
        self._connection = connection
        self._settings = settings
        self._retention_ms = int(settings.result_ttl_s * 1000)
        self._results = results

    async def survey(self, cursor: int, *, limit: int) -> Survey:
        scan = ("SCAN", cursor, "MATCH", _RECORDS, "COUNT", limit, "TYPE", "hash")
        [[following, found]] = await self._connection.run(scan)
        ids = [key.decode(errors="replace")[5:-3] for key in found]
        (seconds, micros), *records = await self._connection.each(
            ("TIME",), *(("HMGET", key, "s", "v", "d", "Q", "n", "Z", "C") for key in found)
        )
        states: Counter[RequestState] = Counter()
        unreadable, live, called_back = 0, [], []
        for request_id, reply in zip(ids, records, strict=True):
            if isinstance(reply, RecordDamaged) or all(field is None for field in reply):  # gone since the scan
                continue
            *fields, callback = reply
            if callback is not None:
                called_back.append((request_id, fields[0]))
            try:
                state = RequestState(fields[0].decode())
                if not state.terminal:
                    live.append(_Entry(request_id, fields))
                    continue
            except _GARBLED:
                unreadable += 1
            else:
                states[state] += 1
        await self._expect(called_back)
        expired, placed = await self._tend(live, states, now_ms=int(seconds) * 1000 + int(micros) // 1000)
        return Survey(cursor=int(following), states=states, unreadable=unreadable, expired=expired, placed=placed)

    async def straighten(self, version_id: str, *, skip: int, limit: int) -> tuple[int, bool]:
        waiting, running = keys.waiting(version_id), keys.running(version_id)
        window = (skip, skip + limit - 1)
        (seconds, _), queued, taken = await self._connection.run(
            ("TIME",), ("ZRANGE", waiting, *window, "WITHSCORES"), ("ZRANGE", running, *window, "WITHSCORES")
        )
        fresh_after = (int(seconds) - _STRAY_AFTER_S) * 1_000_000
        mending: list[Command] = []
        for entries, place, other, belongs in (
            (queued, waiting, running, _QUEUED),
            (taken, running, waiting, _RUNNING),
        ):
            members = _members(entries)
            if not members:
                continue
            states = await self._connection.each(*(("HGET", keys.record(_id(each)), "s") for each, _ in members))
            for (request_id, score), raw in zip(members, states, strict=True):
                if raw == belongs or (raw is None and score >= fresh_after):
                    continue
                if raw in (_QUEUED, _RUNNING):
                    mending.append(scripts.MOVE.call((place, other), request_id))
                else:
                    mending.append(("ZREM", place, request_id))
        if mending:
            await self._connection.run(*mending)
        return len(mending), max(len(_members(queued)), len(_members(taken))) == limit

    async def restore(self, job: Job) -> RequestState:
        return await self._results.healing(job.id, lambda: self._restore(job))

    async def _restore(self, job: Job) -> RequestState:
        [[rebuilt, raw]] = await self._connection.run(
            scripts.RESTORE.call(
                (keys.record(job.id), keys.body(job.id)), self._retention_ms, told(job, self._settings)
            )
        )
        with reading(job.id):
            state = RequestState(raw.decode())
        # Not only of a rebuilt one: it may have been set aside, or this was broken off here the last time.
        commands: list[Command] = list(self._results.entering(job)) if rebuilt or not state.terminal else []
        if state.terminal:
            announced = job.callback is not None
            commands += leaving(job.account, job.version_id, job.id, noted(state, 0), announced=announced)
        elif state is RequestState.RUNNING:
            places = keys.waiting(job.version_id), keys.running(job.version_id)
            commands.append(scripts.MOVE.call(places, job.id))
        else:
            commands.append(("ZADD", keys.waiting(job.version_id), "NX", int(job.created_at * 1e6), job.id))
            if job.queue_deadline_at:
                commands.append(("ZADD", keys.due(job.version_id), int(job.queue_deadline_at * 1000), job.id))
        await self._connection.run(*commands)
        return state

    async def set_aside(self, version_id: str, *, older_than_s: float, limit: int) -> int:
        now = (await self._results.epoch(fresh=True)).now
        place, before = keys.waiting(version_id), int((now - older_than_s) * 1_000_000)
        [members] = await self._connection.run(("ZRANGE", place, "-inf", before, "BYSCORE", "LIMIT", 0, limit))
        if not members:
            return 0
        ids = [_id(member) for member in members]
        found = await self._connection.each(
            *(("HMGET", keys.record(each), "s", "v", "d", "Q", "n", "Z", "a") for each in ids)
        )
        waiting: list[tuple[_Entry, str]] = []
        for request_id, reply in zip(ids, found, strict=True):
            if isinstance(reply, RecordDamaged):
                continue
            *fields, account = reply
            if fields[0] != _QUEUED or fields[5] is not None:
                continue
            with suppress(*_GARBLED):
                waiting.append((_Entry(request_id, fields), account.decode()))
        if not waiting:
            return 0
        replies = await self._connection.run(
            *(("ZADD", keys.due(version_id), entry.due_ms, entry.id) for entry, _ in waiting),
            *(("ZREM", place, entry.id) for entry, _ in waiting),
        )
        # Not those that a worker has claimed meanwhile.
        aside = [each for each, removed in zip(waiting, replies[len(waiting) :], strict=True) if removed]
        if aside:
            left = (leaving(account, version_id, entry.id, places=False) for entry, account in aside)
            await self._connection.run(*(command for pair in left for command in pair))
        return len(aside)

    async def _tend(self, live: Sequence[_Entry], states: Counter[RequestState], *, now_ms: int) -> tuple[int, int]:
        """Count what is not terminal, as it stands after the overdue ones were expired and the others have places."""
        overdue = [entry for entry in live if entry.due_ms <= now_ms]
        records = await self._results.glances([entry.id for entry in overdue])
        ended = {record.id: record.state for record in records if record is not None and record.state.terminal}
        states.update(ended.get(entry.id, entry.state) for entry in live)
        rest = [entry for entry in live if entry.id not in ended]
        if not rest:
            return len(ended), 0
        lost = rest  # nearly all are at the first place that is asked for
        for place in (_own_place, _due_place, _other_place):
            lost = await self._missing(place, lost)
        if lost:
            # By its end, and not among those that wait: whether anything waits for a worker, only the queue can tell.
            await self._connection.run(
                *(("ZADD", keys.due(entry.version_id), entry.due_ms, entry.id) for entry in lost)
            )
        return len(ended), len(lost)

    async def _expect(self, called_back: Sequence[tuple[str, bytes | None]]) -> None:
        """See that those of these requests, which have callbacks, are looked at whose webhooks are not done."""
        if not called_back:
            return
        found = await self._connection.each(*(("HMGET", keys.delivery(each), "d") for each, _ in called_back))
        open_ones = [
            each
            for (each, state), reply in zip(called_back, found, strict=True)
            if not isinstance(reply, RecordDamaged) and (reply[0] == _PENDING or state in (_QUEUED, _RUNNING))
        ]
        if open_ones:
            await self._connection.run(*(("ZADD", keys.WEBHOOKS, "NX", 0, _member(each)) for each in open_ones))

    async def _missing(self, place: Callable[[_Entry], str], entries: Sequence[_Entry]) -> list[_Entry]:
        if not entries:
            return []
        scores = await self._connection.run(*(("ZSCORE", place(entry), entry.id) for entry in entries))
        return [entry for entry, score in zip(entries, scores, strict=True) if score is None]


class _Entry:
    """The fields of a record that is not terminal. Raises _GARBLED."""

    __slots__ = ("due_ms", "id", "state", "version_id")

    def __init__(self, request_id: str, fields: Sequence[Any]) -> None:
        state, version_id, deadline, queue_deadline, attempt, postponed = fields
        self.id = request_id
        self.state = RequestState(state.decode())
        self.version_id: str = keys.unpacked(version_id)
        waits = queue_deadline is not None and int(attempt or 0) == 0 and postponed is None
        self.due_ms = min(int(deadline), int(queue_deadline)) if waits else int(deadline)


def _own_place(entry: _Entry) -> str:
    return (keys.running if entry.state is RequestState.RUNNING else keys.waiting)(entry.version_id)


def _other_place(entry: _Entry) -> str:
    return (keys.waiting if entry.state is RequestState.RUNNING else keys.running)(entry.version_id)


def _due_place(entry: _Entry) -> str:
    return keys.due(entry.version_id)


def _member(request_id: str) -> bytes:
    return bytes.fromhex(request_id.replace("-", ""))


def _members(entries: Sequence[Any]) -> list[tuple[bytes, float]]:
    """RESP3 answers pairs."""
    return [(member, float(score)) for member, score in entries]


def _id(member: bytes) -> str:
    """Nobody's, where it is no text."""
    return member.decode(errors="replace")
