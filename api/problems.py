"""Error class to status and problem body (RFC 9457): the only such table.

`type` is upstream's URN where upstream has a name for the fault, and ours where it has none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple

import orjson
from aiohttp import web
from multidict import CIMultiDict
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from api import headers
from broker.errors import (
    AccountFull,
    AlreadyExists,
    AlreadyFinished,
    BadRequest,
    FnqueueError,
    Forbidden,
    IdempotencyKeyReused,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    QueueFull,
    RateLimited,
    RecordDamaged,
    RequestExpired,
    RevisionConflict,
    StateConflict,
    StreamNotKept,
    TooManyRequests,
    TryLater,
    Unauthenticated,
    Unavailable,
)

CONTENT_TYPE = "application/problem+json"
UPSTREAM = "urn:nv-boot:problem-details:"
OURS = "urn:fnqueue:problem-details:"
MAX_FAULTS = 20
MAX_REJECTED = 256
MAX_PART = 64
_RULE = re.compile(r"(?P<field>[A-Za-z]+): (?P<rule>.+)")
# What was given for these, or anywhere inside them, is never repeated.
_SECRET = frozenset(
    {
        "secret",
        "secrets",
        "value",
        "containerEnvironment",
        "containerArgs",
        "configuration",
        "password",
        "token",
        "key",
        "credentials",
        "authorizations",
    }
)


class NoSuchPath(FnqueueError):
    """No route has this path."""


class WrongMethod(FnqueueError):
    """The path is known and the method is not; `allowed` goes into `Allow`."""

    def __init__(self, allowed: str) -> None:
        super().__init__(f"this path answers {allowed}")
        self.allowed = allowed


class BodyTooSlow(FnqueueError):
    """The client did not send its body in the time it had."""


class TimedOut(FnqueueError):
    """What the caller waited for did not come in time, and will not come."""


class WorkerLost(FnqueueError):
    """The worker died while the caller was connected to it."""


# After these, what the client still sends of its body is not read.
CLOSING = (BodyTooSlow, PayloadTooLarge)


class InvalidBody(BadRequest):
    """The body is JSON and not what this route takes."""


class Kind(NamedTuple):
    status: int
    type: str

    @property
    def word(self) -> str:
        """What the type ends with."""
        return self.type.rpartition(":")[2]


_KINDS: dict[type[BaseException], Kind] = {
    BadRequest: Kind(400, UPSTREAM + "bad-request"),
    InvalidBody: Kind(400, "about:blank"),
    StateConflict: Kind(400, UPSTREAM + "bad-request"),
    PayloadTooLarge: Kind(413, OURS + "payload-too-large"),
    IdempotencyKeyReused: Kind(422, OURS + "idempotency-key-reused"),
    Unauthenticated: Kind(401, UPSTREAM + "unauthorized"),
    Forbidden: Kind(403, UPSTREAM + "forbidden"),
    NotFound: Kind(404, UPSTREAM + "not-found"),
    NoSuchPath: Kind(404, UPSTREAM + "not-found"),
    RequestExpired: Kind(404, OURS + "result-expired"),
    WrongMethod: Kind(405, OURS + "method-not-allowed"),
    BodyTooSlow: Kind(408, OURS + "body-timeout"),
    AlreadyExists: Kind(409, UPSTREAM + "conflict"),
    AlreadyFinished: Kind(409, UPSTREAM + "conflict"),
    RevisionConflict: Kind(409, UPSTREAM + "conflict"),
    StreamNotKept: Kind(410, OURS + "stream-not-kept"),
    QueueFull: Kind(429, OURS + "queue-full"),
    AccountFull: Kind(429, OURS + "account-full"),
    RateLimited: Kind(429, OURS + "rate-limited"),
    TooManyRequests: Kind(429, UPSTREAM + "too-many-requests"),
    WorkerLost: Kind(502, OURS + "worker-lost"),
    TryLater: Kind(503, OURS + "unavailable"),
    Overloaded: Kind(503, OURS + "overloaded"),
    Unavailable: Kind(503, OURS + "unavailable"),
    RecordDamaged: Kind(503, OURS + "record-damaged"),
    TimedOut: Kind(504, OURS + "timed-out"),
}
INTERNAL = Kind(500, OURS + "internal")
NOT_READY = Kind(503, OURS + "unavailable")
# Of requests that ended without an answer of their function (api.answers).
REQUEST_EXPIRED = Kind(504, OURS + "request-expired")
QUEUE_TIMEOUT = Kind(504, OURS + "queue-timeout")
RUN_TIMEOUT = Kind(504, OURS + "run-timeout")
REQUEST_CANCELLED = Kind(410, OURS + "request-cancelled")
REQUEST_DEAD = Kind(500, OURS + "request-dead")
REQUEST_REFUSED = Kind(503, OURS + "request-refused")
STREAM_CUT = Kind(502, OURS + "stream-cut")
# Of one that was fulfilled, and whose answer an envelope cannot hold (api.envelopes).
NOT_JSON = Kind(500, OURS + "answer-not-json")


def kind_of(error: BaseException) -> Kind:
    """Where the error's class, or the nearest class above it, stands in the table."""
    return next((_KINDS[base] for base in type(error).__mro__ if base in _KINDS), INTERNAL)


