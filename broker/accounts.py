"""Accounts and their limits; keys, scopes, and who may do what (contract/management.md §4).

A scope is good for the credential's own account. The same scope behind `admin:` is good for every account that a path
or a body names, and for nothing else. Nobody grants a right that he has not.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from broker import tokens
from broker.errors import (
    AlreadyExists,
    BadRequest,
    Forbidden,
    NotFound,
    RevisionConflict,
    StateConflict,
    TooManyRequests,
    Unauthenticated,
)
from broker.model import ALL_RESOURCES, Account, Key, Principal
from broker.ports import Broker
from broker.revisions import edit

INVOKE = "invoke_function"
# What a key may do unless it was made for less.
ACCOUNT_SCOPES = (
    INVOKE,
    "list_functions",
    "list_functions_details",
    "register_function",
    "update_function",
    "delete_function",
    "deploy_function",
    "queue_details",
    "authorize_clients",
    "update_secrets",
    "manage_telemetries",
    "manage_registry_credentials",
    "list_cluster_groups",
)
# Given by name only: a stolen key must not be able to make itself at home.
OPERATOR_SCOPES = ("manage_keys", "account_setup", "list_accounts", "cluster-management")
ADMIN = "admin:"
SCOPES = (*ACCOUNT_SCOPES, *OPERATOR_SCOPES, *(ADMIN + scope for scope in (*ACCOUNT_SCOPES, *OPERATOR_SCOPES)))

MAX_KEY_TTL_S = 365 * 86_400
TELEMETRIES_MAX = 25  # of a new account (contract/management.md §4.5)
NO_ACCOUNT = "no such account"
NO_KEY = "no such key"

_ACCOUNT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_PREFIX = "nvapi-"
_REFUSED = "the bearer token is not valid"
_CACHE_S = 2.0
_CACHE_ENTRIES = 10_000
_CHANGE_EVERY_S = 3.0
_PURGE_AFTER_S = 2 * 86_400
_UUID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_RESOURCE = re.compile(rf"(?:account|authorized)-functions/\*|function/{_UUID}/(?:\*|{_UUID})")


class Authenticator:
    """Tokens to principals. A verdict is kept for two seconds, so a key that was deleted, suspended or changed is
    what it now is within that, and so are the tokens that were delegated with it."""

    def __init__(self, broker: Broker, *, admin_key: str = "", admin_account: str = "default") -> None:
        self._broker = broker
        self._secret = broker.settings.secret_key.get_secret_value().encode()
        self._admin_hash = hash_token(admin_key) if admin_key else ""
        self._admin_name = tokens.pseudonym(self._secret, self._admin_hash) if admin_key else ""
        self._admin = Principal(account=admin_account, subject="admin", scopes=frozenset(SCOPES))
        self._verdicts: dict[str, tuple[Principal | None, float]] = {}
        # By token, which is cheaper to find; the last verdict on each that was good.
        self._good: dict[str, tuple[Principal, float]] = {}

    def known(self, token: str) -> Principal | None:
        """What `authenticate` returns, where it would ask nobody; None where it is not known without asking."""
        found = self._good.get(token)
        if found is None:
            return None
        if found[1] < time.monotonic():
            del self._good[token]
            return None
        return found[0]

    async def authenticate(self, token: str) -> Principal:
        """Raises Unauthenticated, or StoreUnavailable when the verdict cannot be known."""
        if not token.startswith(tokens.PREFIX):
            token_hash = hash_token(token)
            principal = await self._authenticate(token_hash)
            _, until = self._verdicts.get(token_hash, (None, time.monotonic() + _CACHE_S))
            if len(self._good) >= _CACHE_ENTRIES:
                self._good.clear()
            self._good[token] = (principal, until)
            return principal
        delegation = tokens.verify(self._secret, token)
        if delegation is None or delegation.expires_at <= time.time():
            raise Unauthenticated(_REFUSED)
        if self._admin_name and delegation.parent == self._admin_name:
            return _delegated(self._admin, delegation)
        return _delegated(await self._authenticate(delegation.parent), delegation)

    async def delegate(
        self, token: str, *, client_id: str, functions: Collection[str], ttl_s: float
    ) -> tuple[str, float]:
        """A token with which `client_id` may invoke these functions, spelled as a key's resources are, as far as the
        key `token` may; and for how many seconds: `ttl_s`, or until the key expires. Raises Unauthenticated."""
        now, key_hash = time.time(), hash_token(token)
        expires_at = now + ttl_s
        if not self._is_admin(key_hash):
            row = await self._broker.catalog.keys.get(key_hash)
            if row is None or status(row.item) != "ACTIVE":
                raise Unauthenticated(_REFUSED)
            expires_at = min(expires_at, row.item.expires_at or expires_at)
        delegation = tokens.Delegation(
            parent=self._admin_name if self._is_admin(key_hash) else key_hash,
            client_id=client_id,
            functions=tuple(functions),
            expires_at=expires_at,
        )
        return tokens.sign(self._secret, delegation), expires_at - now

    def stand_in(self, token: str) -> str:
        """What `recall` knows the holder of a key by. It opens nothing that asks for a key, nor can the key be found
        by it, though a person chose it."""
        token_hash = hash_token(token)
        return self._admin_name if self._is_admin(token_hash) else token_hash

    async def recall(self, stand_in: str) -> Principal:
        """Whose key it stands for, as `authenticate` of that key would say it now. Raises as that."""
        if self._admin_name and hmac.compare_digest(stand_in, self._admin_name):
            return self._admin
        return await self._authenticate(stand_in)

    async def _authenticate(self, token_hash: str) -> Principal:
        if self._is_admin(token_hash):
            return self._admin
        principal, until = self._verdicts.get(token_hash, (None, 0.0))
        if until < time.monotonic():
            asked_at = time.monotonic()
            principal = await self._look_up(token_hash)
            if len(self._verdicts) >= _CACHE_ENTRIES:
                self._verdicts.clear()
            self._verdicts[token_hash] = (principal, asked_at + _CACHE_S)
        if principal is None:
            raise Unauthenticated(_REFUSED)
        return principal

    def _is_admin(self, token_hash: str) -> bool:
        return bool(self._admin_hash) and hmac.compare_digest(token_hash, self._admin_hash)

    async def _look_up(self, token_hash: str) -> Principal | None:
        row = await self._broker.catalog.keys.get(token_hash)
        if row is None or status(row.item) != "ACTIVE":
            return None
        key = row.item
        return Principal(
            account=key.account,
            subject=key.id,
            scopes=frozenset(key.scopes),
            resources=frozenset(key.resources),
        )


def _delegated(parent: Principal, delegation: tokens.Delegation) -> Principal:
    return replace(
        parent,
        subject=f"{parent.subject}/{delegation.client_id}",
        scopes=parent.scopes & {INVOKE},
        functions=frozenset(delegation.functions),
    )


def require_key(principal: Principal) -> None:
    """Raises Forbidden for who comes with a delegated token."""
    if principal.functions is not None:
        raise Forbidden("a delegated token is good for invoking functions and for the requests that come of it only")


def require(principal: Principal, *scopes: str) -> None:
    """Raises Forbidden unless the principal holds one of `scopes`."""
    if principal.scopes.isdisjoint(scopes):
        raise Forbidden(f"the credential lacks the scope {' or '.join(scopes)}")


def acting_for(principal: Principal, account: str) -> Principal:
    """The principal with its `admin:` scopes turned into scopes on that account.

    Raises BadRequest when the account's name can be none.
    """
    return Principal(
        account=_valid_account(account),
        subject=principal.subject,
        scopes=frozenset(scope.removeprefix(ADMIN) for scope in principal.scopes if scope.startswith(ADMIN)),
        resources=principal.resources,
        super_admin=True,
    )


def require_for(principal: Principal, account: str, *scopes: str) -> None:
    """Raises Forbidden unless it holds one of `scopes` and is of the account, or holds one behind `admin:`;
    BadRequest when the account's name can be none."""
    _valid_account(account)
    if principal.account == account and not principal.scopes.isdisjoint(scopes):
        return
    require(principal, *(ADMIN + scope for scope in scopes))


