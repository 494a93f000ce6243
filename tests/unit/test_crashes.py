"""How many payloads explain the crashes of one worker."""

from __future__ import annotations

import pytest

from broker.crashes import payloads
from broker.model import Crash


def crash(requests: str, ended_at: float, *, began_at: float = 0.0, origin: str = "a") -> list[Crash]:
    """Of one moment, a letter for each request; they began a second before it unless told."""
    began_at = began_at or ended_at - 1
    return [
        Crash(request_id=letter, origin=origin, began_at=began_at, ended_at=ended_at + number / 100)
        for number, letter in enumerate(requests)
    ]


def test_nothing_is_held_against_one_that_never_crashed() -> None:
    assert payloads([]) == 0


@pytest.mark.parametrize(
    ("crashes", "count"),
    [
        pytest.param(["x", "y", "z"], 3, id="three, one after the other"),
        pytest.param(["x", "x", "x"], 1, id="one that comes back"),
        pytest.param(["x", "y", "x", "y"], 2, id="two that come back in turn"),
        pytest.param(["abcdefgh"], 1, id="all that ran there at one time"),
        pytest.param(["axb", "cxd", "exf"], 1, id="one among bystanders"),
        pytest.param(["ax", "bc", "xd", "e"], 3, id="one of three among bystanders"),
        pytest.param(["ab", "cd", "bc"], 1, id="linked by a later one"),
    ],
)
def test_payloads_are_counted_and_not_crashes(crashes: list[str], count: int) -> None:
    seen = [one for at, requests in enumerate(crashes, start=1) for one in crash(requests, at * 10.0)]
    assert payloads(seen) == count
    assert payloads(reversed(seen)) == count


def test_what_began_before_a_crash_and_is_seen_later_belongs_to_it() -> None:
    """As the leases of a sidecar that was killed run out one by one."""
    leases = [*crash("a", 15, began_at=1), *crash("b", 19, began_at=5), *crash("c", 14, began_at=3)]
    assert payloads(leases) == 1
    assert payloads([*leases, *crash("d", 40, began_at=20)]) == 2


def test_clocks_of_different_origins_are_not_compared() -> None:
    assert payloads([*crash("x", 10.0, origin="a"), *crash("y", 9.5, origin="b"), *crash("z", 1e9, origin="")]) == 3
