"""Measurements to figures: medians over rounds, ratios and differences taken within a round."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.measure import Measurement, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One target under one workload. `of_floor` is its requests/s over the floor's, `added_…` what it takes
    longer than the floor; `of` and `cpu_of` its requests/s and its CPU per request over those of each other target;
    medians of what was found in each round. `cpu_us` per request is over all rounds; `resident_bytes` is memory after
    the warm-up and after the last round."""

    workload: Workload
    concurrency: int
    target: str
    rounds: int
    completed: int
    per_second: float
    of_floor: float
    p50_ms: float
    p99_ms: float
    added_p50_ms: float
    added_p99_ms: float
    polls: int
    errors: int
    lost: int
    cpu_us: dict[str, float] = field(default_factory=dict)
    resident_bytes: dict[str, tuple[int, int]] = field(default_factory=dict)
    drain_s: float = 0.0
    finished_per_second: float = 0.0
    of: dict[str, float] = field(default_factory=dict)
    cpu_of: dict[str, float] = field(default_factory=dict)

    @property
    def all_cpu_us(self) -> float:
        return sum(self.cpu_us.values())

    @property
    def per_front_core(self) -> float:
        """Requests/s that one core takes in the front end alone; 0 when there is none."""
        return 1e6 / self.cpu_us["api"] if self.cpu_us.get("api") else 0.0


def summarise(measurements: Sequence[Measurement], *, floor: str) -> list[Summary]:
    """In the order in which they were measured, the floor first."""
    groups: dict[tuple[Workload, int], dict[str, list[Measurement]]] = {}
    for one in measurements:
        groups.setdefault((one.workload, one.concurrency), {}).setdefault(one.target, []).append(one)
    return [
        _summary(group[target], group[floor], _others(group, target, floor))
        for group in groups.values()
        for target in sorted(group, key=lambda name: name != floor)
    ]


def _others(group: Mapping[str, list[Measurement]], target: str, floor: str) -> dict[str, list[Measurement]]:
    """What a target is compared to beside the floor; the floor is compared to nothing."""
    return {name: group[name] for name in group if name not in (target, floor) and target != floor}


def _summary(
    every: Sequence[Measurement], floors: Sequence[Measurement], others: Mapping[str, Sequence[Measurement]]
) -> Summary:
    rounds = [one for one in every if one.round]
    pairs = list(zip(rounds, [one for one in floors if one.round], strict=True))
    first, completed = rounds[0], sum(one.completed for one in rounds)
    return Summary(
        workload=first.workload,
        concurrency=first.concurrency,
        target=first.target,
        rounds=len(rounds),
        completed=completed,
        per_second=_median(rounds, lambda one: one.per_second),
        of_floor=statistics.median(
            one.per_second / floor.per_second if floor.per_second else 0.0 for one, floor in pairs
        ),
        p50_ms=_median(rounds, lambda one: one.p50_ms),
        p99_ms=_median(rounds, lambda one: one.p99_ms),
        added_p50_ms=statistics.median(one.p50_ms - floor.p50_ms for one, floor in pairs),
        added_p99_ms=statistics.median(one.p99_ms - floor.p99_ms for one, floor in pairs),
        polls=sum(one.polls for one in every),
        errors=sum(sum(one.errors.values()) for one in every),
        lost=sum(one.lost for one in every),
        cpu_us=_cpu_us(rounds, completed),
        resident_bytes={
            role: (every[0].resident_bytes.get(role, 0), after) for role, after in rounds[-1].resident_bytes.items()
        },
        drain_s=_median(rounds, lambda one: one.drain_s),
        finished_per_second=_median(rounds, lambda one: one.completed / (one.elapsed_s + one.drain_s)),
        of={name: _ratio(rounds, other, lambda one: one.per_second) for name, other in others.items()},
        cpu_of={name: _ratio(rounds, other, _cpu_per_request) for name, other in others.items()},
    )


def _ratio(rounds: Sequence[Measurement], other: Sequence[Measurement], of: Callable[[Measurement], float]) -> float:
    pairs = zip(rounds, [one for one in other if one.round], strict=True)
    return statistics.median(of(one) / of(theirs) if of(theirs) else 0.0 for one, theirs in pairs)


def _cpu_per_request(one: Measurement) -> float:
    return sum(one.cpu_s.values()) / max(1, one.completed)


def _median(rounds: Sequence[Measurement], of: Callable[[Measurement], float]) -> float:
    return statistics.median(of(one) for one in rounds)


def _cpu_us(rounds: Sequence[Measurement], completed: int) -> dict[str, float]:
    roles = dict.fromkeys(itertools.chain.from_iterable(one.cpu_s for one in rounds))
    return {role: sum(one.cpu_s.get(role, 0.0) for one in rounds) / max(1, completed) * 1e6 for role in roles}
