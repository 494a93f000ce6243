"""The rate limit of a version by itself (contract/management.md §1.4)."""

from __future__ import annotations

from aiohttp import web

from api import payloads
from api.front import Front
from api.limits import define
from api.routes import functions
from broker import limits
from broker.model import Principal, RateLimit
from fnqueue import wire


async def replace(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """Upstream calls this one deprecated: an update of the function does the same."""
    asked = await payloads.read(front, request, wire.SetRateLimit)
    return await _set(front, request, principal, define(asked))


async def clear(front: Front, request: web.Request, principal: Principal) -> web.Response:
    return await _set(front, request, principal, None)


async def _set(front: Front, request: web.Request, principal: Principal, limit: RateLimit | None) -> web.Response:
    function_id, version_id = functions.ids(request)
    await limits.set_rate_limit(front.broker, principal, function_id, version_id, limit)
    front.versions.forget(function_id)
    return web.Response(status=204)
