"""CPU of a request, burst by burst, and what grows between them."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks import cpu
from benchmarks.load import Burst, Kind, LoadFailed, Send
from benchmarks.targets import Target

CALLERS = 64
BODY_BYTES = 1024
IDLE_S = 5.0


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU of one burst: microseconds per request by process, and how many requests a second there were."""

    by_role: Mapping[str, float]
    per_second: float

    @property
    def whole(self) -> float:
        return sum(self.by_role.values())


class Meter:
    def __init__(self, send: Send, target: Target, seconds: float) -> None:
        self._send = send
        self._target = target
        self._seconds = seconds
        self._serials = itertools.count(1, 1_000_000)

    def burst(self, paths: Sequence[str] = ()) -> Cost:
        """Requests to each of `paths` in turn, or to the target's own. Raises LoadFailed."""
        path, *more = paths or (self._target.path,)
        before = cpu.seconds(self._target.trees())
        tally = self._send(
            Burst(
                kind=Kind.INVOKE,
                port=self._target.port,
                concurrency=CALLERS,
                seconds=self._seconds,
                first_serial=next(self._serials),
                body_bytes=BODY_BYTES,
                path=path,
                more_paths=tuple(more),
                status_path=self._target.status_path,
                headers=self._target.headers,
            )
        )
        after = cpu.seconds(self._target.trees())
        if not tally.completed or tally.errors:
            raise LoadFailed(f"invocations failed: {tally.examples}")
        spent = {role: (after[role] - before.get(role, 0.0)) / tally.completed * 1e6 for role in after}
        return Cost(spent, tally.per_second)

    def idle(self) -> dict[str, float]:
        """CPU milliseconds per second, by process, while nothing is asked."""
        trees = self._target.trees()
        before, since = cpu.seconds(trees), time.monotonic()
        time.sleep(IDLE_S)
        after, took_s = cpu.seconds(trees), time.monotonic() - since
        return {role: (after[role] - before[role]) / took_s * 1000 for role in after}


def table(rows: Mapping[str, Sequence[Cost]], idle: Mapping[str, Mapping[str, float]]) -> str:
    """Medians over rounds, and the ratio to the first row; behind it, what the processes use when idle."""
    roles = list(dict.fromkeys(role for costs in rows.values() for cost in costs for role in cost.by_role))
    first = statistics.median(cost.whole for cost in next(iter(rows.values())))
    lines = [
        f"{'CPU µs/request':<22} {'all':>8} {'ratio':>6}" + "".join(f" {role:>10}" for role in roles) + "   idle ms/s"
    ]
    for name, costs in rows.items():
        whole = statistics.median(cost.whole for cost in costs)
        each = [statistics.median(cost.by_role.get(role, 0.0) for cost in costs) for role in roles]
        used = ", ".join(f"{role} {spent:.0f}" for role, spent in idle.get(name, {}).items() if spent >= 0.5)
        cells = "".join(f" {value:>10,.0f}" for value in each)
        lines.append(f"{name:<22} {whole:>8,.0f} {whole / first:>6.2f}{cells}   {used}")
    return "\n".join([*lines, f"load {os.getloadavg()[0]:.1f}"])
