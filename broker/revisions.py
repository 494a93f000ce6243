"""Change one row of the catalog under optimistic revisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from broker.errors import RevisionConflict
from broker.ports import Table

T = TypeVar("T")

TRIES = 10


async def edit(table: Table[T], key: str, change: Callable[[T], T], *, missing: T | None = None) -> T | None:
    """Store `change(row)` and return it; None when there is no such row and nothing `missing` to start from.

    `change` runs again on the newer row whenever somebody else wrote first. Nothing is written when it returns
    its argument unchanged, or raises.

    Raises:
        RevisionConflict: others wrote first `TRIES` times in a row.
    """
    for _ in range(TRIES):
        row = await table.get(key)
        before = row.item if row else missing
        if before is None:
            return None
        item = change(before)
        if item == before:
            return item
        try:
            await table.put(item, revision=row.revision if row else 0)
        except RevisionConflict:
            continue
        return item
    raise RevisionConflict(f"{key} keeps being changed by others; try again")
