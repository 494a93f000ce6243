"""With whom functions and versions are shared (contract/management.md §4.6)."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from api import headers, payloads
from api.front import Front
from api.routes import functions
from broker import authorizations
from broker.model import Principal
from fnqueue import wire


async def of_function(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """One entry per version, with the function's parties and its own."""
    function_id, _ = _level(request)
    found = await authorizations.get(front.broker, principal, function_id)
    listed = [
        _present(version.account, function_id, version_id=version.id, parties=parties) for version, parties in found
    ]
    return payloads.answer(wire.AuthorizationList(functions=listed))


async def of_version(front: Front, request: web.Request, principal: Principal) -> web.Response:
    function_id, version_id = _level(request)
    [(_, parties)] = await authorizations.get(front.broker, principal, function_id, version_id)
    return _answer(request, principal, parties)


async def replace_all(front: Front, request: web.Request, principal: Principal) -> web.Response:
    asked = await payloads.read(front, request, wire.AuthorizeParties)
    parties = [party.nca_id for party in asked.authorized_parties]
    return await _changed(
        front, request, principal, await authorizations.replace_all(front.broker, principal, *_level(request), parties)
    )


async def add(front: Front, request: web.Request, principal: Principal) -> web.Response:
    party = (await payloads.read(front, request, wire.AuthorizeParty)).authorized_party.nca_id
    return await _changed(
        front, request, principal, await authorizations.add(front.broker, principal, *_level(request), party)
    )


async def remove(front: Front, request: web.Request, principal: Principal) -> web.Response:
    party = (await payloads.read(front, request, wire.AuthorizeParty)).authorized_party.nca_id
    return await _changed(
        front, request, principal, await authorizations.remove(front.broker, principal, *_level(request), party)
    )


async def clear(front: Front, request: web.Request, principal: Principal) -> web.Response:
    return await _changed(
        front, request, principal, await authorizations.clear(front.broker, principal, *_level(request))
    )


def _level(request: web.Request) -> tuple[str, str]:
    """The function and the version that the path names, "" for none. Raises BadRequest."""
    if "version_id" in request.match_info:
        return functions.ids(request)
    return headers.uuid(request.match_info["function_id"], field="functionId"), ""


async def _changed(front: Front, request: web.Request, principal: Principal, parties: Sequence[str]) -> web.Response:
    front.versions.forget(_level(request)[0])
    return _answer(request, principal, parties)


def _answer(request: web.Request, principal: Principal, parties: Sequence[str]) -> web.Response:
    function_id, version_id = _level(request)
    shown = _present(principal.account, function_id, version_id=version_id, parties=parties)
    return payloads.answer(wire.AuthorizationAnswer(function=shown))


def _present(account: str, function_id: str, *, version_id: str, parties: Sequence[str]) -> wire.Authorization:
    return wire.Authorization(
        id=function_id,
        nca_id=account,
        version_id=version_id or None,
        authorized_parties=[wire.AuthorizedParty(nca_id=party) for party in parties],
    )
