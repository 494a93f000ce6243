from __future__ import annotations

import time
from email.utils import formatdate

import pytest

from workers.retry_after import retry_after_s


def said(value: str, status: int = 503, longest_s: float = 300) -> float:
    return retry_after_s(status, [("Content-Type", "text/plain"), ("retry-after", value)], longest_s=longest_s)


@pytest.mark.parametrize(("value", "wait_s"), [("5", 5), (" 7 ", 7), ("0", 1), ("301", 300), ("9" * 5000, 300)])
def test_seconds_are_kept_between_one_and_the_longest(value: str, wait_s: float) -> None:
    assert said(value) == wait_s


def test_a_date_is_a_time_from_now() -> None:
    assert said(formatdate(time.time() + 60, usegmt=True)) == pytest.approx(59.5, abs=1.5)
    assert said(formatdate(time.time() + 3600, usegmt=True)) == 300
    assert said(formatdate(time.time() - 3600, usegmt=True)) == 1


@pytest.mark.parametrize("value", ["", "soon", "-1", "1.5", "1e3", "5, 6", "\u0665", "Tue, 99 Foo 2030 00:00:00 GMT"])
def test_what_is_neither_says_nothing(value: str) -> None:
    assert said(value) == 0


@pytest.mark.parametrize("status", [200, 202, 400, 408, 500, 502, 504])
def test_other_statuses_are_answers(status: int) -> None:
    assert said("5", status) == 0


def test_without_the_header_the_status_is_the_answer() -> None:
    assert retry_after_s(503, [("Content-Type", "text/plain")], longest_s=300) == 0


def test_nothing_is_held_back_where_that_is_switched_off() -> None:
    assert said("5", longest_s=0) == 0
