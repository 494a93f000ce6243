"""An answer that is handed to the client while it comes (contract/invocation.md §5).

The response is prepared, and its headers are sent, where every other one is: behind the middlewares. What is special
is its end, which takes as long as the stream does.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress
from dataclasses import replace

from aiohttp import web

from api import answers, auth, headers
from api.answers import Answer, Speaker
from api.calls import Interrupted
from api.front import Front
from broker import streams
from broker.accounts import INVOKE
from broker.errors import Forbidden, StoreUnavailable, StreamNotKept, Unauthenticated
from broker.model import Chunk, Excerpt, Record, RequestState
from broker.ports import StreamReader

logger = logging.getLogger(__name__)

# Above this, the writer may be waiting to hear that it was read.
_WORTH_TELLING_BYTES = 16 * 1024
# What the kernel may hold for a client that reads slowly counts as read, and must not be all that is kept.
_SEND_BUFFER_BYTES = 256 * 1024
_RETRY_S = 0.5
_KEEP_ALIVE = b": keep-alive\n\n"
_RESTARTING = b": this server is stopping; connect again and go on from the last event\n\n"


async def opened(
    front: Front,
    record: Record,
    wait: headers.Wait,
    *,
    last_id: str = "",
    speaker: Speaker = Speaker.SERVER,
) -> web.StreamResponse | None:
    """The response that streams the answer behind the event `last_id`, once its head is known; 204 when everything
    was said before. None if the wait is over, or the request has ended without a body: the record tells the rest.
    Where it is the container who speaks, its events are bytes like any other, and a client that leaves before the
    answer leaves its request running.

    Raises:
        StreamNotKept: of the events behind `last_id`, some are not kept any more.
    """
    ours = speaker is Speaker.SERVER
    async with front.broker.streams.follow(record.id) as reader:
        try:
            with front.calls.waiting():
                attended_s = _attended_s(front) if ours else 0
                excerpt = await streams.begun(reader, wait_s=wait.seconds, attended_s=attended_s)
        except Interrupted:
            excerpt = None
        except asyncio.CancelledError:
            if ours:
                front.calls.spawn(_leave(front, record.id, expected_back=False))
            raise
        if excerpt is None or excerpt.head is None or (excerpt.state.terminal and not excerpt.written):
            if ours:
                await _leave(front, record.id, expected_back=True)
            return None
        after: int | None = 0
        if last_id:
            after = await streams.place_of(reader, excerpt, last_id)
            excerpt = await streams.look(reader, excerpt.written if after is None else after)
    # The record's word: the stream's state may be one that the store is not to show yet (PROTOCOL R1).
    if after is None or (excerpt and record.state is RequestState.FULFILLED and after == excerpt.written):
        return web.Response(status=204, headers=answers.told(record).headers)
    if excerpt is None or excerpt.head is None:
        raise StreamNotKept("the stream is not kept any more")
    streams.require_next(excerpt, after)
    answer = answers.begun(record, excerpt.head, speaker)
    return StreamedResponse(front, record, answer, excerpt, after=after, as_events=ours)


def _attended_s(front: Front) -> float:
    """How long a reader may be silent: for as long as its client may take no bytes, and a little more."""
    return front.settings.stream_write_timeout_s + 2 * streams.LOOK_S


class StreamedResponse(web.StreamResponse):
    """Sends what is in the request's stream behind `after`, beginning with `excerpt`, and whatever comes.

    A stream that ends before its time says why, in a last event `error` where it is a stream of events; otherwise the
    connection is closed before the end of the body, as it is for a client that should go on elsewhere. Events get
    names and company from here only `as_events`.
    """

    def __init__(
        self, front: Front, record: Record, answer: Answer, excerpt: Excerpt, *, after: int, as_events: bool
    ) -> None:
        super().__init__(status=answer.status, headers=answer.headers)
        assert excerpt.head is not None, "a response needs a head"
        self._front = front
        self._record = record
        self._head = excerpt.head
        self._events = as_events and excerpt.head.event_stream
        self._excerpt = excerpt
        self._attempt = excerpt.attempt
        self._at = after
        self._sent_at = 0.0

    async def write_eof(self, data: bytes = b"") -> None:
        """The body, and its end. Never raises but ConnectionError, which closes the connection."""
        request = self._req
        if request is None or request.method == "HEAD":
            return await super().write_eof()
        _limit_buffer(request)
        try:
            with self._front.calls.waiting():
                await self._carry()
        except Interrupted:
            self._front.calls.spawn(self._leave())
            await self._hang_up(_RESTARTING)
        except (asyncio.CancelledError, ConnectionError):
            self._front.calls.spawn(self._leave())
            raise
        except TimeoutError:
            logger.info("stream_client_too_slow", extra={"request_id": self._record.id, "sent_bytes": self._at})
            self._front.calls.spawn(self._leave())
            self._abort()
        else:
            return await super().write_eof()

    async def _carry(self) -> None:
        """Returns when the body is complete. Raises TimeoutError when the client takes nothing for too long."""
        self._sent_at = asyncio.get_running_loop().time()
        async with self._front.broker.streams.follow(self._record.id) as reader:
            try:
                await self._follow(reader)
            except StreamNotKept as lost:
                cut = replace(self._record, state=RequestState.ERRORED, outcome=None, reason=str(lost))
                await self._fail(replace(cut, attempt=self._attempt))

    async def _follow(self, reader: StreamReader) -> None:
        excerpt: Excerpt | None = self._excerpt
        del self._excerpt
        while True:
            if excerpt is None:
                raise StreamNotKept("the stream is not kept any more")
            await self._hand_on(excerpt)
            size_bytes = sum(len(chunk.data) for chunk in excerpt.chunks)
            drained = self._at == excerpt.written
            if drained and excerpt.state.terminal:
                return await self._conclude()
            if drained and size_bytes <= _WORTH_TELLING_BYTES:
                await reader.changed(self._pause_s())
                await self._sign_of_life()
            excerpt = await streams.look(reader, self._at, attended_s=_attended_s(self._front))

    async def _hand_on(self, excerpt: Excerpt) -> None:
        streams.require_next(excerpt, self._at)
        if not excerpt.chunks:
            return
        await self._still_permitted()
        if excerpt.head is None or (excerpt.head.status, excerpt.head.event_stream) != self._kind():
            raise StreamNotKept("the request was begun again, and is answered in another way")
        named = _named if self._events else _plain
        await self._send(b"".join(named(excerpt.attempt, chunk) for chunk in excerpt.chunks))
        self._at, self._attempt = excerpt.chunks[-1].end, excerpt.attempt

    async def _still_permitted(self) -> None:
        assert self._req is not None, "it is being answered"
        try:
            await auth.still(self._front, self._req, INVOKE)
        except (Unauthenticated, Forbidden):
            await self._hang_up(b"")
            raise ConnectionResetError("its client is not let in any more") from None

    def _kind(self) -> tuple[int, bool]:
        return self._head.status, self._head.event_stream

    async def _send(self, content: bytes) -> None:
        async with asyncio.timeout(self._front.settings.stream_write_timeout_s):
            await self.write(content)
        self._sent_at = asyncio.get_running_loop().time()

    def _pause_s(self) -> float:
        """Until the next look or the next sign of life, whichever comes first."""
        silent_s = asyncio.get_running_loop().time() - self._sent_at
        return max(0.05, min(streams.LOOK_S, self._front.settings.stream_keepalive_s - silent_s))

    async def _sign_of_life(self) -> None:
        """A comment now and then: a client that is gone is noticed, and nobody between gives up."""
        silent_s = asyncio.get_running_loop().time() - self._sent_at
        if self._events and silent_s >= self._front.settings.stream_keepalive_s:
            await self._send(_KEEP_ALIVE)

    async def _conclude(self) -> None:
        """All was sent; what remains to be said is how it ended."""
        record = await self._outcome()
        if record is None:
            raise StreamNotKept("the request is not kept any more")
        if record.outcome is None or not record.outcome.streamed:
            await self._fail(record)
        elif self._front.settings.one_shot_results:
            await self._front.broker.results.forget(record.id)

    async def _outcome(self) -> Record | None:
        """The terminal record, once the store shows it: it must be durable first."""
        while True:
            with suppress(StoreUnavailable):
                record = await self._front.broker.results.read(self._record.id)
                if record is None or record.state.terminal:
                    return record
            await asyncio.sleep(_RETRY_S)
            await self._sign_of_life()

    async def _fail(self, record: Record) -> None:
        if not self._events:
            await self._hang_up(b"")
            raise ConnectionResetError("a body that is not whole must not look so")
        await self._send(answers.error_event(record, streams.end_id(record.attempt, self._at)))

    async def _hang_up(self, last_words: bytes) -> None:
        """Close without the end of the body, so that the client knows that there is more."""
        with suppress(ConnectionError, TimeoutError):
            if last_words and self._events:
                await self._send(last_words)
        if self._req is not None and self._req.transport is not None:
            self._req.transport.close()

    def _abort(self) -> None:
        if self._req is not None and self._req.transport is not None:
            self._req.transport.abort()

    async def _leave(self) -> None:
        await _leave(self._front, self._record.id, expected_back=False)


async def _leave(front: Front, request_id: str, *, expected_back: bool) -> None:
    """Say that nobody reads here. Best effort: who does not read is missed in the end."""
    with suppress(StoreUnavailable):
        async with front.broker.streams.follow(request_id) as reader:
            await reader.leave(expected_back=expected_back)


def _plain(_: int, chunk: Chunk) -> bytes:
    return chunk.data


def _named(attempt: int, chunk: Chunk) -> bytes:
    """The chunk; an event that has no ID of its own gets one, in front of the empty line that ends it."""
    if not chunk.event or chunk.event_id:
        return chunk.data
    blank = b"\r\n" if chunk.data.endswith(b"\r\n") else chunk.data[-1:]
    name = streams.event_id(attempt, chunk).encode()
    return b"".join((chunk.data[: -len(blank)], b"id: ", name, b"\n", blank))


def _limit_buffer(request: web.BaseRequest) -> None:
    connection = request.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
