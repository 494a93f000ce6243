"""API keys over HTTP, in the shapes of upstream's key service (contract/management.md §4.2 to §4.4).

`manage_keys` is good for keys of the credential's own account, `admin:manage_keys` for those of all. Nobody gives a
right that he lacks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import parse_qs

from aiohttp import web

from api import headers, payloads
from api.definitions import instant
from api.front import Front
from broker import accounts
from broker.accounts import MAX_KEY_TTL_S, require_for, require_grantable, require_key
from broker.errors import BadRequest, NotFound, Unauthenticated
from broker.model import ALL_RESOURCES, Key, Principal
from fnqueue import wire

SCOPE = "manage_keys"
EVERYONES = accounts.ADMIN + SCOPE
SCOPES = (SCOPE, EVERYONES)
PRODUCT = "nv-cloud-functions"
OWNER = "Key-Owner-Id"
ISSUER = "Key-Issuer-Id"
LONGEST_ID = 256


class Rights(NamedTuple):
    scopes: Sequence[str]
    resources: Sequence[str]


async def create(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """With the key itself, which is shown here and never again."""
    asked = await payloads.read(front, request, wire.CreateKey)
    account = asked.nca_id or principal.account
    require_for(principal, account, SCOPE)
    scopes, resources = _granted(principal, asked.authorizations)
    token, key = await accounts.create_key(
        front.broker,
        account=account,
        scopes=scopes,
        resources=resources,
        description=asked.description or "",
        expires_at=_expiry(asked),
        owner=_header(request, OWNER) or account,
        issuer=_header(request, ISSUER),
        audiences=_audiences(asked),
        limit=front.broker.settings.keys_per_owner,
    )
    return payloads.answer(present(key, value=token))


async def list_keys(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """The account's keys, or those of the owner that the header names."""
    account = request.query.get("nca_id", principal.account)
    require_for(principal, account, SCOPE)
    owner = _header(request, OWNER)
    found = await accounts.list_keys(front.broker, account)
    return payloads.answer(
        wire.ApiKeyList(keys=[present(key, rights=False) for key in found if owner in ("", key.owner)])
    )


async def get(front: Front, request: web.Request, principal: Principal) -> web.Response:
    return payloads.answer(present(await _find(front, request, principal)))


async def delete(front: Front, request: web.Request, principal: Principal) -> web.Response:
    key = await _find(front, request, principal)
    await accounts.delete_key(front.broker, key.id, account=key.account)
    return web.Response(status=204)


async def authorize(front: Front, request: web.Request, principal: Principal) -> web.Response:
    asked = await payloads.read(front, request, wire.UpdateKeyAuthorizations)
    scopes, resources = _granted(principal, asked.authorizations)
    key = await _find(front, request, principal)
    return payloads.answer(present(await accounts.authorize_key(front.broker, key, scopes=scopes, resources=resources)))


async def set_status(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """Suspend or activate; whoever activates needs the rights that then are good again."""
    asked = await payloads.read(front, request, wire.UpdateKeyStatus)
    key = await _find(front, request, principal)
    suspended = asked.status == "SUSPENDED"
    if not suspended:
        require_grantable(principal, scopes=key.scopes, resources=key.resources)
    changed = await accounts.suspend_key(front.broker, key.id, suspended=suspended, account=key.account)
    return payloads.answer(present(changed))


async def introspect(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """What a valid key may do; one that is not valid, and one that is not the caller's to see, are unknown."""
    asked = await payloads.read(front, request, wire.Introspect)
    row = await front.broker.catalog.keys.get(accounts.hash_token(asked.key))
    if row is None or accounts.status(row.item) != "ACTIVE" or not _may_see(principal, row.item):
        raise NotFound(accounts.NO_KEY)
    key = row.item
    return payloads.answer(
        wire.Introspected(
            key_id=key.id,
            nca_id=key.account,
            owner_id=key.owner or key.account,
            issuer_service_id=key.issuer or None,
            authorizations=_authorizations(key),
            expires_at=instant(key.expires_at) if key.expires_at else None,
        )
    )


async def caller_info(front: Front, request: web.Request) -> web.Response:
    """What NGC's clients ask before anything else. The key comes as a form, the form is the credential."""
    request[payloads.READ] = wire.Credentials
    held = await front.bodies.read(request)
    try:
        form = parse_qs(held.body.decode(errors="replace"), max_num_fields=16)
    except ValueError:
        raise BadRequest("the form has too many fields") from None
    finally:
        held.close()
    credentials = form.get("credentials", [""])[0] or headers.bearer(request.headers)
    if not credentials:
        raise Unauthenticated("the form has no credentials; send credentials=<API key>")
    principal = await front.authenticator.authenticate(credentials)
    require_key(principal)
    return payloads.answer(wire.CallerInfo(org_name=principal.account, key_id=principal.subject, products=[PRODUCT]))


async def _find(front: Front, request: web.Request, principal: Principal) -> Key:
    """The key of the path. Raises NotFound, also for one of an account that the caller has nothing to do with."""
    key_id = headers.uuid(request.match_info["key_id"], field="id")
    account = "" if EVERYONES in principal.scopes else principal.account
    return await accounts.find_key(front.broker, key_id, account=account)


def _may_see(principal: Principal, key: Key) -> bool:
    return EVERYONES in principal.scopes or key.account == principal.account


def _granted(principal: Principal, asked: wire.KeyAuthorizations) -> Rights:
    [policy] = asked.policies
    resources = [f"{resource.type}/{resource.id.lower()}" for resource in policy.resources or []]
    rights = Rights(policy.scopes, ALL_RESOURCES if policy.resources is None else resources)
    require_grantable(principal, scopes=rights.scopes, resources=rights.resources)
    return rights


def _expiry(asked: wire.CreateKey) -> float:
    latest_at = time.time() + MAX_KEY_TTL_S
    if asked.expires_at is None:
        return latest_at
    expires_at = asked.expires_at.timestamp()
    if not time.time() < expires_at <= latest_at:
        raise BadRequest("expires_at: must be in the future and within 365 days", field="expires_at")
    return expires_at


def _audiences(asked: wire.CreateKey) -> list[str]:
    [policy] = asked.authorizations.policies
    return list(dict.fromkeys([*asked.audience_service_ids, *([policy.aud] if policy.aud else [])]))


def _header(request: web.Request, name: str) -> str:
    value = request.headers.get(name, "").strip()
    if len(value) > LONGEST_ID or not value.isascii():
        raise BadRequest(f"{name}: at most {LONGEST_ID} ASCII characters", field=name)
    return value


def present(key: Key, *, value: str | None = None, rights: bool = True) -> wire.ApiKey:
    return wire.ApiKey(
        id=key.id,
        status=accounts.status(key),
        value=value,
        hint=key.hint,
        nca_id=key.account,
        owner_id=key.owner or key.account,
        issuer_service_id=key.issuer or None,
        audience_service_ids=list(key.audiences),
        description=key.description or None,
        created_at=instant(key.created_at),
        expires_at=instant(key.expires_at) if key.expires_at else None,
        authorizations=_authorizations(key) if rights else None,
    )


def _authorizations(key: Key) -> wire.KeyAuthorizations:
    resources = [
        wire.KeyResource(type=kind, id=rest) for kind, _, rest in (each.partition("/") for each in key.resources)
    ]
    policy = wire.KeyPolicy(
        scopes=list(key.scopes),
        resources=resources,
        aud=key.audiences[0] if key.audiences else None,
        auds=list(key.audiences) or None,
        product=PRODUCT,
    )
    return wire.KeyAuthorizations.model_construct(policies=[policy])
