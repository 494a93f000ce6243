"""What every route may answer (contract/management.md §5)."""

from __future__ import annotations

from typing import Literal

from fnqueue.wire.fields import Wire


class Problem(Wire):
    """What went wrong (RFC 9457); `type` tells the kinds of one status apart."""

    type: str
    title: str
    status: int
    detail: str | None = None
    instance: str | None = None
    request_id: str | None = None
    outcome: Literal["unknown"] | None = None
