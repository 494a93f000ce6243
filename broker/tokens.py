"""Delegated invocation tokens: what a key's holder gives to somebody who is to invoke a few functions for a while.

A token is `nvapi-t1.<payload>.<mac>`, both base64url. Nothing of it is stored: who knows the secret knows it for ours,
and its parent key is asked for each time, so that it is never good for more, or longer, than that key.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from dataclasses import dataclass

import orjson

# No key holds a dot; the digit is the format's version.
PREFIX = "nvapi-t1."

_DERIVED_FOR = b"fnqueue/delegated-token/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delegation:
    """What a token says. `parent` is by what its key is found, `functions` are spelled as a key's resources are, and
    `expires_at` is in unix seconds by the clock of the front ends."""

    parent: str
    client_id: str
    functions: tuple[str, ...]
    expires_at: float


def sign(secret: bytes, delegation: Delegation) -> str:
    """The token. It hides nothing of what it says."""
    said = (delegation.parent, delegation.client_id, delegation.functions, delegation.expires_at)
    signed = PREFIX + _text(orjson.dumps(said))
    return f"{signed}.{_mac(secret, signed)}"


def verify(secret: bytes, token: str) -> Delegation | None:
    """What `sign` was given with the same secret; None for everything else. Whether it has expired is not asked."""
    signed, _, mac = token.rpartition(".")
    # As text: two spellings of the same bytes are not the same token.
    if not signed.startswith(PREFIX) or not hmac.compare_digest(mac.encode(), _mac(secret, signed).encode()):
        return None
    payload = signed.removeprefix(PREFIX)
    parent, client_id, functions, expires_at = orjson.loads(
        base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
    )
    return Delegation(parent=parent, client_id=client_id, functions=tuple(functions), expires_at=expires_at)


def pseudonym(secret: bytes, key_hash: str) -> str:
    """Stands in a token for a key that a person chose: its hash alone could be searched for."""
    return "admin:" + hmac.digest(_key(secret), key_hash.encode(), hashlib.sha256).hex()


def _mac(secret: bytes, signed: str) -> str:
    return _text(hmac.digest(_key(secret), signed.encode(), hashlib.sha256))


def _key(secret: bytes) -> bytes:
    return hmac.digest(secret, _DERIVED_FOR, hashlib.sha256)


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
