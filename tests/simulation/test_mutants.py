"""A checker that cannot fail proves nothing: it catches the protocol with any one rule left out, and finds nothing to
blame in the whole one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from broker.errors import PublishRejected, PublishUnconfirmed
from tests.checker import Violation
from tests.simulation import mutants
from tests.simulation.clock import simulate
from tests.simulation.processes import Action, Failpoint
from tests.simulation.world import World, a_world

Scenario = Callable[[World], Awaitable[object]]


async def worker_dies_in_an_attempt(world: World) -> None:
    await world.submit("a", think_s=5)
    await asyncio.sleep(1)
    for number in range(2):
        await world.replace_worker(number)


async def broker_refuses(world: World) -> None:
    world.queue.ends = [(PublishRejected("the queue takes no more jobs"), False)]
    await world.submit("a")


async def publish_lands_unconfirmed(world: World) -> None:
    world.queue.ends = [(PublishUnconfirmed("no confirm came in time"), True)] * 1000
    for worker in world.workers:
        await worker.freeze(30)
    await world.submit("a")


async def both_workers_finish(world: World) -> None:
    await world.submit("a", think_s=1)
    await asyncio.sleep(0.5)
    [busy] = [worker for worker in world.workers if "results.claim" in worker.calls]
    busy.failpoint = Failpoint("results.settle", Action.HANG)
    await world.read("a", wait_s=18)


async def result_comes_without_a_hint(world: World) -> None:
    await world.submit("a", think_s=5)
    await world.read("a", front=0)
    await asyncio.sleep(20)
    await world.read("a", front=1)


async def primary_is_lost_with_a_result(world: World) -> None:
    await world.submit("a", think_s=5)
    await asyncio.sleep(1)
    world.store.replica_away = True
    await asyncio.sleep(5)
    await world.read("a")
    for number in range(2):
        await world.replace_worker(number)
    world.store.fail_over()


# The mutant, the faults that bring it out, and the promise that it breaks.
CASES: dict[str, tuple[dict[str, Any], Scenario, str]] = {
    "ack early": ({"mutate_queue": mutants.early_ack}, worker_dies_in_an_attempt, "none lost"),
    "202 before the confirm": ({"mutate_queue": mutants.unconfirmed}, broker_refuses, "none lost"),
    "503 without a tombstone": (
        {"mutate_results": mutants.no_tombstone},
        publish_lands_unconfirmed,
        "honest refusals",
    ),
    "overwrite": ({"mutate_results": mutants.overwrite}, both_workers_finish, "one visible result"),
    "pub/sub as fact": (
        {"mutate_results": mutants.hints_as_facts},
        result_comes_without_a_hint,
        "none lost",
    ),
    "non-durable reads": (
        {"mutate_results": mutants.non_durable_reads},
        primary_is_lost_with_a_result,
        "one visible result",
    ),
    "ack before the result is durable": (
        {"mutate_results": mutants.ack_before_durable},
        primary_is_lost_with_a_result,
        "none lost",
    ),
}


def play(folder: Path, scenario: Scenario, **mutation: Any) -> list[Violation]:
    async def run() -> list[Violation]:
        async with a_world(folder, **mutation) as world:
            await scenario(world)
            return await world.verdict()

    return simulate(run)


@pytest.mark.parametrize("mutant", CASES)
def test_a_mutant_is_caught(tmp_path: Path, mutant: str) -> None:
    mutation, scenario, promise = CASES[mutant]
    assert promise in {violation.invariant for violation in play(tmp_path, scenario, **mutation)}


@pytest.mark.parametrize("mutant", CASES)
def test_the_same_faults_break_no_promise_of_the_whole_protocol(tmp_path: Path, mutant: str) -> None:
    _, scenario, _ = CASES[mutant]
    found = play(tmp_path, scenario)
    assert not found, "\n".join(map(str, found))
