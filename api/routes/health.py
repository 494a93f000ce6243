"""Whether this server is up (`/livez`), and of use (`/health`, `/readyz`). Open to all."""

from __future__ import annotations

from aiohttp import web

from api import problems
from api.front import Front

_OK = b'{"status":"OK"}'


async def health(front: Front, request: web.Request) -> web.Response:
    """Upstream's: 500 while no invocation could be accepted."""
    return _answer(await front.health.fault(), problems.INTERNAL)


async def ready(front: Front, request: web.Request) -> web.Response:
    """503 too once this server is stopping."""
    fault = "this server is stopping" if front.calls.stopping else await front.health.fault()
    return _answer(fault, problems.NOT_READY)


async def live(front: Front, request: web.Request) -> web.Response:
    return _answer("", problems.INTERNAL)


def _answer(fault: str, kind: problems.Kind) -> web.Response:
    if not fault:
        return web.Response(body=_OK, content_type="application/json")
    extra = {"Retry-After": "1"} if kind.status == 503 else {}
    return problems.respond(kind.status, problems.body(kind, fault), extra=extra)
