"""Hints inside one process: who waits for a change of which request.

A hint means "read again" and nothing more; losing one costs time, never truth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from broker.model import Interest, Record


class Watch:
    """One waiter; implements `broker.ports.Watch` over the back end's read."""

    def __init__(self, read: Callable[[], Awaitable[Record | None]], interest: Interest = Interest.END) -> None:
        self._read = read
        self._event = asyncio.Event()
        self._hinted = False
        self.interest = interest

    async def read(self) -> Record | None:
        self._clear()
        return await self._read()

    async def changed(self, timeout_s: float) -> bool:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(timeout_s, self._event.set)
        try:
            await self._event.wait()
            return self._hinted
        finally:
            timer.cancel()
            self._clear()

    def wake(self) -> None:
        self._event.set()

    def tell(self) -> None:
        self._hinted = True
        self._event.set()

    def _clear(self) -> None:
        self._event.clear()
        self._hinted = False


class Hints:
    def __init__(self) -> None:
        self._watches: dict[str, list[Watch]] = {}

    @contextmanager
    def watching(self, request_id: str, watch: Watch) -> Iterator[Watch]:
        self._watches.setdefault(request_id, []).append(watch)
        try:
            yield watch
        finally:
            waiting = self._watches[request_id]
            waiting.remove(watch)
            if not waiting:
                del self._watches[request_id]

    def tell(self, request_id: str, of: Interest = Interest.END) -> None:
        for watch in self._watches.get(request_id, ()):
            if watch.interest >= of:
                watch.tell()

    def tell_all(self) -> None:
        """After a gap in which hints may have been lost."""
        for request_id in list(self._watches):
            self.tell(request_id)

    def __len__(self) -> int:
        return len(self._watches)
