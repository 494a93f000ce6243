"""Estimates over recorded arrivals: nine in ten requests end by the time that they were told for nine in ten."""

from __future__ import annotations

from statistics import fmean

import pytest
from click.testing import CliRunner

from benchmarks import waits
from benchmarks.scaling import Plan, read
from benchmarks.waits import RUNS, simulate

SEEDS = (7, 29, 1, 2, 3)
BURST = [*[0] * 10, *[20] * 5, *[0] * 45]


@pytest.mark.parametrize("seed", SEEDS[:2])
@pytest.mark.parametrize("spread", RUNS)
@pytest.mark.parametrize("name", ["flapping", "steady"])
def test_nine_in_ten_end_within_the_p90_that_they_were_told(name: str, spread: str, seed: int) -> None:
    arrivals = read(name)
    seen = simulate(arrivals, Plan(), RUNS[spread], seed=seed)
    assert seen.answered == sum(arrivals)
    assert seen.told > 0.95
    assert 0.85 <= seen.within_p90 <= 0.95
    assert 0.85 <= seen.later_within_p90 <= 0.95
    assert 0.4 <= seen.within_p50 <= 0.6
    assert 0.4 <= seen.later_within_p50 <= 0.6


@pytest.mark.parametrize("spread", RUNS)
def test_a_burst_on_a_cold_function_is_told_what_the_bursts_before_it_took(spread: str) -> None:
    """All of a burst share one mistake about runs and starts, so that it takes many bursts."""
    seen = [simulate(BURST, Plan(idle_s=60.0), RUNS[spread], rounds=12, seed=seed) for seed in SEEDS]
    assert all(each.told >= 10 / 12 for each in seen)
    assert 0.85 <= fmean(each.within_p90 for each in seen) <= 0.95
    assert 0.85 <= fmean(each.later_within_p90 for each in seen) <= 0.95
    assert 0.4 <= fmean(each.within_p50 for each in seen) <= 0.6
    assert 0.4 <= fmean(each.later_within_p50 for each in seen) <= 0.6


def test_every_run_gives_the_same_figures() -> None:
    first, second = (simulate(BURST, Plan(), RUNS["mixed"], rounds=2) for _ in range(2))
    assert first == second


def test_the_command_prints_a_line_for_each_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "names", lambda: ["burst"])
    monkeypatch.setattr(waits, "read", lambda _: BURST)
    printed = CliRunner().invoke(waits.main, ["--rounds", "2"])
    assert printed.exit_code == 0, printed.output
    assert [line.split()[:2] for line in printed.output.splitlines()[1:]] == [["burst", spread] for spread in RUNS]
