"""What a request costs beside others: told against the first row, from processes whose end is noticed."""

from __future__ import annotations

from multiprocessing.connection import Connection

import pytest

from benchmarks.children import child
from benchmarks.meter import Cost, table
from benchmarks.targets import SetUpFailed


def echo(parent: Connection) -> None:
    parent.send("ready")
    while True:
        parent.send(parent.recv())


def leave(parent: Connection) -> None:
    """Without a word."""


def test_rows_are_compared_with_the_first_one() -> None:
    rows = {
        "few": [Cost({"api": 10.0, "redis": 10.0}, 1.0), Cost({"api": 20.0, "redis": 20.0}, 1.0)],
        "many": [Cost({"api": 30.0, "redis": 30.0}, 1.0)],
    }
    _, few, many, _ = table(rows, {"many": {"api": 2.0, "redis": 0.1}}).splitlines()
    assert few.split() == ["few", "30", "1.00", "15", "15"]
    assert many.split() == ["many", "60", "2.00", "30", "30", "api", "2"]


def test_a_child_answers_what_it_is_asked() -> None:
    with child(echo) as started:
        assert started.first == "ready"
        assert started.ask([1, 2]) == [1, 2]


def test_a_child_that_ends_too_early_is_an_error() -> None:
    with pytest.raises(SetUpFailed, match="leave came to an end"), child(leave):
        pass
