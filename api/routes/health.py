"""Whether this server is up (`/livez`), and of use (`/health`, `/readyz`). Open to all.

A front end without RabbitMQ stays ready: all of them are without it at once, and an orchestrator that takes all of them
away takes away results and polls, which need Redis alone, and refusals in words (decision 24).
"""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from api import problems
from api.front import STORE, Front

_OK = b'{"status":"OK"}'


async def health(front: Front, request: web.Request) -> web.Response:
    """Upstream's: 500 while no invocation could be accepted."""
    return _answer(_away(await front.health.away()), problems.INTERNAL)


async def ready(front: Front, request: web.Request) -> web.Response:
    """503 while nothing at all could be answered, and once this server is stopping. What else is away is named."""
    if front.calls.stopping:
        return _answer("this server is stopping", problems.NOT_READY)
    away = await front.health.away()
    if STORE in away:
        return _answer(_away(away), problems.NOT_READY)
    return web.json_response({"status": "OK", "away": away}) if away else _answer("", problems.NOT_READY)


async def live(front: Front, request: web.Request) -> web.Response:
    return _answer("", problems.INTERNAL)


def _away(servers: Sequence[str]) -> str:
    return f"the {' and the '.join(servers)} {'is' if len(servers) == 1 else 'are'} away" if servers else ""


def _answer(fault: str, kind: problems.Kind) -> web.Response:
    if not fault:
        return web.Response(body=_OK, content_type="application/json")
    extra = {"Retry-After": "1"} if kind.status == 503 else {}
    return problems.respond(kind.status, problems.body(kind, fault), extra=extra)
