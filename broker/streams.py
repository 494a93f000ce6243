"""The verbs of a streamed answer: wait for its head, find the place where a client stopped, gather it whole.

An event of a stream is named by `fnq-<attempt>-<offset>`, its place in the body, unless the container gave it an ID
of its own. A client that says which event it had last goes on behind it, on any front end.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import replace

from broker.errors import StoreUnavailable, StreamNotKept
from broker.model import Chunk, Excerpt, Record
from broker.ports import Broker, StreamReader

# What one exchange asks for, and so what a reader holds in memory.
READ_BYTES = 64 * 1024
# A reader that waits looks so often by itself; a hint may be lost.
LOOK_S = 5.0
_RETRY_S = 0.5
_PLACE = re.compile(r"fnq-(\d{1,9})-(\d{1,18})(-end)?", re.ASCII)
_GONE = "that part of the stream is not kept any more"


def event_id(attempt: int, chunk: Chunk) -> str:
    """The name of the event for clients."""
    return chunk.event_id or f"fnq-{attempt}-{chunk.end}"


def end_id(attempt: int, written: int) -> str:
    """The name of an event that says why the stream ended; nothing comes behind it."""
    return f"fnq-{attempt}-{written}-end"


async def look(reader: StreamReader, after: int, *, attended_s: float = 0.0) -> Excerpt | None:
    """What is behind `after`, as `StreamReader.read`; a store that does not answer is waited for, so the caller
    bounds the wait."""
    while True:
        try:
            return await reader.read(after, limit_bytes=READ_BYTES, attended_s=attended_s)
        except StoreUnavailable:
            await asyncio.sleep(_RETRY_S)


async def begun(reader: StreamReader, *, wait_s: float, attended_s: float) -> Excerpt | None:
    """The beginning of the stream once its head is known or the request has ended, or as it stands after `wait_s`.
    None if there is no such request, or the store did not answer all the while."""
    loop = asyncio.get_running_loop()
    until = loop.time() + wait_s
    excerpt, look_s = None, LOOK_S
    while True:
        try:
            excerpt = await reader.read(0, limit_bytes=READ_BYTES, attended_s=attended_s)
            look_s = LOOK_S
        except StoreUnavailable:
            look_s = _RETRY_S
        else:
            if excerpt is None or excerpt.head is not None or excerpt.state.terminal:
                return excerpt
        if (left_s := until - loop.time()) <= 0:
            return excerpt
        await reader.changed(min(left_s, look_s))


async def place_of(reader: StreamReader, excerpt: Excerpt, last_id: str) -> int | None:
    """The offset behind the event of that ID, None if it was the stream's end.

    Raises:
        StreamNotKept: the event, or what came behind it, is not kept any more, or never was in this stream.
    """
    ours = _PLACE.fullmatch(last_id)
    if ours is None:
        return await _place_of_own(reader, last_id)
    attempt, offset = int(ours[1]), int(ours[2])
    if attempt != excerpt.attempt or offset > excerpt.written:
        raise StreamNotKept("there is no such event in this stream")
    return None if ours[3] else offset


async def _place_of_own(reader: StreamReader, last_id: str) -> int:
    """By the container's ID, which is found by looking at all that is kept."""
    found = [chunk.end async for chunk in _kept(reader) if chunk.event_id == last_id]
    if len(found) > 1:
        raise StreamNotKept("the container gave that ID to several events")
    if not found:
        raise StreamNotKept("there is no such event in this stream, or it is not kept any more")
    return found[0]


async def gathered(broker: Broker, record: Record) -> Record:
    """The record with the whole of a streamed answer in its outcome.

    Raises:
        StreamNotKept: it had more bytes than are kept of a stream.
    """
    if record.outcome is None or not record.outcome.streamed:
        return record
    async with broker.streams.follow(record.id) as reader:
        body = bytearray()
        async for chunk in _kept(reader):
            if chunk.start != len(body):
                raise StreamNotKept("the answer was streamed, and its beginning is not kept any more")
            body += chunk.data
        excerpt = await reader.read(len(body), limit_bytes=1)
    if excerpt is None or excerpt.written != len(body):
        raise StreamNotKept("the answer was streamed, and is not kept any more")
    return replace(record, outcome=replace(record.outcome, body=bytes(body), streamed=False))


def require_next(excerpt: Excerpt, after: int) -> None:
    """Raises StreamNotKept unless the excerpt goes on where `after` is."""
    begins = excerpt.chunks[0].start if excerpt.chunks else excerpt.written
    if begins != after:
        raise StreamNotKept(_GONE)


async def _kept(reader: StreamReader) -> AsyncIterator[Chunk]:
    """All chunks that are there now, or while they are read, in order."""
    after = 0
    while True:
        excerpt = await reader.read(after, limit_bytes=4 * READ_BYTES)
        if excerpt is None or not excerpt.chunks:
            return
        for chunk in excerpt.chunks:
            yield chunk
        after = excerpt.chunks[-1].end
