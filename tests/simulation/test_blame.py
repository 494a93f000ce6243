"""What a worker's death costs a request, by what it was doing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.simulation.clock import simulate
from tests.simulation.processes import Action, Failpoint, Process, When
from tests.simulation.world import World, a_world


def test_a_worker_that_dies_while_a_job_is_postponed_costs_nothing(tmp_path: Path) -> None:
    """More often than workers may die, and than attempts may be made."""

    async def run() -> None:
        async with a_world(tmp_path) as world:
            await world.submit("postponed", think_s=0.5, busy=5, busy_s=30)
            for times in range(1, 6):
                await started(world, "postponed", times=times)
                await asyncio.sleep(1)
                for number in range(2):  # one of them holds it
                    await world.replace_worker(number)
            shown = await world.read("postponed", wait_s=120)
            assert (shown.state, shown.attempt) == ("fulfilled", 1)
            assert world.starts["postponed"] == 6

    simulate(run)


@pytest.mark.parametrize("when", When)
@pytest.mark.parametrize("action", [Action.KILL, Action.HANG, Action.RAISE])
def test_a_worker_that_dies_while_it_stores_a_large_result_is_followed_by_another(
    tmp_path: Path, action: Action, when: When
) -> None:
    async def run() -> None:
        async with a_world(tmp_path) as world:
            for worker in world.workers:
                worker.failpoint = Failpoint("blobs.upload", action, when)
            await world.submit("large", large=True)
            await until(lambda: any(worker.struck for worker in world.workers))
            spare_the_other(world.workers)
            assert await world.verdict() == []
            shown = await world.read("large")
            assert shown.state == "fulfilled"

    simulate(run)


def spare_the_other(workers: Sequence[Process]) -> None:
    for worker in workers:
        if not worker.struck:
            worker.failpoint = None


async def started(world: World, name: str, *, times: int) -> None:
    await until(lambda: world.starts[name] == times)


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(600):
        while not happened():  # noqa: ASYNC110  time passes at once
            await asyncio.sleep(0.1)
