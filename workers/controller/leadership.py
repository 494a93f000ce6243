"""The lease by which one of several controllers acts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from broker.errors import FnqueueError
from broker.ports import Catalog

# Another controller asks at the end of a lease at the earliest and RENEW_S and its jitter later at the latest: within
# 15 s of the last renewal it leads and has looked at everything once.
LEASE_S = 10.0
RENEW_S = 3.0
# The lease is taken for lapsed this long before another controller may have it.
_MARGIN_S = 3.0


class Leadership:
    """`renew` must be called every RENEW_S; the rest follows from what it learned."""

    def __init__(self, catalog: Catalog, holder: str, *, now: Callable[[], float] = time.monotonic) -> None:
        self.holder = holder
        self.ever_held = False
        self._catalog = catalog
        self._now = now
        self._until = 0.0
        self._won = asyncio.Event()
        self._lost = asyncio.Event()
        self._lost.set()

    @property
    def held(self) -> bool:
        return self._won.is_set() and self._now() < self._until

    async def renew(self) -> None:
        """Ask for the lease, or for more of it. Raises StoreUnavailable; until the lease may have lapsed, it is
        still ours then."""
        asked_at = self._now()
        try:
            held = await self._catalog.lead(self.holder, ttl_s=LEASE_S)
        except FnqueueError:
            self._turn(self.held)
            raise
        if held:
            self.ever_held = True
            self._until = asked_at + LEASE_S - _MARGIN_S
        self._turn(held)

    async def won(self) -> None:
        await self._won.wait()

    async def lost(self) -> None:
        await self._lost.wait()

    def only(self, step: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[None]]:
        """`step`, left out while the lease is not held: a process that was paused must not act on a lapsed one."""

        async def guarded() -> None:
            if self.held:
                await step()

        return guarded

    def _turn(self, held: bool) -> None:
        if held:
            self._lost.clear()
            self._won.set()
        else:
            self._won.clear()
            self._lost.set()
