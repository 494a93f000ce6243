"""What versions did lately, counted in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from broker.activity import KEPT_MINUTES, Histogram, Minute, step_of
from broker.model import RequestState


@dataclass(slots=True)
class _Times:
    sum_s: float = 0.0
    counts: dict[int, int] = field(default_factory=dict)

    def add(self, seconds: float) -> None:
        self.sum_s += seconds
        self.counts[step_of(seconds)] = self.counts.get(step_of(seconds), 0) + 1

    def histogram(self) -> Histogram:
        return Histogram(sum_s=self.sum_s, counts=dict(self.counts))


@dataclass(slots=True)
class _Tally:
    ends: dict[RequestState, int] = field(default_factory=dict)
    attempts: int = 0
    times: Mapping[str, _Times] = field(
        default_factory=lambda: {name: _Times() for name in ("waits", "runs", "cold_starts", "starts", "leads")}
    )


class MemoryActivity:
    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._versions: dict[str, dict[int, _Tally]] = {}

    def ended(self, version_id: str, state: RequestState, *, attempts: int, **times_s: float) -> None:
        """`times_s` are the request's `waits` and `runs`, and what else Minute has, where they are known."""
        minutes, minute = self._versions.setdefault(version_id, {}), int(self._now() // 60)
        if minute not in minutes:
            for old in [each for each in minutes if each <= minute - KEPT_MINUTES]:
                del minutes[old]
        tally = minutes.setdefault(minute, _Tally())
        tally.ends[state] = tally.ends.get(state, 0) + 1
        tally.attempts += attempts
        for name, seconds in times_s.items():
            tally.times[name].add(seconds)

    def minutes(self, version_id: str, count: int) -> tuple[Minute, ...]:
        kept, last = self._versions.get(version_id, {}), int(self._now() // 60)
        return tuple(_told(minute, kept.get(minute)) for minute in range(last - count + 1, last + 1))


def _told(minute: int, tally: _Tally | None) -> Minute:
    if tally is None:
        return Minute(at=minute * 60.0)
    times = {name: kept.histogram() for name, kept in tally.times.items()}
    return Minute(at=minute * 60.0, ends=dict(tally.ends), attempts=tally.attempts, **times)
