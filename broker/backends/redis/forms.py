"""Commands of which little changes from one request to the next, packed but for that.

To pack the thirty parts of a script's call one by one costs more than all else that a process does to send it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import hiredis

_ARRAY_HEAD = len(b"*1\r\n")


class _Open(str):
    __slots__ = ()


OPEN: Final = _Open()
"""A part that `form` leaves to be filled in."""


def form(command: Sequence[str | int | bytes]) -> bytes:
    """To be packed by `form(…) % filled(…)`."""
    parts = [b"*%d\r\n" % len(command)]
    for part in command:
        if isinstance(part, _Open):
            parts.append(b"$%d\r\n%b\r\n")
        else:
            parts.append(hiredis.pack_command((part,))[_ARRAY_HEAD:].replace(b"%", b"%%"))
    return b"".join(parts)


def filled(*parts: bytes) -> tuple[int | bytes, ...]:
    """What is OPEN in a form, in order."""
    pairs: list[int | bytes] = [0] * (2 * len(parts))
    pairs[::2] = map(len, parts)
    pairs[1::2] = parts
    return tuple(pairs)


def parts_of(packed: bytes) -> list[bytes]:
    """Of a packed command."""
    reader = hiredis.Reader()
    reader.feed(packed)
    parts: list[bytes] = reader.gets()
    return parts
