"""Each call that a front end or a worker makes of a server, from submit to read, is where its process is killed or
freezes, its server does not answer, or its effect comes twice."""

from __future__ import annotations

import asyncio
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from broker.errors import PublishRejected
from tests.checker import Violation
from tests.simulation.clock import simulate
from tests.simulation.processes import Action, Failpoint, Process, When
from tests.simulation.world import World, a_world

# A call that is not in here is made by nobody: `test_every_call_is_a_failpoint` keeps the lists whole.
POINTS: dict[str, tuple[str, ...]] = {
    "front": (
        "queue.publish",
        "results.abandon",
        "results.cancel",
        "results.create",
        "results.epoch",
        "results.forget_key",
        "results.read",
        "results.remember_key",
        "watch.read",
    ),
    "worker": (
        "delivery.ack",
        "delivery.arrive",
        "delivery.reject",
        "delivery.requeue",
        "results.claim",
        "results.release",
        "results.renew",
        "results.settle",
        "watch.read",
    ),
}
NTH = (1, 2)


async def everyday(world: World) -> None:
    """Every verb of a client and of a worker: requests that are waited for, polled, cancelled in the queue and in an
    attempt, refused by the broker, and lost with their container."""
    await world.insist("waited for")
    if "waited for" in world.accepted():
        await world.read("waited for", front=0, wait_s=30)
    await world.insist("long", think_s=20)
    await world.insist("another long", think_s=20)
    await world.insist("queued")
    await world.insist("cancelled early")
    await cancelled(world, "cancelled early")
    await asyncio.sleep(2)
    await cancelled(world, "long")
    await world.submit("crashing", front=0, die=True, think_s=0.5)
    world.queue.ends = [refusal()]
    await world.submit("refused", front=0)
    world.queue.ends.clear()
    await world.submit("last", front=0)
    for name in world.accepted():
        await world.read(name, front=0, wait_s=5)


async def heir(world: World) -> Process:
    """The worker that is left, and does everything until it dies itself. The other one has died over a request."""
    await world.insist("left behind", think_s=5)
    await asyncio.sleep(1)
    [busy] = [worker for worker in world.workers if "results.claim" in worker.calls]
    [idle] = [worker for worker in world.workers if worker is not busy]
    idle.calls.clear()
    await busy.kill()
    return idle


async def cancelled(world: World, name: str) -> None:
    """Until somebody says so."""
    for front in (0, 1):
        if name in world.accepted():
            await world.cancel(name, front=front)


def refusal() -> Any:
    return PublishRejected("the queue takes no more jobs"), False


def strike(folder: Path, which: str, point: Failpoint | None) -> tuple[list[Violation], Process]:
    async def run() -> tuple[list[Violation], Process]:
        async with a_world(folder) as world:
            process = world.fronts[0] if which == "front" else await heir(world)
            process.failpoint = point
            await everyday(world)
            return await world.verdict(), process

    return simulate(run)


@pytest.mark.parametrize("which", POINTS)
def test_every_call_is_a_failpoint(tmp_path: Path, which: str) -> None:
    broken, process = strike(tmp_path, which, None)
    assert broken == []
    assert tuple(sorted(set(process.calls))) == POINTS[which]


@pytest.mark.parametrize(("which", "action"), [*product(POINTS, Action)])
def test_no_promise_is_broken_wherever_it_strikes(tmp_path: Path, which: str, action: Action) -> None:
    sides = (When.AFTER,) if action is Action.DUPLICATE else tuple(When)
    broken: list[str] = []
    struck = 0
    for name, when, nth in product(POINTS[which], sides, NTH):
        point = Failpoint(name, action, when, nth)
        found, process = strike(tmp_path, which, point)
        struck += process.struck
        broken += [f"{which}: {point}: {violation}" for violation in found]
    assert not broken, "\n".join(broken)
    assert struck >= len(POINTS[which]) * len(sides)
