"""When the circuit breaker lets a call through, by a clock of the test's own."""

from __future__ import annotations

import asyncio

import pytest

from broker.backends.breaker import Breaker, seek
from broker.errors import ConfigurationError, StoreUnavailable


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


def test_while_it_is_open_nothing_goes_through_however_late(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    clock.at += 1000
    assert not any(breaker.admits() for _ in range(5))
    assert breaker.hopeless


def test_once_the_server_is_found_one_call_goes_through_and_all_others_are_refused(breaker: Breaker) -> None:
    opened(breaker).found()
    assert not breaker.hopeless
    assert [breaker.admits() for _ in range(5)] == [True, False, False, False, False]


def test_a_call_that_is_answered_closes_it(breaker: Breaker) -> None:
    opened(breaker).found()
    assert breaker.admits()
    breaker.answered()
    assert all(breaker.admits() for _ in range(5))


def test_a_call_that_fails_leaves_it_open_until_the_server_is_found_again(breaker: Breaker) -> None:
    opened(breaker).found()
    assert breaker.admits()
    fail(breaker)
    assert not breaker.admits()
    breaker.found()
    assert breaker.admits()


def test_it_says_once_that_it_opens(breaker: Breaker) -> None:
    assert [breaker.failed(began_at=breaker.now() - took_s) for took_s in (0, 3, 3)] == [False, True, False]


async def test_the_server_is_sought_until_the_breaker_is_closed(breaker: Breaker) -> None:
    opened(breaker)
    asked = 0

    async def ask() -> None:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise StoreUnavailable("away")
        if asked > 4:  # a call that went through meanwhile
            breaker.answered()

    async with asyncio.timeout(30):
        await seek(breaker, ask, pause_s=(0.0, 0.0))
    assert asked == 5


async def test_whatever_asking_comes_to_the_search_goes_on(breaker: Breaker) -> None:
    opened(breaker)
    errors = iter([ConfigurationError("no permission"), StoreUnavailable("away")])

    async def ask() -> None:
        for error in errors:
            raise error
        breaker.answered()

    async with asyncio.timeout(30):
        await seek(breaker, ask, pause_s=(0.0, 0.0))
    assert breaker.admits()