def kinds() -> tuple[Kind, ...]:
    """All that an answer can be, for the documentation."""
    ends = (REQUEST_EXPIRED, QUEUE_TIMEOUT, RUN_TIMEOUT, REQUEST_CANCELLED, REQUEST_DEAD, REQUEST_REFUSED)
    return (*_KINDS.values(), INTERNAL, NOT_READY, *ends, STREAM_CUT, NOT_JSON)


def body(kind: Kind, detail: str = "", **members: str) -> bytes:
    """The JSON of a problem; empty members are left out."""
    problem = {"type": kind.type, "title": HTTPStatus(kind.status).phrase, "status": kind.status}
    extra = {name: _text(value) for name, value in {"detail": detail, **members}.items() if value}
    return orjson.dumps(problem | extra)


def _text(value: str) -> str:
    """Bytes of the client's that are not UTF-8 arrive as lone surrogates, which JSON cannot hold."""
    return value.encode(errors="replace").decode()


def response(error: BaseException, *, instance: str = "", request_id: str = "") -> web.Response:
    """The answer to a request that ended in `error`; one that is not ours says nothing of its inside."""
    kind = kind_of(error)
    detail = "" if kind is INTERNAL else str(error)
    unknown = isinstance(error, Unavailable) and error.outcome_unknown
    limit = error.limit if isinstance(error, QueueFull) else ""
    outcome = "unknown" if unknown else ""
    content = body(kind, detail, instance=instance, requestId=request_id, outcome=outcome, limit=limit)
    return respond(kind.status, content, extra=_headers_of(error, request_id))


def respond(status: int, content: bytes, *, extra: Mapping[str, str]) -> web.Response:
    answer = CIMultiDict({"Content-Type": CONTENT_TYPE})
    answer.update(extra)
    return web.Response(status=status, body=content, headers=answer)


def _headers_of(error: BaseException, request_id: str) -> dict[str, str]:
    extra: dict[str, str] = {headers.REQUEST_ID: request_id} if request_id else {}
    if isinstance(error, Unauthenticated):
        extra["WWW-Authenticate"] = "Bearer"
    if isinstance(error, TryLater):
        extra["Retry-After"] = headers.retry_after(error.retry_after_s)
    if isinstance(error, WrongMethod):
        extra["Allow"] = error.allowed
    return extra


def faults(error: ValidationError) -> BadRequest:
    """What pydantic found, as one sentence: each object, field and message, and what was given where that is a plain
    value and cannot be a secret."""
    found = error.errors(include_url=False, include_context=False)
    if found and found[0]["type"] == "json_invalid":
        return BadRequest(f"the body is not JSON: {found[0]['msg'].removeprefix('Invalid JSON: ')}")
    subject = error.title[:1].lower() + error.title[1:]
    named = [_fault(fault) for fault in found]
    told = [f"object {subject}, field {field or 'body'}{rejected}: {message}" for field, rejected, message in named]
    more = [f"and {len(told) - MAX_FAULTS} more"] if len(told) > MAX_FAULTS else []
    return InvalidBody("Validation failed: " + "; ".join(told[:MAX_FAULTS] + more), field=named[0][0] or None)


def _fault(fault: ErrorDetails) -> tuple[str, str, str]:
    """Field, rejected value and message. A rule about an object as a whole begins its message with the field."""
    path = [str(part)[:MAX_PART] for part in fault["loc"]]
    message = fault["msg"].removeprefix("Value error, ")
    if isinstance(fault["input"], dict) and (ruled := _RULE.fullmatch(message)):
        path.append(ruled["field"])
        message = ruled["rule"]
    return ".".join(path), _rejected(fault), message


def _rejected(fault: ErrorDetails) -> str:
    given = fault["input"]
    if not isinstance(given, str | int | float) or fault["type"] == "missing" or _SECRET & set(fault["loc"]):
        return ""
    return f", rejected value {json.dumps(given)[:MAX_REJECTED]}"
