"""Counters of one process: the reference reading of the port.

`take` does not await between its check and its change, so it is atomic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice

from broker.model import Quota, Rate, Taken, Window
from broker.ports import WINDOW_PARTS

_SWEPT_AT_ONCE = 2


class MemoryCounters:
    """`now` is the clock; tests hand in their own."""

    def __init__(self, *, now: Callable[[], float] = time.time) -> None:
        self._now = now
        # By length of window, and within it by last use, so that what has passed is found at the front.
        self._counts: dict[int, dict[tuple[str, str], _Count]] = {}

    async def take(self, partition: str, windows: Sequence[Window]) -> Taken:
        now = int(self._now() * 1000)
        counts = [self._count(partition, window, now) for window in windows]
        granted = all(count.used < window.rate.limit for window, count in zip(windows, counts, strict=True))
        if granted:
            for window, count in zip(windows, counts, strict=True):
                count.add(now)
                kept = self._counts.setdefault(window.rate.window_s, {})
                kept.pop((partition, window.counter), None)
                kept[partition, window.counter] = count
        quotas = [
            Quota(
                policy=window.policy,
                rate=window.rate,
                remaining=max(0, window.rate.limit - count.used),
                reset_s=count.reset_s(window.rate, now),
            )
            for window, count in zip(windows, counts, strict=True)
        ]
        return Taken(granted=granted, quotas=tuple(quotas))

    def _count(self, partition: str, window: Window, now: int) -> _Count:
        kept = self._counts.get(window.rate.window_s, {})
        for key in list(islice(kept, _SWEPT_AT_ONCE)):
            kept[key].forget(now)
            if not kept[key].used:
                del kept[key]
        count = kept.get((partition, window.counter)) or _Count(window.rate.window_s)
        count.forget(now)
        return count


class _Count:
    """What was taken in each part of one window. Times are milliseconds."""

    __slots__ = ("_taken", "_width", "used")

    def __init__(self, window_s: int) -> None:
        self._width = window_s * 1000 // WINDOW_PARTS
        self._taken: dict[int, int] = {}
        self.used = 0

    def forget(self, now: int) -> None:
        """Drop the parts that have passed, and those of a clock that was set back."""
        part = self._part(now)
        if all(abs(part - taken) <= WINDOW_PARTS for taken in self._taken):
            return
        self._taken = {taken: count for taken, count in self._taken.items() if abs(part - taken) <= WINDOW_PARTS}
        self.used = sum(self._taken.values())

    def add(self, now: int) -> None:
        part = self._part(now)
        self._taken[part] = self._taken.get(part, 0) + 1
        self.used += 1

    def reset_s(self, rate: Rate, now: int) -> float:
        """Until one more can be taken than now."""
        missing, ends_at = max(1, self.used - rate.limit + 1), now
        for part in sorted(self._taken):
            if missing <= 0:
                break
            missing -= self._taken[part]
            ends_at = (part + WINDOW_PARTS + 1) * self._width
        return (ends_at - now) / 1000

    def _part(self, now: int) -> int:
        return now // self._width
