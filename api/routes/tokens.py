"""Delegated invocation tokens (contract/invocation.md §1.1): a key's holder lets somebody invoke a few functions."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from api import auth, headers, payloads
from api.front import Front
from broker import functions
from broker.model import Principal
from fnqueue import wire

Named = tuple[str, str]


async def create(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """For the function or version of the path, and nothing else. Ends with the key that asks for it."""
    named = request.match_info
    function_id = headers.uuid(named["function_id"], field="functionId")
    version_id = headers.uuid(named["version_id"], field="functionVersionId") if "version_id" in named else ""
    asked = await payloads.read(front, request, wire.CreateToken)
    return await _answer(front, request, principal, asked.client_id, [(function_id, version_id)])


async def create_for_functions(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """For up to four functions or versions, and nothing else. Ends with the key that asks for it."""
    asked = await payloads.read(front, request, wire.CreateTokenForFunctions)
    named = [(str(each.function_id), str(each.function_version_id or "")) for each in asked.functions]
    return await _answer(front, request, principal, asked.client_id, named)


async def _answer(
    front: Front, request: web.Request, principal: Principal, client_id: str, named: Sequence[Named]
) -> web.Response:
    for function_id, version_id in named:
        await _require_visible(front, principal, function_id, version_id)
    token, lives_s = await front.authenticator.delegate(
        auth.token(request.headers),
        client_id=client_id,
        functions=[f"function/{function_id}/{version_id or '*'}" for function_id, version_id in named],
        ttl_s=front.settings.invocation_token_ttl_s,
    )
    return payloads.answer(wire.InvocationToken(access_token=token, expires_in=int(lives_s)))


async def _require_visible(front: Front, principal: Principal, function_id: str, version_id: str) -> None:
    """Raises NotFound, or Forbidden when the key does not cover it."""
    if version_id:
        await functions.get(front.broker, principal, function_id, version_id)
    else:
        await functions.list_versions(front.broker, principal, function_id)
