"""Who may see, invoke and change which function version: the one place that decides it.

An account sees its own, what was shared with it, and what is public; it changes its own. What it does not see is
told apart from what does not exist nowhere. Then the key's resources decide: what they leave out is refused by name
and missing from lists (contract/management.md §4.4, §4.6).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from broker.errors import Forbidden, NotFound, StateConflict
from broker.model import (
    ALL_RESOURCES,
    EVERYONE,
    DeadLetter,
    Principal,
    Record,
    Sharing,
    Tally,
    Version,
    WebhookDelivery,
)
from broker.ports import Broker

UNKNOWN_FUNCTION = "no such function"
UNKNOWN_VERSION = "no such function version"
NOT_COVERED = "the key's resources do not cover the function"
PUBLIC_FUNCTION = "the function is public: only a super-admin may do this"

OWN, SHARED = ALL_RESOURCES


OfRequest = Record | DeadLetter | Tally | WebhookDelivery


class Visibility(StrEnum):
    """Why an account sees a version, in the order of lists (contract/management.md §1.7)."""

    PUBLIC = "public"
    PRIVATE = "private"
    AUTHORIZED = "authorized"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """All versions of one function, and with whom they are shared."""

    versions: Sequence[Version]
    sharing: Sharing | None = None


def standing(principal: Principal, version: Version, sharing: Sharing | None) -> Visibility | None:
    """None when the principal's account does not see it."""
    if version.account == principal.account:
        return Visibility.PRIVATE
    parties = sharing.of(version.id) if sharing else ()
    if principal.account in parties:
        return Visibility.AUTHORIZED
    return Visibility.PUBLIC if EVERYONE in parties else None


def covers(principal: Principal, version: Version) -> bool:
    """Whether the credential is good for a version that the account sees."""
    if not _within(principal.functions, version.function_id, version.id):
        return False
    everything = OWN if version.account == principal.account else SHARED
    return everything in principal.resources or names(principal, version.function_id, version.id)


def names(principal: Principal, function_id: str, version_id: str = "") -> bool:
    """Whether the resources name this very version, or all versions of the function."""
    return _within(principal.resources, function_id, version_id)


def is_public(family: Family) -> bool:
    sharing = family.sharing
    return sharing is not None and any(EVERYONE in sharing.of(version.id) for version in family.versions)


def select(principal: Principal, family: Family, version_id: str = "") -> list[Version]:
    """The versions, or the named one, that the caller may see.

    Raises NotFound when the account sees none, Forbidden when the key's resources cover none of them.
    """
    seen = [
        version
        for version in family.versions
        if version_id in ("", version.id) and standing(principal, version, family.sharing)
    ]
    if not seen:
        raise NotFound(UNKNOWN_VERSION if version_id else UNKNOWN_FUNCTION)
    covered = [version for version in seen if covers(principal, version)]
    if not covered:
        raise Forbidden(NOT_COVERED)
    return covered


async def find_family(broker: Broker, function_id: str) -> Family:
    """In one exchange with the store. Without versions when there is no such function."""
    rows, sharing = await asyncio.gather(
        broker.catalog.versions.list("function_id", function_id), broker.catalog.sharing.get(function_id)
    )
    return Family(versions=[row.item for row in rows], sharing=sharing.item if sharing else None)


async def find_visible(broker: Broker, principal: Principal, function_id: str, version_id: str) -> Version:
    """A version to look at. Raises NotFound (unknown, of another function, or not visible) or Forbidden."""
    family = await _find_one(broker, function_id, version_id)
    [version] = select(principal, family, version_id)
    return version


async def find_version(
    broker: Broker, principal: Principal, function_id: str, version_id: str, *, changing: bool = True
) -> Version:
    """A version of the caller's own account, to change it unless told otherwise.

    Raises:
        NotFound: unknown, of another function, or another account's, shared ones included.
        Forbidden: the key's resources do not cover it.
        StateConflict: it is public, and only a super-admin changes it.
    """
    family = await _find_one(broker, function_id, version_id)
    [version] = select(principal, _own(principal, family), version_id)
    if changing:
        refuse_public(principal, family)
    return version


async def find_function(broker: Broker, principal: Principal, function_id: str, *, changing: bool = True) -> Family:
    """A function of the caller's own account, to change it as a whole unless told otherwise. Raises as
    `find_version`."""
    family = await find_family(broker, function_id)
    if not _own(principal, family).versions:
        raise NotFound(UNKNOWN_FUNCTION)
    if OWN not in principal.resources and not names(principal, function_id):
        raise Forbidden(NOT_COVERED)
    if changing:
        refuse_public(principal, family)
    return family


def refuse_public(principal: Principal, family: Family) -> None:
    """Raises StateConflict when any of these versions is public and the caller is no super-admin."""
    if is_public(family) and not principal.super_admin:
        raise StateConflict(PUBLIC_FUNCTION)


async def check_request(broker: Broker, principal: Principal, record: OfRequest) -> None:
    """Return if the caller's key covers the function of its account's request. Raises Forbidden.

    A function that is gone belongs to nobody any more: then any key that covers functions at large is good enough.
    """
    if not _within(principal.functions, record.function_id, record.version_id):
        raise Forbidden(NOT_COVERED)
    whole = principal.resources.intersection(ALL_RESOURCES)
    if len(whole) == len(ALL_RESOURCES) or names(principal, record.function_id, record.version_id):
        return
    row = await broker.catalog.versions.get(record.version_id) if whole else None
    if whole and (row is None or covers(principal, row.item)):
        return
    raise Forbidden(NOT_COVERED)


async def is_covered(broker: Broker, principal: Principal, record: OfRequest) -> bool:
    """Whether `check_request` would return."""
    try:
        await check_request(broker, principal, record)
    except Forbidden:
        return False
    return True


def _within(named: frozenset[str] | None, function_id: str, version_id: str) -> bool:
    """None is no bound."""
    return (
        named is None or f"function/{function_id}/{version_id or '*'}" in named or f"function/{function_id}/*" in named
    )


async def _find_one(broker: Broker, function_id: str, version_id: str) -> Family:
    row, sharing = await asyncio.gather(
        broker.catalog.versions.get(version_id), broker.catalog.sharing.get(function_id)
    )
    versions = [row.item] if row and row.item.function_id == function_id else []
    return Family(versions=versions, sharing=sharing.item if sharing else None)


def _own(principal: Principal, family: Family) -> Family:
    return Family(versions=[version for version in family.versions if version.account == principal.account])
