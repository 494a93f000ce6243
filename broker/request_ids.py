"""Request IDs: UUIDs of version 4 whose last 48 bits are a keyed tag of the account.

A guessed or foreign ID is told from one of ours without asking the store, and an ID of ours that the store no
longer knows is told from one that never existed (PROTOCOL R4).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import uuid

_TAG_BYTES = 6


def mint(secret: bytes, account: str) -> str:
    """A new ID for `account`: 74 random bits and the tag."""
    head = bytearray(os.urandom(16 - _TAG_BYTES))
    head[6] = (head[6] & 0x0F) | 0x40
    head[8] = (head[8] & 0x3F) | 0x80
    return str(uuid.UUID(bytes=bytes(head) + _tag(secret, account, bytes(head))))


def belongs(secret: bytes, account: str, request_id: str) -> bool:
    """Whether `mint` made this ID for this account. `request_id` is a canonical UUID."""
    raw = uuid.UUID(request_id).bytes
    head, tag = raw[:-_TAG_BYTES], raw[-_TAG_BYTES:]
    return hmac.compare_digest(tag, _tag(secret, account, head))


def _tag(secret: bytes, account: str, head: bytes) -> bytes:
    return hashlib.blake2b(head + account.encode(), key=secret[:64], digest_size=_TAG_BYTES).digest()
