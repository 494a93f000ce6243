"""Estimates of waits: what follows from runs, slots and places, and that nothing is told where too little is known."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from broker.activity import KEPT_MINUTES, Histogram, Minute, merged, step_of
from broker.estimates import ENOUGH_RUNS, FEWEST_RUNS, Capacity, Estimate, Forecast, Lately, Starting
from broker.model import Line

NOW = 1_000_000.0
ONE = Capacity(slots=1, most_slots=1)


def times(*seconds: float) -> Histogram:
    return merged(Histogram(sum_s=each, counts={step_of(each): 1}) for each in seconds)


def runs(mean_s: float = 10.0, spread: float = 0.1, count: int = 200) -> Histogram:
    source = random.Random(1)
    return times(*(source.gauss(mean_s, spread * mean_s) for _ in range(count)))


def forecast(
    capacity: Capacity = ONE,
    *,
    queued: int = 0,
    running: int = 0,
    of: Histogram | None = None,
    starts: Histogram | None = None,
    waited_s: float = 0.0,
) -> Forecast:
    marks = ((1, NOW - waited_s), (queued, NOW))[: min(queued, 2)]
    line = Line(at=NOW, queued=queued, running=running, landmarks=marks)
    return Forecast(line, capacity, of if of is not None else runs(), starts or Histogram())


def told(found: Estimate | None) -> Estimate:
    assert found is not None
    assert 0 <= found.p10_s <= found.p50_s <= found.p90_s
    return found


def test_with_a_free_slot_it_takes_as_long_as_runs_do() -> None:
    found = told(forecast(Capacity(slots=3, most_slots=3), running=2).queued(1))
    assert found.p50_s == pytest.approx(10, rel=0.1)
    assert found.p90_s == pytest.approx(11.3, rel=0.1)


def test_everyone_ahead_adds_a_run() -> None:
    seen = forecast(queued=20, running=1)
    medians = [told(seen.queued(rank)).p50_s for rank in (1, 2, 3, 11)]
    assert medians[0] == pytest.approx(15, rel=0.1)  # half of the one that runs, and its own
    assert [later - sooner for sooner, later in itertools.pairwise(medians)] == pytest.approx([10, 10, 80], rel=0.1)


@pytest.mark.parametrize("slots", [1, 2, 5, 20])
def test_slots_share_the_work(slots: int) -> None:
    found = told(forecast(Capacity(slots=slots, most_slots=slots), queued=400, running=slots).queued(400))
    assert found.p50_s == pytest.approx(10 * 400 / slots + 10, rel=0.05)


def test_uneven_runs_make_a_wider_estimate() -> None:
    even, uneven = (told(forecast(of=runs(spread=spread), queued=9, running=1).queued(9)) for spread in (0.05, 0.5))
    assert uneven.p90_s - uneven.p50_s > 2 * (even.p90_s - even.p50_s)


def test_a_few_runs_tell_nothing() -> None:
    few = runs(count=FEWEST_RUNS - 1)
    assert forecast(of=few, queued=1).queued(1) is None
    assert forecast(of=few, running=1).running(1.0) is None
    assert forecast(of=Histogram()).queued(1) is None


def test_without_an_instance_and_none_to_come_nothing_is_told() -> None:
    assert forecast(Capacity(slots=0)).queued(1) is None
    assert forecast(Capacity(slots=0), starts=times(30, 30)).queued(1) is None


def test_without_a_start_that_was_seen_a_cold_start_is_not_guessed() -> None:
    assert forecast(Capacity(slots=0, most_slots=4)).queued(1) is None


def test_a_cold_start_comes_on_top() -> None:
    cold = Capacity(slots=0, most_slots=4)
    found = told(forecast(cold, starts=times(28, 30, 32)).queued(1))
    assert found.p50_s == pytest.approx(40, rel=0.1)


def test_what_an_instance_has_started_for_already_is_taken_off() -> None:
    starting = Capacity(slots=0, starting=(Starting(since=NOW - 20, slots=1),), most_slots=1)
    found = told(forecast(starting, starts=times(28, 30, 32)).queued(1))
    assert found.p50_s == pytest.approx(20, rel=0.15)


def test_an_instance_that_starts_for_longer_than_any_did_is_not_counted_on() -> None:
    starting = Capacity(slots=0, starting=(Starting(since=NOW - 90, slots=1),), most_slots=1)
    assert forecast(starting, starts=times(28, 30, 32)).queued(1) is None


def test_instances_that_a_long_queue_asks_for_are_counted_on() -> None:
    growing, fixed = (
        told(forecast(Capacity(slots=1, most_slots=most), queued=100, running=1, starts=times(30)).queued(100))
        for most in (10, 1)
    )
    assert fixed.p50_s == pytest.approx(1010, rel=0.05)
    assert growing.p50_s == pytest.approx(140, rel=0.1)


def test_instances_that_were_asked_for_in_vain_are_not() -> None:
    stuck = forecast(Capacity(slots=1, most_slots=10), queued=100, running=1, starts=times(30), waited_s=300)
    assert told(stuck.queued(100)).p50_s == pytest.approx(1010, rel=0.05)


def test_of_instances_that_start_together_some_are_there_sooner() -> None:
    starting = Capacity(slots=0, starting=(Starting(since=NOW, slots=1),) * 9, most_slots=9)
    seen = forecast(starting, queued=9, starts=times(20, 30, 40), of=runs(100.0, 0.01))
    first, middle, last = (told(seen.queued(rank)).p50_s for rank in (1, 5, 9))
    assert (first, middle, last) == pytest.approx((121, 130, 142), rel=0.03)


def test_what_came_before_earlier_starts_comes_before_the_next() -> None:
    line = Line(at=NOW, queued=1, running=0, landmarks=((1, NOW),))
    cold = Capacity(slots=0, most_slots=4)
    pulled = Forecast(line, cold, runs(1.0), times(30), leads=times(60, 60))
    assert told(pulled.queued(1)).p50_s == pytest.approx(91, rel=0.15)


def test_slots_that_are_coming_have_come_nearer_since_those_that_are_there_have_not() -> None:
    starting = Capacity(slots=0, starting=(Starting(since=NOW, slots=1),), most_slots=1)
    cold, warm = forecast(starting, queued=3, starts=times(30)), forecast(queued=3, running=1)
    assert told(cold.queued(3)).p50_s - told(cold.placed(3, since_s=2.0)).p50_s == pytest.approx(2)
    assert warm.placed(3, since_s=2.0) == warm.queued(3)


def test_a_run_has_what_is_left_of_those_that_took_as_long() -> None:
    mixed = merged([runs(1.0, count=100), runs(60.0, count=100)])
    seen = forecast(of=mixed, running=1)
    assert told(seen.running(0.0)).p90_s == pytest.approx(64, rel=0.1)
    assert told(seen.running(5.0)).p50_s == pytest.approx(55, rel=0.1)


def test_a_run_that_takes_longer_than_all_others_has_no_estimate() -> None:
    assert forecast(running=1).running(100.0) is None


def test_time_that_has_passed_since_is_taken_off_but_for_its_own_run() -> None:
    seen = forecast(queued=5, running=1)
    fresh, old, ancient = (told(seen.queued(5, since_s=since_s)) for since_s in (0.0, 4.0, 1000.0))
    assert fresh.p50_s - old.p50_s == pytest.approx(4)
    assert ancient.p50_s == pytest.approx(10, rel=0.1)


def test_a_place_is_found_by_when_a_request_was_accepted() -> None:
    line = Line(at=NOW, queued=101, running=0, landmarks=((1, NOW - 50), (51, NOW - 40), (101, NOW - 10)))
    seen = Forecast(line, ONE, runs(), Histogram())
    places = [seen.rank(at) for at in (NOW - 60, NOW - 50, NOW - 45, NOW - 40, NOW - 25, NOW - 10, NOW)]
    assert places == [1, 1, 26, 51, 76, 101, 102]
    assert forecast().rank(NOW) == 1


@pytest.mark.parametrize("rank", [64, 101, 5000, 1_000_001])
def test_places_far_back_are_told_in_steps(rank: int) -> None:
    seen = forecast(queued=rank, running=1)
    assert told(seen.queued(rank)).p50_s == pytest.approx(10 * rank, rel=0.05)
    assert seen.queued(rank) is seen.queued(rank - rank % 2)


# -- what is remembered ----------------------------------------------------------------------------


def minute(number: int, run: Histogram, start: Histogram | None = None) -> Minute:
    return Minute(at=number * 60.0, runs=run, starts=start or Histogram())


def test_only_the_latest_runs_count() -> None:
    lately = Lately()
    lately.add([minute(1, runs(10.0, count=500)), minute(2, runs(1.0, count=ENOUGH_RUNS))])
    assert lately.runs == runs(1.0, count=ENOUGH_RUNS)


def test_a_minute_that_is_told_again_replaces_what_it_was() -> None:
    lately = Lately()
    for count in (5, 9):
        lately.add([minute(1, runs(count=count)), replace(minute(2, Histogram()), attempts=1)])
    assert lately.runs.count == 9


def test_starts_are_remembered_for_longer_than_runs() -> None:
    lately = Lately()
    busy = runs(count=50)
    lately.add([minute(1, runs(count=1), times(30)), *(minute(at, busy) for at in range(2, KEPT_MINUTES))])
    assert lately.starts == times(30)
    assert lately.runs.count <= ENOUGH_RUNS + 51


def test_the_runs_of_a_minute_that_is_remembered_for_its_starts_do_not_count() -> None:
    lately = Lately()
    lately.add([minute(1, runs(1.0, count=50), times(30)), minute(2, runs(10.0, count=ENOUGH_RUNS))])
    assert lately.starts == times(30)
    assert lately.runs == runs(10.0, count=ENOUGH_RUNS)
