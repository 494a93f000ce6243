"""Rate limits towards HTTP: the JSON of a function's, and the pace of management calls."""

from __future__ import annotations

from broker import limits
from broker.backends.memory.counters import MemoryCounters
from broker.errors import ConfigurationError, TooManyRequests
from broker.model import Rate, RateLimit, Window
from broker.settings import ApiSettings
from fnqueue.wire import RateLimitModel


def define(asked: RateLimitModel) -> RateLimit:
    """Raises BadRequest that names the field."""
    return limits.define(
        rates=asked.rate_limit,
        exempted=asked.exempted_nca_ids or (),
        per_account=asked.per_nca_id_rate,
        per_user=asked.per_user_rate,
        sync_check=bool(asked.sync_check),
    )


def present(limit: RateLimit) -> RateLimitModel:
    return RateLimitModel(
        rate_limit=limits.format_rates(limit.rates) or None,
        exempted_nca_ids=list(limit.exempted) or None,
        per_nca_id_rate={account: limits.format_rates(rates) for account, rates in limit.per_account} or None,
        per_user_rate=limits.format_rates(limit.per_user) or None,
        sync_check=limit.sync_check or None,
    )


class Pace:
    """Management calls per second, of an account and of an account about one function or version.

    Counted in this process: these limits protect the store, so they must not cost an exchange with it. Calls about
    a function are counted for each account by itself, or anybody could use up the owner's.
    """

    def __init__(self, settings: ApiSettings) -> None:
        """Raises ConfigurationError: the setting `paces` cannot be read."""
        self._counters = MemoryCounters()
        self._per_account = settings.account_calls_per_s
        self._per_function = settings.function_calls_per_s
        self._own = _paces(settings.paces)

    async def keep(self, account: str, *, about: str) -> None:
        """`about` is the ID of a version or function, "" when the call is about none. Raises TooManyRequests."""
        bounds = [("account", "", self._own.get(account.lower(), self._per_account))]
        if about:
            bounds.append(("function", about, self._own.get(about.lower(), self._per_function)))
        windows = [
            Window(counter=f"{policy}:{counter}", policy=policy, rate=Rate(limit=limit, window_s=1))
            for policy, counter, limit in bounds
            if limit
        ]
        taken = await self._counters.take(account, windows)
        if not taken.granted:
            spent = next(quota for quota in taken.quotas if not quota.remaining)
            raise TooManyRequests(
                f"slow down: more than {spent.rate.limit} management calls per second for this {spent.policy}",
                retry_after_s=taken.retry_after_s,
            )


def _paces(text: str) -> dict[str, int]:
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (half.strip() for half in part.partition("="))
        if not name or not number.isdecimal():
            raise ConfigurationError(f"FNQUEUE_PACES: {part!r} is not of the form ID=NUMBER")
        found[name.lower()] = int(number)
    return found
