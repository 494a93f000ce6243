"""Query parameters of the management routes."""

from __future__ import annotations

from aiohttp import web

from broker.errors import BadRequest

_YES = frozenset({"true", "1", "yes", "on"})
_NO = frozenset({"false", "0", "no", "off"})


def boolean(request: web.Request, name: str, *, default: bool) -> bool:
    """In the usual spellings and any case; absent or empty is `default`. Raises BadRequest."""
    word = request.query.get(name, "").strip().lower()
    if word and word not in _YES | _NO:
        raise BadRequest(f"{name}: must be true or false", field=name)
    return word in _YES if word else default


def words(request: web.Request, name: str) -> list[str]:
    """Both spellings of a list: `?name=a,b` and `?name=a&name=b`."""
    values = request.query.getall(name, [])
    return [word.strip() for value in values for word in value.split(",") if word.strip()]
