"""Sharing a function, or one version of it, with other accounts (contract/management.md §4.6).

What a level lists adds to the other: the function's parties get every version, present and future. Every verb takes
"" as the version id for the function's level, and answers with what that level then lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from broker.errors import AlreadyExists, BadRequest, NotFound, StateConflict
from broker.model import EVERYONE, Principal, Sharing, Version
from broker.ports import Broker
from broker.revisions import edit
from broker.visibility import Family, find_function, find_version

NO_LIST = "nobody is authorized on this level yet"

Parties = tuple[str, ...]


async def get(
    broker: Broker, principal: Principal, function_id: str, version_id: str = ""
) -> list[tuple[Version, Parties]]:
    """Every version of the caller's function, or the named one, with everybody who may use it.

    Raises NotFound, Forbidden, StateConflict.
    """
    family = await _find(broker, principal, function_id, version_id)
    row = await broker.catalog.sharing.get(function_id)
    return [(version, row.item.of(version.id) if row else ()) for version in family.versions]


async def replace_all(
    broker: Broker, principal: Principal, function_id: str, version_id: str, parties: Sequence[str]
) -> Parties:
    """List these parties and no others. Only a super-admin makes public, and then EVERYONE stands alone.

    Raises NotFound, Forbidden, StateConflict, or BadRequest that says what is wrong with the parties.
    """
    family = await _find(broker, principal, function_id, version_id)
    if not parties:
        raise BadRequest("authorizedParties: at least one is needed", field="authorizedParties")
    if len(set(parties)) < len(parties):
        raise BadRequest("authorizedParties: each account once", field="authorizedParties")
    if EVERYONE in parties and (not principal.super_admin or len(parties) > 1):
        raise BadRequest("authorizedParties: '*' is for a super-admin, and stands alone", field="authorizedParties")
    for party in parties:
        await _check(family, party, broker)
    return await _write(broker, family, version_id, lambda _: tuple(parties))


async def add(broker: Broker, principal: Principal, function_id: str, version_id: str, party: str) -> Parties:
    """Raises NotFound, also when the level has no list; AlreadyExists; Forbidden, StateConflict, BadRequest."""
    family = await _find(broker, principal, function_id, version_id)
    await _check(family, _named(party), broker)

    def change(listed: Parties) -> Parties:
        if not listed:
            raise NotFound(NO_LIST)
        if party in listed:
            raise AlreadyExists("the account is authorized already")
        return (*_closed(listed), party)

    return await _write(broker, family, version_id, change)


async def remove(broker: Broker, principal: Principal, function_id: str, version_id: str, party: str) -> Parties:
    """Raises NotFound, also when the level does not list the party; Forbidden, StateConflict, BadRequest."""
    family = await _find(broker, principal, function_id, version_id)
    _named(party)

    def change(listed: Parties) -> Parties:
        if party not in listed:
            raise NotFound("the account is not authorized on this level")
        return tuple(other for other in listed if other != party)

    return await _write(broker, family, version_id, change)


async def clear(broker: Broker, principal: Principal, function_id: str, version_id: str = "") -> Parties:
    """Idempotent. Raises NotFound, Forbidden, StateConflict."""
    family = await _find(broker, principal, function_id, version_id)
    return await _write(broker, family, version_id, lambda _: ())


async def _find(broker: Broker, principal: Principal, function_id: str, version_id: str) -> Family:
    if not version_id:
        return await find_function(broker, principal, function_id)
    return Family(versions=[await find_version(broker, principal, function_id, version_id)])


async def _check(family: Family, party: str, broker: Broker) -> None:
    if party == family.versions[0].account:
        raise BadRequest("authorizedParties: the function is the account's own", field="authorizedParties")
    if party != EVERYONE and await broker.catalog.accounts.get(party) is None and not await _in_use(broker, party):
        raise BadRequest("authorizedParties: no such account", field="authorizedParties")


async def _in_use(broker: Broker, account: str) -> bool:
    """An account needs no record to be one (`accounts.get_account`)."""
    return bool(await broker.catalog.keys.list("account", account)) or bool(
        await broker.catalog.versions.list("account", account)
    )


def _named(party: str) -> str:
    if party == EVERYONE:
        raise BadRequest("authorizedParty: '*' cannot be added or removed", field="authorizedParty")
    return party


def _closed(listed: Parties) -> Parties:
    if EVERYONE in listed:
        raise StateConflict("the function is public: there is nobody to add")
    return listed


async def _write(broker: Broker, family: Family, version_id: str, change: Callable[[Parties], Parties]) -> Parties:
    function_id, account = family.versions[0].function_id, family.versions[0].account

    def write(sharing: Sharing) -> Sharing:
        parties = change(sharing.level(version_id))
        if not version_id:
            return replace(sharing, parties=parties)
        others = tuple(level for level in sharing.versions if level[0] != version_id)
        return replace(sharing, versions=(*others, (version_id, parties)) if parties else others)

    written = await edit(
        broker.catalog.sharing, function_id, write, missing=Sharing(function_id=function_id, account=account)
    )
    return written.level(version_id) if written else ()
