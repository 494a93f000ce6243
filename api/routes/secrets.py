"""Secrets of function versions (contract/management.md §6.1): written here, and read by nobody but containers."""

from __future__ import annotations

from aiohttp import web

from api import headers, payloads
from api.definitions import plains
from api.front import Front
from broker import secrets
from broker.model import Principal
from fnqueue import wire


async def put(front: Front, request: web.Request, principal: Principal) -> web.Response:
    function_id = headers.uuid(request.match_info["function_id"], field="functionId")
    version_id = headers.uuid(request.match_info["version_id"], field="functionVersionId")
    asked = await payloads.read(front, request, wire.PutSecrets)
    await secrets.put(front.broker, principal, function_id, version_id, plains(asked.secrets))
    return web.Response(status=204)
