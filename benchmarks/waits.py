"""`python -m benchmarks.waits`: play recorded arrivals to the estimates of waits, and count how often they were right.

No servers and no clock, as `benchmarks.scaling`: the real estimates (`broker/estimates.py`) and the real autoscaler
over simulated instances. Each request asks as an honest client does: when it is accepted, and then whenever
`Retry-After` is over. Runs and starts take random times from a seeded source, so that every run gives the same figures.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import click

from benchmarks.scaling import LOOK_S, Plan, names, read
from broker.activity import NO_TIMES, Histogram, Minute, merged, step_of
from broker.estimates import Capacity, Estimate, Forecast, Lately, Starting
from broker.model import Line
from broker.ports import LANDMARKS
from workers.controller.autoscale import History, Reading, decide

SEED = 29
# How long a front end makes do with what it knows of a version.
KNOWN_FOR_S = 1.0
LONGEST_PAUSE_S = 30.0
_AFTERWARDS_S = 420.0
_START_SPREAD = 0.2

Draw = Callable[[random.Random], float]


def _lognormal(mean_s: float, spread: float) -> Draw:
    centre = math.log(mean_s) - spread**2 / 2
    return lambda source: source.lognormvariate(centre, spread)


def _mixed(source: random.Random) -> float:
    """Four short ones to a long one."""
    return (
        source.lognormvariate(math.log(0.3), 0.2) if source.random() < 0.8 else source.lognormvariate(math.log(4), 0.2)
    )


# How runs may be spread, each about a second in the mean.
RUNS: Mapping[str, Draw] = {"even": _lognormal(1.0, 0.2), "uneven": _lognormal(1.0, 1.0), "mixed": _mixed}


@dataclass(slots=True, eq=False)
class _Job:
    accepted_at: float
    estimates: list[tuple[float, Estimate | None]] = field(default_factory=list)
    ask_at: float = 0.0
    started_at: float = -1.0
    ended_at: float = -1.0


@dataclass(slots=True, eq=False)
class _Instance:
    since: float
    ready_at: float
    first: bool
    running: int = 0
    told: bool = False

    def tell(self, job: _Job) -> tuple[Histogram, Histogram]:
        """What its start took and, of the first of all, how long its first request had waited when it began."""
        if self.told:
            return NO_TIMES, NO_TIMES
        self.told = True
        return _one(self.ready_at - self.since), _one(self.since - job.accepted_at) if self.first else NO_TIMES


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Shares of requests: those that were told an estimate when they were accepted, those of them that had ended by
    its p50 and its p90; and of all estimates that were told while they waited or ran, the same. `polls` is how often a
    request asked, in the mean, and `late_s` for how long its result lay there until it did."""

    answered: int
    told: float
    within_p50: float
    within_p90: float
    later_within_p50: float
    later_within_p90: float
    polls: float
    late_s: float


