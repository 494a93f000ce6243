"""Slots: how many jobs the container is sent at once."""

from __future__ import annotations

import asyncio
from collections import deque


class Slots:
    """As `asyncio.Semaphore`, in turn; but to take one that is free is no wait, and costs next to nothing."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: deque[asyncio.Future[None]] = deque()

    def take(self) -> bool:
        """Whether there was one, which is then the caller's to `give` back."""
        if not self._free:
            return False
        self._free -= 1
        return True

    async def wait(self) -> None:
        """As `take`, once there is one. A cancelled wait has taken none."""
        given: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(given)
        try:
            await given
        except asyncio.CancelledError:
            if not given.cancelled():  # it came at the same moment
                self.give()
            elif given in self._waiting:
                self._waiting.remove(given)
            raise

    def give(self) -> None:
        """Back, or on to who has waited longest."""
        while self._waiting:
            first = self._waiting.popleft()
            if not first.done():
                first.set_result(None)
                return
        self._free += 1
