"""The checker of promises: what it lets pass, and what it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from tests.checker import UNKNOWN_ID, Census, Ending, Kind, Operation, Terms, violations


def operation(
    kind: Kind, state: str = "", *, at: float = 0.0, ending: Ending = Ending.OK, **given: object
) -> Operation:
    made = Operation(kind=kind, name="a", ending=ending, began_at=at, ended_at=at, request_id="id-a", state=state)
    return replace(made, **given)  # type: ignore[arg-type]  # fields of several types


SUBMIT = operation(Kind.SUBMIT, "queued")
READ = operation(Kind.READ, "fulfilled", at=5.0, digest="d", attempt=1)
REFUSED = operation(Kind.SUBMIT, ending=Ending.FAILED, request_id="")
UNSURE = replace(REFUSED, ending=Ending.UNKNOWN)


def broken(history: Sequence[Operation], starts: Mapping[str, int], **terms: object) -> set[str]:
    given = Terms(**terms)  # type: ignore[arg-type]  # fields of several types
    return {violation.invariant for violation in violations(history, starts, terms=given)}


@pytest.mark.parametrize(
    ("history", "starts"),
    [
        ([SUBMIT, READ], 1),
        ([SUBMIT, replace(READ, attempt=3), replace(READ, attempt=3, began_at=9.0)], 3),
        ([UNSURE], 0),
        ([UNSURE], 1),
        ([UNSURE, SUBMIT, READ], 1),
        ([REFUSED], 0),
        ([REFUSED, SUBMIT, READ], 1),
        ([SUBMIT, operation(Kind.CANCEL, at=1.0), replace(READ, state="cancelled", digest="")], 0),
        ([SUBMIT, replace(READ, state="dead", digest="", attempt=3)], 3),
        ([SUBMIT, operation(Kind.READ, at=1.0, ending=Ending.UNKNOWN), READ], 1),
    ],
)
def test_a_run_that_keeps_all_promises_is_clean(history: list[Operation], starts: int) -> None:
    assert broken(history, {"a": starts} if starts else {}) == set()


@pytest.mark.parametrize(
    ("history", "starts", "invariant"),
    [
        ([SUBMIT], 1, "none lost"),
        ([SUBMIT, replace(READ, state="running")], 1, "none lost"),
        ([SUBMIT, replace(READ, state=UNKNOWN_ID)], 1, "none lost"),
        ([SUBMIT, operation(Kind.READ, UNKNOWN_ID, at=1.0), READ], 1, "none lost"),
        ([SUBMIT, replace(READ, state="abandoned")], 0, "none lost"),
        ([SUBMIT, replace(READ, state="expired")], 1, "none lost"),
        ([SUBMIT, READ, replace(READ, digest="other")], 2, "one visible result"),
        ([SUBMIT, READ, replace(READ, attempt=2)], 2, "one visible result"),
        ([SUBMIT, READ, replace(READ, state="errored")], 2, "one visible result"),
        ([SUBMIT, READ, replace(READ, state="running", began_at=6.0)], 1, "one visible result"),
        ([SUBMIT, READ, replace(READ, state=UNKNOWN_ID, began_at=6.0)], 1, "one visible result"),
        ([SUBMIT, READ], 0, "one visible result"),
        ([SUBMIT, operation(Kind.CANCEL, at=1.0), READ], 1, "one visible result"),
        ([SUBMIT, replace(SUBMIT, request_id="id-b"), READ], 1, "one visible result"),
        ([SUBMIT, READ], 4, "attempts"),
        ([REFUSED], 1, "honest refusals"),
        ([SUBMIT, replace(READ, state="queued", began_at=90_000.0), replace(READ, began_at=90_001.0)], 1, "deadline"),
    ],
)
def test_a_broken_promise_is_named(history: list[Operation], starts: int, invariant: str) -> None:
    assert invariant in broken(history, {"a": starts} if starts else {})


def test_an_attempt_of_what_nobody_submitted_is_a_broken_promise() -> None:
    assert broken([SUBMIT, READ], {"a": 1, "b": 1}) == {"honest refusals"}


def test_what_may_expire_is_not_lost() -> None:
    history = [SUBMIT, replace(READ, state="expired", digest="", attempt=0)]
    assert broken(history, {}, may_expire=True) == set()


@pytest.mark.parametrize(
    ("states", "queued", "running"),
    [
        ({}, 0, 0),  # lost
        ({"id-a": "fulfilled", "id-b": "fulfilled"}, 0, 0),  # made up
        ({"id-a": "running"}, 0, 0),  # not counted
        ({"id-a": "queued"}, 0, 0),  # not counted
        ({"id-a": "fulfilled"}, 1, 0),  # counted, and not there
    ],
)
def test_a_census_that_does_not_add_up_is_a_broken_promise(states: dict[str, str], queued: int, running: int) -> None:
    found = violations([SUBMIT, READ], {"a": 1}, Census(states=states, queued=queued, running=running))
    assert {violation.invariant for violation in found} == {"conservation"}


@pytest.mark.parametrize("queued", [0, 1])
def test_what_was_refused_may_be_queued_and_taken_off_the_count(queued: int) -> None:
    history = [SUBMIT, READ, replace(REFUSED, name="b")]
    states = {"id-a": "fulfilled", "id-b": "queued"}
    assert violations(history, {"a": 1}, Census(states=states, queued=queued, running=0)) == []


@pytest.mark.parametrize(
    ("states", "queued", "settled"),
    [
        ({"id-a": "fulfilled"}, 0, True),
        ({"id-a": "fulfilled", "id-b": "queued"}, 0, True),
        ({"id-a": "fulfilled"}, 1, False),
        ({"id-a": "running"}, 0, False),
    ],
)
def test_a_census_is_settled_once_nothing_runs_or_is_counted_that_is_not_there(
    states: dict[str, str], queued: int, settled: bool
) -> None:
    assert Census(states=states, queued=queued, running=0).settled is settled


def test_a_violation_tells_the_whole_story_of_its_request() -> None:
    [violation] = violations([SUBMIT, READ, replace(READ, digest="other")], {"a": 2})
    assert len(violation.story) == 4
    assert "other" in str(violation)
