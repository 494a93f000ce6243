"""What happens to one request, as it happens, for whoever listens: queued, started, progress, done.

A listener waits for hints and reads the record when there is one, as a poll does. Its place in the queue changes with
every request ahead of it: `Places` looks once a second for all listeners of a version in this process together, and
wakes those whose place has changed.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from broker.errors import StoreUnavailable
from broker.model import Interest, Position, Progress, Record, RequestState
from broker.ports import Results, Watch

PLACES_EVERY_S = 1.0
# Seconds between two reads without a hint: hints may be lost. A listener hears as often that the stream is alive;
# proxies cut what is silent for a minute.
QUIET_S = (15.0, 25.0)
_AWAY_S = 1.0
# Updates read at once: a partial response may be large.
_BATCH = 16
_SEEN = re.compile(r"(\d{1,9})\.(\d{1,15})(\.done)?", re.ASCII)

Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class Kind(StrEnum):
    QUEUED = "queued"
    STARTED = "started"
    PROGRESS = "progress"
    DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """How far a listener has come: the last attempt and the last update that it knows of, and whether it knows the
    end. Any process goes on from there."""

    attempt: int = 0
    number: int = 0
    done: bool = False

    def __str__(self) -> str:
        return f"{self.attempt}.{self.number}" + (".done" if self.done else "")

    @classmethod
    def parse(cls, text: str) -> Seen:
        """Of what `str` made of one; nothing was seen by whom says something else."""
        found = _SEEN.fullmatch(text)
        if found is None:
            return cls()
        return cls(attempt=int(found[1]), number=int(found[2]), done=found[3] is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened. `seen` is how far a listener has come with it. QUEUED has a position, unless it is not
    known, and is sent again whenever it changes; PROGRESS has progress."""

    kind: Kind
    record: Record
    seen: Seen
    position: Position | None = None
    progress: Progress | None = None


async def follow(
    results: Results, places: Places, record: Record, seen: Seen, *, quiet_s: tuple[float, float] = QUIET_S
) -> AsyncGenerator[Event | None, None]:
    """The events of a request after `seen`, until DONE; None when there was nothing for so long, from least to most.

    `record` is the request as it was found, also one that the store has lost and a worker may bring back. While the
    store is away, nothing happens. Ends without DONE when the request was forgotten.
    """
    async with results.watch(record.id, Interest.STEPS) as watch:
        listener = _Listener(results, places, watch, record, seen)
        try:
            while (news := await listener.news()) is not None:
                for event in news:
                    yield event
                if listener.seen.done:
                    return
                if not news:
                    yield None
                while (moved := await listener.wait(random.uniform(*quiet_s))) is not None:  # noqa: S311  spreads load
                    yield moved
        finally:
            listener.leave()


class _Listener:
    def __init__(self, results: Results, places: Places, watch: Watch, record: Record, seen: Seen) -> None:
        self._results = results
        self._places = places
        self._watch = watch
        self._record = record
        self._stored = bool(record.version_id)
        self._place: Place | None = None
        self._told_rank = -1
        self._behind = False
        self.seen = seen

    async def news(self) -> list[Event] | None:
        """What the record says beyond what was seen, a batch of updates at most; None if it was forgotten."""
        try:
            found = await self._watch.read()
            if found is None and self._stored:
                return None
            self._record, self._stored = found or self._record, found is not None
            queued = self._record.state is RequestState.QUEUED
            return await (self._of_queued() if queued else self._of_started())
        except StoreUnavailable:
            await self._watch.changed(_AWAY_S)
            self._behind = True
            return []

    async def wait(self, quiet_s: float) -> Event | None:
        """The next change of place; None when the record has to be read."""
        if self._behind or await self._watch.changed(quiet_s):
            return None
        return self._moved()

    def leave(self) -> None:
        if self._place is not None:
            self._places.leave(self._place)
        self._place, self._told_rank = None, -1

    async def _of_queued(self) -> list[Event]:
        record, self._behind = self._record, False
        # An attempt that was given back may get its number again.
        self.seen = replace(self.seen, attempt=record.attempt)
        if not record.version_id:  # lost with a wiped store, and not yet run again: its place is not known
            first, self._told_rank = self._told_rank < 0, 0
            return [self._event(Kind.QUEUED)] if first else []
        if self._place is None:
            position = await self._results.position(record)
            self._place = Place(record, self._watch, position)
            self._places.enter(self._place)
        moved = self._moved()
        return [] if moved is None else [moved]

    async def _of_started(self) -> list[Event]:
        self.leave()
        record, events, updates = self._record, [], list[Progress]()
        if record.progress is not None and record.progress.number > self.seen.number:
            updates = await self._results.updates(record.id, after=self.seen.number, limit=_BATCH)
        self._behind = len(updates) == _BATCH
        if record.attempt > self.seen.attempt:
            self.seen = replace(self.seen, attempt=record.attempt)
            events.append(self._event(Kind.STARTED))
        for update in updates:
            self.seen = replace(self.seen, number=update.number)
            events.append(self._event(Kind.PROGRESS, progress=update))
        if record.state.terminal and not self._behind:
            self.seen = replace(self.seen, done=True)
            events.append(self._event(Kind.DONE))
        return events

    def _moved(self) -> Event | None:
        if self._place is None or self._place.position.rank in (0, self._told_rank):
            return None
        self._told_rank = self._place.position.rank
        return self._event(Kind.QUEUED, position=self._place.position)

    def _event(self, kind: Kind, *, position: Position | None = None, progress: Progress | None = None) -> Event:
        return Event(kind=kind, record=self._record, seen=self.seen, position=position, progress=progress)


class Place:
    """One listener's request in its version's queue, and where it stood last."""

    def __init__(self, record: Record, watch: Watch, position: Position) -> None:
        self.request_id = record.id
        self.version_id = record.version_id
        self.position = position
        self._watch = watch

    def move(self, position: Position) -> None:
        moved = position.rank != self.position.rank
        self.position = position
        if moved:
            self._watch.wake()


class Places:
    """Where requests stand, for all who listen in this process. `spawn` makes the one task per version that looks,
    for as long as somebody listens."""

    def __init__(self, results: Results, spawn: Spawn) -> None:
        self._results = results
        self._spawn = spawn
        self._listening: dict[str, dict[Place, None]] = {}
        self._looking: dict[str, asyncio.Task[None]] = {}

    def enter(self, place: Place) -> None:
        if place.version_id not in self._listening:
            self._listening[place.version_id] = {}
            self._looking[place.version_id] = self._spawn(self._look(place.version_id))
        self._listening[place.version_id][place] = None

    def leave(self, place: Place) -> None:
        listening = self._listening[place.version_id]
        del listening[place]
        if not listening:
            del self._listening[place.version_id]
            self._looking.pop(place.version_id).cancel()

    async def _look(self, version_id: str) -> None:
        while True:
            await asyncio.sleep(PLACES_EVERY_S)
            places = list(self._listening[version_id])
            try:
                positions = await self._results.places(version_id, [place.request_id for place in places])
            except StoreUnavailable:
                continue
            for place, position in zip(places, positions, strict=True):
                place.move(position)
