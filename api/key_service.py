"""What `fnqueue keys` asks of a server, and of a store: the same questions, and answers of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode

from api.routes.keys import OWNER, present
from broker import accounts
from broker.ports import Broker
from fnqueue import wire
from fnqueue.blocking import Client

AT = "/v1/keys"
_IN_A_STORE = "default"
_UNTOLD = "-"
HEADS = ("KEY", "ACCOUNT", "HINT", "STATUS", "EXPIRES", "DESCRIPTION", "SCOPES", "RESOURCES")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A key that is to be made. Without `account` it is for the caller's; `expires_at` is in unix seconds, and 0 means
    as late as may be."""

    account: str | None
    scopes: Sequence[str]
    resources: Sequence[str]
    description: str
    expires_at: float
    owner: str

    def ask(self, fnq: Client) -> wire.ApiKey:
        """Raises as `Client.ask`."""
        resources = [{"type": kind, "id": rest} for kind, _, rest in (each.partition("/") for each in self.resources)]
        body: dict[str, Any] = {
            "description": self.description or None,
            "authorizations": {"policies": [{"scopes": list(self.scopes), "resources": resources}]},
            "nca_id": self.account,
        }
        if self.expires_at:
            body["expires_at"] = datetime.fromtimestamp(self.expires_at, UTC).isoformat()
        return fnq.ask(wire.ApiKey, "POST", AT, body, headers={OWNER: self.owner} if self.owner else None)


async def store(broker: Broker, wish: Wish) -> wire.ApiKey:
    """Raises BadRequest, or StoreUnavailable."""
    account = wish.account or _IN_A_STORE
    token, key = await accounts.create_key(
        broker,
        account=account,
        scopes=wish.scopes,
        resources=wish.resources,
        description=wish.description,
        expires_at=wish.expires_at,
        owner=wish.owner or account,
    )
    return present(key, value=token)


def listed(fnq: Client, account: str) -> wire.ApiKeyList:
    return fnq.ask(wire.ApiKeyList, "GET", f"{AT}?{urlencode({'nca_id': account})}" if account else AT)


def shown(fnq: Client, key_id: str) -> wire.ApiKey:
    return fnq.ask(wire.ApiKey, "GET", _of(key_id))


def deleted(fnq: Client, key_id: str) -> None:
    fnq.tell("DELETE", _of(key_id))


def suspended(fnq: Client, key_id: str, *, suspended: bool) -> wire.ApiKey:
    status = "SUSPENDED" if suspended else "ACTIVE"
    return fnq.ask(wire.ApiKey, "PUT", f"{_of(key_id)}/status", {"status": status})


def scopes(key: wire.ApiKey) -> Sequence[str]:
    return key.authorizations.policies[0].scopes if key.authorizations else [_UNTOLD]


def as_json(told: wire.ApiKey | wire.ApiKeyList) -> str:
    return told.model_dump_json(by_alias=True, exclude_none=True, indent=2)


def row(key: wire.ApiKey) -> Sequence[str]:
    """As HEADS names them; none is empty."""
    rights = (",".join(scopes(key)), ",".join(_resources(key)))
    expires = key.expires_at.strftime("%Y-%m-%d") if key.expires_at else "never"
    return [key.id, key.nca_id, key.hint, key.status, expires, key.description or _UNTOLD, *rights]


def described(key: wire.ApiKey) -> str:
    return "\n".join(f"{head.capitalize():<12} {cell}" for head, cell in zip(HEADS, row(key), strict=True))


def _resources(key: wire.ApiKey) -> Sequence[str]:
    if key.authorizations is None:
        return [_UNTOLD]
    return [f"{each.type}/{each.id}" for each in key.authorizations.policies[0].resources or []]


def _of(key_id: str) -> str:
    return f"{AT}/{quote(key_id, safe='')}"
