"""When what replicas have acknowledged is safe from a fail-over."""

from __future__ import annotations

import time
from collections.abc import Callable


class Replication:
    """Judges what WAIT returns. `least` replicas have to acknowledge; but while one of `every` is missing for less than
    `failover_s`, it may be the one that Sentinels have just promoted beside a primary that is not dead, and what the
    others acknowledge will be gone when they are turned to the new one. Who is missing for longer was not promoted: by
    then nobody else would be left. What happened while nobody looked, for half of that time, is not known. `now` is a
    clock in seconds."""

    def __init__(self, *, least: int, every: int, failover_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self.every = max(least, every)
        self._least = least
        self._failover_s = failover_s
        self._now = now
        self._missing_since: float | None = None
        self._judged_at = 0.0

    @property
    def needed(self) -> bool:
        """Whether anybody waits at all."""
        return self._least > 0

    @property
    def wanted(self) -> int:
        """How many to wait for; not for one that will not come."""
        return self._least if self._known() and self._long_missing() else self.every

    def safe(self, acknowledged: int) -> bool:
        """Whether that many have what was asked for. To be told of each answer, and of one to `every` now and then."""
        if acknowledged >= self.every:
            self._missing_since = None
            return True
        if self._missing_since is None or not self._known():
            self._missing_since = self._now()
        self._judged_at = self._now()
        return acknowledged >= self._least and self._long_missing()

    def _known(self) -> bool:
        return self._now() - self._judged_at <= self._failover_s / 2

    def _long_missing(self) -> bool:
        return self._missing_since is not None and self._now() - self._missing_since >= self._failover_s
