"""Stages of a request: together as long as the request, whichever process noted what first."""

from __future__ import annotations

import pytest

from benchmarks.stages import stages
from benchmarks.targets import SetUpFailed

MARKS = {
    "create": 1.0,
    "created": 2.0,
    "confirmed": 3.0,
    "claim": 4.0,
    "claimed": 5.0,
    "call": 6.0,
    "called": 8.0,
    "told": 9.0,
    "read": 10.0,
}


def test_stages_are_together_as_long_as_the_request() -> None:
    found = stages({"a": (0.0, 12.0)}, {"a": MARKS})
    assert found.stages["container"] == [2000.0]
    assert found.stages["answer"] == [2000.0]
    assert sum(each[0] for each in found.stages.values()) == found.whole[0] == 12_000.0


def test_the_stages_of_a_usual_request_are_those_of_the_middle() -> None:
    marks = {str(number): MARKS for number in range(5)}
    found = stages({str(number): (0.0, 11.0 + number) for number in range(5)}, marks)
    assert found.usual()["answer"] == 3000.0
    assert sum(found.usual().values()) == 13_000.0


def test_nobody_waits_for_a_confirm_that_comes_after_the_delivery() -> None:
    found = stages({"a": (0.0, 12.0)}, {"a": {**MARKS, "confirmed": 4.5}})
    assert found.stages["publish"] == [2000.0]
    assert found.stages["deliver"] == [0.0]


def test_a_request_that_was_not_seen_everywhere_is_told() -> None:
    with pytest.raises(SetUpFailed, match="not seen to claimed"):
        stages({"a": (0.0, 12.0)}, {"a": {mark: at for mark, at in MARKS.items() if mark != "claimed"}})
