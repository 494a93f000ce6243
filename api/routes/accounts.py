"""Accounts and their limits (contract/management.md §4.5).

`account_setup` is good for the credential's own account, `admin:account_setup` for all.
"""

from __future__ import annotations

from collections.abc import Collection

from aiohttp import web

from api import payloads
from api.definitions import instant
from api.front import Front
from api.routes.registries import present as credential
from broker import accounts
from broker.accounts import ADMIN, Limits, acting_for, require, require_for
from broker.model import Account, Principal
from broker.registries import list_credentials
from fnqueue import wire

WRITES = ("account_setup",)
READS = ("account_setup", "list_accounts")


def anyones(scopes: Collection[str]) -> tuple[str, ...]:
    """Scopes, and the same over every account."""
    return (*scopes, *(ADMIN + scope for scope in scopes))


async def create(front: Front, request: web.Request, principal: Principal) -> web.Response:
    account = _named(request, principal, *WRITES)
    asked = await payloads.read(front, request, wire.CreateAccount)
    clients = [asked.admin_client_id] if asked.admin_client_id else []
    made = await accounts.create_account(front.broker, account, _limits(asked), client_ids=clients)
    return payloads.answer(wire.AccountAnswer(account=_present(made)))


async def list_accounts(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """All, or just the caller's own."""
    require(principal, *anyones(READS))
    everyones = not principal.scopes.isdisjoint(ADMIN + scope for scope in READS)
    found = await accounts.list_accounts(front.broker)
    shown = [_present(account) for account in found if everyones or account.id == principal.account]
    return payloads.answer(wire.AccountList(cloud_accounts=shown))


async def get(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """With how many function versions it has, and its registry credentials."""
    account = _named(request, principal, *READS)
    found, functions = await accounts.get_account(front.broker, account)
    owner = principal if principal.account == account else acting_for(principal, account)
    credentials = await list_credentials(front.broker, owner)
    shown = _present(found).model_copy(
        update={
            "current_number_functions": functions,
            "registry_credentials": [credential(account, each) for each in credentials],
        }
    )
    return payloads.answer(wire.AccountAnswer(account=shown))


async def update(front: Front, request: web.Request, principal: Principal) -> web.Response:
    account = _named(request, principal, *WRITES)
    asked = await payloads.read(front, request, wire.UpdateAccount)
    updated = await accounts.update_account(front.broker, account, _limits(asked))
    return payloads.answer(wire.AccountAnswer(account=_present(updated)))


async def delete(front: Front, request: web.Request, principal: Principal) -> web.Response:
    await accounts.delete_account(front.broker, _named(request, principal, *WRITES))
    return web.Response(status=204)


def _named(request: web.Request, principal: Principal, *scopes: str) -> str:
    """Raises Forbidden when the caller may do nothing for the account of the path."""
    account = request.match_info["nca_id"]
    require_for(principal, account, *scopes)
    return account


def _limits(asked: wire.CreateAccount | wire.UpdateAccount) -> Limits:
    return Limits(
        name=asked.name,
        max_functions=asked.max_functions_allowed,
        max_tasks=asked.max_tasks_allowed,
        max_telemetries=asked.max_telemetries_allowed,
        max_registry_credentials=asked.max_registry_credentials_allowed,
    )


def _present(account: Account) -> wire.Account:
    clients = list(account.client_ids) or None
    return wire.Account(
        nca_id=account.id,
        name=account.name,
        client_ids=clients,
        admin_client_ids=clients,
        max_functions_allowed=account.max_functions,
        max_tasks_allowed=account.max_tasks,
        max_telemetries_allowed=account.max_telemetries,
        max_registry_credentials_allowed=account.max_registry_credentials,
        last_updated_at=instant(account.updated_at) if account.updated_at else None,
    )
