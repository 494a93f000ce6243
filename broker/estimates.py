"""How much longer a request is likely to take: worked out from what is known of its version, and from nothing else.

Three things are put together: how long runs took lately, how many requests are ahead, and how many slots there are or
will be. What is ahead of a request is not played through run by run: the time until it starts has the mean and the
variance of a renewal process over that many slots, and its own run, as it was seen, comes on top.

Whatever too little is known for has no estimate.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from broker.activity import NO_TIMES, Histogram, Minute, bounds_s, merged
from broker.model import Line

# From fewer runs nothing is told, nor of a run that has taken longer than all but so few. Those that go on are the
# longer ones: where they are as many as those that have ended, they would be missed.
FEWEST_RUNS = 10
_RUNS_FOR_EACH_RUNNING = 20
_MOST_NEEDED_RUNS = 200
FEWEST_LONGER = 3
# Of more than these, only the latest count.
ENOUGH_RUNS = 1000
ENOUGH_STARTS = 20
# Requests have to wait for so long until the autoscaler asks for more instances than the first (its BACKLOG_S).
BACKLOG_S = 2.0
# Until a first instance begins to start, where that was never seen: half the time between two looks of the controller.
_LEAD_S = 0.5
# Starts of instances were seen seldom, and places in a line are not exact: no time is told as surer than to this part.
_SPREAD_OF_START = 0.2
_SPREAD = 0.02
_SHARES = (0.1, 0.5, 0.9)
# Places so far back are told in steps of a 32nd.
_EXACT_RANKS = 32
_HALVINGS = 16
_GROUPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds until the result: with a chance of one in ten it is there by `p10_s`, and so on."""

    p10_s: float
    p50_s: float
    p90_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Starting:
    """An instance that is not ready yet, and since when it has been starting."""

    since: float
    slots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """The slots of the instances that are ready, those that are coming, and how many there may be altogether, in
    instances of `slots_each`."""

    slots: int
    starting: tuple[Starting, ...] = ()
    most_slots: int = 0
    slots_each: int = 1


class Lately:
    """What the latest runs and starts of one version took. Bounded: of what is older than enough of them, nothing
    stays."""

    def __init__(self) -> None:
        self._minutes: dict[float, Minute] = {}
        self.runs = NO_TIMES
        self.starts = NO_TIMES
        self.leads = NO_TIMES

    def add(self, minutes: Iterable[Minute]) -> None:
        """Minutes as they stand now; one that was added before is replaced."""
        self._minutes.update({minute.at: minute for minute in minutes if minute.runs.counts or minute.starts.counts})
        kept: list[Minute] = []
        ran: list[Histogram] = []
        runs = starts = 0
        for at in sorted(self._minutes, reverse=True):
            minute = self._minutes[at]
            if runs < ENOUGH_RUNS or (starts < ENOUGH_STARTS and minute.starts.counts):
                kept.append(minute)
                # Of a minute in which instances started, the long runs are in the next ones: no gaps.
                if runs < ENOUGH_RUNS:
                    ran.append(minute.runs)
                runs += minute.runs.count
                starts += minute.starts.count
        self._minutes = {minute.at: minute for minute in kept}
        self.runs = merged(ran)
        self.starts = merged(minute.starts for minute in kept)
        self.leads = merged(minute.leads for minute in kept)


@dataclass(frozen=True, slots=True)
class _Moments:
    """Of a time: its mean, its squared coefficient of variation, and its skewness."""

    mean_s: float
    variation: float
    skewness: float

    @property
    def variance(self) -> float:
        return self.variation * self.mean_s**2


@dataclass(frozen=True, slots=True)
class _Coming:
    """Slots that will be there `after_s`, give or take, from `instances` of their own."""

    after_s: float
    variance: float
    slots: int
    instances: int


