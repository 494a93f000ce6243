"""Counters on Redis: one script, on a hash for each window that holds what was taken in each part of it."""

from __future__ import annotations

from collections.abc import Sequence

from broker.backends.redis import scripts
from broker.backends.redis.connection import Connection
from broker.model import Quota, Taken, Window
from broker.ports import WINDOW_PARTS


class RedisCounters:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def take(self, partition: str, windows: Sequence[Window]) -> Taken:
        keys = tuple(f"fnq:l:{{{partition}}}:{window.counter}:{window.rate.window_s}" for window in windows)
        bounds = [bound for window in windows for bound in (window.rate.limit, _width_ms(window))]
        [[granted, *standings]] = await self._connection.run(scripts.TAKE.call(keys, WINDOW_PARTS, *bounds))
        quotas = [
            Quota(policy=window.policy, rate=window.rate, remaining=int(remaining), reset_s=int(reset_ms) / 1000)
            for window, remaining, reset_ms in zip(windows, standings[::2], standings[1::2], strict=True)
        ]
        return Taken(granted=bool(granted), quotas=tuple(quotas))


def _width_ms(window: Window) -> int:
    return window.rate.window_s * 1000 // WINDOW_PARTS
