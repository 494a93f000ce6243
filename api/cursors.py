"""Where the next page of a list begins, as text that says nothing to its reader."""

from __future__ import annotations

import base64

from broker.errors import BadRequest


def cursor(place: int) -> str:
    return base64.urlsafe_b64encode(place.to_bytes(8)).decode().rstrip("=")


def place(text: str) -> int:
    """What `cursor` was given; 0 for none. A made-up one only leads elsewhere in the caller's own list. Raises
    BadRequest."""
    if not text:
        return 0
    try:
        raw = base64.b64decode(text.encode() + b"=", altchars=b"-_", validate=True)
    except ValueError:
        raw = b""
    if len(raw) != 8 or raw[0]:
        raise BadRequest("cursor: must be one that an earlier page gave", field="cursor")
    return int.from_bytes(raw)
