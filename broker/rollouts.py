"""How the calls of a function are shared among its versions: set, look, and draw one.

A weight is a version's per cent of the calls that name the function only. Versions without one share the rest evenly,
so that a canary is one weight and everything else follows. Shares are of what can be called now: what a version that
cannot be called would get goes to the others in proportion, and a weight of 0 gets none, whatever else is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import fsum
from random import SystemRandom

from broker.errors import BadRequest
from broker.model import Principal, Version
from broker.ports import Broker
from broker.revisions import edit
from broker.visibility import Family, find_function

WHOLE = 100.0
# What decimals that come to 100 may miss it by.
_ROUNDING = 1e-6

_chance = SystemRandom()


def shares(family: Family, callable_now: Sequence[Version]) -> list[float]:
    """The per cent of each of these versions; all 0 when none of them may be drawn."""
    rest = max(0.0, WHOLE - sum(version.weight or 0.0 for version in family.versions))
    without = sum(version.weight is None for version in callable_now)
    parts = [rest / without if version.weight is None else version.weight for version in callable_now]
    total = sum(parts)
    return [part / total * WHOLE if total else 0.0 for part in parts]


def draw(family: Family, callable_now: Sequence[Version]) -> Version | None:
    """One of these versions of the family, by their shares; None when none of them may be drawn."""
    if all(version.weight is None for version in family.versions):
        return _chance.choice(callable_now) if len(callable_now) > 1 else callable_now[0]
    parts = shares(family, callable_now)
    return _chance.choices(callable_now, parts)[0] if any(parts) else None


async def get(broker: Broker, principal: Principal, function_id: str) -> list[tuple[Version, float]]:
    """Every version of the caller's function with its share. Raises NotFound, Forbidden."""
    return _shown(await find_function(broker, principal, function_id, changing=False))


async def set_weights(
    broker: Broker, principal: Principal, function_id: str, weights: Mapping[str, float]
) -> list[tuple[Version, float]]:
    """Give these versions these weights and the others none; returns what `get` then says. Idempotent: a call that
    failed half-way is repeated.

    Raises NotFound, Forbidden, StateConflict, or BadRequest that says what is wrong with the weights.
    """
    family = await find_function(broker, principal, function_id)
    known = {version.id for version in family.versions}
    if unknown := sorted(set(weights) - known):
        raise BadRequest(f"weights: the function has no version {unknown[0]}", field="weights")
    together = fsum(weights.values())
    if together > WHOLE + _ROUNDING:
        raise BadRequest(f"weights: {together:g} per cent together, {WHOLE:g} at most", field="weights")

    def weigh(version: Version) -> Version:
        return replace(version, weight=weights.get(version.id))

    weighed = []
    for version in family.versions:
        written = await edit(broker.catalog.versions, version.id, weigh)
        if written is not None:
            weighed.append(written)
    return _shown(Family(versions=weighed))


def _shown(family: Family) -> list[tuple[Version, float]]:
    callable_now = [version for version in family.versions if version.status.invocable]
    found = dict(zip((version.id for version in callable_now), shares(family, callable_now), strict=True))
    ordered = sorted(family.versions, key=lambda version: (version.created_at, version.id))
    return [(version, found.get(version.id, 0.0)) for version in ordered]
