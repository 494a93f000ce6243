"""Times in steps, and the route that tells what a version did lately."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

import pytest

from broker.activity import STEPS, Histogram, bounds_s, merged, step_of
from tests.unit.test_server import NVCF, SPARE, House, opened


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path) as running:
        yield running


def histogram(*times_s: float) -> Histogram:
    return merged(Histogram(sum_s=time_s, counts={step_of(time_s): 1}) for time_s in times_s)


@pytest.mark.parametrize("time_s", [0.0, 0.0004, 0.001, 0.0013, 0.25, 1.0, 59.9, 3600.0, 86_400.0])
def test_a_time_is_in_its_step(time_s: float) -> None:
    low, high = bounds_s(step_of(time_s))
    assert low <= time_s <= high
    assert step_of(high * 1.001) == step_of(time_s) + 1


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_percentiles_are_exact_to_a_step(share: float) -> None:
    times_s = [1.01**number for number in range(1, 1001)]
    exact = times_s[max(0, round(share * len(times_s)) - 1)]
    assert histogram(*times_s).quantile(share) == pytest.approx(exact, rel=2 ** (1 / STEPS) - 1)


def test_nothing_has_no_percentiles() -> None:
    assert histogram().quantile(0.5) == 0
    assert (histogram().count, histogram().sum_s) == (0, 0)


def test_what_is_merged_counts_together() -> None:
    both = merged([histogram(1, 1, 30), histogram(1)])
    assert (both.count, both.sum_s, both.counts[step_of(1)]) == (4, 33, 3)


async def test_a_version_tells_what_it_did(house: House) -> None:
    first, *_ = [await house.submit() for _ in range(3)]
    await house.client.delete(f"{NVCF}/requests/{first}")
    delivery = await house.broker.queue.take(SPARE.rpartition("/")[2])
    assert delivery is not None
    await delivery.ack()
    await house.finish()
    async with house.client.get(f"{NVCF}/{SPARE}/activity?minutes=2") as response:
        told = await response.json()
    ends: dict[str, int] = {}
    for minute in told["minutes"]:
        assert (datetime.fromisoformat(told["until"]) - datetime.fromisoformat(minute["startsAt"])).seconds in (60, 120)
        for state, count in minute["ends"].items():
            ends[state] = ends.get(state, 0) + count
    assert ends == {"cancelled": 1, "fulfilled": 1}
    assert sum(minute["attempts"] for minute in told["minutes"]) == 1
    [run] = [minute["run"] for minute in told["minutes"] if "run" in minute]
    assert run["count"] == 1
    assert 0 <= run["p50Seconds"] <= run["p90Seconds"] <= run["p99Seconds"]


async def test_a_version_that_did_nothing_has_no_minutes(house: House) -> None:
    async with house.client.get(f"{NVCF}/{SPARE}/activity") as response:
        assert (response.status, (await response.json())["minutes"]) == (200, [])


@pytest.mark.parametrize("minutes", ["0", "1441", "-1", "many"])
async def test_minutes_have_bounds(house: House, minutes: str) -> None:
    async with house.client.get(f"{NVCF}/{SPARE}/activity?minutes={minutes}") as response:
        assert response.status == 400
        assert "from 1 to 1440" in (await response.json(content_type="application/problem+json"))["detail"]
