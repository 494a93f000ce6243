"""Transfers once, in small: that both ways are measured, not how fast they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import transfers


@pytest.mark.servers
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_a_short_run_compares_both_ways_with_curl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "DATA", tmp_path)
    printed = CliRunner().invoke(transfers.main, ["--mib", "2", "--rounds", "1"])
    assert printed.exit_code == 0, printed.output
    found = json.loads(printed.output)
    assert found["asset_of_curl"] > 0
    assert found["result_of_curl"] > 0
    assert list(tmp_path.iterdir()) == []
