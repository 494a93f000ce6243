"""`Retry-After` as a container may send it (RFC 9110 §10.2.3)."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from datetime import UTC
from email.utils import parsedate_to_datetime

STATUSES = frozenset({429, 503})
SHORTEST_S = 1.0  # the header counts whole seconds, and zero of them would be a busy loop


def retry_after_s(status: int, headers: Iterable[tuple[str, str]], *, longest_s: float) -> float:
    """Seconds after which the container wants the same request again, 0.0 if it does not say so."""
    said = next((value.strip() for name, value in headers if name.lower() == "retry-after"), "")
    wait_s = _seconds(said) if status in STATUSES else None
    return 0.0 if wait_s is None else min(max(wait_s, SHORTEST_S), longest_s)


def _seconds(said: str) -> float | None:
    if re.fullmatch(r"[0-9]+", said):
        return float(said)
    try:
        at = parsedate_to_datetime(said)
    except ValueError:
        return None
    # A date in the zone "-0000" comes without one; HTTP knows none but GMT.
    return at.replace(tzinfo=at.tzinfo or UTC).timestamp() - time.time()
