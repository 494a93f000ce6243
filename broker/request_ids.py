"""Request IDs: UUIDs of version 4 that carry a keyed tag of the account and the epoch of the store.

74 random bits, 8 bits of epoch, 40 bits of tag. A guessed or foreign ID is told from one of ours without asking
the store, and an ID of ours that the store lost when it was wiped is told from one whose time had come
(PROTOCOL R4).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import uuid

_TAG_BYTES = 5
_EPOCH_AT = 10


def mint(secret: bytes, account: str, epoch: int) -> str:
    """A new ID. `secret` is at most 64 bytes, `epoch` 0 to 255."""
    chance = os.urandom(_EPOCH_AT)
    versioned = (chance[6] & 0x0F | 0x40, chance[7], chance[8] & 0x3F | 0x80, chance[9], epoch)
    head = chance[:6] + bytes(versioned)
    digits = (head + _tag(secret, account, head)).hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def belongs(secret: bytes, account: str, request_id: str) -> bool:
    """Whether `mint` made this ID for this account. `request_id` is a canonical UUID."""
    raw = bytes.fromhex(request_id.replace("-", ""))
    head, tag = raw[:-_TAG_BYTES], raw[-_TAG_BYTES:]
    return hmac.compare_digest(tag, _tag(secret, account, head))


def epoch_of(request_id: str) -> int:
    """The epoch in which a canonical ID of ours was minted."""
    return uuid.UUID(request_id).bytes[_EPOCH_AT]


def _tag(secret: bytes, account: str, head: bytes) -> bytes:
    return hashlib.blake2b(head + account.encode(), key=secret, digest_size=_TAG_BYTES).digest()