# -- keys --------------------------------------------------------------------------------------


def new_token() -> str:
    """A bearer token of 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    """What is stored of a token. It is random, so it needs no salt and no slow hash."""
    return hashlib.sha256(token.encode()).hexdigest()


def expired(key: Key) -> bool:
    return 0 < key.expires_at <= time.time()


def status(key: Key) -> str:
    """ACTIVE, SUSPENDED or EXPIRED."""
    if expired(key):
        return "EXPIRED"
    return "SUSPENDED" if key.suspended else "ACTIVE"


async def create_key(
    broker: Broker,
    *,
    account: str,
    scopes: Collection[str] = ACCOUNT_SCOPES,
    resources: Collection[str] = ALL_RESOURCES,
    description: str = "",
    expires_at: float = 0.0,
    owner: str = "",
    issuer: str = "",
    audiences: Collection[str] = (),
    limit: int = 0,
) -> tuple[str, Key]:
    """The token, which is shown once, and what is kept of it. `limit` is how many valid keys the owner may have in
    the account, 0 for any number: exact, whoever else makes keys meanwhile.

    Raises BadRequest, or StateConflict at the limit.
    """
    token = new_token()
    key = Key(
        hash=hash_token(token),
        id=str(uuid.uuid4()),
        account=_valid_account(account),
        hint=f"{_PREFIX}{'*' * 8}{token[-3:]}",
        description=description,
        scopes=_valid_scopes(scopes),
        created_at=time.time(),
        expires_at=expires_at,
        resources=_valid_resources(resources),
        owner=owner,
        issuer=issuer,
        audiences=tuple(audiences),
    )
    await broker.catalog.keys.put(key)
    if limit and key.id not in await _first_keys(broker, account, owner, limit):
        await broker.catalog.keys.delete(key.hash)
        raise StateConflict(f"an owner may have {limit} valid keys; delete one")
    return token, key


async def list_keys(broker: Broker, account: str = "") -> list[Key]:
    """Keys of one account, or of all, oldest first."""
    rows = await broker.catalog.keys.list("account", account) if account else await broker.catalog.keys.list()
    return [row.item for row in rows]


async def find_key(broker: Broker, key_id: str, *, account: str = "") -> Key:
    """A key of the account, or of any. Raises NotFound."""
    for key in await list_keys(broker, account):
        if key.id == key_id:
            return key
    raise NotFound(NO_KEY)


async def delete_key(broker: Broker, key_id: str, *, account: str = "") -> None:
    """Revoke a key by its id. Raises NotFound."""
    key = await find_key(broker, key_id, account=account)
    if not await broker.catalog.keys.delete(key.hash):
        raise NotFound(NO_KEY)


async def suspend_key(broker: Broker, key_id: str, *, suspended: bool, account: str = "") -> Key:
    """Refuse a key from now on, or admit it again. Idempotent. Raises NotFound."""
    key = await find_key(broker, key_id, account=account)
    return await _edit_key(broker, key, lambda stored: replace(stored, suspended=suspended))


async def authorize_key(broker: Broker, key: Key, *, scopes: Collection[str], resources: Collection[str]) -> Key:
    """Give a key other rights in place of those it has. Raises BadRequest, NotFound, or TooManyRequests: at most
    every three seconds."""
    now = time.time()
    rights = {"scopes": _valid_scopes(scopes), "resources": _valid_resources(resources)}

    def change(stored: Key) -> Key:
        wait_s = stored.changed_at + _CHANGE_EVERY_S - now
        if wait_s > 0:
            raise TooManyRequests("the key's authorizations were changed just now", retry_after_s=wait_s)
        return replace(stored, changed_at=now, scopes=rights["scopes"], resources=rights["resources"])

    return await _edit_key(broker, key, change)


def require_grantable(principal: Principal, *, scopes: Collection[str], resources: Collection[str]) -> None:
    """Raises BadRequest for rights that there are not, Forbidden unless the principal has all that it is to give."""
    lacking = set(_valid_scopes(scopes)) - principal.scopes - {scope.removeprefix(ADMIN) for scope in principal.scopes}
    if lacking:
        raise Forbidden(f"the credential cannot give scopes that it lacks: {', '.join(sorted(lacking))}")
    if principal.resources.issuperset(ALL_RESOURCES):
        return
    for resource in _valid_resources(resources):
        kind, function_id, _ = f"{resource}/".split("/", 2)
        if resource not in principal.resources and f"{kind}/{function_id}/*" not in principal.resources:
            raise Forbidden(f"the credential cannot give resources that it lacks: {resource}")


async def _edit_key(broker: Broker, key: Key, change: Callable[[Key], Key]) -> Key:
    changed = await edit(broker.catalog.keys, key.hash, change)
    if changed is None:
        raise NotFound(NO_KEY)
    return changed


async def _first_keys(broker: Broker, account: str, owner: str, limit: int) -> set[str]:
    """IDs of the owner's oldest valid keys. Those that expired two days ago are removed on the way."""
    now = time.time()
    keys = await list_keys(broker, account)
    for key in keys:
        if 0 < key.expires_at < now - _PURGE_AFTER_S:
            await broker.catalog.keys.delete(key.hash)
    return {key.id for key in [key for key in keys if key.owner == owner and not expired(key)][:limit]}


