"""Every row of the contract is covered, and everything that is said to cover one is there."""

from __future__ import annotations

from tests.compat.rows import Row, faults, headings, read_rows
from tests.compat.scenarios import read_all


def test_every_row_of_the_contract_is_covered() -> None:
    assert not faults(read_rows(), read_all(), headings())


def test_every_difference_is_one_of_a_row() -> None:
    assert set(headings()) == {row.differs for row in read_rows() if row.differs}


def test_what_covers_nothing_is_found() -> None:
    rows = [
        Row(id="a", gist="left out"),
        Row(id="b", gist="moved", differs="nowhere"),
        Row(id="c", gist="renamed", tests=("unit/test_docs.py::test_that_is_gone", "unit/gone.py::test_it")),
        Row(id="d", gist="fine", tests=("compat/test_rows.py::test_what_covers_nothing_is_found",), differs="here"),
    ]
    assert len(faults(rows, [], ["here"])) == 4
