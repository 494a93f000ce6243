"""For receivers of webhooks: whether a message is from the server, by Standard Webhooks (standardwebhooks.com)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Iterable, Mapping

TOLERANCE_S = 300.0


class NotGenuine(ValueError):
    """A message that must not be believed."""


def verify(
    secret: str | Iterable[str],
    headers: Mapping[str, str],
    body: bytes,
    *,
    tolerance_s: float = TOLERANCE_S,
    now: float | None = None,
) -> str:
    """The ID of a message, the same each time that it is sent.

    Args:
        secret: `whsec_…`, or several, of which one has to fit.
        headers: as they came, in any case.
        body: byte by byte as it came.
        tolerance_s: how old or how far ahead the message may be.
        now: the time, in unix seconds; the clock's where it is not given.

    Raises: NotGenuine; ValueError: a secret is none.
    """
    found = {name.lower(): value for name, value in headers.items()}
    try:
        message_id, timestamp, given = (found[f"webhook-{part}"] for part in ("id", "timestamp", "signature"))
    except KeyError as exc:
        raise NotGenuine(f"there is no header {exc.args[0]}") from None
    if not (timestamp.isascii() and timestamp.isdigit()):
        raise NotGenuine("webhook-timestamp is no time")
    if abs((time.time() if now is None else now) - float(timestamp[:15])) > tolerance_s:
        raise NotGenuine("the message is too old, or the clocks differ")
    signed = f"{message_id}.{timestamp}.".encode() + body
    good = [_signature(each, signed) for each in ([secret] if isinstance(secret, str) else secret)]
    # All are compared, so that the time tells nothing.
    fits = [hmac.compare_digest(one, each.encode()) for one in good for each in given.split(" ")]
    if not any(fits):
        raise NotGenuine("no signature fits")
    return message_id


def _signature(secret: str, signed: bytes) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("a webhook secret is whsec_ and base64") from None
    return b"v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256))