class _World:
    """The queue, the instances and the activity of one version, and what one front end knows of them."""

    def __init__(self, plan: Plan, draw: Draw, seed: int) -> None:
        self.plan = plan
        self.now = 0.0
        self.jobs: list[_Job] = []
        self._draw = draw
        self._runs, self._starts = random.Random(seed), random.Random(seed + 1)
        self._start = _lognormal(plan.start_s, _START_SPREAD)
        self._queue: deque[_Job] = deque()
        self._instances: list[_Instance] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._running: set[_Job] = set()
        self._minutes: dict[int, list[Minute]] = {}
        self._lately = Lately()
        self._forecast: Forecast | None = None
        self._history = History()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def play(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, what = heapq.heappop(self._events)
            what()

    def accept(self) -> None:
        job = _Job(self.now)
        self.jobs.append(job)
        self._queue.append(job)
        self._ask(job)
        self._work()

    def look(self) -> None:
        """The controller's."""
        ready = sum(each.ready_at <= self.now for each in self._instances)
        reading = Reading(
            at=self.now,
            queued=len(self._queue),
            running=len(self._running),
            counts=(len(self._instances),),
            slots=ready * self.plan.slots,
        )
        self._history.add(reading)
        [count] = decide(self._history, [self.plan.specification], now=self.now, idle_s=self.plan.idle_s).counts
        for instance in [each for each in self._instances if not each.running][: max(0, len(self._instances) - count)]:
            self._instances.remove(instance)
        for _ in range(count - len(self._instances)):
            instance = _Instance(self.now, self.now + self._start(self._starts), first=not self._instances)
            self._instances.append(instance)
            self.at(instance.ready_at, self._work)
        self.at(self.now + LOOK_S, self.look)

    def _work(self) -> None:
        for instance in self._instances:
            while self._queue and instance.ready_at <= self.now and instance.running < self.plan.slots:
                self._begin(instance, self._queue.popleft())

    def _begin(self, instance: _Instance, job: _Job) -> None:
        starts, leads = instance.tell(job)
        instance.running += 1
        self._running.add(job)
        job.started_at = self.now

        def end() -> None:
            instance.running -= 1
            self._running.remove(job)
            job.ended_at = self.now
            self._note(job, starts, leads)
            self._work()

        self.at(self.now + self._draw(self._runs), end)

    def _note(self, job: _Job, starts: Histogram, leads: Histogram) -> None:
        minute = int(self.now // 60)
        self._minutes.setdefault(minute, []).append(
            Minute(
                at=minute * 60.0,
                runs=_one(job.ended_at - job.started_at),
                starts=starts,
                leads=leads,
            )
        )

    def _ask(self, job: _Job) -> None:
        if job.ended_at >= 0:
            return
        found = self._estimate(job)
        job.estimates.append((self.now, found))
        pause_s = min(LONGEST_PAUSE_S, max(1.0, math.ceil(found.p10_s))) if found else 1.0
        job.ask_at = self.now + pause_s
        self.at(job.ask_at, lambda: self._ask(job))

    def _estimate(self, job: _Job) -> Estimate | None:
        if self._forecast is None or self.now - self._forecast.line.at >= KNOWN_FOR_S:
            self._forecast = self._known()
        forecast, since = self._forecast, self._forecast.line.at
        if job.started_at >= 0:
            return forecast.running(self.now - job.started_at)
        if job.accepted_at == self.now:  # a front end knows the place of what it accepts
            return forecast.placed(len(self._queue), since_s=self.now - since)
        return forecast.queued(forecast.rank(job.accepted_at), since_s=self.now - since)

    def _known(self) -> Forecast:
        marks = min(len(self._queue), LANDMARKS)
        ranks = [(len(self._queue) - 1) * mark // max(1, marks - 1) for mark in range(marks)]
        line = Line(
            at=self.now,
            queued=len(self._queue),
            running=len(self._running),
            landmarks=tuple((rank + 1, self._queue[rank].accepted_at) for rank in ranks),
        )
        ready = [each for each in self._instances if each.ready_at <= self.now]
        starting = tuple(
            Starting(since=each.since, slots=self.plan.slots) for each in self._instances if each not in ready
        )
        present = int(self.now // 60)
        for minute in (present - 1, present):
            if minute in self._minutes:
                self._minutes[minute] = [_together(self._minutes[minute])]
                self._lately.add(self._minutes[minute])
        capacity = Capacity(
            slots=len(ready) * self.plan.slots,
            starting=starting,
            most_slots=self.plan.max_instances * self.plan.slots,
            slots_each=self.plan.slots,
        )
        return Forecast(line, capacity, self._lately.runs, self._lately.starts, self._lately.leads)


def simulate(arrivals: Sequence[int], plan: Plan, draw: Draw, *, rounds: int = 1, seed: int = SEED) -> Figures:
    """Play the trace so many times in a row, with time between for everything to end. Each time, it begins anywhere
    between two looks of the controller."""
    world = _World(plan, draw, seed)
    world.look()
    length_s = len(arrivals) + _AFTERWARDS_S
    phases = random.Random(seed + 2)
    for turn in range(rounds):
        begins_at = turn * length_s + phases.random() * LOOK_S
        for when in _times(arrivals):
            world.at(begins_at + when, world.accept)
    world.play(rounds * length_s)
    return _figures([job for job in world.jobs if job.ended_at >= 0])


def _figures(jobs: Sequence[_Job]) -> Figures:
    first = [(job, *job.estimates[0]) for job in jobs]
    later = [(job, *asked) for job in jobs for asked in job.estimates[1:]]
    return Figures(
        answered=len(jobs),
        told=sum(found is not None for _, _, found in first) / len(jobs),
        within_p50=_share(first, lambda found: found.p50_s),
        within_p90=_share(first, lambda found: found.p90_s),
        later_within_p50=_share(later, lambda found: found.p50_s),
        later_within_p90=_share(later, lambda found: found.p90_s),
        polls=sum(len(job.estimates) for job in jobs) / len(jobs),
        late_s=sum(job.ask_at - job.ended_at for job in jobs) / len(jobs),
    )


def _share(asked: Sequence[tuple[_Job, float, Estimate | None]], told: Callable[[Estimate], float]) -> float:
    kept = [job.ended_at - at <= told(found) for job, at, found in asked if found is not None]
    return sum(kept) / len(kept) if kept else math.nan


def _times(arrivals: Sequence[int]) -> Iterator[float]:
    """Those of one second are spread evenly."""
    for second, count in enumerate(arrivals):
        yield from (second + number / count for number in range(count))


def _one(seconds: float) -> Histogram:
    return Histogram(sum_s=seconds, counts={step_of(seconds): 1})


def _together(minutes: Sequence[Minute]) -> Minute:
    return Minute(
        at=minutes[0].at,
        runs=merged(each.runs for each in minutes),
        starts=merged(each.starts for each in minutes),
        leads=merged(each.leads for each in minutes),
    )


@click.command()
@click.option("--trace", "traces", multiple=True, help="Of benchmarks/traces; all without it.")
@click.option("--min", "min_instances", type=click.IntRange(0, 1000), default=0, show_default=True)
@click.option("--max", "max_instances", type=click.IntRange(1, 1000), default=8, show_default=True)
@click.option("--slots", type=click.IntRange(1, 1000), default=1, show_default=True, help="maxRequestConcurrency.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=5, show_default=True, help="Of each trace.")
@click.option("--seed", type=int, default=SEED, show_default=True)
def main(traces: Sequence[str], min_instances: int, max_instances: int, slots: int, rounds: int, seed: int) -> None:
    """Measure how often requests end within the estimates that they were told."""
    plan = Plan(min_instances=min_instances, max_instances=max_instances, slots=slots)
    click.echo("trace     runs    answered   told  <= p50  <= p90  later <= p50  <= p90  polls   late")
    for name, (spread, draw) in itertools.product(traces or names(), RUNS.items()):
        seen = simulate(read(name), plan, draw, rounds=rounds, seed=seed)
        click.echo(
            f"{name:<9} {spread:<7} {seen.answered:>8}  {seen.told:>5.1%}  {seen.within_p50:>6.1%}  "
            f"{seen.within_p90:>6.1%}  {seen.later_within_p50:>12.1%}  {seen.later_within_p90:>6.1%}  "
            f"{seen.polls:>5.1f}  {seen.late_s:>4.1f} s"
        )


if __name__ == "__main__":
    main()
