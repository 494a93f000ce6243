"""Who is calling: a bearer token to a Principal, checked before anything else is looked at."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import NoReturn

from aiohttp import web
from aiohttp.typedefs import Handler
from multidict import MultiMapping

from api import headers
from api.front import Front
from broker.accounts import ADMIN, acting_for, require, require_key
from broker.errors import Forbidden, StoreUnavailable, Unauthenticated
from broker.model import Principal

_LOOK_S = 2.0

Guarded = Callable[[Front, web.Request, Principal], Awaitable[web.StreamResponse]]


def token(arrived: MultiMapping[str]) -> str:
    """Raises Unauthenticated: there is none, or it cannot be one."""
    return good(headers.bearer(arrived))


def good(found: str | None) -> str:
    """A bearer token, as `headers.bearer` found it. Raises as `token`."""
    if found is None:
        raise Unauthenticated("the Authorization header is missing; send Authorization: Bearer <API key>")
    if not found:
        raise Unauthenticated("the Authorization header is not of the form: Bearer <API key>")
    return found


async def authenticate(front: Front, request: web.Request, *scopes: str) -> Principal:
    """Who calls, for the account that the path names (`api.app.elsewhere`).

    Raises Unauthenticated, Forbidden when the caller holds none of `scopes` there, or StoreUnavailable.
    """
    return await admit(front, token(request.headers), request.match_info, *scopes)


async def admit(front: Front, bearer: str, named: Mapping[str, str], *scopes: str) -> Principal:
    """As `authenticate`, for the bearer token and what the path names."""
    principal = front.authenticator.known(bearer) or await front.authenticator.authenticate(bearer)
    if "for_account" in named:
        require(principal, *(ADMIN + scope for scope in scopes))
        return acting_for(principal, named["for_account"])
    if scopes:
        require(principal, *scopes)
    if "org" in named and named["org"] != principal.account:
        raise Forbidden("the credential is of another org: the org in the path is the account's ID")
    return principal


def holds(front: Front, bearer: str | None, scope: str) -> bool:
    """Whether `still` would return without asking anybody, for this token."""
    principal = front.authenticator.known(bearer) if bearer else None
    return principal is not None and scope in principal.scopes


async def still(front: Front, request: web.BaseRequest, *scopes: str) -> None:
    """Return if what the call was let in with is good yet: a call may be held for an hour, and a key that was taken
    from a thief must not be good for that long. A look within two seconds of the last one asks nobody.

    A store that is away takes nothing from who was let in.

    Raises Unauthenticated, or Forbidden when the caller holds none of `scopes` any more.
    """
    bearer = token(request.headers)
    principal = front.authenticator.known(bearer)
    if principal is None:
        try:
            principal = await front.authenticator.authenticate(bearer)
        except StoreUnavailable:
            return
    require(principal, *scopes)


async def watched(front: Front, request: web.Request, *scopes: str) -> NoReturn:
    """Look every two seconds. Raises as `still`."""
    while True:
        await asyncio.sleep(_LOOK_S)
        await still(front, request, *scopes)


def guarded(front: Front, handler: Guarded, *scopes: str, delegates: bool = False) -> Handler:
    """`handler`, for callers that hold one of `scopes`; without any, for whoever has a good key. `delegates`: also for
    who comes with a delegated token."""

    async def guard(request: web.Request) -> web.StreamResponse:
        principal = await authenticate(front, request, *scopes)
        if not delegates:
            require_key(principal)
        return await handler(front, request, principal)

    return guard


def at_pace(handler: Guarded) -> Guarded:
    """`handler`, for callers that keep the pace of management calls."""

    async def pace(front: Front, request: web.Request, principal: Principal) -> web.StreamResponse:
        named = request.match_info
        await front.pace.keep(principal.account, about=named.get("version_id") or named.get("function_id", ""))
        return await handler(front, request, principal)

    return pace
