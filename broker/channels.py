"""What front end and sidecar say to each other over a channel, and the token that opens one.

A message is one byte that tells its kind, and a payload. Of a call there is at most one HEAD, and nothing else of the
container's before it. DATA and END carry a body, in either direction; TEXT to CLOSE a WebSocket's messages.
"""

from __future__ import annotations

import hashlib
import secrets
import socket
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import orjson

CHUNK_BYTES = 64 * 1024
# Of a WebSocket's close frame (RFC 6455 §5.5.1): 125 bytes, two of them the code.
REASON_MAX_BYTES = 123
# The largest that `max_message_bytes` can be, and a kind: each end bounds what its own side sends, and neither has to
# know the other's setting.
MESSAGE_MAX_BYTES = 64 * 1024 * 1024 + 1
# A machine that has gone is noticed after 30 s. Messages of our own could not tell: they would wait behind those that a
# slow reader has not taken yet.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


class Kind(IntEnum):
    """FAIL comes from the sidecar: the call ends here, without what it was going to say. ABORT is the front end's
    word for the same; its payload is why. Both carry what the other side is to be told."""

    HEAD = 1
    DATA = 2
    END = 3
    TEXT = 4
    BINARY = 5
    PING = 6
    PONG = 7
    CLOSE = 8
    FAIL = 9
    ABORT = 10


class CloseCode(IntEnum):
    """Those of RFC 6455 §7.4.1 that we say ourselves."""

    NORMAL = 1000
    GOING_AWAY = 1001
    INTERNAL_ERROR = 1011
    SERVICE_RESTART = 1012


class Garbled(ValueError):
    """Not what the other side may send here."""


class Message(NamedTuple):
    kind: Kind
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """How the container answered. 101 is a WebSocket that it opened, with `protocol` agreed on ('' for none)."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    protocol: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """The end of a WebSocket, in its own words."""

    code: int = CloseCode.NORMAL
    reason: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why there is no more: `problem` is a problem+json body of that `status`, `code` is for closing a WebSocket."""

    status: int
    problem: bytes
    code: int = CloseCode.INTERNAL_ERROR

    @property
    def detail(self) -> str:
        try:
            return str(orjson.loads(self.problem)["detail"])
        except (ValueError, TypeError, KeyError):
            return ""


def new_token() -> str:
    return secrets.token_urlsafe(32)


def token_hash(token: str) -> bytes:
    """All of a token that may be kept; found by this, it takes the same time whatever was guessed."""
    return hashlib.sha256(token.encode(errors="replace")).digest()


def message(kind: Kind, payload: bytes = b"") -> bytes:
    return _PREFIXES[kind] + payload


def parse(raw: bytes) -> Message:
    """Raises Garbled."""
    try:
        return Message(_KINDS[raw[0]], raw[1:])
    except (IndexError, KeyError) as exc:
        raise Garbled("a message of no known kind") from exc


def pack_head(head: Head) -> bytes:
    return orjson.dumps([head.status, head.headers, head.protocol])


def unpack_head(payload: bytes) -> Head:
    """Raises Garbled."""
    try:
        status, headers, protocol = orjson.loads(payload)
        pairs = tuple((str(name), str(value)) for name, value in headers)
        return Head(status=int(status), headers=pairs, protocol=str(protocol))
    except (ValueError, TypeError) as exc:
        raise Garbled("not a head") from exc


def pack_close(close: Close) -> bytes:
    return close.code.to_bytes(2) + close.reason


def unpack_close(payload: bytes) -> Close:
    """Raises Garbled."""
    if not 2 <= len(payload) <= 2 + REASON_MAX_BYTES:
        raise Garbled("not a close")
    return Close(code=int.from_bytes(payload[:2]), reason=payload[2:])


def closing(code: int, reason: str | bytes) -> Close:
    """One that may be sent. A frame without a code reads 0, and a reason is cut to what fits."""
    told = reason.encode() if isinstance(reason, str) else reason
    cut = told[:REASON_MAX_BYTES].decode(errors="ignore").encode()
    return Close(code=code or CloseCode.NORMAL, reason=cut)


def pack_failure(failure: Failure) -> bytes:
    return failure.code.to_bytes(2) + failure.status.to_bytes(2) + failure.problem


def unpack_failure(payload: bytes) -> Failure:
    """Raises Garbled."""
    status = int.from_bytes(payload[2:4])
    if not 400 <= status <= 599:
        raise Garbled("not a failure")
    return Failure(code=int.from_bytes(payload[:2]), status=status, problem=payload[4:])


def keep_alive(connection: socket.socket) -> None:
    """Have the kernel look, all the time, whether the other machine is there."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


_PREFIXES = {kind: bytes((kind,)) for kind in Kind}
_KINDS = {int(kind): kind for kind in Kind}