class Forecast:
    """What is to be expected of one version's requests, as it stood at `line.at`."""

    def __init__(
        self, line: Line, capacity: Capacity, runs: Histogram, starts: Histogram, leads: Histogram = NO_TIMES
    ) -> None:
        self.line = line
        self._capacity = capacity
        self._runs = runs
        self._starts = starts
        self._lead_s = leads.quantile(0.5) if leads.count else _LEAD_S
        needed = max(FEWEST_RUNS, min(_MOST_NEEDED_RUNS, _RUNS_FOR_EACH_RUNNING * line.running))
        self._run = replace(_moments(runs.counts), mean_s=runs.sum_s / runs.count) if runs.count >= needed else None
        self._parts = _parts(runs)
        self._at_once = Estimate(**{name: runs.quantile(share) for name, share in _named()})
        self._queued: dict[int, Estimate | None] = {}
        self._accepted = [accepted_at for _, accepted_at in line.landmarks]

    def rank(self, accepted_at: float) -> int:
        """About how many were ahead of a request that was accepted then, and 1."""
        landmarks, at = self.line.landmarks, bisect_right(self._accepted, accepted_at)
        if at == 0:
            return 1
        rank, since = landmarks[at - 1]
        if at == len(landmarks):
            return rank if since == accepted_at else self.line.queued + 1
        further, until = landmarks[at]
        return rank + round((further - rank) * (accepted_at - since) / (until - since))

    def queued(self, rank: int, *, since_s: float = 0.0) -> Estimate | None:
        """Of a request that `rank` - 1 others were ahead of `since_s` ago, and that has not been started since."""
        return self._sooner(self._of_rank(rank), since_s)

    def placed(self, rank: int, *, since_s: float) -> Estimate | None:
        """Of a request that `rank` - 1 others are ahead of now, `since_s` after `line.at`: slots that are there have
        gone on with the line since, but those that are coming have come nearer."""
        coming = sum(each.slots for each in self._coming(rank))
        return self._sooner(self._of_rank(rank), since_s * coming / max(1, coming + self._capacity.slots))

    def _sooner(self, found: Estimate | None, since_s: float) -> Estimate | None:
        """Its own run is always left."""
        if found is None or not since_s:
            return found
        least = self._at_once
        return Estimate(
            p10_s=max(least.p10_s, found.p10_s - since_s),
            p50_s=max(least.p50_s, found.p50_s - since_s),
            p90_s=max(least.p90_s, found.p90_s - since_s),
        )

    def _of_rank(self, rank: int) -> Estimate | None:
        if rank > _EXACT_RANKS:
            step = 2 ** (rank.bit_length() - _EXACT_RANKS.bit_length())
            rank = rank // step * step + step // 2
        if rank not in self._queued:
            self._queued[rank] = self._of_queued(max(1, rank))
        return self._queued[rank]

    def running(self, elapsed_s: float) -> Estimate | None:
        """Of a request that has been running for so long."""
        left = {
            step: share
            for step, count in self._runs.counts.items()
            if (share := count * _beyond(elapsed_s, *bounds_s(step)))
        }
        if self._run is None or sum(left.values()) < min(FEWEST_LONGER, self._runs.count):
            return None
        return Estimate(**{name: _left(left, elapsed_s, share) for name, share in _named()})

    def _of_queued(self, rank: int) -> Estimate | None:
        run = self._run
        start = self._start(rank, run) if run else None
        if start is None:
            return None
        mean_s, variance = start
        if mean_s <= 0:
            return self._at_once
        return Estimate(**{name: _quantile(mean_s, variance, self._parts, share) for name, share in _named()})

    def _start(self, rank: int, run: _Moments) -> tuple[float, float] | None:
        """Mean and variance of the time until the request of this rank starts; None if that cannot be known."""
        busy = self._capacity.slots
        ahead = rank - max(0, busy - self.line.running)
        if busy and ahead <= 0:
            return 0.0, 0.0
        coming = self._coming(rank)
        if not busy and not coming:
            return None
        mean_s = self._when(ahead, run, coming)
        there = [each for each in coming if each.after_s <= mean_s]
        slots = busy + sum(each.slots for each in there)
        ended = max(0.0, ahead - sum(each.slots for each in there))
        steady = max(0.0, 1 / 6 + run.variation**2 / 2 - run.skewness * run.variation**1.5 / 3)
        variance = (run.mean_s / slots) ** 2 * (run.variation * ended + steady * min(slots, ended))
        variance += (ended * run.mean_s / slots) ** 2 * run.variation / self._runs.count
        variance += sum((each.slots / slots) ** 2 * each.variance / each.instances for each in there)
        # What is taken for the mean start all of them share.
        variance += sum(each.slots / slots * math.sqrt(each.variance) for each in there) ** 2 / max(
            1, self._starts.count
        )
        return mean_s, variance + (_SPREAD * mean_s) ** 2

    def _when(self, ahead: int, run: _Moments, coming: Sequence[_Coming]) -> float:
        """When so many are expected to have started that have no slot now. Slots that are busy began at any time; one
        that comes takes a request at once, and the next one a whole run later."""
        late = (1 - run.variation) / 2
        busy = self._capacity.slots

        def begun(after_s: float) -> float:
            found = busy * after_s / run.mean_s + late if busy else 0.0
            for each in coming:
                if each.after_s <= after_s:
                    found += each.slots * (1 + max(0.0, (after_s - each.after_s) / run.mean_s - max(0.0, late)))
            return found

        low, high = 0.0, max((each.after_s for each in coming), default=0.0) + (ahead + 1) * run.mean_s
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if begun(middle) >= ahead else (middle, high)
        return high

    def _coming(self, rank: int) -> list[_Coming]:
        """The slots that are coming, soonest first: of instances that start, and of those that will be asked for
        because so many requests wait, if they have not waited so long in vain."""
        if not self._starts.count:
            return []
        capacity, line = self._capacity, self.line
        waited_s = line.at - line.landmarks[0][1] if line.landmarks else 0.0
        # Those that were asked for together differ by what it takes to launch them.
        alike = Counter((round(start.since, 1), start.slots) for start in capacity.starting)
        found = [
            each
            for (since, slots), count in alike.items()
            for each in self._after(max(0.0, line.at - since), count, slots)
        ]
        starting = sum(each.slots for each in capacity.starting)
        wanted = min(capacity.most_slots, max(line.queued, rank) + line.running) - capacity.slots - starting
        if wanted > 0 and not capacity.slots and not starting:
            found += self._after(waited_s - self._lead_s, 1, capacity.slots_each)
            wanted -= capacity.slots_each
        asked_after_s = BACKLOG_S + self._lead_s - waited_s
        in_vain = -asked_after_s > self._starts.quantile(0.9) and not starting
        if wanted > 0 and not in_vain:
            instances = math.ceil(wanted / capacity.slots_each)
            found += self._after(min(0.0, -asked_after_s), instances, capacity.slots_each)
        return sorted(found, key=lambda each: each.after_s)

    def _after(self, elapsed_s: float, instances: int, slots_each: int) -> list[_Coming]:
        """None of instances that have been starting for longer than any ever took. Below 0, they are asked for only
        then. Of several, some are there sooner."""
        left = {
            step: share
            for step, count in self._starts.counts.items()
            if (share := count * _beyond(elapsed_s, *bounds_s(step)))
        }
        if not left:
            return []
        start = _moments(left)
        spread_s = max(math.sqrt(start.variance), _SPREAD_OF_START * start.mean_s)
        groups = min(instances, _GROUPS)
        shares = [instances * (group + 1) // groups - instances * group // groups for group in range(groups)]
        return [
            _Coming(
                _left(left, max(0.0, elapsed_s), (group + 0.5) / groups) + max(0.0, -elapsed_s),
                spread_s**2,
                slots_each * share,
                share,
            )
            for group, share in enumerate(shares)
        ]


def _named() -> Sequence[tuple[str, float]]:
    return tuple(zip(("p10_s", "p50_s", "p90_s"), _SHARES, strict=True))


def _parts(runs: Histogram) -> Sequence[tuple[float, float]]:
    """The middle of each step, and the share of runs in it."""
    count = runs.count
    return [(sum(bounds_s(step)) / 2, number / count) for step, number in sorted(runs.counts.items())]


def _moments(counts: Mapping[int, float]) -> _Moments:
    count = sum(counts.values())
    weighed = [(sum(bounds_s(step)) / 2, number / count) for step, number in counts.items()]
    mean_s = sum(middle * share for middle, share in weighed)
    # A step is as wide as a fifth of what is in it.
    variance = sum((middle - mean_s) ** 2 * share for middle, share in weighed) + (0.05 * mean_s) ** 2
    third = sum((middle - mean_s) ** 3 * share for middle, share in weighed)
    return _Moments(mean_s, variance / mean_s**2, third / variance**1.5)


def _beyond(elapsed_s: float, low_s: float, high_s: float) -> float:
    """The share of a step that is beyond a time."""
    return min(1.0, max(0.0, (high_s - elapsed_s) / (high_s - low_s)))


def _left(shares: Mapping[int, float], elapsed_s: float, share: float) -> float:
    """A quantile of what is left of times that have all taken `elapsed_s` already."""
    wanted, seen = share * sum(shares.values()), 0.0
    for step in sorted(shares):
        low, high = bounds_s(step)
        low = max(low, elapsed_s)
        if seen + shares[step] >= wanted:
            return low + (high - low) * (wanted - seen) / shares[step] - elapsed_s
        seen += shares[step]
    return max(bounds_s(step)[1] for step in shares) - elapsed_s


def _quantile(mean_s: float, variance: float, parts: Sequence[tuple[float, float]], share: float) -> float:
    """Of the sum of a log-normal time with these moments, and of one that is made of `parts`."""
    spread = math.log(1 + variance / mean_s**2)
    centre, width = math.log(mean_s) - spread / 2, math.sqrt(2 * spread)

    def reached(seconds: float) -> float:
        found = 0.0
        for middle, weight in parts:
            if seconds <= middle:
                break
            found += weight * (1 + math.erf((math.log(seconds - middle) - centre) / width)) / 2
        return found

    low, high = 0.0, parts[-1][0] + mean_s + 8 * math.sqrt(variance)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) >= share else (middle, high)
    return high