def _valid_scopes(scopes: Collection[str]) -> tuple[str, ...]:
    if unknown := sorted(set(scopes) - set(SCOPES)):
        raise BadRequest(f"scopes: unknown {', '.join(unknown)}; known are {', '.join(SCOPES)}", field="scopes")
    if not scopes:
        raise BadRequest("scopes: at least one is needed", field="scopes")
    return tuple(sorted(set(scopes)))


def _valid_resources(resources: Collection[str]) -> tuple[str, ...]:
    """None at all are allowed: such a key sees no function."""
    for resource in resources:
        if _RESOURCE.fullmatch(resource) is None:
            raise BadRequest(
                "resources: each is account-functions/*, authorized-functions/*, function/<id>/* or "
                "function/<id>/<version id>",
                field="resources",
            )
    return tuple(sorted(set(resources)))


def _valid_account(account: str) -> str:
    if _ACCOUNT.fullmatch(account) is None:
        raise BadRequest("account: 1 to 64 letters, digits, '-' and '_', a letter or digit first", field="account")
    return account


# -- accounts ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is asked for an account; None leaves it as it is, or as every new account has it."""

    name: str | None = None
    max_functions: int | None = None
    max_tasks: int | None = None
    max_telemetries: int | None = None
    max_registry_credentials: int | None = None


