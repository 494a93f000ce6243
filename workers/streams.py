"""A container's answer on its way to the request's stream (contract/invocation.md §5), with back-pressure: what no
client has read yet makes the container wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

from broker.errors import RecordDamaged, StoreUnavailable
from broker.model import Chunk, Flow, Job, Outcome, RequestState
from broker.ports import Results, StreamWriter
from broker.settings import SidecarSettings
from workers import loops
from workers.events import Cutter, Events, EventTooLarge, Pieces
from workers.inference import CONNECTION_FAULT, AttemptFailed, ContainerLost, Response, problem

CUT = "The stream was lost together with the data of the store"
ABANDONED = "its client left the stream and did not come back"
# How often the writer of a silent stream looks whether it is still wanted.
LOOK_S = 2.0
# Servers send the head by itself and the body right behind it. Both in one append are there sooner than the second of
# two, and a short answer that is whole by then is no stream.
SOON_S = 0.001


class LeaseLost(Exception):
    """The store took the attempt away; `state` is what stands instead."""

    def __init__(self, state: RequestState) -> None:
        super().__init__(state.value)
        self.state = state


class Feed:
    """The stream of one attempt, from its first byte to its last.

    Every method raises LeaseLost when the attempt must not go on, also when nobody has been reading for
    `stream_grace_s`: then the request is cancelled first. A store that does not answer is waited for.
    """

    def __init__(self, results: Results, writer: StreamWriter, settings: SidecarSettings, job: Job) -> None:
        self._results = results
        self._writer = writer
        self._settings = settings
        self._job = job
        self._begun = False
        self.size_bytes = 0
        """Of the body, as far as it was handed on."""
        self._most_unread = settings.stream_bytes // 2

    async def attend(self) -> None:
        """Look now and then whether the answer is still wanted, until cancelled."""
        waited_s = time.time() - self._job.created_at
        if waited_s <= self._settings.stream_grace_s:  # nobody can have been gone for long
            await asyncio.sleep(LOOK_S)
        while True:
            await self._exchange()
            await asyncio.sleep(LOOK_S)

    async def carry(self, response: Response) -> Outcome:
        """Hand `response` on; returns what to settle. An answer that is here as a whole is no stream, nor is one that
        says how long it is and can be kept.

        Raises:
            ContainerLost: nothing of the body was handed on: the attempt may be repeated.
            AttemptFailed: it must not be repeated.
        """
        head = Outcome(status=response.status, headers=response.headers, streamed=True)
        cutter: Cutter = (Events if head.event_stream else Pieces)(limit_bytes=self._most_unread)
        if not response.whole:
            await asyncio.sleep(SOON_S)
        if isinstance(cutter, Pieces) and (response.whole or self._can_keep(response)):
            body = await response.read()
            self.size_bytes = len(body)
            return Outcome(status=head.status, headers=head.headers, body=body)
        try:
            await self._append(cutter.feed(response.arrived()), head=head)
            async for piece in response.chunks():
                await self._append(cutter.feed(piece))
            await self._append(cutter.end())
        except ContainerLost as lost:
            if not self._begun:
                raise
            raise AttemptFailed(problem(self._job, 500, CONNECTION_FAULT, source="inference-connection")) from lost
        except EventTooLarge as exc:
            await self._append(exc.before)
            detail = f"An event of the answer is larger than {self._most_unread} bytes"
            raise AttemptFailed(problem(self._job, 500, detail)) from exc
        return head

    def _can_keep(self, response: Response) -> bool:
        return response.length is not None and response.length <= self._settings.max_response_bytes

    async def _append(self, chunks: Sequence[Chunk], *, head: Outcome | None = None) -> None:
        """Append in portions, and wait behind each until not too much is unread."""
        if head is not None and not chunks:
            await self._exchange(head=head)
        for portion in _portions(chunks, self._most_unread):
            self._begun = True
            flow = await self._exchange(portion, head)
            self.size_bytes += sum(len(chunk.data) for chunk in portion)
            while flow.unread_bytes > self._most_unread:
                await self._writer.drained(LOOK_S)
                flow = await self._exchange()
            head = None

    async def _exchange(self, chunks: Sequence[Chunk] = (), head: Outcome | None = None) -> Flow:
        async def append() -> Flow:
            return await self._writer.append(chunks, head=head)

        flow = await loops.insist(append, on=StoreUnavailable, name="stream")
        if flow.cut:
            raise AttemptFailed(problem(self._job, 500, CUT))
        if flow.state is not RequestState.RUNNING:
            raise LeaseLost(flow.state)
        if flow.unattended_s > self._settings.stream_grace_s:
            await self._cancel()
        return flow

    async def _cancel(self) -> NoReturn:
        async def cancel() -> RequestState | None:
            try:
                return await self._results.cancel(self._job.id, reason=ABANDONED)
            except RecordDamaged:
                return None

        before = await loops.insist(cancel, on=StoreUnavailable, name="cancel")
        raise LeaseLost(before if before is not None and before.terminal else RequestState.CANCELLED)


def _portions(chunks: Sequence[Chunk], most_bytes: int) -> Iterator[Sequence[Chunk]]:
    """Runs of `chunks` of at most so many bytes each. No chunk is larger."""
    begin = 0
    for at, chunk in enumerate(chunks):
        if chunk.end - chunks[begin].start > most_bytes:
            yield chunks[begin:at]
            begin = at
    if chunks:
        yield chunks[begin:]
