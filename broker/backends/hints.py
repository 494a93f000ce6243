"""Hints inside one process: who waits for a change of which request.

A hint means "read again" and nothing more; losing one costs time, never truth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

from broker.model import Interest, Record


class Watch:
    """One waiter. There are thousands in a front end, so it waits on a future: an event takes 800 bytes more."""

    __slots__ = ("_hinted", "_waiting", "_woken", "interest")

    def __init__(self, interest: Interest = Interest.END) -> None:
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
                loop = asyncio.get_running_loop()
                self._waiting = loop.create_future()
                timer = loop.call_later(timeout_s, self.wake)
                try:
                    await self._waiting
                finally:
                    timer.cancel()
                    self._waiting = None
            return self._hinted
        finally:
            self.forget()

    def wake(self) -> None:
        self._woken = True
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def tell(self, news: bytes = b"") -> None:
        """`news` may say what is new, for who understands it."""
        self._hinted = True
        self.wake()

    def told_end(self) -> None:
        """What `tell` is about to say may be the end."""


class RecordWatch(Watch):
    """Implements `broker.ports.Watch` over the back end's read; registered during the body. A class, since a generator
    keeps half a kilobyte for as long as somebody waits. `read_end` is tried first once the end was hinted at: it gives
    the record if it is over, else None."""

    __slots__ = ("_ended", "_hints", "_read", "_read_end", "_request_id")

    def __init__(
        self,
        hints: Hints,
        request_id: str,
        interest: Interest,
        read: Callable[[str, Interest], Awaitable[Record | None]],
        read_end: Callable[[str], Awaitable[Record | None]] | None = None,
    ) -> None:
        super().__init__(interest)
        self._hints = hints
        self._request_id = request_id
        self._read = read
        self._read_end = read_end
        self._ended = False

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
        if ended and self._read_end is not None:
            record = await self._read_end(self._request_id)
            if record is not None:
                return record
        return await self._read(self._request_id, self.interest)

    def told_end(self) -> None:
        self._ended = True


class Listener(Watch):
    """One who waits for nothing, and is called."""

    __slots__ = ("_told",)

    def __init__(self, told: Callable[[], None]) -> None:
        super().__init__()
        self._told = told

    def tell(self, news: bytes = b"") -> None:
        self._told()


class _Listening(AbstractContextManager[None]):
    """A class, because a sidecar listens for every job."""

    __slots__ = ("_hints", "_listener", "_subject")

    def __init__(self, hints: Hints, subject: str, told: Callable[[], None]) -> None:
        self._hints = hints
        self._subject = subject
        self._listener = Listener(told)

    def __enter__(self) -> None:
        self._hints.add(self._subject, self._listener)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hints.discard(self._subject, self._listener)


class Hints:
    """By subject: a request's ID, with `/r` behind it for readers of its stream, `/w` for the writer."""

    def __init__(self) -> None:
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
        return _Listening(self, subject, told)

    def tell(self, subject: str, of: Interest = Interest.END, news: bytes = b"") -> None:
        for watch in tuple(self._watches.get(subject, ())):
            if watch.interest >= of:
                if of is Interest.END:
                    watch.told_end()
                watch.tell(news)

    def tell_all(self) -> None:
        """After a gap in which hints may have been lost."""
        for subject in list(self._watches):
            self.tell(subject)

    def __len__(self) -> int:
        return len(self._watches)
