"""The whole benchmark once, for a blink: that it measures, not what."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
QUICK = ["--rounds", "1", "--seconds", "0.3", "--concurrency", "4"]


def test_a_short_embedded_run_gives_clean_ratios_for_every_workload(tmp_path: Path) -> None:
    output = tmp_path / "benchmark.json"
    done = bench("--embedded", *QUICK, "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    measured = [one for one in found["summaries"] if one["target"] == "embedded"]
    assert [one["workload"] for one in measured] == ["sync", "submit", "status"]
    for one in found["summaries"]:
        assert (one["errors"], one["lost"]) == (0, 0)
        assert one["of_floor"] > 0
        assert one["completed"] > 0
        assert one["p50_ms"] <= one["p99_ms"]
    assert {"cpu", "python", "commit", "settings", "run"} <= found["facts"].keys()
    assert "of floor" in done.stdout


def test_a_bad_option_is_one_clear_line() -> None:
    done = bench("--workload", "sync,fast")
    assert done.returncode == 2
    assert "known, to be separated by commas, are sync, large, submit, status" in done.stderr
    assert "Traceback" not in done.stderr


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *options]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False)
