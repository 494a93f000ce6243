"""Streams on Redis: appending and reading are one script each, and hints come over the one subscription of the process.

Thousands of readers hold no connection: who waits for more waits for a hint, and what they then ask for together
leaves in one exchange. A hint carries what is new where that is little. It is as good as what is read, because the
script that appended it made the hint; one that is lost leaves a gap, which is then read.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import orjson

from broker.backends.codec import pack_outcome, unpack_outcome
from broker.backends.hints import Alarms, Hints, Watch
from broker.backends.redis import scripts
from broker.backends.redis.connection import Connection
from broker.backends.redis.keys import body as _body
from broker.backends.redis.keys import record as _record
from broker.backends.redis.keys import stream as _stream
from broker.backends.redis.results import reading
from broker.errors import RecordDamaged
from broker.model import Chunk, Excerpt, Flow, Interest, Lease, Outcome, RequestState
from broker.settings import Settings

_CHUNK_FIELDS = 4
# How exactly a reader's place is kept, in parts of what is kept of the stream.
_STEPS = 16
# What hints may say in advance to one reader.
_MOST_NEWS_BYTES = 64 * 1024


class RedisStreams:
    """`channel` is the one over which this process hears hints, which arrive in `hints`."""

    def __init__(self, connection: Connection, settings: Settings, *, hints: Hints, channel: str) -> None:
        self._connection = connection
        self._settings = settings
        self._hints = hints
        self._channel = channel

    @asynccontextmanager
    async def write(self, lease: Lease) -> AsyncIterator[_Writer]:
        watch = Watch(self._hints.alarms)
        with self._hints.watching(f"{lease.request_id}/w", watch):
            yield _Writer(self._connection, self._settings, lease, watch, self._channel)

    @asynccontextmanager
    async def follow(self, request_id: str) -> AsyncIterator[_Reader]:
        watch = _News(self._hints.alarms)
        with self._hints.watching(f"{request_id}/r", watch):
            yield _Reader(self._connection, self._settings, request_id, watch, self._channel)


class _Writer:
    def __init__(self, connection: Connection, settings: Settings, lease: Lease, watch: Watch, channel: str) -> None:
        self._connection = connection
        self._watch = watch
        self._request_id = lease.request_id
        self._keys = _record(lease.request_id), _stream(lease.request_id)
        self._facts = lease.token, channel, settings.stream_bytes // 2, settings.stream_bytes

    async def append(self, chunks: Sequence[Chunk] = (), *, head: Outcome | None = None) -> Flow:
        self._watch.forget()
        packed = pack_outcome(head) if head else b""
        parts = (part for chunk in chunks for part in (chunk.end, int(chunk.event), chunk.event_id, chunk.data))
        try:
            [reply] = await self._connection.run(scripts.STREAM_APPEND.call(self._keys, *self._facts, packed, *parts))
            with reading(self._request_id):
                state, cut, unread_bytes, unattended_ms = reply
                return Flow(
                    state=RequestState(_text(state)),
                    cut=bool(cut),
                    unread_bytes=int(unread_bytes),
                    unattended_s=int(unattended_ms) / 1000,
                )
        except RecordDamaged:  # as one that is lost
            return Flow(state=RequestState.RUNNING, cut=True, unread_bytes=0, unattended_s=0.0)

    async def drained(self, timeout_s: float) -> None:
        await self._watch.changed(timeout_s)


class _News(Watch):
    """Keeps what hints say is new, until there is too much of it or one says nothing: then the log must be read."""

    def __init__(self, alarms: Alarms) -> None:
        super().__init__(alarms)
        self._said: list[bytes] = []
        self._size_bytes = 0

    def tell(self, news: bytes = b"", of: Interest = Interest.END) -> None:
        self._size_bytes += len(news) if news else _MOST_NEWS_BYTES
        if self._size_bytes < _MOST_NEWS_BYTES:
            self._said.append(news)
        super().tell()

    def taken(self) -> list[bytes]:
        """What was said since the last time; nothing if that is not all."""
        said = self._said if self._size_bytes < _MOST_NEWS_BYTES else []
        self._said, self._size_bytes = [], 0
        return said


class _Reader:
    def __init__(self, connection: Connection, settings: Settings, request_id: str, watch: _News, channel: str) -> None:
        self._connection = connection
        self._watch = watch
        self._request_id = request_id
        self._keys = _record(request_id), _body(request_id), _stream(request_id)
        ttl_ms, self._step_bytes = int(settings.result_ttl_s * 1000), settings.stream_bytes // _STEPS
        self._facts = channel, int(settings.lease_s * 1000), ttl_ms, self._step_bytes
        self._last: Excerpt | None = None
        self._due_at = 0.0
        self._due_offset = 0

    async def read(self, after: int, *, limit_bytes: int, attended_s: float = 0.0) -> Excerpt | None:
        self._watch.forget()
        if (excerpt := self._news(after)) is not None:
            return excerpt
        [reply] = await self._connection.run(
            scripts.STREAM_READ.call(self._keys, after, limit_bytes, int(attended_s * 1000), *self._facts)
        )
        with reading(self._request_id):
            self._last = None if reply is None else _excerpt(reply)
        self._due_at = time.monotonic() + attended_s / _STEPS
        self._due_offset = after + self._step_bytes
        return self._last

    def _news(self, after: int) -> Excerpt | None:
        """What hints have said, if it goes on at `after`, and the store need not hear of this reader yet."""
        said = self._watch.taken()
        if self._last is None or not said or time.monotonic() >= self._due_at or after >= self._due_offset:
            return None
        chunks = [chunk for news in said for chunk in _said(news, self._last.attempt) if chunk.end > after]
        if not chunks or chunks[0].start != after or any(a.end != b.start for a, b in pairwise(chunks)):
            return None
        return replace(self._last, written=chunks[-1].end, chunks=tuple(chunks))

    async def changed(self, timeout_s: float) -> None:
        await self._watch.changed(timeout_s)

    async def leave(self, *, expected_back: bool) -> None:
        await self._connection.run(scripts.STREAM_LEAVE.call(self._keys[:1], int(expected_back)))


def _said(news: bytes, attempt: int) -> Iterator[Chunk]:
    head, _, data = news.partition(b"\n")
    by, before, told = orjson.loads(head)
    begin = before
    for end, kind, event_id in told if by == attempt else ():
        yield Chunk(data=data[begin - before : end - before], end=end, event=kind == "1", event_id=event_id)
        begin = end


def _excerpt(reply: Sequence[Any]) -> Excerpt:
    state, attempt, written, head, *rest = reply
    chunks = (rest[at : at + _CHUNK_FIELDS] for at in range(0, len(rest), _CHUNK_FIELDS))
    return Excerpt(
        state=RequestState(_text(state)),
        attempt=int(attempt),
        written=int(written),
        head=unpack_outcome(head) if head else None,
        chunks=tuple(
            Chunk(data=data, end=int(end), event=kind == b"1", event_id=_text(event_id))
            for end, kind, event_id, data in chunks
        ),
    )


def _text(raw: bytes | str) -> str:
    return raw.decode() if isinstance(raw, bytes) else raw
