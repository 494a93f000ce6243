"""What is known of a request while it is answered."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from api.headers import Head
from broker.model import Record, Taken


class Notes:
    """For whoever answers, counts or logs it. One key of the request for all: each is looked for with every request,
    and most are seldom there."""

    record: Record | None = None
    """Set by the handlers of an invocation."""
    taken: Taken | None = None
    """Set by the handler of an invocation before it may refuse it: where the function's rate limits stand."""
    head: Head | None = None
    """What its headers say, once somebody has asked."""
    route: str | None = None
    """Set by what serves a request without the router: the template of the path that it has there."""
    task: asyncio.Task[Any] | None = None
    """Set by what serves a request in a task that is cancelled by `Calls.abandon` only: that task."""
    invokes: bool | None = None
    """Set by what invokes by any method; otherwise a POST does."""
    refused: tuple[str, str] | None = None
    """Why it was refused, where another time or another server would have done: the problem's type, and the limit
    met."""


NOTES = web.RequestKey("notes", Notes)


def notes_of(request: web.Request) -> Notes:
    known = request.get(NOTES)
    if known is None:
        known = request[NOTES] = Notes()
    return known
