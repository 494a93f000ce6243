"""Rate limits of a version: read and written as text, set, and taken from (contract/management.md §1.4).

Which rates hold for a caller is upstream's rule: `rates` count each calling account by itself, a rate of its own
replaces them for an account, exempted accounts have none, and the rate per user holds beside whichever it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from broker.errors import BadRequest, NotFound, RateLimited, Unavailable
from broker.model import Principal, Rate, RateLimit, Taken, Version, Window
from broker.ports import Broker
from broker.revisions import edit
from broker.visibility import UNKNOWN_VERSION, find_version

logger = logging.getLogger(__name__)

UNIT_S = {"S": 1, "M": 60, "H": 3600, "D": 86_400}
UNLIMITED = Taken(granted=True)
MAX_ACCOUNTS = 32
MAX_LIMIT = 1_000_000_000

_LETTERS = {seconds: letter for letter, seconds in UNIT_S.items()}
_WORDS = {1: "second", 60: "minute", 3600: "hour", 86_400: "day"}
_RATE = re.compile(r"(\d{1,10})-([SMHD])", re.ASCII | re.IGNORECASE)


def parse_rates(text: str, *, field: str) -> tuple[Rate, ...]:
    """`100-S, 500-H`: a number from 1, a dash, and one of S M H D, each of them once.

    Raises BadRequest that names `field`.
    """
    rates = tuple(_parse_rate(part.strip(), field) for part in text.split(","))
    windows = [rate.window_s for rate in rates]
    if repeated := sorted({_LETTERS[window] for window in windows if windows.count(window) > 1}):
        raise BadRequest(f"{field}: the unit {', '.join(repeated)} is given more than once", field=field)
    return rates


def format_rates(rates: Sequence[Rate]) -> str:
    """What `parse_rates` reads."""
    return ", ".join(f"{rate.limit}-{_LETTERS[rate.window_s]}" for rate in rates)


def define(
    *,
    rates: str | None,
    exempted: Sequence[str] = (),
    per_account: Mapping[str, str] | None = None,
    per_user: str | None = None,
    sync_check: bool = False,
) -> RateLimit:
    """A rate limit from what its author wrote. Raises BadRequest that names the field."""
    per_account = per_account or {}
    _check(rates, exempted, per_account, per_user)
    return RateLimit(
        rates=() if rates is None else parse_rates(rates, field="rateLimit.rateLimit"),
        exempted=tuple(dict.fromkeys(exempted)),
        per_account=tuple(
            (account, parse_rates(text, field=f"rateLimit.perNcaIdRate.{account}"))
            for account, text in per_account.items()
        ),
        per_user=() if per_user is None else parse_rates(per_user, field="rateLimit.perUserRate"),
        sync_check=sync_check,
    )


async def set_rate_limit(
    broker: Broker, principal: Principal, function_id: str, version_id: str, rate_limit: RateLimit | None
) -> Version:
    """Replace the rate limit of a version of one's own, or take it away; what was counted so far stays counted.

    Every front end follows within a second. Raises NotFound, Forbidden, StateConflict.
    """
    await find_version(broker, principal, function_id, version_id)

    def change(version: Version) -> Version:
        if version.account != principal.account:
            raise NotFound(UNKNOWN_VERSION)
        return replace(version, rate_limit=rate_limit)

    changed = await edit(broker.catalog.versions, version_id, change)
    if changed is None:
        raise NotFound(UNKNOWN_VERSION)
    return changed


def windows(principal: Principal, version: Version) -> tuple[Window, ...]:
    """What an invocation takes from; nothing when no rate holds for this caller."""
    limit = version.rate_limit
    if limit is None:
        return ()
    account = principal.account
    rates = dict(limit.per_account).get(account, () if account in limit.exempted else limit.rates)
    return (
        *(_window(f"a:{account}", "", rate) for rate in rates),
        *(_window(f"u:{account}:{principal.subject}", "user-", rate) for rate in limit.per_user),
    )


class RateLimiter:
    """Takes from the rate limits of versions. One per process, made beside the Broker."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._away = False

    async def take(self, principal: Principal, version: Version) -> Taken:
        """Take one invocation; asks the store nothing where no rate holds. `require` turns the answer into an error.

        When the counters cannot be reached, the setting `rate_limit_unreachable` decides: `open` grants without
        counting, `closed` raises Unavailable.
        """
        wanted = windows(principal, version)
        if not wanted:
            return UNLIMITED
        try:
            taken = await self._broker.counters.take(version.id, wanted)
        except Unavailable:
            if not self._away:  # once per streak
                logger.warning("rate_limits_unreachable", extra={"then": self._broker.settings.rate_limit_unreachable})
            self._away = True
            if self._broker.settings.rate_limit_unreachable == "closed":
                raise
            return UNLIMITED
        self._away = False
        return taken


def require(taken: Taken) -> None:
    """Raises RateLimited, with what was exceeded and when to come again, unless the take was granted."""
    if taken.granted:
        return
    spent = [quota for quota in taken.quotas if not quota.remaining]
    names = " and ".join(
        f"{quota.rate.limit} per {_WORDS[quota.rate.window_s]}{' and user' if quota.policy.startswith('user-') else ''}"
        for quota in spent
    )
    raise RateLimited(
        f"the function's rate limit is used up: {names}; send the request again after Retry-After seconds",
        retry_after_s=taken.retry_after_s,
    )


def _parse_rate(text: str, field: str) -> Rate:
    found = _RATE.fullmatch(text)
    limit = int(found[1]) if found else 0
    if found is None or not 0 < limit <= MAX_LIMIT:
        raise BadRequest(
            f"{field}: {text[:20]!r} is not a rate; write a number from 1 to {MAX_LIMIT}, a dash, and one of S, M, H "
            "and D, as in 100-S, 500-H",
            field=field,
        )
    return Rate(limit=limit, window_s=UNIT_S[found[2].upper()])


def _check(rates: str | None, exempted: Sequence[str], per_account: Mapping[str, str], per_user: str | None) -> None:
    if rates is None and not per_account and per_user is None:
        raise BadRequest("rateLimit: one of rateLimit, perNcaIdRate and perUserRate is needed", field="rateLimit")
    if exempted and rates is None:
        raise BadRequest("rateLimit.exemptedNcaIds: needs rateLimit beside it", field="rateLimit.exemptedNcaIds")
    for name, accounts in (("exemptedNcaIds", set(exempted)), ("perNcaIdRate", set(per_account))):
        if len(accounts) > MAX_ACCOUNTS:
            raise BadRequest(f"rateLimit.{name}: at most {MAX_ACCOUNTS} accounts", field=f"rateLimit.{name}")
        if "" in accounts:
            raise BadRequest(f"rateLimit.{name}: an account is empty", field=f"rateLimit.{name}")
    if both := sorted(set(exempted) & set(per_account)):
        raise BadRequest(
            f"rateLimit.perNcaIdRate: {both[0]} cannot have a rate and be exempted", field="rateLimit.perNcaIdRate"
        )


def _window(counter: str, prefix: str, rate: Rate) -> Window:
    return Window(counter=counter, policy=prefix + _WORDS[rate.window_s], rate=rate)
