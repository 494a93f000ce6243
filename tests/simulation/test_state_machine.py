"""Clients and faults in any order that Hypothesis thinks of, against what the protocol says of each single step."""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from broker.errors import PublishRejected, PublishUnconfirmed, Unavailable
from tests.checker import Ending, Operation
from tests.simulation.clock import VirtualLoop
from tests.simulation.processes import Action, Failpoint, When
from tests.simulation.test_failpoints import POINTS
from tests.simulation.world import World

T = TypeVar("T")

EITHER = st.integers(0, 1)
# What may follow what, as a client sees it.
FOLLOWING = {
    "": {"queued", "running", "fulfilled", "dead", "cancelled"},
    "queued": {"queued", "running", "fulfilled", "dead", "cancelled"},
    "running": {"queued", "running", "fulfilled", "dead", "cancelled"},
}


class Broker(RuleBasedStateMachine):
    requests: Bundle[str] = Bundle("requests")
    mutation: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        random.seed(0)
        self.folder = Path(tempfile.mkdtemp(prefix="fnqueue-model-"))
        self.runner = asyncio.Runner(loop_factory=VirtualLoop)
        self.world: World = self.run(World(self.folder, concurrency=2, **self.mutation).__aenter__())
        self.names = (f"request-{number}" for number in itertools.count())
        self.cancelled: set[str] = set()
        self.seen: dict[str, tuple[str, str, int]] = {}

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        try:
            broken = self.run(self.world.verdict())
            assert not broken, "\n".join(map(str, broken))
        finally:
            self.run(self.world.__aexit__())
            self.runner.close()
            shutil.rmtree(self.folder)

    # -- clients --------------------------------------------------------------------------

    @rule(target=requests, front=EITHER, wait_s=st.sampled_from((0.0, 30.0)), die=st.booleans(), think=EITHER)
    def submit(self, front: int, wait_s: float, die: bool, think: int) -> Any:
        name = next(self.names)
        done = self.run(self.world.submit(name, front=front, wait_s=wait_s, think_s=(0.5, 20.0)[think], die=die))
        if done.ending is Ending.FAILED:
            return multiple()
        self.agrees(done)
        return name

    @rule(name=requests, front=EITHER)
    def submit_again(self, name: str, front: int) -> None:
        before = self.world.request_id(name)
        done = self.run(self.world.submit(name, front=front, think_s=0.5))
        if done.ending is Ending.OK and before:
            assert done.request_id == before
        self.agrees(done)

    @rule(name=requests, front=EITHER, wait_s=st.sampled_from((0.0, 30.0)))
    def read(self, name: str, front: int, wait_s: float) -> None:
        if self.world.request_id(name):
            self.agrees(self.run(self.world.read(name, front=front, wait_s=wait_s)))

    @rule(name=requests, front=EITHER)
    def cancel(self, name: str, front: int) -> None:
        if self.world.request_id(name):
            done = self.run(self.world.cancel(name, front=front))
            if done.ending is Ending.OK:
                before = self.seen.get(name, ("",))[0]
                assert before in FOLLOWING or before == "cancelled"
                self.cancelled.add(name)

    # -- faults ---------------------------------------------------------------------------

    @rule(number=EITHER)
    def kill_worker(self, number: int) -> None:
        self.run(self.world.replace_worker(number))

    @rule(number=EITHER)
    def kill_front(self, number: int) -> None:
        self.run(self.world.replace_front(number))

    @rule(number=EITHER, seconds=st.sampled_from((5.0, 20.0, 60.0)))
    def freeze_worker(self, number: int, seconds: float) -> None:
        self.run(self.world.workers[number].freeze(seconds))

    @rule(number=EITHER, front=st.booleans(), data=st.data())
    def misbehave(self, number: int, front: bool, data: st.DataObject) -> None:
        process = (self.world.fronts if front else self.world.workers)[number]
        name = data.draw(st.sampled_from(POINTS["front" if front else "worker"]))
        action, when = data.draw(st.sampled_from(Action)), data.draw(st.sampled_from(When))
        process.failpoint, process.struck = Failpoint(name, action, when, process.calls.count(name) + 1), False

    @rule(front=EITHER)
    def restart_dead_front(self, front: int) -> None:
        if self.world.fronts[front].dead:
            self.run(self.world.replace_front(front))

    @rule(
        error=st.sampled_from((PublishRejected, PublishUnconfirmed, Unavailable)),
        times=st.sampled_from((1, 2, 100)),
        lands=st.booleans(),
    )
    def broker_fails(self, error: type[Unavailable], times: int, lands: bool) -> None:
        self.world.queue.ends = [(error("as told"), lands and error is PublishUnconfirmed)] * times

    @rule()
    def broker_is_well(self) -> None:
        self.world.queue.ends = []

    @rule()
    def replica_leaves(self) -> None:
        self.world.store.replica_away = True

    @rule()
    def replica_returns(self) -> None:
        self.world.store.replica_away = False

    @rule()
    def primary_fails_over(self) -> None:
        self.world.store.fail_over()

    @rule(seconds=st.sampled_from((0.1, 1.0, 10.0, 40.0)))
    def time_passes(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    # -- what must hold at every step -----------------------------------------------------

    @invariant()
    def every_request_is_counted_once(self) -> None:
        census = self.world.store.census()
        states = list(census.states.values())
        assert (states.count("queued"), states.count("running")) == (census.queued, census.running)

    @invariant()
    def no_more_attempts_than_allowed(self) -> None:
        assert all(count <= 3 for count in self.world.starts.values())

    def agrees(self, done: Operation) -> None:
        """What was shown may follow what was shown before; an end never changes."""
        if not done.state:
            return
        before = self.seen.get(done.name, ("", "", 0))
        shown = (done.state, done.digest, done.attempt)
        if before[0] in FOLLOWING:
            assert done.state in FOLLOWING[before[0]], (before, shown)
        else:
            assert shown == before
        assert done.state == "cancelled" or done.name not in self.cancelled
        self.seen[done.name] = shown


@pytest.mark.timeout(300)
class TestBroker(Broker.TestCase):  # type: ignore[misc, valid-type]  # made by Hypothesis
    settings = settings(
        max_examples=100,
        stateful_step_count=30,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
