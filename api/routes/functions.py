"""Functions and their versions (contract/management.md §1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from aiohttp import web

from api import definitions, headers, payloads, queries
from api.definitions import present
from api.front import Front
from broker import functions, secrets
from broker.functions import Change
from broker.model import Principal, Version
from fnqueue import wire
from fnqueue.wire import Wire

W = TypeVar("W", bound=Wire)


async def create(front: Front, request: web.Request, principal: Principal) -> web.Response:
    definition = definitions.definition(await payloads.read(front, request, wire.CreateFunction))
    return _one(principal, await functions.create(front.broker, principal, definition))


async def add_version(front: Front, request: web.Request, principal: Principal) -> web.Response:
    function_id = headers.uuid(request.match_info["function_id"], field="functionId")
    definition = definitions.definition(await payloads.read(front, request, wire.CreateFunction))
    return _one(principal, await functions.add_version(front.broker, principal, function_id, definition))


async def list_functions(front: Front, request: web.Request, principal: Principal) -> web.Response:
    wanted = queries.words(request.query, "visibility")
    found = await functions.list_functions(front.broker, principal, visibility=wanted)
    return payloads.answer(wire.FunctionList(functions=[present(version, principal) for version in found]))


async def list_ids(front: Front, request: web.Request, principal: Principal) -> web.Response:
    wanted = queries.words(request.query, "visibility")
    found = await functions.list_functions(front.broker, principal, visibility=wanted)
    return payloads.answer(wire.FunctionIds(function_ids=list(dict.fromkeys(version.function_id for version in found))))


async def list_versions(front: Front, request: web.Request, principal: Principal) -> web.Response:
    function_id = headers.uuid(request.match_info["function_id"], field="functionId")
    found = await functions.list_versions(front.broker, principal, function_id)
    return payloads.answer(wire.FunctionList(functions=[present(version, principal) for version in found]))


async def get(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """With its instances and the names of its secrets, for those of its account who may see details."""
    function_id, version_id = ids(request)
    names_too = queries.boolean(request.query, "includeSecrets", absent=True)
    version = await functions.get(front.broker, principal, function_id, version_id)
    if version.account != principal.account or "list_functions_details" not in principal.scopes:
        return _one(principal, version)
    shown = present(
        version,
        principal,
        instances=await front.broker.catalog.instances(version.id),
        secrets=await secrets.names(front.broker, version.id) if names_too else None,
    )
    return payloads.answer(wire.FunctionAnswer(function=shown))


async def update(front: Front, request: web.Request, principal: Principal) -> web.Response:
    return await _update(front, request, principal, definitions.change, wire.UpdateFunction)


async def update_metadata(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """The deprecated path, for tags only."""
    return await _update(front, request, principal, lambda asked: Change(tags=tuple(asked.tags)), wire.UpdateMetadata)


async def delete_version(front: Front, request: web.Request, principal: Principal) -> web.Response:
    function_id, version_id = ids(request)
    await functions.delete_version(front.broker, principal, function_id, version_id)
    front.versions.forget(function_id)
    return web.Response(status=204)


def ids(request: web.Request) -> tuple[str, str]:
    """The function and the version that the path names. Raises BadRequest."""
    return (
        headers.uuid(request.match_info["function_id"], field="functionId"),
        headers.uuid(request.match_info["version_id"], field="functionVersionId"),
    )


async def _update(
    front: Front, request: web.Request, principal: Principal, change: Callable[[W], Change], kind: type[W]
) -> web.Response:
    function_id, version_id = ids(request)
    asked = await payloads.read(front, request, kind)
    version = await functions.update(front.broker, principal, function_id, version_id, change(asked))
    front.versions.forget(function_id)
    return _one(principal, version)


def _one(principal: Principal, version: Version) -> web.Response:
    return payloads.answer(wire.FunctionAnswer(function=present(version, principal)))
