"""A circuit breaker for one server: who asks while it is away is refused at once, and does not wait for a time-out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from broker.errors import FnqueueError

logger = logging.getLogger(__name__)

PAUSE_S = (0.2, 2.0)  # first and longest time between two probes


class Breaker:
    """Opens once nothing but failures came for `after_s`. While it is open no call goes through, until the server was
    `found`; then one does, and closes it if the server answers. A refusal by the server is an answer. `now` is the
    clock, in seconds. `opened` and `connections` count, for those who watch."""

    def __init__(self, server: str, *, after_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self.server = server
        self.opened = 0
        self.connections = 0
        self.now = now
        self._after_s = after_s
        self._failing_since: float | None = None
        self._open = False
        self._found = False

    @property
    def open(self) -> bool:
        return self._open

    @property
    def hopeless(self) -> bool:
        """Open, and the server was not found since."""
        return self._open and not self._found

    def admits(self) -> bool:
        """Whether to make a call now. While it is open, asking takes the one turn that there is."""
        if not self._open:
            return True
        found, self._found = self._found, False
        return found

    def found(self) -> None:
        """The server can be reached: the next call goes through, to see whether it answers what callers ask."""
        self._found = True

    def answered(self) -> None:
        if self._open:
            logger.info("breaker_closed", extra={"server": self.server})
        self._failing_since, self._open, self._found = None, False, False

    def failed(self, *, began_at: float) -> bool:
        """No answer came to a call that began then, by this breaker's clock. Whether it opens with this one: then
        somebody has to `seek` the server."""
        now = self.now()
        self._failing_since = began_at if self._failing_since is None else min(self._failing_since, began_at)
        if self._open or now - self._failing_since < self._after_s:
            return False
        logger.warning("breaker_opened", extra={"server": self.server})
        self._open = True
        self.opened += 1
        return True

    def connected(self) -> None:
        """A connection was made."""
        self.connections += 1


async def seek(breaker: Breaker, ask: Callable[[], Awaitable[object]], pause_s: tuple[float, float] = PAUSE_S) -> None:
    """Until the breaker is closed, find out whether the server can be reached, at the expense of no caller. `ask`
    raises where it cannot, and is called with longer and longer pauses."""
    wait_s, longest_s = pause_s
    while breaker.open:
        await asyncio.sleep(wait_s)
        wait_s = min(wait_s * 2, longest_s)
        try:
            await ask()
        except FnqueueError as exc:
            logger.debug("still_away", extra={"server": breaker.server, "cause": type(exc).__name__})
        else:
            breaker.found()
