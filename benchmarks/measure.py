"""The run: short bursts of the floor, fnqueue and the others in alternation, in another order in each round."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from benchmarks import cpu
from benchmarks.load import Accepted, Burst, Kind, Send, Tally
from benchmarks.targets import Target

BETWEEN_S = 0.1  # for what a burst has left to do: acknowledgements, logs
WARM_UP_S = 0.5
IDLE_S = 2.0
MOST_REQUESTS = 50_000  # of one burst; half of what one queue takes by default
LARGE_BODY_BYTES = 1024 * 1024  # the echo function's message at most
COLLECTORS = 64


class Workload(StrEnum):
    """`sync`: POST and its result. `large`: the same with a body of 1 MiB each way. `submit`: POST that is answered 202
    at once, and every result afterwards. `status`: GET the status of a finished request. The floor is a direct POST in
    all of them."""

    SYNC = "sync"
    LARGE = "large"
    SUBMIT = "submit"
    STATUS = "status"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    workloads: Sequence[Workload]
    concurrencies: Sequence[int]
    rounds: int
    seconds: float
    body_bytes: int
    drain_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One burst. Round 0 is the warm-up, of which only faults count.

    `cpu_s` is CPU time by process while the burst ran, `resident_bytes` memory by process after it. After a `submit`
    burst, `drain_s` is how long it took to read the result of every accepted request, and `lost` how many gave none or
    a wrong one.
    """

    workload: Workload
    concurrency: int
    target: str
    round: int
    completed: int
    elapsed_s: float
    per_second: float
    p50_ms: float
    p99_ms: float
    polls: int
    cpu_s: dict[str, float]
    resident_bytes: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    examples: Sequence[str] = ()
    lost: int = 0
    drain_s: float = 0.0

    @property
    def faults(self) -> int:
        return sum(self.errors.values()) + self.lost + (not self.completed)


class Bench:
    def __init__(self, send: Send, plan: Plan, *, say: Callable[[str], None]) -> None:
        self._send = send
        self._plan = plan
        self._say = say
        self._serials = itertools.count(1, MOST_REQUESTS)
        self._finished: dict[str, tuple[Accepted, ...]] = {}

    def run(self, floor: Target, target: Target, *others: Target) -> list[Measurement]:
        """Everything in the plan. Those of `others` that tell no status know nothing but to wait for a result."""
        measurements: list[Measurement] = []
        for workload, concurrency in itertools.product(self._plan.workloads, self._plan.concurrencies):
            waits = workload in (Workload.SYNC, Workload.LARGE)
            turns = [(floor, workload if waits else Workload.SYNC), (target, workload)]
            turns += [(other, workload) for other in others if waits or other.status_path]
            for number in range(self._plan.rounds + 1):
                self._say(f"{workload} by {concurrency}: {f'round {number}' if number else 'warm-up'}")
                seconds = self._plan.seconds if number else min(WARM_UP_S, self._plan.seconds)
                for whom, what in turns if number % 2 else reversed(turns):
                    measured = self._measure(whom, what, concurrency, seconds)
                    measurements.append(replace(measured, workload=workload, round=number))
        return measurements

    def idle(self, target: Target) -> dict[str, float]:
        """CPU milliseconds per second by process while nothing is asked of it: a part of every other figure."""
        self._say(f"{target.name} idle")
        trees = target.trees()
        before, since = cpu.seconds(trees), time.monotonic()
        time.sleep(IDLE_S)
        after, took_s = cpu.seconds(trees), time.monotonic() - since
        return {role: (after[role] - before[role]) / took_s * 1000 for role in after}

    def _measure(self, target: Target, workload: Workload, concurrency: int, seconds: float) -> Measurement:
        burst = self._burst(target, workload, concurrency, seconds)
        time.sleep(BETWEEN_S)
        trees = target.trees()
        before = cpu.seconds(trees)
        tally = self._send(burst)
        after = cpu.seconds(trees)
        cpu_s = {role: after[role] - before[role] for role in after}
        measurement = _measurement(tally, workload, burst, target, cpu_s, cpu.resident_bytes(trees))
        return self._drained(measurement, target, tally) if workload is Workload.SUBMIT else measurement

    def _burst(self, target: Target, workload: Workload, concurrency: int, seconds: float) -> Burst:
        burst = Burst(
            kind=Kind.INVOKE,
            port=target.port,
            concurrency=concurrency,
            seconds=seconds,
            requests=MOST_REQUESTS,
            first_serial=next(self._serials),
            body_bytes=self._plan.body_bytes,
            path=target.path,
            status_path=target.status_path,
            headers=target.headers,
        )
        match workload:
            case Workload.SYNC:
                return burst
            case Workload.LARGE:
                return replace(burst, body_bytes=LARGE_BODY_BYTES)
            case Workload.SUBMIT:
                return replace(burst, kind=Kind.SUBMIT, headers=(*target.headers, ("Prefer", "respond-async")))
            case Workload.STATUS:
                return replace(burst, kind=Kind.STATUS, accepted=self._some_finished(target))

    def _drained(self, measurement: Measurement, target: Target, submitted: Tally) -> Measurement:
        """With what became of the requests that were accepted."""
        since = time.monotonic()
        collected = self._collect(target, tuple(submitted.accepted))
        errors = submitted.errors + collected.errors
        return replace(
            measurement,
            errors=dict(errors),
            examples=[*submitted.examples, *collected.examples],
            lost=collected.missing,
            drain_s=time.monotonic() - since,
        )

    def _collect(self, target: Target, accepted: tuple[Accepted, ...]) -> Tally:
        if not accepted:
            return Tally()
        burst = self._burst(target, Workload.SYNC, min(COLLECTORS, len(accepted)), self._plan.drain_s)
        headers = (*target.headers, ("NVCF-POLL-SECONDS", "5"))
        return self._send(replace(burst, kind=Kind.COLLECT, headers=headers, accepted=accepted))

    def _some_finished(self, target: Target) -> tuple[Accepted, ...]:
        """Requests whose results can be read, made once."""
        if target.name not in self._finished:
            burst = self._burst(target, Workload.SUBMIT, COLLECTORS, self._plan.drain_s)
            accepted = tuple(self._send(replace(burst, requests=COLLECTORS)).accepted)
            self._collect(target, accepted)
            self._finished[target.name] = accepted
        return self._finished[target.name]


def _measurement(
    tally: Tally,
    workload: Workload,
    burst: Burst,
    target: Target,
    cpu_s: dict[str, float],
    resident_bytes: dict[str, int],
) -> Measurement:
    return Measurement(
        workload=workload,
        concurrency=burst.concurrency,
        target=target.name,
        round=0,
        completed=tally.completed,
        elapsed_s=tally.elapsed_s,
        per_second=tally.per_second,
        p50_ms=tally.percentile_ms(50),
        p99_ms=tally.percentile_ms(99),
        polls=tally.polls,
        cpu_s=cpu_s,
        resident_bytes=resident_bytes,
        errors=dict(tally.errors),
        examples=tally.examples,
    )
