"""Where a body may be cut: a stream of server-sent events between two of them, anything else wherever it comes.

Lines and fields are those of the WHATWG HTML standard, "Interpreting an event stream".
"""

from __future__ import annotations

import re
from typing import Protocol

from broker.model import Chunk

EVENT_ID_MAX_BYTES = 256
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# The end of a line and an empty line. Atomic, so that CR LF is never taken for two ends.
_BLANK = re.compile(rb"(?>\r\n|\r|\n)(?>\r\n|\r|\n)")
_LONGEST_BLANK = 4
_DATA = re.compile(rb"(?:\A|[\r\n])data[:\r\n]")
_ID = re.compile(rb"(?:\A|[\r\n])id(?:: ?([^\r\n]*))?(?=[\r\n])")


class EventTooLarge(Exception):
    """An event has more bytes than may be held back until its end. `before` are the whole chunks in front of it."""

    def __init__(self, before: list[Chunk]) -> None:
        super().__init__()
        self.before = before


class Cutter(Protocol):
    def feed(self, piece: bytes) -> list[Chunk]:
        """The chunks that are whole now. Raises EventTooLarge."""

    def end(self) -> list[Chunk]:
        """What is left at the end of the body."""


class Pieces:
    """A body without events: as it comes, in pieces of at most `limit_bytes`."""

    def __init__(self, *, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._offset = 0

    def feed(self, piece: bytes) -> list[Chunk]:
        parts = (piece[at : at + self._limit_bytes] for at in range(0, len(piece), self._limit_bytes))
        return [self._chunk(part) for part in parts]

    def end(self) -> list[Chunk]:
        return []

    def _chunk(self, part: bytes) -> Chunk:
        self._offset += len(part)
        return Chunk(data=part, end=self._offset)


class Events:
    """A body of `text/event-stream`: one chunk per block of lines up to an empty line, of at most `limit_bytes`.

    A block without data, as a comment that keeps the connection alive, is handed on like the others and is no event.
    So is what comes behind the last empty line; a client drops that.
    """

    def __init__(self, *, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._pending = b""
        self._offset = 0
        self._last_id = ""

    def feed(self, piece: bytes) -> list[Chunk]:
        """A block that ends with CR is handed on at once; an LF that completes it to CR LF begins the next one."""
        search_from = max(0, len(self._pending) - _LONGEST_BLANK + 1)
        text, begin, found = self._pending + piece, 0, []
        for blank in _BLANK.finditer(text, search_from):
            if blank.end() - begin > self._limit_bytes:
                break
            found.append(self._chunk(text[begin : blank.end()]))
            begin = blank.end()
        self._pending = text[begin:]
        if len(self._pending) > self._limit_bytes:
            raise EventTooLarge(found)
        return found

    def end(self) -> list[Chunk]:
        rest, self._pending = self._pending, b""
        self._offset += len(rest)
        return [Chunk(data=rest, end=self._offset)] if rest else []

    def _chunk(self, block: bytes) -> Chunk:
        lines = block if self._offset else block.removeprefix(_BYTE_ORDER_MARK)
        self._offset += len(block)
        if _DATA.search(lines) is None:
            return Chunk(data=block, end=self._offset)
        before, self._last_id = self._last_id, _own_id(lines)
        return Chunk(
            data=block, end=self._offset, event=True, event_id=self._last_id if self._last_id != before else ""
        )


def _own_id(lines: bytes) -> str:
    """The ID that the event gives itself; "" for none, and for one that no client could send back."""
    found = _ID.findall(lines)
    if not found or len(found[-1]) > EVENT_ID_MAX_BYTES:
        return ""
    try:
        text: str = found[-1].decode()
    except UnicodeDecodeError:
        return ""
    return text if text.isprintable() and text == text.strip() else ""
