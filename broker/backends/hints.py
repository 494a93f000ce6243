"""Hints inside one process: who waits for a change of which request.

A hint means "read again"; losing one costs time, never truth. It may bring along what would be read.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

from broker.model import Interest, Record

_TICK_S = 1 / 16


class Alarms:
    """Wakes those who have waited for long enough, up to `_TICK_S` late. Most hear what they wait for before that, and
    a timer of the loop for each, to be cancelled then, costs as much as all else that a waiter does."""

    def __init__(self) -> None:
        # By when their tick ends, in ticks of the loop's clock.
        self._due: dict[int, set[Watch]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._next = 0

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._due.values()))

    def add(self, watch: Watch, timeout_s: float) -> int:
        """Until it is discarded; returns the tick after which it is woken."""
        loop = asyncio.get_running_loop()
        tick = math.ceil((loop.time() + timeout_s) / _TICK_S)
        waiting = self._due.get(tick)
        if waiting is None:
            self._due[tick] = {watch}
            if self._timer is None or tick < self._next:
                self._look_after(tick, loop)
        else:
            waiting.add(watch)
        return tick

    def discard(self, watch: Watch, tick: int) -> None:
        waiting = self._due.get(tick)
        if waiting is None:  # it is over
            return
        waiting.discard(watch)
        if not waiting:
            del self._due[tick]

    def _look_after(self, tick: int, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next = tick
        self._timer = loop.call_at(tick * _TICK_S, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = max(self._next, int(loop.time() / _TICK_S))  # a timer may be early by what its clock cannot tell
        for tick in [tick for tick in self._due if tick <= now]:
            for watch in self._due.pop(tick):
                watch.wake()
        if self._due:
            self._look_after(min(self._due), loop)


class Watch:
    """One waiter. There are thousands in a front end, so it waits on a future: an event takes 800 bytes more."""

    __slots__ = ("_alarms", "_hinted", "_waiting", "_woken", "interest")

    def __init__(self, alarms: Alarms, interest: Interest = Interest.END) -> None:
        self._alarms = alarms
        self._hinted = False
        self._woken = False
        self._waiting: asyncio.Future[None] | None = None
        self.interest = interest

    def forget(self) -> None:
        """From now on only what is told later counts: the caller reads next."""
        self._woken = self._hinted = False

    async def changed(self, timeout_s: float) -> bool:
        try:
            if not self._woken:
                self._waiting = asyncio.get_running_loop().create_future()
                tick = self._alarms.add(self, timeout_s)
                try:
                    await self._waiting
                finally:
                    self._alarms.discard(self, tick)
                    self._waiting = None
            return self._hinted
        finally:
            self.forget()

    def wake(self) -> None:
        self._woken = True
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def tell(self, news: bytes = b"", of: Interest = Interest.END) -> None:
        """`news` may say what is new, for who understands it."""
        self._hinted = True
        self.wake()


class RecordWatch(Watch):
    """Implements `broker.ports.Watch` over the back end's read; registered during the body. A class, since a generator
    keeps half a kilobyte for as long as somebody waits. `read_end` is tried first once the end was hinted at, with what
    the last hint said: it gives the record if it is over, else None."""

    __slots__ = ("_ended", "_hints", "_news", "_read", "_read_end", "_request_id")

    def __init__(
        self,
        hints: Hints,
        request_id: str,
        interest: Interest,
        read: Callable[[str, Interest], Awaitable[Record | None]],
        read_end: Callable[[str, bytes], Awaitable[Record | None]] | None = None,
    ) -> None:
        super().__init__(hints.alarms, interest)
        self._hints = hints
        self._request_id = request_id
        self._read = read
        self._read_end = read_end
        self._ended = False
        self._news = b""

    async def __aenter__(self) -> RecordWatch:
        self._hints.add(self._request_id, self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hints.discard(self._request_id, self)

    async def read(self) -> Record | None:
        self.forget()
        ended, self._ended = self._ended, False
        news, self._news = self._news, b""
        if ended and self._read_end is not None:
            record = await self._read_end(self._request_id, news)
            if record is not None:
                return record
        return await self._read(self._request_id, self.interest)

    def tell(self, news: bytes = b"", of: Interest = Interest.END) -> None:
        self._news = news
        self._ended = self._ended or of is Interest.END
        self._hinted = True
        self.wake()


class Listener(Watch):
    """One who waits for nothing, and is called, while the body of this context runs. A class that is both, because a
    sidecar listens for every job."""

    __slots__ = ("_hints", "_subject", "_told")

    def __init__(self, hints: Hints, subject: str, told: Callable[[], None]) -> None:
        self._hints = hints
        self._subject = subject
        self._told = told
        self.interest = Interest.END

    def __enter__(self) -> None:
        self._hints.add(self._subject, self)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hints.discard(self._subject, self)

    def tell(self, news: bytes = b"", of: Interest = Interest.END) -> None:
        self._told()


class Hints:
    """By subject: a request's ID, with `/r` behind it for readers of its stream, `/w` for the writer."""

    def __init__(self) -> None:
        self.alarms = Alarms()
        self._watches: dict[str, list[Watch]] = {}

    def add(self, subject: str, watch: Watch) -> None:
        """Until it is discarded."""
        self._watches.setdefault(subject, []).append(watch)

    def discard(self, subject: str, watch: Watch) -> None:
        waiting = self._watches[subject]
        waiting.remove(watch)
        if not waiting:
            del self._watches[subject]

    @contextmanager
    def watching(self, subject: str, watch: Watch) -> Iterator[None]:
        self.add(subject, watch)
        try:
            yield
        finally:
            self.discard(subject, watch)

    def listening(self, subject: str, told: Callable[[], None]) -> AbstractContextManager[None]:
        return Listener(self, subject, told)

    def tell(self, subject: str, of: Interest = Interest.END, news: bytes = b"") -> None:
        for watch in tuple(self._watches.get(subject, ())):
            if watch.interest >= of:
                watch.tell(news, of)

    def tell_all(self) -> None:
        """After a gap in which hints may have been lost."""
        for subject in list(self._watches):
            self.tell(subject)

    def __len__(self) -> int:
        return len(self._watches)
