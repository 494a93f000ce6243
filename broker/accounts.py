"""Keys, scopes, and who may do what (contract/management.md §4)."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
import uuid
from collections.abc import Collection

from broker.errors import BadRequest, Forbidden, NotFound, Unauthenticated
from broker.model import Key, Principal
from broker.ports import Broker

SCOPES = (
    "invoke_function",
    "list_functions",
    "list_functions_details",
    "register_function",
    "update_function",
    "delete_function",
    "deploy_function",
    "queue_details",
    "update_secrets",
    "manage_registry_credentials",
)

_ACCOUNT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_PREFIX = "nvapi-"
_REFUSED = "the bearer token is not valid"
_CACHE_S = 2.0
_CACHE_ENTRIES = 10_000


class Authenticator:
    """Tokens to principals. A verdict is kept for two seconds, so a deleted key dies within that."""

    def __init__(self, broker: Broker, *, admin_key: str = "", admin_account: str = "default") -> None:
        self._broker = broker
        self._admin_hash = hash_token(admin_key) if admin_key else ""
        self._admin = Principal(account=admin_account, subject="admin", scopes=frozenset(SCOPES))
        self._verdicts: dict[str, tuple[Principal | None, float]] = {}

    async def authenticate(self, token: str) -> Principal:
        """Raises Unauthenticated, or StoreUnavailable when the verdict cannot be known."""
        token_hash = hash_token(token)
        if self._admin_hash and hmac.compare_digest(token_hash, self._admin_hash):
            return self._admin
        principal, until = self._verdicts.get(token_hash, (None, 0.0))
        if until < time.monotonic():
            principal = await self._look_up(token_hash)
            if len(self._verdicts) >= _CACHE_ENTRIES:
                self._verdicts.clear()
            self._verdicts[token_hash] = (principal, time.monotonic() + _CACHE_S)
        if principal is None:
            raise Unauthenticated(_REFUSED)
        return principal

    async def _look_up(self, token_hash: str) -> Principal | None:
        row = await self._broker.catalog.keys.get(token_hash)
        if row is None or (row.item.expires_at and row.item.expires_at <= time.time()):
            return None
        return Principal(account=row.item.account, subject=row.item.id, scopes=frozenset(row.item.scopes))


def require(principal: Principal, *scopes: str) -> None:
    """Raises Forbidden unless the principal holds one of `scopes`."""
    if principal.scopes.isdisjoint(scopes):
        raise Forbidden(f"the credential lacks the scope {' or '.join(scopes)}")


def new_token() -> str:
    """A bearer token of 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    """What is stored of a token. It is random, so it needs no salt and no slow hash."""
    return hashlib.sha256(token.encode()).hexdigest()


async def create_key(
    broker: Broker, *, account: str, scopes: Collection[str] = SCOPES, description: str = "", expires_at: float = 0.0
) -> tuple[str, Key]:
    """The token, which is shown once, and what is kept of it. Raises BadRequest."""
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown:
        raise BadRequest(f"scopes: unknown {', '.join(unknown)}; known are {', '.join(SCOPES)}", field="scopes")
    if not scopes:
        raise BadRequest("scopes: at least one is needed", field="scopes")
    if not _ACCOUNT.fullmatch(account):
        raise BadRequest("account: 1 to 64 letters, digits, '-' and '_', a letter or digit first", field="account")
    token = new_token()
    key = Key(
        hash=hash_token(token),
        id=str(uuid.uuid4()),
        account=account,
        hint=f"{_PREFIX}{'*' * 8}{token[-3:]}",
        description=description,
        scopes=tuple(sorted(set(scopes))),
        created_at=time.time(),
        expires_at=expires_at,
    )
    await broker.catalog.keys.put(key)
    return token, key


async def list_keys(broker: Broker, account: str = "") -> list[Key]:
    """Keys of one account, or of all."""
    rows = await broker.catalog.keys.list("account", account) if account else await broker.catalog.keys.list()
    return [row.item for row in rows]


async def delete_key(broker: Broker, key_id: str) -> None:
    """Revoke a key by its id. Raises NotFound."""
    for key in await list_keys(broker):
        if key.id == key_id:
            await broker.catalog.keys.delete(key.hash)
            return
    raise NotFound(f"no key {key_id}")
