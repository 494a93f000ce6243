"""Streams in one process: the reference reading of the Streams port. They live in the entries of MemoryResults."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from broker.backends.hints import Watch
from broker.backends.memory.results import MemoryResults
from broker.model import STREAM_CUT, Chunk, Excerpt, Flow, Lease, Outcome, RequestState
from broker.settings import Settings


class MemoryStreams:
    def __init__(self, results: MemoryResults, settings: Settings) -> None:
        self._results = results
        self._settings = settings

    @asynccontextmanager
    async def write(self, lease: Lease) -> AsyncIterator[_Writer]:
        watch = Watch(self._results.hints.alarms)
        with self._results.hints.watching(f"{lease.request_id}/w", watch):
            yield _Writer(self._results, self._settings, lease, watch)

    @asynccontextmanager
    async def follow(self, request_id: str) -> AsyncIterator[_Reader]:
        watch = Watch(self._results.hints.alarms)
        with self._results.hints.watching(f"{request_id}/r", watch):
            yield _Reader(self._results, self._settings, request_id, watch)


class _Writer:
    def __init__(self, results: MemoryResults, settings: Settings, lease: Lease, watch: Watch) -> None:
        self._results = results
        self._lease = lease
        self._watch = watch
        self._kept_bytes = settings.stream_bytes
        self._most_unread = settings.stream_bytes // 2

    async def append(self, chunks: Sequence[Chunk] = (), *, head: Outcome | None = None) -> Flow:
        self._watch.forget()
        entry, now = self._results.entry(self._lease.request_id), self._results.now()
        if entry is None:
            return Flow(state=RequestState.RUNNING, cut=True)
        if entry.state is not RequestState.RUNNING:
            return Flow(state=entry.state)
        if entry.token != self._lease.token:
            return Flow(state=RequestState.QUEUED)
        log = entry.log
        if head is not None:
            log.head = head
            self._results.hints.tell(entry.id)
        new = [chunk for chunk in chunks if chunk.end > log.written]
        for chunk in new:
            if chunk.start != log.written:
                return Flow(state=RequestState.RUNNING, cut=True)
            log.chunks.append(chunk)
            log.written = chunk.end
        while log.chunks and log.chunks[0].end <= log.written - self._kept_bytes:
            log.chunks.popleft()
        if new or head is not None:
            self._results.hints.tell(f"{entry.id}/r")
        unread_bytes = log.written - log.read
        if unread_bytes > self._most_unread:
            log.until = log.until or now
        return Flow(
            state=entry.state,
            unread_bytes=unread_bytes,
            unattended_s=max(0.0, now - log.until) if log.until else 0.0,
        )

    async def drained(self, timeout_s: float) -> None:
        await self._watch.changed(timeout_s)


class _Reader:
    def __init__(self, results: MemoryResults, settings: Settings, request_id: str, watch: Watch) -> None:
        self._results = results
        self._silence_s = settings.lease_s
        self._id = request_id
        self._watch = watch

    async def read(self, after: int, *, limit_bytes: int, attended_s: float = 0.0) -> Excerpt | None:
        self._watch.forget()
        entry = self._results.entry(self._id)
        if entry is None or entry.hidden:
            return None
        log, now = entry.log, self._results.now()
        if entry.state is RequestState.RUNNING and log.written and entry.lease_until + self._silence_s <= now:
            self._results.finish(entry, RequestState.ERRORED, reason=STREAM_CUT)
        if attended_s and not entry.state.terminal:
            log.read, log.until = after, max(log.until, now + attended_s)
            self._results.hints.tell(f"{entry.id}/w")
        return Excerpt(
            state=entry.state,
            attempt=entry.attempt,
            written=log.written,
            head=log.head,
            chunks=_within([chunk for chunk in log.chunks if chunk.end > after], limit_bytes),
        )

    async def changed(self, timeout_s: float) -> None:
        await self._watch.changed(timeout_s)

    async def leave(self, *, expected_back: bool) -> None:
        entry = self._results.entry(self._id)
        if entry is not None and entry.log.until:
            entry.log.until = 0.0 if expected_back else min(self._results.now(), entry.log.until)


def _within(chunks: Sequence[Chunk], limit_bytes: int) -> tuple[Chunk, ...]:
    """The first of `chunks`, and as many more as fit."""
    size_bytes = 0
    for at, chunk in enumerate(chunks):
        size_bytes += len(chunk.data)
        if at and size_bytes > limit_bytes:
            return tuple(chunks[:at])
    return tuple(chunks)
