"""How many instances a version should have: decided from what was seen of it, and from nothing else.

Upstream's rules (contract/management.md §2.6), with what a queue knows put before them:

- **backlog**: what has waited for BACKLOG_S on end gets slots at once, as many as it needs, and the first request of
  all gets an instance without that wait;
- **utilisation** above the upper threshold multiplies the instances; below the lower one it takes some away, but never
  so many that those that stay would be above the upper one;
- **idleness** for the idle limit leaves the minimum.

Raising is eager and lowering slow: a step down needs a window without a gap in what was seen, in which every instance
reported and their number stood still. What is not known never takes an instance away.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, pairwise
from math import inf

from pydantic import TypeAdapter, ValidationError

from broker.model import Autoscaling, GpuSpecification, Scaling, Stickiness

# Upstream's platform policy, and the span over which it takes the mean.
PLATFORM_UP = Scaling(factor=1.2, threshold=70)
PLATFORM_DOWN = Scaling(factor=0.8, threshold=30)
WINDOW_S = 70.0
# A queue that is emptied sooner needs no further instance: it would come too late.
BACKLOG_S = 2.0
# Between two steps up by utilisation, as upstream, so that the first one can show in it.
STEP_S = 15.0
# Readings further apart than this say nothing of the time between them.
GAP_S = 20.0
# Of what was before WINDOW_S, which only a policy's stickiness asks for, a reading so often is enough.
COARSE_S = 15.0
LONGEST_STICKINESS_S = 3600.0

_DURATION: TypeAdapter[timedelta] = TypeAdapter(timedelta)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One look at a version. `counts` are its instances by specification, starting ones included; `slots` those of
    the ones that are ready. `complete` says that every instance has reported."""

    at: float
    queued: int
    running: int
    counts: tuple[int, ...]
    slots: int
    complete: bool = True

    @property
    def demand(self) -> int:
        return self.queued + self.running


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Instances by specification, and the rule that asked for a change: "" when none did."""

    counts: tuple[int, ...]
    reason: str = ""


@dataclass(slots=True)
class History:
    """What was seen of one version: every reading of the last WINDOW_S, a few of the time before as far as `keep_s`.
    A gap of more than `gap_s` makes it forget everything. Bounded, whatever is added."""

    gap_s: float = GAP_S
    keep_s: float = WINDOW_S
    last: Reading | None = None
    _recent: deque[Reading] = field(default_factory=deque)
    _older: deque[Reading] = field(default_factory=deque)
    _whole_since: float = inf
    _steady_since: float = inf
    _idle_since: float = inf
    _waiting_since: float = inf

    def add(self, reading: Reading) -> None:
        """In order of time."""
        if self.last is None or reading.at - self.last.at > self.gap_s:
            self._recent.clear()
            self._older.clear()
            self._whole_since = self._steady_since = self._idle_since = reading.at
            self._waiting_since = inf
        elif (reading.counts, reading.slots) != (self.last.counts, self.last.slots):
            self._steady_since = reading.at
        if not reading.complete:
            self._whole_since = self._idle_since = reading.at
        if reading.demand:
            self._idle_since = reading.at
        self._waiting_since = min(self._waiting_since, reading.at) if reading.queued else inf
        self.last = reading
        self._recent.append(reading)
        self._drop(reading.at)

    def steady_s(self, now: float) -> float:
        """How long the number of instances, and of those that are ready, has stood still."""
        return now - self._steady_since

    def whole_s(self, now: float) -> float:
        """How long nothing has been missing from what was seen."""
        return now - self._whole_since

    def idle_s(self, now: float) -> float:
        """How long there has been no work, for certain."""
        return now - self._idle_since

    def backlog(self, now: float) -> int:
        """The least that was queued or running while requests waited in each of the last BACKLOG_S; 0 if they did
        not."""
        if now - self._waiting_since < BACKLOG_S:
            return 0
        return min((reading.demand for reading in self._recent if reading.at >= now - BACKLOG_S), default=0)

    def mean(self, now: float) -> tuple[float, float]:
        """Over WINDOW_S: the jobs that ran at once, and the slots that were ready."""
        busy = slots = covered_s = 0.0
        for reading, s in self._spans(now - WINDOW_S):
            busy += reading.running * s
            slots += reading.slots * s
            covered_s += s
        return (busy / covered_s, slots / covered_s) if covered_s else (0.0, 0.0)

    def seconds(self, now: float, *, within_s: float, above: float = -inf, below: float = inf) -> float:
        """How much of the last `within_s` the utilisation was between these per cent, both left out."""
        spans = self._spans(now - within_s)
        return sum(s for reading, s in spans if reading.slots and above < _per_cent(reading) < below)

    def _spans(self, since: float) -> Iterator[tuple[Reading, float]]:
        """Each reading with the seconds for which it stands: until the next one."""
        for reading, following in pairwise(chain(self._older, self._recent)):
            if following.at > since:
                yield reading, following.at - max(reading.at, since)

    def _drop(self, now: float) -> None:
        while self._recent[0].at < now - WINDOW_S:
            left = self._recent.popleft()
            if not self._older or left.at - self._older[-1].at >= COARSE_S:
                self._older.append(left)
        # One from before the window stays: it stands for the time until the first one within.
        while len(self._older) > 1 and self._older[1].at <= now - self.keep_s:
            self._older.popleft()


def decide(history: History, specifications: Sequence[GpuSpecification], *, now: float, idle_s: float) -> Decision:
    """How many instances each specification should have, within its bounds; the policy is the first one's.

    `now` and the readings are of one clock; `history` holds at least one reading, of these specifications in this
    order. More come in the specifications' preferred order, and the last ones go first.
    """
    last = history.last
    if last is None:
        raise ValueError("nothing was seen of the version yet")
    counts = _bounded(last.counts, specifications)
    up, down = policy(specifications[0].autoscaling)
    if last.demand and not sum(counts):
        return Decision(counts=_more(counts, specifications, 1), reason="first request")
    backlog = history.backlog(now)
    grown = _with_slots(counts, specifications, backlog)
    if grown != counts:
        return Decision(counts=grown, reason="backlog")
    if history.idle_s(now) >= idle_s:
        least = tuple(min(count, each.min_instances) for count, each in zip(counts, specifications, strict=True))
        return Decision(counts=least, reason="idle" if least != counts else "")
    changed = _step_up(history, counts, specifications, up, now)
    if changed == counts:
        changed = _step_down(history, counts, specifications, (up, down), now)
    return Decision(counts=changed, reason="utilisation" if changed != counts else "")


def policy(own: Autoscaling | None) -> tuple[Scaling, Scaling]:
    """What raises and what lowers: the user's, a missing half the platform's; all the platform's when the thresholds
    leave no room between them."""
    up = (own and own.up) or PLATFORM_UP
    down = (own and own.down) or PLATFORM_DOWN
    return (up, down) if up.threshold > down.threshold else (PLATFORM_UP, PLATFORM_DOWN)


def history_s(own: Autoscaling | None) -> float:
    """How far back a policy looks."""
    sizes = [_span(scaling.stickiness)[0] for scaling in policy(own) if scaling.stickiness]
    return max(WINDOW_S, *sizes, 0.0)


# -- steps by utilisation ------------------------------------------------------------------------


def _step_up(
    history: History, counts: tuple[int, ...], specifications: Sequence[GpuSpecification], up: Scaling, now: float
) -> tuple[int, ...]:
    last = history.last
    still_starting = last is None or last.slots < _slots(counts, specifications)
    if still_starting or history.steady_s(now) < STEP_S:
        return counts
    busy, slots = history.mean(now)
    if up.stickiness:
        size_s, least_s = _span(up.stickiness)
        high = history.seconds(now, within_s=size_s, above=up.threshold) >= least_s
    else:
        high = slots > 0 and busy / slots * 100 > up.threshold
    total = max(1, sum(counts))
    # Rounded, for 10 * 1.1 is a little more than 11.
    return _more(counts, specifications, math.ceil(round(total * up.factor, 6)) - total) if high else counts


def _step_down(
    history: History,
    counts: tuple[int, ...],
    specifications: Sequence[GpuSpecification],
    thresholds: tuple[Scaling, Scaling],
    now: float,
) -> tuple[int, ...]:
    up, down = thresholds
    size_s, least_s = _span(down.stickiness) if down.stickiness else (WINDOW_S, 0.0)
    if min(history.steady_s(now), history.whole_s(now)) < max(WINDOW_S, size_s):
        return counts
    busy, slots = history.mean(now)
    if down.stickiness:
        low = history.seconds(now, within_s=size_s, below=down.threshold) >= least_s
    else:
        low = slots > 0 and busy / slots * 100 < down.threshold
    total = sum(counts)
    fewer = _fewer(counts, specifications, total - max(1, math.floor(round(total * down.factor, 6))))
    slots_left = _slots(fewer, specifications)
    demand = history.last.demand if history.last else 0
    # What waits beside free slots waits for something else, but must not ask for the instance again.
    enough = busy * 100 <= slots_left * up.threshold and demand <= slots_left
    return fewer if low and enough else counts


def _per_cent(reading: Reading) -> float:
    return reading.running / reading.slots * 100


def _span(stickiness: Stickiness) -> tuple[float, float]:
    """Size and threshold in seconds. What is no duration counts as none, which the wire does not let through."""
    try:
        size_s, least_s = (
            _DURATION.validate_python(text).total_seconds() for text in (stickiness.size, stickiness.threshold)
        )
    except ValidationError:
        return WINDOW_S, 0.0
    return min(size_s, LONGEST_STICKINESS_S), least_s


# -- spreading over specifications ---------------------------------------------------------------


def _bounded(counts: Sequence[int], specifications: Sequence[GpuSpecification]) -> tuple[int, ...]:
    pairs = zip(counts, specifications, strict=True)
    return tuple(min(max(count, each.min_instances), each.max_instances) for count, each in pairs)


def _slots(counts: Sequence[int], specifications: Sequence[GpuSpecification]) -> int:
    return sum(count * each.max_request_concurrency for count, each in zip(counts, specifications, strict=True))


def _order(specifications: Sequence[GpuSpecification]) -> list[int]:
    return sorted(range(len(specifications)), key=lambda position: specifications[position].preferred_order)


def _more(counts: Sequence[int], specifications: Sequence[GpuSpecification], wanted: int) -> tuple[int, ...]:
    changed = list(counts)
    for position in _order(specifications):
        added = min(wanted, specifications[position].max_instances - changed[position])
        changed[position] += added
        wanted -= added
    return tuple(changed)


def _fewer(counts: Sequence[int], specifications: Sequence[GpuSpecification], unwanted: int) -> tuple[int, ...]:
    changed = list(counts)
    for position in reversed(_order(specifications)):
        taken = min(unwanted, changed[position] - specifications[position].min_instances)
        changed[position] -= taken
        unwanted -= taken
    return tuple(changed)


def _with_slots(counts: Sequence[int], specifications: Sequence[GpuSpecification], demand: int) -> tuple[int, ...]:
    """At least these, and as many more as `demand` jobs at once need."""
    changed = list(counts)
    lacking = demand - _slots(counts, specifications)
    for position in _order(specifications):
        each = specifications[position]
        needed = max(0, math.ceil(lacking / each.max_request_concurrency))
        added = min(needed, each.max_instances - changed[position])
        changed[position] += added
        lacking -= added * each.max_request_concurrency
    return tuple(changed)
