"""What a person reads, and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.measure import Measurement
from benchmarks.summary import Summary

COLUMNS = (
    "workload", "callers", "target", "requests/s", "of floor", "p50 ms", "p99 ms", "+p50 ms", "+p99 ms",
    "CPU µs", "errors", "lost",
)  # fmt: skip
MIB = 1 << 20
OURS = ("api", "sidecar")
NOTES = """\
Medians over rounds; ratio and added latency are taken within a round. CPU µs: of all processes of the target per
request, what they use when idle included, load generator left out. On a machine that does other work too, trust
ratios and CPU before requests/s."""


def text(facts: Mapping[str, str], summaries: Sequence[Summary]) -> str:
    width = max(len(name) for name in facts)
    parts = [
        "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()),
        _table([COLUMNS, *(_row(one) for one in summaries)]),
        _cpu_table(summaries),
    ]
    if compared := [line for one in summaries for line in _compared(one)]:
        parts.append("\n".join(compared))
    if fronts := [one for one in summaries if one.per_front_core]:
        parts.append("\n".join(_front(one) for one in fronts))
    if drained := [one for one in summaries if one.drain_s]:
        parts.append("\n".join(_drained(one) for one in drained))
    return "\n\n".join([*parts, NOTES])


def document(
    facts: Mapping[str, str], summaries: Sequence[Summary], measurements: Sequence[Measurement]
) -> dict[str, Any]:
    """Everything, with units in the names."""
    return {
        "facts": dict(facts),
        "summaries": [asdict(one) for one in summaries],
        "measurements": [asdict(one) for one in measurements],
    }


def as_json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"


def faults(measurements: Sequence[Measurement]) -> list[str]:
    """One line per burst that was not clean."""
    return [
        f"{one.target}, {one.workload} by {one.concurrency}, round {one.round}: {one.completed} completed, "
        f"{one.lost} lost, errors {one.errors or 'none'}" + "".join(f"\n    {example}" for example in one.examples)
        for one in measurements
        if one.faults
    ]


def _row(one: Summary) -> tuple[str, ...]:
    return (
        one.workload,
        str(one.concurrency),
        one.target,
        f"{one.per_second:,.0f}",
        f"{one.of_floor:.3f}",
        f"{one.p50_ms:.2f}",
        f"{one.p99_ms:.2f}",
        f"{one.added_p50_ms:.2f}",
        f"{one.added_p99_ms:.2f}",
        f"{one.all_cpu_us:,.0f}",
        str(one.errors),
        str(one.lost),
    )


def _cpu_table(summaries: Sequence[Summary]) -> str:
    roles = list(dict.fromkeys(role for one in summaries for role in one.cpu_us))
    head = ("CPU µs/request", "callers", "target", *roles)
    rows = [
        (
            one.workload,
            str(one.concurrency),
            one.target,
            *(f"{one.cpu_us[role]:,.0f}" if role in one.cpu_us else "" for role in roles),
        )
        for one in summaries
    ]
    return _table([head, *rows])


def _compared(one: Summary) -> list[str]:
    return [
        f"{one.workload} by {one.concurrency}: {one.target} has {ratio:.2f} x the requests/s of {other}, for "
        f"{one.cpu_of[other]:.2f} x the CPU"
        for other, ratio in one.of.items()
        if not one.target.endswith("pipe")
    ]


def _front(one: Summary) -> str:
    """Memory in MiB, of the processes that are ours."""
    memory = ", ".join(
        f"{role} {one.resident_bytes[role][0] / MIB:.0f} -> {one.resident_bytes[role][1] / MIB:.0f}"
        for role in OURS
        if role in one.resident_bytes
    )
    return (
        f"{one.workload} by {one.concurrency}, {one.target}: {one.per_front_core:,.0f} requests/s for each core that "
        f"the front end uses; resident MiB before and after: {memory}"
    )


def _drained(one: Summary) -> str:
    return (
        f"{one.workload} by {one.concurrency}, {one.target}: all results read {one.drain_s:.1f} s after the last 202, "
        f"{one.finished_per_second:,.0f} finished/s from the first request on"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Words to the left, numbers to the right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    left = {0, 2}
    lines = [
        "  ".join(
            cell.ljust(width) if at in left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
