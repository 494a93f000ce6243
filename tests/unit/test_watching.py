"""What the command line says of a request that goes on."""

from __future__ import annotations

import pytest

from fnqueue.events import Done, Eta, Queued, Running
from fnqueue.invoke import described


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Queued(), "queued"),
        (Queued(position=3, length=7), "queued, 3 of 7"),
        (
            Queued(position=3, length=7, eta=Eta(p50_s=4.6, p90_s=9.2)),
            "queued, 3 of 7, done in about 5 s (9 in 10: 9 s)",
        ),
        (Queued(eta=Eta(p50_s=0.2, p90_s=170.0)), "queued, done in about 1 s (9 in 10: 3 min)"),
        (Queued(eta=Eta(p50_s=3600.0, p90_s=18_000.0)), "queued, done in about 60 min (9 in 10: 5 h)"),
        (Running(attempt=2, percent=40), "running, attempt 2, 40 %"),
        (Done(status="fulfilled", status_code=200), "fulfilled"),
    ],
)
def test_an_event_is_told_in_a_line(event: Queued | Running | Done, line: str) -> None:
    assert described(event) == line
