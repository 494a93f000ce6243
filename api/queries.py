"""Query parameters of the management routes."""

from __future__ import annotations

from multidict import MultiMapping

from broker.errors import BadRequest

_YES = frozenset({"true", "1", "yes", "on"})
_NO = frozenset({"false", "0", "no", "off"})


def words(query: MultiMapping[str], name: str) -> list[str]:
    """Both spellings of a list: `?name=a,b` and `?name=a&name=b`."""
    return [word.strip() for value in query.getall(name, []) for word in value.split(",") if word.strip()]


def boolean(query: MultiMapping[str], name: str, *, absent: bool) -> bool:
    """In any of the usual spellings; given without a value it counts as absent. Raises BadRequest."""
    word = query.get(name, "").strip().lower()
    if word and word not in _YES | _NO:
        raise BadRequest(f"{name}: must be true or false", field=name)
    return word in _YES if word else absent
