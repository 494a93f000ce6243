"""Counting dead letters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from broker.model import DeadLetter, Tally


def tallied(letters: Iterable[DeadLetter]) -> list[Tally]:
    """By version and cause, the most frequent first."""
    died: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
    for letter in letters:
        died[letter.function_id, letter.version_id, letter.cause].append(letter.died_at)
    tallies = [
        Tally(
            function_id=function_id,
            version_id=version_id,
            cause=cause,
            count=len(times),
            first_at=min(times),
            last_at=max(times),
        )
        for (function_id, version_id, cause), times in died.items()
    ]
    return sorted(tallies, key=lambda tally: -tally.count)
