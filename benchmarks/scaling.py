"""`python -m benchmarks.scaling`: play recorded arrivals to the autoscaler, and count what it costs and who waits.

No servers and no clock: the real decisions (`workers/controller/autoscale.py`) over simulated instances, so that an
hour takes a second and every run gives the same figures.
"""

from __future__ import annotations

import heapq
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from broker.model import GpuSpecification
from workers.controller.autoscale import History, Reading, decide

TRACES = Path(__file__).parent / "traces"
# Of an instance until it is ready, of one request, between two looks of the controller, and of the simulation.
START_S = 10.0
RUN_S = 1.0
LOOK_S = 1.0
_TICK_S = 0.1
_AFTERWARDS_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How the function is deployed."""

    min_instances: int = 0
    max_instances: int = 8
    slots: int = 1
    idle_s: float = 300.0
    start_s: float = START_S
    run_s: float = RUN_S

    @property
    def specification(self) -> GpuSpecification:
        return GpuSpecification(
            id="s",
            gpu="GPU",
            instance_type="GPU",
            min_instances=self.min_instances,
            max_instances=self.max_instances,
            max_request_concurrency=self.slots,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """`reaction_s`: the longest time for which more requests were there than slots, starting ones included, and more
    instances allowed. `settling_s`: the longest for which somebody waited all the time. `used_s`: instance-seconds,
    from start to stop; `wasted_s`: those of them in which slots did nothing, starting included. `changes`: instances
    started and stopped."""

    answered: int
    reaction_s: float
    settling_s: float
    wait_p50_s: float
    wait_p99_s: float
    most: int
    at_end: int
    changes: int
    used_s: float
    wasted_s: float


@dataclass(slots=True, eq=False)
class _Instance:
    ready_at: float
    running: int = 0


@dataclass(slots=True)
class _World:
    """The queue and the instances of one version."""

    plan: Plan
    now: float = 0.0
    queue: deque[float] = field(default_factory=deque)
    instances: list[_Instance] = field(default_factory=list)
    ends: list[tuple[float, int, _Instance]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    changes: int = 0

    @property
    def running(self) -> int:
        return len(self.ends)

    @property
    def short(self) -> bool:
        """Whether more slots are needed and allowed than there are."""
        count = len(self.instances)
        return count < self.plan.max_instances and len(self.queue) + self.running > count * self.plan.slots

    @property
    def at_rest(self) -> bool:
        return not self.queue and not self.running and len(self.instances) <= self.plan.min_instances

    def work(self) -> None:
        """End what is over and begin what there is a slot for."""
        while self.ends and self.ends[0][0] <= self.now + _TICK_S / 2:
            heapq.heappop(self.ends)[2].running -= 1
        for instance in self.instances:
            while self.queue and instance.ready_at <= self.now and instance.running < self.plan.slots:
                instance.running += 1
                self.waits.append(self.now - self.queue.popleft())
                heapq.heappush(self.ends, (self.now + self.plan.run_s, len(self.waits), instance))

    def reading(self) -> Reading:
        ready = sum(instance.ready_at <= self.now for instance in self.instances)
        return Reading(
            at=self.now,
            queued=len(self.queue),
            running=self.running,
            counts=(len(self.instances),),
            slots=ready * self.plan.slots,
        )

    def scale(self, count: int) -> None:
        for instance in [item for item in self.instances if not item.running][: max(0, len(self.instances) - count)]:
            self.instances.remove(instance)
            self.changes += 1
        for _ in range(count - len(self.instances)):
            self.instances.append(_Instance(self.now + self.plan.start_s))
            self.changes += 1


@dataclass(slots=True)
class _Longest:
    """The longest time for which something was so without a break."""

    longest_s: float = 0.0
    _since: float | None = None

    def see(self, is_so: bool, now: float) -> None:
        if not is_so:
            self._since = None
        elif self._since is None:
            self._since = now
        else:
            self.longest_s = max(self.longest_s, now - self._since)


def read(name: str) -> list[int]:
    """Arrivals in each second. Raises FileNotFoundError."""
    lines = (TRACES / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [int(word) for line in lines if not line.startswith("#") for word in line.split()]


def names() -> list[str]:
    return sorted(path.stem for path in TRACES.glob("*.txt"))


def simulate(arrivals: Sequence[int], plan: Plan) -> Figures:
    """Play the trace, and then wait until everything is answered and the instances are down to their minimum, for an
    hour at most."""
    world, history, specification = _World(plan), History(), plan.specification
    short, waiting = _Longest(), _Longest()
    next_look_at, used_s, most = 0.0, 0.0, 0
    for tick in range(round((len(arrivals) + _AFTERWARDS_S) / _TICK_S)):
        world.now = tick * _TICK_S
        second = int(world.now + _TICK_S / 2)
        if second < len(arrivals):
            world.queue.extend(_at(arrivals[second], world.now - second, world.now))
        elif world.at_rest:
            break
        world.work()
        if world.now + _TICK_S / 2 >= next_look_at:
            next_look_at += LOOK_S
            history.add(world.reading())
            [count] = decide(history, [specification], now=world.now, idle_s=plan.idle_s).counts
            world.scale(count)
        short.see(world.short, world.now)
        waiting.see(bool(world.queue), world.now)
        most = max(most, len(world.instances))
        used_s += len(world.instances) * _TICK_S
    worked_s = len(world.waits) * plan.run_s / plan.slots
    return Figures(
        answered=len(world.waits),
        reaction_s=short.longest_s,
        settling_s=waiting.longest_s,
        wait_p50_s=statistics.median(world.waits),
        wait_p99_s=statistics.quantiles(world.waits, n=100)[98],
        most=most,
        at_end=len(world.instances),
        changes=world.changes,
        used_s=used_s,
        wasted_s=used_s - worked_s,
    )


def _at(count: int, into_s: float, now: float) -> list[float]:
    """Those of one second's arrivals that come in this tick of it: they are spread evenly."""
    tick, ticks = round(into_s / _TICK_S), round(1 / _TICK_S)
    return [now] * (count * (tick + 1) // ticks - count * tick // ticks)


@click.command()
@click.option("--min", "min_instances", type=click.IntRange(0, 1000), default=0, show_default=True)
@click.option("--max", "max_instances", type=click.IntRange(1, 1000), default=8, show_default=True)
@click.option("--slots", type=click.IntRange(1, 1000), default=1, show_default=True, help="maxRequestConcurrency.")
@click.option("--idle-s", type=click.FloatRange(1, 86_400), default=300.0, show_default=True, help="FNQUEUE_IDLE_S.")
@click.option("--start-s", type=click.FloatRange(0, 3600), default=START_S, show_default=True, help="Of an instance.")
@click.option("--run-s", type=click.FloatRange(0.1, 3600), default=RUN_S, show_default=True, help="Of a request.")
def main(min_instances: int, max_instances: int, slots: int, idle_s: float, start_s: float, run_s: float) -> None:
    """Simulate the autoscaler over the recorded traces."""
    plan = Plan(
        min_instances=min_instances,
        max_instances=max_instances,
        slots=slots,
        idle_s=idle_s,
        start_s=start_s,
        run_s=run_s,
    )
    click.echo("trace     answered  reaction  settling  wait p50  wait p99  most  changes  used i*s  wasted i*s")
    for name in names():
        seen = simulate(read(name), plan)
        click.echo(
            f"{name:<9} {seen.answered:>8}  {seen.reaction_s:>6.1f} s  {seen.settling_s:>6.1f} s  "
            f"{seen.wait_p50_s:>6.1f} s  {seen.wait_p99_s:>6.1f} s  {seen.most:>4}  {seen.changes:>7}  "
            f"{seen.used_s:>8.0f}  {seen.wasted_s:>7.0f} ({seen.wasted_s / seen.used_s:.0%})"
        )


if __name__ == "__main__":
    main()