async def create_account(broker: Broker, account: str, limits: Limits, *, client_ids: Collection[str] = ()) -> Account:
    """A record for an account, which may have keys and functions already. Raises AlreadyExists, BadRequest."""
    if any(set(client_ids) & set(row.item.client_ids) for row in await broker.catalog.accounts.list()):
        raise AlreadyExists("the client belongs to an account already")
    record = _apply(default_account(broker, _valid_account(account)), limits)
    record = replace(record, created_at=record.updated_at, client_ids=tuple(client_ids))

    try:
        await broker.catalog.accounts.put(record)
    except RevisionConflict as exc:
        raise AlreadyExists("the account exists already") from exc
    return record


async def list_accounts(broker: Broker) -> list[Account]:
    """Those with a record, oldest first."""
    return [row.item for row in await broker.catalog.accounts.list()]


async def get_account(broker: Broker, account: str) -> tuple[Account, int]:
    """The account, as every account is where it has no record, and how many function versions it has.

    Raises NotFound when there is neither a record, nor a key, nor a function of it.
    """
    row = await broker.catalog.accounts.get(account)
    versions = await broker.catalog.versions.list("account", account)
    if row is None and not versions and not await list_keys(broker, account):
        raise NotFound(NO_ACCOUNT)
    return row.item if row else default_account(broker, account), len(versions)


async def update_account(broker: Broker, account: str, limits: Limits) -> Account:
    """Raises NotFound, BadRequest when nothing is asked for."""
    if limits == Limits():
        raise BadRequest("nothing to change: give a name or a limit")
    updated = await edit(broker.catalog.accounts, account, lambda stored: _apply(stored, limits))
    if updated is None:
        raise NotFound(NO_ACCOUNT)
    return updated


async def delete_account(broker: Broker, account: str) -> None:
    """Its keys and registry credentials go first, so that a call that was cut short can be repeated. Raises NotFound,
    or StateConflict while it has functions or clusters, or others share theirs with it."""
    if await broker.catalog.accounts.get(account) is None:
        raise NotFound(NO_ACCOUNT)
    if await broker.catalog.versions.list("account", account):
        raise StateConflict("the account still has functions; delete them first")
    for shared in await broker.catalog.sharing.list("shared_with", account):
        if await broker.catalog.versions.list("function_id", shared.item.function_id):
            raise StateConflict("functions of other accounts are shared with the account; that must end first")
    for row in await broker.catalog.clusters.list():
        if row.item.account == account:
            raise StateConflict("the account still has clusters; delete them first")
        if account in row.item.authorized:
            raise StateConflict("clusters of other accounts are shared with the account; that must end first")
    for key in await list_keys(broker, account):
        await broker.catalog.keys.delete(key.hash)
    await broker.catalog.registry_credentials.delete(account)
    if not await broker.catalog.accounts.delete(account):
        raise NotFound(NO_ACCOUNT)


def default_account(broker: Broker, account: str) -> Account:
    """What an account without a record is."""
    return Account(
        id=account,
        name=account,
        max_functions=broker.settings.max_functions,
        max_tasks=broker.settings.max_functions,
        max_telemetries=TELEMETRIES_MAX,
        max_registry_credentials=broker.settings.max_registry_credentials,
        created_at=0.0,
        updated_at=0.0,
    )


def _apply(account: Account, limits: Limits) -> Account:
    def kept(asked: int | None, has: int) -> int:
        return has if asked is None else asked

    return replace(
        account,
        name=limits.name or account.name,
        max_functions=kept(limits.max_functions, account.max_functions),
        max_tasks=kept(limits.max_tasks, account.max_tasks),
        max_telemetries=kept(limits.max_telemetries, account.max_telemetries),
        max_registry_credentials=kept(limits.max_registry_credentials, account.max_registry_credentials),
        updated_at=time.time(),
    )
