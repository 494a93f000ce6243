"""The secrets of a function version: written by their owner, merged by name, read by its containers only.

They are sealed before they are stored (`broker.keyring`) and opened by the controller alone, for the launcher
(contract/management.md §6; docs/decisions/0005-secrets.md).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from broker.errors import BadRequest, NotFound, StateConflict
from broker.keyring import Rotation, Sealed
from broker.model import FunctionStatus, Principal, Secret, Secrets, Version
from broker.ports import Broker
from broker.revisions import edit
from broker.visibility import UNKNOWN_VERSION, find_version

MAX_SECRETS = 256
# A row is written just before its version: younger ones may belong to a version that is being made.
ORPHAN_S = 3600.0

_FIELD = "secrets"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """A secret as its owner gave it. `value` is the JSON text of a string or an object, and never shown."""

    name: str
    value: str = field(repr=False)


async def put(broker: Broker, principal: Principal, function_id: str, version_id: str, plains: Sequence[Plain]) -> None:
    """Add or overwrite secrets by name; none is removed. Running containers see them within seconds.

    Raises:
        NotFound: unknown, or not the caller's own.
        BadRequest: no secrets, a name twice, too many, or no key to seal them with.
        Forbidden: the key's resources do not cover it.
        StateConflict: it is public, and only a super-admin changes it; or they would be the version's first, and it is
            deployed: its containers have no secrets file.
    """
    version = await find_version(broker, principal, function_id, version_id)
    if not plains:
        raise BadRequest("secrets: at least one is needed", field=_FIELD)
    sealed = _seal(broker, version, plains)
    await _merge(broker, version, sealed)
    if await broker.catalog.versions.get(version_id) is None:  # deleted meanwhile
        await delete(broker, version_id)
        raise NotFound(UNKNOWN_VERSION)


async def begin(broker: Broker, version: Version, plains: Sequence[Plain]) -> None:
    """Store the secrets of a version that is about to be stored itself. Raises BadRequest as `put` does."""
    if plains:
        await _merge(broker, version, _seal(broker, version, plains))


async def names(broker: Broker, version_id: str) -> list[str]:
    row = await broker.catalog.secrets.get(version_id)
    return [secret.name for secret in row.item.secrets] if row else []


async def delete(broker: Broker, version_id: str) -> None:
    """Idempotent. The caller has deleted the version."""
    await broker.catalog.secrets.delete(version_id)


def reveal(broker: Broker, secrets: Secrets) -> bytes:
    """The content of a secrets file: one JSON object, name to value. Raises ConfigurationError."""
    members = ",\n".join(
        f"  {_json(secret.name)}: {broker.keyring.open(secret.sealed, *_bound(secrets, secret.name)).decode()}"
        for secret in secrets.secrets
    )
    return f"{{\n{members}\n}}\n".encode()


async def rotate(broker: Broker) -> Rotation:
    """Seal everything with the ring's first key. Safe to repeat, to interrupt, and beside writers."""
    total = Rotation()
    for row in await broker.catalog.secrets.list():
        total += await _rotate(broker, row.item.version_id)
    return total


async def sweep(broker: Broker) -> int:
    """Remove what a crash left without its version; returns how many rows."""
    removed = 0
    for row in await broker.catalog.secrets.list():
        orphan = row.item.updated_at < time.time() - ORPHAN_S
        if orphan and await broker.catalog.versions.get(row.item.version_id) is None:
            await broker.catalog.secrets.delete(row.item.version_id)
            removed += 1
    return removed


def _seal(broker: Broker, version: Version, plains: Sequence[Plain]) -> Secrets:
    if len({plain.name for plain in plains}) < len(plains):
        raise BadRequest("secrets: each name may be given once", field=_FIELD)
    empty = Secrets(version_id=version.id, account=version.account, secrets=(), updated_at=time.time())
    sealed = [
        Secret(name=plain.name, sealed=broker.keyring.seal(plain.value.encode(), *_bound(empty, plain.name)))
        for plain in plains
    ]
    return replace(empty, secrets=tuple(sealed))


async def _merge(broker: Broker, version: Version, added: Secrets) -> None:
    def merge(stored: Secrets) -> Secrets:
        by_name = {secret.name: secret for secret in (*stored.secrets, *added.secrets)}
        if len(by_name) > MAX_SECRETS:
            raise BadRequest(f"secrets: a version may have {MAX_SECRETS}", field=_FIELD)
        return replace(added, secrets=tuple(by_name.values()))

    none_yet = replace(added, secrets=()) if version.status is FunctionStatus.INACTIVE else None
    if await edit(broker.catalog.secrets, version.id, merge, missing=none_yet) is None:
        raise StateConflict(
            f"the version has no secrets and is {version.status.value}: its first ones can be added only while it is "
            "INACTIVE; undeploy it first"
        )


async def _rotate(broker: Broker, version_id: str) -> Rotation:
    counted = Rotation()

    def reseal(stored: Secrets) -> Secrets:
        nonlocal counted
        texts, counted = broker.keyring.rotate(
            Sealed(label=f"{version_id}/{secret.name}", text=secret.sealed, bound=_bound(stored, secret.name))
            for secret in stored.secrets
        )
        resealed = [replace(secret, sealed=text) for secret, text in zip(stored.secrets, texts, strict=True)]
        return replace(stored, secrets=tuple(resealed))

    await edit(broker.catalog.secrets, version_id, reseal)
    return counted


def _bound(secrets: Secrets, name: str) -> tuple[str, ...]:
    return ("function-secret", secrets.account, secrets.version_id, name)


def _json(name: str) -> str:
    """Names need no escapes: they are letters, digits, `_`, `.` and `-`."""
    return f'"{name}"'
