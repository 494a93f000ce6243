"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html): how one is written, and the
response that carries them.

A response that has begun cannot become a problem any more: whatever goes wrong in it ends it, and a client that comes
back with Last-Event-ID goes on where it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import web

from api import middleware
from api.calls import Interrupted
from api.front import Front
from broker.errors import Forbidden, Overloaded, Unauthenticated
from broker.model import EVENT_STREAM

logger = logging.getLogger(__name__)

RETRY_MS = 1000
# What a client may take to read 64 KiB, and how long one stream may go on before its client has to come again.
WRITE_S = 30.0
LONGEST_S = 3600.0

KEEP_ALIVE = b":\n\n"


def encode(name: str, data: bytes, *, event_id: str = "") -> bytes:
    """One event; `data` may have several lines. The ID goes only with what can be resumed after."""
    lines = [b"id: " + event_id.encode()] if event_id else []
    lines += [b"event: " + name.encode(), *(b"data: " + line for line in data.split(b"\n"))]
    return b"\n".join(lines) + b"\n\n"


class _Stuck(Exception):
    """The client does not read."""


async def serve(
    front: Front,
    request: web.Request,
    response: web.StreamResponse,
    events: AsyncGenerator[bytes, None],
    *,
    write_s: float = WRITE_S,
) -> web.StreamResponse:
    """Answer with `response` as an event stream of `events`, which are closed in the end. It ends with them, after
    LONGEST_S, when the client takes longer than `write_s` to read, when `events` finds it is let in no more
    (`api.auth.still`), or when this server stops.

    Raises:
        Overloaded: this server is stopping.
    """
    response.content_type = EVENT_STREAM
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Accel-Buffering"] = "no"
    middleware.mark(front, request, response)
    try:
        with front.calls.waiting():
            async with asyncio.timeout(LONGEST_S), aclosing(events):
                await _write(request, response, events, write_s)
    except Interrupted:
        if not response.prepared:
            raise Overloaded("this server is stopping; send the request again") from None
    except (TimeoutError, ConnectionError, Unauthenticated, Forbidden):
        pass
    except _Stuck:
        if request.transport is not None:
            request.transport.abort()
    except Exception:  # the outermost: nothing but the end can be said any more
        if not response.prepared:
            raise
        logger.exception("fault", extra={"method": request.method, "path": request.path})
    response.force_close()
    return response


async def _write(
    request: web.Request, response: web.StreamResponse, events: AsyncGenerator[bytes, None], write_s: float
) -> None:
    await response.prepare(request)
    await response.write(b"retry: %d\n\n" % RETRY_MS)
    async for event in events:
        try:
            async with asyncio.timeout(write_s):
                await response.write(event)
        except TimeoutError:
            raise _Stuck from None
