"""What the health routes answer."""

from __future__ import annotations

from typing import Literal

from fnqueue.wire.fields import Wire


class Up(Wire):
    status: Literal["OK"]


class Ready(Up):
    """`away` names servers without which some calls are answered 503."""

    away: list[Literal["queue"]] | None = None
