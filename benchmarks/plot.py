"""`python -m benchmarks.plot RESULTS.json PICTURE.svg`: what `python -m benchmarks --output` wrote, as bars.

SVG by hand: it is a few rectangles and words, the same bytes for the same figures, and readable in a diff.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import click

from benchmarks.measure import Workload
from benchmarks.summary import Summary

WIDTH, LEFT, RIGHT = 860, 230, 90
BAR, GAP, HEAD, MARGIN = 16, 6, 34, 12
# Told apart by people who see colours otherwise, too (Okabe and Ito).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999")


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of a panel: what it is called, its parts by name, and what is written behind it."""

    label: str
    parts: Mapping[str, float]
    told: str


@click.command()
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("picture", type=click.Path(dir_okay=False, writable=True, path_type=Path))
def main(results: Path, picture: Path) -> None:
    """Draw requests/s as ratios to the floor, and CPU per request by process."""
    try:
        picture.write_text(drawn(read(json.loads(results.read_text()))))
    except (KeyError, TypeError, ValueError) as exc:
        raise click.ClickException(f"{results} is not what `python -m benchmarks --output` writes: {exc!r}") from exc


def read(document: Mapping[str, Any]) -> list[Summary]:
    """The summaries of `report.document`. Raises KeyError, TypeError or ValueError."""
    names = {one.name for one in fields(Summary)}
    return [
        Summary(
            **{name: value for name, value in one.items() if name in names} | {"workload": Workload(one["workload"])}
        )
        for one in document["summaries"]
    ]


def drawn(summaries: Sequence[Summary]) -> str:
    behind = [one for one in summaries if one.target != "floor"]
    return bars(
        ("Requests/s, as a part of the floor's", [_rate(one) for one in behind]),
        ("CPU per request by process, µs", [_cpu(one) for one in summaries]),
    )


def bars(*panels: tuple[str, Sequence[Bar]]) -> str:
    """An SVG of panels of horizontal bars, one below the other, with one legend for all parts that have names."""
    names = list(dict.fromkeys(name for _, rows in panels for bar in rows for name in bar.parts if name))
    colours = {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(names)}
    parts: list[str] = []
    top = MARGIN
    for title, rows in panels:
        parts.append(_text(MARGIN, top + BAR, title, weight="bold"))
        top += HEAD
        longest = max((sum(bar.parts.values()) for bar in rows), default=0.0) or 1.0
        for bar in rows:
            parts.extend(_row(bar, top, (WIDTH - LEFT - RIGHT) / longest, colours))
            top += BAR + GAP
        top += MARGIN
    left = MARGIN
    for name in names:
        parts.append(_box(left, top, BAR, colours[name]))
        parts.append(_text(left + BAR + GAP, top + BAR - 4, name))
        left += BAR + 4 * GAP + 7 * len(name)
    height = top + BAR + MARGIN
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12" fill="#222">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>"]) + "\n"


def _rate(one: Summary) -> Bar:
    return Bar(_label(one), {"": one.of_floor}, f"{one.of_floor:.3f}")


def _cpu(one: Summary) -> Bar:
    return Bar(_label(one), one.cpu_us, f"{one.all_cpu_us:,.0f}")


def _label(one: Summary) -> str:
    return f"{one.workload}, {one.concurrency}: {one.target}"


def _row(bar: Bar, top: float, scale: float, colours: Mapping[str, str]) -> list[str]:
    left, parts = float(LEFT), [_text(LEFT - GAP, top + BAR - 4, bar.label, anchor="end")]
    for name, value in bar.parts.items():
        parts.append(_box(left, top, value * scale, colours.get(name, COLOURS[0])))
        left += value * scale
    return [*parts, _text(left + GAP, top + BAR - 4, bar.told)]


def _box(left: float, top: float, width: float, colour: str) -> str:
    return f'<rect x="{left:.1f}" y="{top:g}" width="{width:.1f}" height="{BAR}" fill="{colour}"/>'


def _text(left: float, base: float, words: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{left:.1f}" y="{base:g}" text-anchor="{anchor}" font-weight="{weight}">{escape(words)}</text>'


if __name__ == "__main__":
    main()
