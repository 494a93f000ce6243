"""Which calls are made again, and when. Pure.

Every call of the client may be repeated: reading and deleting are idempotent, and an invocation always carries an
Idempotency-Key, so that a second one leads to the first.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from fnqueue.errors import ApiError, FnqueueError

FIRST_S = 0.25
LONGEST_S = 20.0
# A server that fails in this way does so again; once more is for what only one of several servers has.
_INTERNAL_REPEATS = 2
# Beyond what a server asks for, so that those whom it sent away do not come back together.
_SPREAD = 0.25

Draw = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Those in a row of one call. `since` and all times are of one clock that never goes back, in seconds."""

    count: int = 0
    since: float = 0.0

    def one_more(self, now: float) -> Failures:
        return Failures(count=self.count + 1, since=self.since if self.count else now)


def pause_s(retry_after_s: float | None, failures: int, draw: Draw = random.random) -> float:
    """How long to wait: what the server asks for and up to a quarter more, at least a back-off that doubles."""
    backoff = min(LONGEST_S, FIRST_S * 2.0 ** min(failures, 16)) * (0.5 + 0.5 * draw())
    asked = (retry_after_s or 0.0) * (1.0 + _SPREAD * draw())
    return max(asked, backoff)


def wait_s(
    error: FnqueueError,
    failures: Failures,
    now: float,
    *,
    retry_for_s: float,
    give_up_at: float,
    draw: Draw = random.random,
) -> float | None:
    """How long to wait before the call is made again; None where it is not.

    `failures` counts this one. A pause that would end behind `give_up_at`, or `retry_for_s` after the first failure,
    is not begun: the caller hears of the error while it can do something else.
    """
    if not error.retryable:
        return None
    if isinstance(error, ApiError) and error.status == 500 and failures.count > _INTERNAL_REPEATS:
        return None
    asked = error.retry_after_s if isinstance(error, ApiError) else None
    wait = pause_s(asked, failures.count - 1, draw)
    return wait if now + wait < min(give_up_at, failures.since + retry_for_s) else None
