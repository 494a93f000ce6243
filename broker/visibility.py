"""Who may see which function version: the one place that decides it.

An account sees its own. What it does not see is told apart from what does not exist nowhere.
"""

from __future__ import annotations

from broker.errors import NotFound
from broker.model import Principal, Version
from broker.ports import Broker

UNKNOWN_FUNCTION = "no such function"
UNKNOWN_VERSION = "no such function version"


def visible(principal: Principal, version: Version) -> bool:
    return version.account == principal.account


async def find_version(broker: Broker, principal: Principal, function_id: str, version_id: str) -> Version:
    """Raises NotFound: unknown, of another function, or not visible to the caller."""
    row = await broker.catalog.versions.get(version_id)
    if row is None or row.item.function_id != function_id or not visible(principal, row.item):
        raise NotFound(UNKNOWN_VERSION)
    return row.item
