"""A circuit breaker for one server: who asks while it is away is refused at once, and does not wait for a time-out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

PAUSE_S = (0.2, 2.0)  # first and longest time between two probes


class Breaker:
    """Opens once nothing but failures came for `after_s`; then lets one call through after each pause, and closes with
    the first that the server answers. A refusal by the server is an answer. `now` is a clock in seconds."""

    def __init__(self, server: str, *, after_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._server = server
        self._after_s = after_s
        self._now = now
        self._failing_since: float | None = None
        self._pause_s = 0.0  # 0: closed
        self._probe_at = 0.0

    @property
    def open(self) -> bool:
        return self._pause_s > 0

    def admits(self) -> bool:
        """Whether to make a call now. While open, asking takes the turn of the probe."""
        if not self.open:
            return True
        now = self._now()
        if now < self._probe_at:
            return False
        # A probe that never comes back is not the last one.
        self._probe_at = now + self._pause_s
        return True

    def answered(self) -> None:
        if self.open:
            logger.info("breaker_closed", extra={"server": self._server})
        self._failing_since, self._pause_s = None, 0.0

    def failed(self, *, began_at: float) -> None:
        """No answer came to a call that began then, by this breaker's clock."""
        now = self._now()
        self._failing_since = began_at if self._failing_since is None else min(self._failing_since, began_at)
        if self.open:
            self._pause_s = min(self._pause_s * 2, PAUSE_S[1])
            self._probe_at = now + self._pause_s
        elif now - self._failing_since >= self._after_s:
            logger.warning("breaker_opened", extra={"server": self._server})
            self._pause_s = PAUSE_S[0]
            self._probe_at = now + self._pause_s

    def now(self) -> float:
        return self._now()
