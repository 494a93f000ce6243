"""Hints inside one process: who waits for a change of which request.

A hint means "read again" and nothing more; losing one costs time, never truth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from broker.model import Interest, Record


class Watch:
    """One waiter."""

    def __init__(self, interest: Interest = Interest.END) -> None:
        self._event = asyncio.Event()
        self._hinted = False
        self.interest = interest

    def forget(self) -> None:
        """From now on only what is told later counts: the caller reads next."""
        self._event.clear()
        self._hinted = False

    async def changed(self, timeout_s: float) -> bool:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(timeout_s, self._event.set)
        try:
            await self._event.wait()
            return self._hinted
        finally:
            timer.cancel()
            self.forget()

    def wake(self) -> None:
        self._event.set()

    def tell(self, news: bytes = b"") -> None:
        """`news` may say what is new, for who understands it."""
        self._hinted = True
        self._event.set()


class RecordWatch(Watch):
    """Implements `broker.ports.Watch` over the back end's read."""

    def __init__(self, read: Callable[[], Awaitable[Record | None]], interest: Interest = Interest.END) -> None:
        super().__init__(interest)
        self._read = read

    async def read(self) -> Record | None:
        self.forget()
        return await self._read()


class Listener(Watch):
    """One who waits for nothing, and is called."""

    def __init__(self, told: Callable[[], None]) -> None:
        self.interest = Interest.END
        self._told = told

    def tell(self, news: bytes = b"") -> None:
        self._told()


AnyWatch = TypeVar("AnyWatch", bound=Watch)


class Hints:
    """By subject: a request's ID, with `/r` behind it for readers of its stream, `/w` for the writer."""

    def __init__(self) -> None:
        self._watches: dict[str, list[Watch]] = {}

    @contextmanager
    def watching(self, subject: str, watch: AnyWatch) -> Iterator[AnyWatch]:
        self._watches.setdefault(subject, []).append(watch)
        try:
            yield watch
        finally:
            waiting = self._watches[subject]
            waiting.remove(watch)
            if not waiting:
                del self._watches[subject]

    @contextmanager
    def listening(self, subject: str, told: Callable[[], None]) -> Iterator[None]:
        with self.watching(subject, Listener(told)):
            yield

    def tell(self, subject: str, of: Interest = Interest.END, news: bytes = b"") -> None:
        for watch in tuple(self._watches.get(subject, ())):
            if watch.interest >= of:
                watch.tell(news)

    def tell_all(self) -> None:
        """After a gap in which hints may have been lost."""
        for subject in list(self._watches):
            self.tell(subject)

    def __len__(self) -> int:
        return len(self._watches)
