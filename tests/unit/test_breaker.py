"""When the circuit breaker lets a call through, by a clock of the test's own."""

from __future__ import annotations

import pytest

from broker.backends.breaker import PAUSE_S, Breaker


class Clock:
    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker("store", after_s=3, now=clock)


def fail(breaker: Breaker, *, took_s: float = 0.0) -> None:
    breaker.failed(began_at=breaker.now() - took_s)


def opened(breaker: Breaker) -> Breaker:
    fail(breaker, took_s=3)
    assert breaker.open
    return breaker


def test_many_failures_at_once_open_nothing_before_their_time(breaker: Breaker, clock: Clock) -> None:
    for _ in range(100):
        fail(breaker)
    assert breaker.admits()
    clock.at += 3
    fail(breaker)
    assert not breaker.admits()


def test_one_call_that_waited_as_long_opens_it(breaker: Breaker) -> None:
    fail(breaker, took_s=3)
    assert not breaker.admits()


def test_an_answer_in_between_begins_anew(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.at += 3
    breaker.answered()
    fail(breaker)
    assert breaker.admits()


def test_one_probe_goes_through_and_all_others_are_refused(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    clock.at += PAUSE_S[0]
    assert [breaker.admits() for _ in range(5)] == [True, False, False, False, False]


def test_a_probe_that_fails_is_followed_by_a_longer_pause_up_to_the_longest(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    for _ in range(10):
        clock.at += PAUSE_S[1]
        assert breaker.admits()
        fail(breaker)
    clock.at += PAUSE_S[1] / 2
    assert not breaker.admits()
    clock.at += PAUSE_S[1] / 2
    assert breaker.admits()


def test_a_probe_that_is_answered_closes_it(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    clock.at += PAUSE_S[0]
    assert breaker.admits()
    breaker.answered()
    assert all(breaker.admits() for _ in range(5))


def test_a_probe_that_never_comes_back_is_not_the_last_one(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    clock.at += PAUSE_S[0]
    assert breaker.admits()
    clock.at += PAUSE_S[1]
    assert breaker.admits()
