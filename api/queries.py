"""Query parameters of the management routes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import datetime

from multidict import MultiMapping

from broker.errors import BadRequest

_YES = frozenset({"true", "1", "yes", "on"})
_NO = frozenset({"false", "0", "no", "off"})


def words(query: MultiMapping[str], name: str) -> list[str]:
    """Both spellings of a list: `?name=a,b` and `?name=a&name=b`."""
    return [word.strip() for value in query.getall(name, []) for word in value.split(",") if word.strip()]


def choices(query: MultiMapping[str], name: str, known: Collection[str]) -> list[str]:
    """A list, as `words`, of known words in any case. Raises BadRequest that names those there are."""
    return among(words(query, name), name, known)


def among(words: Iterable[str], name: str, known: Collection[str]) -> list[str]:
    """These words, in any case, which have to be known ones. Raises BadRequest that names those there are."""
    given = [word.lower() for word in words]
    if any(word not in known for word in given):
        raise BadRequest(f"{name}: must be of {', '.join(known)}", field=name)
    return given


def boolean(query: MultiMapping[str], name: str, *, absent: bool) -> bool:
    """In any of the usual spellings; given without a value it counts as absent. Raises BadRequest."""
    word = query.get(name, "").strip().lower()
    if word and word not in _YES | _NO:
        raise BadRequest(f"{name}: must be true or false", field=name)
    return word in _YES if word else absent


def integer(query: MultiMapping[str], name: str, *, absent: int, least: int, most: int) -> int:
    """Raises BadRequest that names the bounds."""
    text = query.get(name, "").strip()
    if not text:
        return absent
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and least <= int(text) <= most):
        raise BadRequest(f"{name}: must be a whole number from {least} to {most}", field=name)
    return int(text)


def instant(query: MultiMapping[str], name: str) -> float:
    """A time as RFC 3339 writes it, in unix seconds; 0 when absent. Raises BadRequest."""
    text = query.get(name, "").strip()
    if not text:
        return 0.0
    try:
        # A plus sign that was not escaped arrives as a blank.
        time = datetime.fromisoformat(text.replace(" ", "+"))
        seconds = time.timestamp() if time.tzinfo else 0.0
    except (ValueError, OverflowError):
        seconds = 0.0
    if seconds <= 0:
        raise BadRequest(f"{name}: must be a time with its offset, as 2026-01-31T08:00:00Z", field=name)
    return seconds
