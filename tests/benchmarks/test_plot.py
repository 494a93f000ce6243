"""Bars of figures: every part as long as it is large, and all words there."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

from click.testing import CliRunner

from benchmarks import plot, report
from benchmarks.measure import Workload
from benchmarks.plot import Bar, bars, drawn
from benchmarks.summary import Summary

SUMMARY = Summary(
    workload=Workload.SYNC,
    concurrency=64,
    target="floor",
    rounds=1,
    completed=10,
    per_second=100.0,
    of_floor=1.0,
    p50_ms=1.0,
    p99_ms=2.0,
    added_p50_ms=0.0,
    added_p99_ms=0.0,
    polls=0,
    errors=0,
    lost=0,
    cpu_us={"container": 50.0},
)
SUMMARIES = [SUMMARY, replace(SUMMARY, target="fnqueue", of_floor=0.2, cpu_us={"api": 100.0, "container": 50.0})]


def test_a_part_twice_as_large_is_twice_as_long() -> None:
    picture = ET.fromstring(bars(("a panel", [Bar("one", {"a": 1.0, "b": 2.0}, "3"), Bar("two", {"b": 6.0}, "6")])))
    *parts, _, _ = [float(box.attrib["width"]) for box in _all(picture, "rect")[1:]]  # the last two are the legend's
    assert parts[1] == 2 * parts[0]
    assert parts[2] == 3 * parts[1]


def test_words_are_no_markup() -> None:
    assert "<b>" in [words.text for words in _all(ET.fromstring(bars(("<b>", []))), "text")]


def test_results_that_were_written_are_drawn_as_they_were_measured(tmp_path: Path) -> None:
    results, picture = tmp_path / "results.json", tmp_path / "picture.svg"
    results.write_text(report.as_json(report.document({}, SUMMARIES, [])))
    printed = CliRunner().invoke(plot.main, [str(results), str(picture)])
    assert printed.exit_code == 0, printed.output
    assert picture.read_text() == drawn(SUMMARIES)
    words = [one.text for one in _all(ET.fromstring(picture.read_text()), "text")]
    assert {"sync, 64: fnqueue", "0.200", "150", "api", "container"} <= set(words)


def test_other_json_is_one_clear_line(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"summaries": [{"workload": "sync"}]}))
    printed = CliRunner().invoke(plot.main, [str(results), str(tmp_path / "picture.svg")])
    assert (printed.exit_code, printed.output.count("\n")) == (1, 1)
    assert "is not what" in printed.output


def _all(picture: ET.Element, name: str) -> list[ET.Element]:
    return picture.findall(f"{{http://www.w3.org/2000/svg}}{name}")
