"""How many instances: decisions over histories that are written down here, second by second."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from broker.model import Autoscaling, GpuSpecification, Scaling, Stickiness
from workers.controller.autoscale import (
    BACKLOG_S,
    GAP_S,
    PLATFORM_DOWN,
    PLATFORM_UP,
    STEP_S,
    WINDOW_S,
    Decision,
    History,
    Reading,
    decide,
    history_s,
    policy,
)

IDLE_S = 300.0


def specification(
    minimum: int, maximum: int, *, slots: int = 1, order: int = 1, own: Autoscaling | None = None
) -> GpuSpecification:
    return GpuSpecification(
        id="s",
        gpu="CPU",
        instance_type="CPU",
        min_instances=minimum,
        max_instances=maximum,
        max_request_concurrency=slots,
        preferred_order=order,
        autoscaling=own,
    )


class Seen:
    """A version as a controller sees it every second; what changes is said, the rest stays."""

    def __init__(self, *specifications: GpuSpecification) -> None:
        self.specifications = specifications
        self.history = History(keep_s=history_s(specifications[0].autoscaling))
        self.now = 1000.0
        self._reading = Reading(at=0.0, queued=0, running=0, counts=(0,) * len(specifications), slots=0)

    def look(self, *, for_s: float = 0.0, every_s: float = 1.0, **changed: object) -> Decision:
        """What is decided after the last of these looks."""
        self._reading = replace(self._reading, **changed)  # type: ignore[arg-type]  # fields of a Reading
        if "counts" in changed and "slots" not in changed:
            pairs = zip(self._reading.counts, self.specifications, strict=True)
            ready = sum(count * each.max_request_concurrency for count, each in pairs)
            self._reading = replace(self._reading, slots=ready)
        until = self.now + for_s
        while True:
            self.history.add(replace(self._reading, at=self.now))
            decided = decide(self.history, self.specifications, now=self.now, idle_s=IDLE_S)
            if self.now >= until:
                self.now += every_s
                return decided
            self.now += every_s

    def count(self, **look: object) -> int:
        return sum(self.look(**look).counts)  # type: ignore[arg-type]


# -- up ------------------------------------------------------------------------------------------


def test_the_first_request_gets_an_instance_at_once() -> None:
    seen = Seen(specification(0, 4))
    assert seen.look(for_s=100) == Decision(counts=(0,))
    assert seen.look(queued=1) == Decision(counts=(1,), reason="first request")


def test_a_request_that_runs_without_an_instance_gets_one_too() -> None:
    assert Seen(specification(0, 4)).count(running=1) == 1


def test_a_burst_gets_all_the_slots_that_it_needs_within_seconds() -> None:
    seen = Seen(specification(0, 100, slots=4))
    assert seen.count(queued=81) == 1
    decided = seen.look(counts=(1,), slots=0, for_s=BACKLOG_S - 1)
    assert decided == Decision(counts=(21,), reason="backlog")
    assert BACKLOG_S < 5


def test_instances_that_are_starting_are_not_asked_for_again() -> None:
    seen = Seen(specification(0, 100))
    seen.look(queued=10)
    assert seen.count(counts=(10,), slots=0, for_s=600) == 10


def test_a_queue_that_is_soon_empty_again_starts_nothing() -> None:
    seen = Seen(specification(1, 8))
    for _ in range(20):
        assert seen.count(counts=(1,), queued=5, running=0, for_s=BACKLOG_S - 1) == 1
        assert seen.count(queued=0) == 1


def test_only_what_waited_all_the_time_counts_as_backlog() -> None:
    seen = Seen(specification(1, 100))
    seen.look(counts=(1,), queued=2, running=1, for_s=BACKLOG_S)
    assert seen.count(queued=50) == 3


@pytest.mark.parametrize("maximum", [1, 3])
def test_never_more_than_the_maximum(maximum: int) -> None:
    seen = Seen(specification(0, maximum))
    assert seen.count(queued=10_000, for_s=600) <= maximum
    assert seen.count(counts=(maximum + 2,), for_s=600) == maximum


def test_high_utilisation_multiplies_the_instances_step_by_step() -> None:
    seen = Seen(specification(1, 100))
    assert seen.look(counts=(10,), running=8, for_s=STEP_S) == Decision(counts=(12,), reason="utilisation")
    # Its effect is to be seen before the next step.
    assert seen.count(counts=(12,), slots=10, running=10, for_s=600) == 12
    assert seen.count(counts=(12,), running=12, for_s=STEP_S - 1) == 12
    assert seen.count(for_s=2) == 15


def test_a_factor_gives_what_it_says() -> None:
    """10 * 1.1 is not 11 to a computer."""
    own = Autoscaling(up=Scaling(factor=1.1, threshold=70), down=Scaling(factor=0.7, threshold=30))
    assert Seen(specification(1, 100, own=own)).count(counts=(10,), running=10, for_s=STEP_S) == 11
    assert Seen(specification(1, 100, own=own)).count(counts=(10,), running=1, for_s=WINDOW_S) == 7


def test_middling_utilisation_changes_nothing() -> None:
    assert Seen(specification(1, 100)).look(counts=(10,), running=5, for_s=600) == Decision(counts=(10,))


def test_utilisation_is_that_of_slots() -> None:
    assert Seen(specification(1, 100, slots=10)).count(counts=(1,), running=8, for_s=STEP_S) == 2
    assert Seen(specification(1, 100, slots=10)).count(counts=(1,), running=6, for_s=STEP_S) == 1


# -- down ----------------------------------------------------------------------------------------


def test_low_utilisation_takes_instances_away_step_by_step_and_leaves_one() -> None:
    seen = Seen(specification(0, 100))
    seen.look(queued=1)
    counts, count = [], 10
    for _ in range(12):
        # Something runs now and then: it is not idle.
        count = seen.count(counts=(count,), running=1, queued=0) if count > 3 else count
        count = seen.count(counts=(count,), running=0, for_s=WINDOW_S)
        counts.append(count)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 8
    assert counts[-1] in (0, 1)


def test_no_step_down_goes_below_what_is_needed() -> None:
    own = Autoscaling(down=Scaling(factor=0.1, threshold=60))
    assert Seen(specification(0, 100, own=own)).count(counts=(10,), running=5, for_s=600) == 10
    assert Seen(specification(0, 100, own=own)).count(counts=(2,), running=1, for_s=600) == 2


def test_nothing_goes_that_what_waits_could_need() -> None:
    assert Seen(specification(0, 100)).count(counts=(4,), queued=4, for_s=600) == 4


def test_a_request_that_nobody_can_take_does_not_keep_all_of_them() -> None:
    assert Seen(specification(0, 100)).count(counts=(4,), queued=1, for_s=600) == 3


def test_idleness_leaves_the_minimum() -> None:
    for minimum in (0, 2):
        seen = Seen(specification(minimum, 8))
        seen.look(counts=(4,), running=1)
        assert seen.count(running=0, for_s=1) == 4
        decided = seen.look(counts=(4,), for_s=IDLE_S)
        assert decided == Decision(counts=(minimum,), reason="idle")


def test_one_request_begins_the_idle_time_again() -> None:
    seen = Seen(specification(0, 1))
    for _ in range(5):
        assert seen.count(counts=(1,), running=0, for_s=IDLE_S - 2) == 1
        assert seen.count(running=1) == 1


def test_never_fewer_than_the_minimum() -> None:
    seen = Seen(specification(3, 8))
    assert seen.count(counts=(8,), for_s=10 * WINDOW_S) >= 3
    assert seen.count(counts=(0,)) == 3


# -- what is not known ---------------------------------------------------------------------------


def test_what_was_not_looked_at_takes_nothing_away() -> None:
    seen = Seen(specification(0, 8))
    assert seen.count(counts=(4,), for_s=3600, every_s=GAP_S + 1) == 4
    assert seen.count(for_s=WINDOW_S - 1) == 4


def test_an_instance_that_does_not_report_takes_nothing_away() -> None:
    seen = Seen(specification(0, 8))
    assert seen.count(counts=(4,), complete=False, for_s=3600) == 4
    assert seen.count(complete=True, for_s=WINDOW_S - 2) == 4
    assert seen.count(for_s=3600) == 0


def test_without_slots_there_is_no_utilisation() -> None:
    assert Seen(specification(1, 8)).look(counts=(4,), slots=0, running=0, for_s=WINDOW_S + 5) == Decision(counts=(4,))


# -- policies ------------------------------------------------------------------------------------


def test_a_missing_half_of_a_policy_is_the_platforms() -> None:
    up, down = Scaling(factor=2.0, threshold=50), Scaling(factor=0.5, threshold=10)
    assert policy(None) == (PLATFORM_UP, PLATFORM_DOWN)
    assert policy(Autoscaling(up=up)) == (up, PLATFORM_DOWN)
    assert policy(Autoscaling(down=down)) == (PLATFORM_UP, down)
    assert policy(Autoscaling(up=up, down=down)) == (up, down)


@pytest.mark.parametrize("threshold", [30, 10])
def test_thresholds_without_room_between_them_are_not_followed(threshold: int) -> None:
    up = Scaling(factor=2.0, threshold=threshold)
    assert policy(Autoscaling(up=up)) == (PLATFORM_UP, PLATFORM_DOWN)


def test_a_users_thresholds_and_factors_are_followed() -> None:
    own = Autoscaling(up=Scaling(factor=3.0, threshold=20), down=Scaling(factor=0.5, threshold=15))
    assert Seen(specification(0, 100, own=own)).count(counts=(10,), running=3, for_s=STEP_S) == 30
    assert Seen(specification(0, 100, own=own)).count(counts=(10,), running=1, for_s=WINDOW_S) == 5


def sticky(size: str, threshold: str) -> Autoscaling:
    return Autoscaling(
        up=Scaling(factor=2.0, threshold=70, stickiness=Stickiness(size=size, threshold=threshold)),
        down=Scaling(factor=0.5, threshold=30, stickiness=Stickiness(size=size, threshold=threshold)),
    )


def test_a_sticky_policy_goes_up_once_it_was_high_for_long_enough() -> None:
    seen = Seen(specification(1, 100, own=sticky("PT10M", "PT5M")))
    assert seen.count(counts=(4,), running=4, for_s=290) == 4
    assert seen.count(running=2, for_s=60) == 4
    assert seen.count(running=4, for_s=30) == 8


def test_a_sticky_policy_forgets_what_is_older_than_its_size() -> None:
    seen = Seen(specification(1, 100, own=sticky("PT10M", "PT5M")))
    for _ in range(6):
        assert seen.count(counts=(4,), running=4, for_s=200) == 4
        assert seen.count(running=2, for_s=400) == 4


def test_a_sticky_policy_goes_down_after_its_whole_size() -> None:
    seen = Seen(specification(0, 100, own=sticky("PT20M", "PT15M")))
    seen.look(counts=(4,), running=1, for_s=1)
    assert seen.count(counts=(8,), for_s=1190) == 8
    assert seen.count(for_s=30) == 4


def test_a_long_history_stays_small() -> None:
    history = History(keep_s=3600)
    for second in range(8000):
        history.add(Reading(at=second, queued=0, running=2, counts=(4,), slots=4))
    assert len(history._recent) + len(history._older) < 320
    assert history.seconds(8000, within_s=3600, above=49, below=51) == 3599


# -- several specifications ----------------------------------------------------------------------


def several() -> Iterable[GpuSpecification]:
    return specification(0, 2, order=2), specification(1, 2, slots=4), specification(0, 4, order=3)


def test_more_come_in_the_preferred_order_and_the_last_go_first() -> None:
    seen = Seen(*several())
    assert seen.look().counts == (0, 1, 0)
    assert seen.look(counts=(0, 1, 0), queued=5, for_s=BACKLOG_S).counts == (0, 2, 0)
    assert seen.look(queued=9).counts == (0, 2, 0)
    assert seen.look(for_s=BACKLOG_S).counts == (1, 2, 0)
    assert seen.look(queued=100, for_s=BACKLOG_S).counts == (2, 2, 4)
    assert seen.look(counts=(2, 2, 4), queued=0, for_s=WINDOW_S).counts == (2, 2, 2)
    assert seen.look(for_s=IDLE_S).counts == (0, 1, 0)
