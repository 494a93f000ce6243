"""When what replicas have acknowledged is safe from a fail-over."""

from __future__ import annotations

import time
from collections.abc import Callable


class Replication:
    """Judges what WAIT returns. `least` replicas have to acknowledge; but while one of `every` is missing for less than
    `failover_s`, it may be the one that Sentinels have just promoted beside a primary that is not dead, and what the
    others acknowledge will be gone when they are turned to the new one. Who is missing for longer was not promoted: by
    then nobody else would be left. `now` is a clock in seconds."""

    def __init__(self, *, least: int, every: int, failover_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._least = least
        self._every = max(least, every)
        self._failover_s = failover_s
        self._now = now
        self._missing_since: float | None = None

    @property
    def wanted(self) -> int:
        """How many to wait for; 0 if nobody waits at all. Not for those that will not come."""
        return self._least if self._long_missing() or not self._least else self._every

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
