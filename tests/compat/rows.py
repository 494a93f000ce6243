"""The rows of NVCF's contract, and what covers each: scenarios that name it, other tests, or a deliberate difference.

A file under `rows/` maps a row to its gist, or to an object of
    gist     what the row says
    tests    tests that show it, as pytest names them, below `tests/`
    differs  the heading of docs/differences.md that says what we do otherwise
A row that a scenario names needs neither.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.compat.scenarios import HERE, Scenario, load

TESTS = HERE.parent
DIFFERENCES = TESTS.parent / "docs" / "differences.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    id: str
    gist: str
    tests: tuple[str, ...] = ()
    differs: str = ""


def read_rows(folder: Path = HERE / "rows") -> list[Row]:
    return [_row(name, said) for path in sorted(folder.glob("*.yaml")) for name, said in load(path).items()]


def faults(rows: Sequence[Row], scenarios: Iterable[Scenario], headings: Iterable[str]) -> list[str]:
    """Why the rows do not all stand: one sentence for each that does not."""
    known, headings = {row.id for row in rows}, set(headings)
    played = {name for scenario in scenarios for name in scenario.rows}
    found = [f"{name}: a scenario names it, and there is no such row" for name in sorted(played - known)]
    if len(known) < len(rows):
        found.append("a row is there twice")
    for row in rows:
        if not (row.tests or row.differs or row.id in played):
            found.append(f"{row.id}: nothing covers it")
        if row.differs and row.differs not in headings:
            found.append(f"{row.id}: there is no heading #{row.differs}")
        found += [f"{row.id}: there is no test {test}" for test in row.tests if not _exists(test)]
    return found


def headings(page: Path = DIFFERENCES) -> list[str]:
    """Anchors of the differences, as GitHub makes them."""
    titles = re.findall(r"^### (.+)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-") for title in titles]


def _row(name: str, said: Any) -> Row:
    if isinstance(said, str):
        return Row(id=name, gist=said)
    return Row(id=name, **{**said, "tests": tuple(said.get("tests", ()))})


def _exists(test: str) -> bool:
    path, _, name = test.partition("::")
    return name in _functions(TESTS / path)


@cache
def _functions(path: Path) -> frozenset[str]:
    if not path.exists():
        return frozenset()
    defined = ast.walk(ast.parse(path.read_text()))
    return frozenset(node.name for node in defined if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
