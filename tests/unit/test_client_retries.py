from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fnqueue import errors, retries
from fnqueue.errors import ApiError, ConnectionFailed, FnqueueError, TimedOut
from fnqueue.retries import Failures

FOREVER = 1e9


def refused(status: int, *, retry_after: str = "") -> ApiError:
    return errors.of_answer(status, {"retry-after": retry_after} if retry_after else {}, b"")


def wait_s(
    error: FnqueueError, *, count: int = 1, now: float = 0.0, retry_for_s: float = FOREVER, give_up_at: float = FOREVER
) -> float | None:
    failures = Failures(count=count, since=0.0)
    return retries.wait_s(error, failures, now, retry_for_s=retry_for_s, give_up_at=give_up_at, draw=lambda: 0.0)


@given(asked=st.none() | st.floats(0, 1e6), failures=st.integers(0, 1000), draw=st.floats(0, 1, exclude_max=True))
def test_never_sooner_than_told_and_never_much_later(asked: float | None, failures: int, draw: float) -> None:
    pause = retries.pause_s(asked, failures, lambda: draw)
    assert pause >= (asked or 0.0)
    assert pause >= retries.FIRST_S / 2
    assert pause <= max(retries.LONGEST_S, 1.25 * (asked or 0.0))


def test_back_off_doubles_up_to_a_bound() -> None:
    pauses = [retries.pause_s(None, failures, lambda: 1.0) for failures in range(20)]
    assert pauses[:4] == [0.25, 0.5, 1.0, 2.0]
    assert pauses[-1] == retries.LONGEST_S


def test_what_cannot_go_well_is_not_repeated() -> None:
    for status in (400, 401, 403, 404, 409, 410, 413, 422):
        assert wait_s(refused(status)) is None
    assert wait_s(errors.FunctionFailed(503, {}, b"")) is None
    assert wait_s(errors.ConfigurationError()) is None


def test_what_may_go_well_is_repeated() -> None:
    for status in (408, 429, 502, 503, 504):
        assert wait_s(refused(status), count=9) is not None
    assert wait_s(ConnectionFailed("gone"), count=9) is not None


def test_an_error_inside_the_server_is_repeated_twice() -> None:
    assert [wait_s(refused(500), count=count) is not None for count in (1, 2, 3)] == [True, True, False]


def test_a_pause_that_would_end_too_late_is_not_begun() -> None:
    busy = refused(429, retry_after="30")
    assert wait_s(busy, now=69.0, retry_for_s=100.0) == 30.0
    assert wait_s(busy, now=71.0, retry_for_s=100.0) is None
    assert wait_s(busy, now=0.0, give_up_at=29.0) is None


def test_the_time_of_repeating_begins_with_the_first_failure_in_a_row() -> None:
    failures = Failures().one_more(5.0).one_more(50.0)
    assert failures == Failures(count=2, since=5.0)


def test_the_callers_own_limit_is_not_waited_over() -> None:
    assert wait_s(TimedOut("over")) is None
