"""When what replicas have acknowledged is safe from a fail-over."""

from __future__ import annotations

import time
from collections.abc import Callable


class Replication:
    """Judges what WAIT returns. `least` replicas have to acknowledge; but while one of `every` is missing for less than
    `failover_s`, it may be the one that Sentinels have just promoted beside a primary that is not dead, and what the
    others acknowledge will be gone when they are turned to the new one. Who is missing for longer was not promoted: by
    then nobody else would be left. `now` is a clock in seconds."""

    PROBE_EVERY_S = 1.0
    PROBE_S = 0.1

    def __init__(self, *, least: int, every: int, failover_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._least = least
        self._every = max(least, every)
        self._failover_s = failover_s
        self._now = now
        self._missing_since: float | None = None
        self._probe_at = 0.0

    @property
    def needed(self) -> bool:
        """Whether anybody waits at all."""
        return self._least > 0

    def patience(self, longest_s: float) -> tuple[int, float]:
        """How many to wait for next, and for how long; not for one that will not come, but for a moment now and then,
        to see whether it is back."""
        if not self._long_missing():
            return self._every, longest_s
        if (now := self._now()) < self._probe_at:
            return self._least, longest_s
        self._probe_at = now + self.PROBE_EVERY_S
        return self._every, self.PROBE_S

    def safe(self, acknowledged: int) -> bool:
        """Whether that many have what was asked for. To be told of each answer."""
        if acknowledged >= self._every:
            self._missing_since = None
            return True
        if self._missing_since is None:
            self._missing_since = self._now()
        return acknowledged >= self._least and self._long_missing()

    def _long_missing(self) -> bool:
        return self._missing_since is not None and self._now() - self._missing_since >= self._failover_s
