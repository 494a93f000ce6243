"""When the acknowledgements of replicas count."""

from __future__ import annotations

import pytest

from broker.backends.redis.replication import Replication


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def replication(clock: Clock) -> Replication:
    return Replication(least=1, every=2, failover_s=10, now=clock)


def test_all_are_waited_for_and_are_enough(replication: Replication) -> None:
    assert replication.wanted == 2
    assert replication.safe(2)


def pass_time(replication: Replication, clock: Clock, seconds: int) -> None:
    """While somebody looks."""
    for _ in range(seconds):
        clock.now += 1
        replication.safe(1)


def test_while_one_may_just_have_been_promoted_the_other_is_not_enough(replication: Replication, clock: Clock) -> None:
    assert not replication.safe(1)
    pass_time(replication, clock, 9)
    assert not replication.safe(1)
    assert replication.wanted == 2


def test_one_that_stays_away_is_done_without(replication: Replication, clock: Clock) -> None:
    assert not replication.safe(1)
    pass_time(replication, clock, 10)
    assert replication.wanted == 1
    assert replication.safe(1)
    assert not replication.safe(0)


def test_what_was_not_looked_at_is_not_known(replication: Replication, clock: Clock) -> None:
    assert not replication.safe(1)
    pass_time(replication, clock, 10)
    clock.now += 6
    assert replication.wanted == 2
    assert not replication.safe(1)
    pass_time(replication, clock, 9)
    assert not replication.safe(1)


def test_once_it_is_back_it_is_waited_for_again(replication: Replication, clock: Clock) -> None:
    assert not replication.safe(1)
    pass_time(replication, clock, 10)
    assert replication.safe(2)
    assert replication.wanted == 2
    assert not replication.safe(1)


@pytest.mark.parametrize("every", [0, 1])
def test_where_one_is_all_there_are_it_is_enough(clock: Clock, every: int) -> None:
    replication = Replication(least=1, every=every, failover_s=10, now=clock)
    assert replication.wanted == 1
    assert replication.safe(1)
    assert not replication.safe(0)


@pytest.mark.parametrize("every", [0, 2])
def test_nobody_waits_where_none_is_asked_for(clock: Clock, every: int) -> None:
    assert not Replication(least=0, every=every, failover_s=10, now=clock).needed
