"""Every row of what must not go wrong is shown by a test that is there, or says what is missing."""

from __future__ import annotations

from pathlib import Path

from tests.compat.rows import Row, faults
from tests.compat.scenarios import load

ROWS = Path(__file__).parent / "rows.yaml"
NUMBERS = range(1, 65)


def test_every_row_has_tests_or_says_what_is_missing() -> None:
    said = load(ROWS)
    assert sorted(said) == list(NUMBERS)
    rows = {
        number: Row(id=str(number), gist=row["gist"], tests=tuple(row.get("tests", ()))) for number, row in said.items()
    }
    assert not faults([row for row in rows.values() if row.tests], [], [])
    assert [number for number, row in rows.items() if not row.tests and not said[number].get("open")] == []
