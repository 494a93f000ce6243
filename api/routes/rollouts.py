"""How a function's calls are shared among its versions."""

from __future__ import annotations

from collections.abc import Iterable

from aiohttp import web

from api import headers, payloads
from api.front import Front
from broker import rollouts
from broker.model import Principal, Version
from fnqueue import wire


async def get(front: Front, request: web.Request, principal: Principal) -> web.Response:
    function_id = headers.uuid(request.match_info["function_id"], field="functionId")
    return _answer(function_id, await rollouts.get(front.broker, principal, function_id))


async def put(front: Front, request: web.Request, principal: Principal) -> web.Response:
    function_id = headers.uuid(request.match_info["function_id"], field="functionId")
    asked = await payloads.read(front, request, wire.SetWeights)
    weights = {headers.uuid(each.function_version_id, field="functionVersionId"): each.weight for each in asked.weights}
    shared = await rollouts.set_weights(front.broker, principal, function_id, weights)
    front.versions.forget(function_id)
    return _answer(function_id, shared)


def _answer(function_id: str, shared: Iterable[tuple[Version, float]]) -> web.Response:
    weights = [
        wire.VersionShare(
            function_version_id=version.id,
            function_status=version.status.value,
            weight=version.weight,
            share=round(share, 2),
        )
        for version, share in shared
    ]
    return payloads.answer(wire.Weights(function_id=function_id, weights=weights))
