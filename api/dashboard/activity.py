"""What versions did in the last hour, as far as pages show it: figures of the last minutes, and points of charts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from broker.activity import Histogram, Minute, merged
from broker.model import RequestState
from broker.ports import Results

MINUTES = 60
RECENT = 5
_AGAIN = 3  # the present minute, and two that it was said too late for
_AT_ONCE = 100

# A minute's start, the requests that ended in it fulfilled and otherwise, and p50 and p90 of waits and of runs.
Point = tuple[float, int, int, float | None, float | None, float | None, float | None]


class Activity:
    """Of each version, the minutes in which something ended; an hour is read once, and then only what may change."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[float, Minute]] = {}
        self._at = 0.0
        self.changed: frozenset[float] = frozenset()

    async def read(self, results: Results, version_ids: Collection[str]) -> None:
        """See what was done since. `changed` are the minutes of which more is known than before. Raises
        StoreUnavailable."""
        changed: set[float] = set()
        self._kept = {version_id: kept for version_id, kept in self._kept.items() if version_id in version_ids}
        for unknown, minutes in ((False, _AGAIN), (True, MINUTES)):
            wanted = [version_id for version_id in version_ids if (version_id not in self._kept) == unknown]
            for start in range(0, len(wanted), _AT_ONCE):
                some = wanted[start : start + _AT_ONCE]
                for version_id, found in zip(some, await results.activity(some, minutes=minutes), strict=True):
                    changed |= self._note(version_id, found)
        self.changed = frozenset(changed)

    def recent(self, version_ids: Iterable[str], now: float) -> dict[str, Any] | None:
        """Requests that ended per minute, and p50 and p90 of their waits and runs, over RECENT minutes; None when
        none did."""
        since = self._at - (RECENT - 1) * 60
        minutes = [
            minute
            for version_id in version_ids
            for minute in self._kept.get(version_id, {}).values()
            if minute.at >= since
        ]
        if not minutes:
            return None
        ended = sum(sum(minute.ends.values()) for minute in minutes)
        return {
            "perMinute": round(ended * 60 / max(60.0, now - since), 1),
            "wait": _quantiles(minute.waits for minute in minutes),
            "run": _quantiles(minute.runs for minute in minutes),
        }

    def points(self, version_ids: Collection[str], *, known: Mapping[float, Point]) -> dict[float, Point]:
        """One for each of the last MINUTES, of these versions together. Those that are `known` and have not changed
        are as they are there."""
        ats = [self._at - 60 * number for number in range(MINUTES)] if self._at else []
        stale = [at for at in ats if at not in known or at in self.changed]
        made: dict[float, list[Minute]] = {at: [] for at in stale}
        for version_id in version_ids:
            kept = self._kept.get(version_id)
            if kept:
                for at in made.keys() & kept.keys():
                    made[at].append(kept[at])
        return {at: _point(at, made[at]) if at in made else known[at] for at in sorted(ats)}

    def _note(self, version_id: str, found: Sequence[Minute]) -> set[float]:
        self._at = max(self._at, found[-1].at)
        kept = self._kept.setdefault(version_id, {})
        changed = {minute.at for minute in found if minute.ends and kept.get(minute.at) != minute}
        kept.update({minute.at: minute for minute in found if minute.at in changed})
        for at in [at for at in kept if at <= self._at - MINUTES * 60]:
            del kept[at]
        return changed


def _point(at: float, minutes: Sequence[Minute]) -> Point:
    fulfilled = sum(minute.ends.get(RequestState.FULFILLED, 0) for minute in minutes)
    ended = sum(sum(minute.ends.values()) for minute in minutes)
    wait = _quantiles(minute.waits for minute in minutes)
    run = _quantiles(minute.runs for minute in minutes)
    return (at, fulfilled, ended - fulfilled, *wait, *run)


def _quantiles(histograms: Iterable[Histogram]) -> tuple[float | None, float | None]:
    together = merged(histograms)
    if not together.count:
        return None, None
    return round(together.quantile(0.5), 3), round(together.quantile(0.9), 3)
