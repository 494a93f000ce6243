"""A short run of `make chaos`, with its seed fixed: what the machine makes of it differs all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.chaos import Plan, run


@pytest.mark.servers
@pytest.mark.timeout(900)
async def test_no_promise_is_broken_while_faults_strike_everything_at_random(programs: None, tmp_path: Path) -> None:
    report = await run(Plan(requests=300, faults=5, seed=2475), tmp_path)
    assert not report.broken, str(report)
    assert report.endings["fulfilled"] > 0
