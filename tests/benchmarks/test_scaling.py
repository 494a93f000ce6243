"""The autoscaler over recorded arrivals: whoever waits gets instances soon, and instances go when nobody does."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from benchmarks.scaling import Plan, main, names, read, simulate


@pytest.mark.parametrize(
    ("name", "reaction_s", "settling_s", "wait_p99_s", "wasted_s"),
    [
        ("burst", 3.0, 75.0, 70.0, 1500),
        ("diurnal", 5.0, 15.0, 1.0, 16_000),
        ("flapping", 6.0, 20.0, 6.0, 6500),
        ("steady", 5.0, 20.0, 5.0, 5000),
    ],
)
def test_a_trace_is_answered_and_given_back(
    name: str, reaction_s: float, settling_s: float, wait_p99_s: float, wasted_s: float
) -> None:
    arrivals, plan = read(name), Plan()
    seen = simulate(arrivals, plan)
    assert seen.answered == sum(arrivals)
    assert seen.most <= plan.max_instances
    assert seen.at_end == 0
    assert seen.reaction_s <= reaction_s
    assert seen.settling_s <= settling_s
    assert seen.wait_p99_s <= wait_p99_s
    assert seen.wasted_s <= wasted_s


def test_a_minimum_is_kept_to_the_end() -> None:
    assert simulate(read("burst"), Plan(min_instances=2)).at_end == 2


def test_load_that_comes_and_goes_does_not_make_instances_come_and_go_as_often() -> None:
    """30 turns of load: without a memory it would be four instances each."""
    assert simulate(read("flapping"), Plan()).changes <= 60


def test_the_command_prints_a_line_for_each_trace() -> None:
    printed = CliRunner().invoke(main, [])
    assert printed.exit_code == 0, printed.output
    assert [line.split()[0] for line in printed.output.splitlines()] == ["trace", *names()]
