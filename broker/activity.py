"""What a version did, minute by minute: how its requests ended, how long they waited and ran."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from broker.model import RequestState

KEPT_MINUTES = 1440
# How finely times are told apart: so many steps from a time to its double.
STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Times in steps that widen by a fifth, from a millisecond up; `counts` by step, `sum_s` exact."""

    sum_s: float = 0.0
    counts: Mapping[int, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(self.counts.values())

    def quantile(self, share: float) -> float:
        """The time that `share` (0 to 1) of all do not exceed, in seconds; 0 when there is none. Within a step, times
        count as evenly spread."""
        wanted, seen, high = share * self.count, 0, 0.0
        for step in sorted(self.counts):
            low, high = bounds_s(step)
            if seen + self.counts[step] >= wanted:
                return low + (high - low) * (wanted - seen) / self.counts[step]
            seen += self.counts[step]
        return high


NO_TIMES = Histogram()


@dataclass(frozen=True, slots=True, kw_only=True)
class Minute:
    """What ended in the minute that began at `at`, by the store's clock.

    `ends` counts requests by terminal state, each once. `attempts` are those that these requests took together. Of
    requests that a worker settled, `waits` are from acceptance to the claim of the last attempt, `runs` from there to
    the settling, and `cold_starts` the parts of waits in which no instance was ready, told by the first request of
    each instance that became so. Of instances, told with the first request that each settled: `starts` are from the
    beginning of its worker until it was ready, and `leads`, of one that none was ready before, from the acceptance of
    that request to the beginning of its worker.
    """

    at: float
    ends: Mapping[RequestState, int] = field(default_factory=dict)
    attempts: int = 0
    waits: Histogram = NO_TIMES
    runs: Histogram = NO_TIMES
    cold_starts: Histogram = NO_TIMES
    starts: Histogram = NO_TIMES
    leads: Histogram = NO_TIMES


def step_of(seconds: float) -> int:
    """The step of a histogram in which a time belongs."""
    milliseconds = seconds * 1000
    return int(math.log2(milliseconds) * STEPS) if milliseconds > 1 else 0


def bounds_s(step: int) -> tuple[float, float]:
    """From where to where a step reaches, in seconds."""
    return (2 ** (step / STEPS) if step else 0.0) / 1000, 2 ** ((step + 1) / STEPS) / 1000


def merged(histograms: Iterable[Histogram]) -> Histogram:
    sum_s, counts = 0.0, dict[int, int]()
    for histogram in histograms:
        sum_s += histogram.sum_s
        for step, count in histogram.counts.items():
            counts[step] = counts.get(step, 0) + count
    return Histogram(sum_s=sum_s, counts=counts)
