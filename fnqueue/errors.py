"""What can go wrong for a client.

FnqueueError
├── ConfigurationError         no key, no URL, a file that cannot be read; nothing was sent
├── UnknownFunction            no function of this name, or more than one
├── ClientClosed               the client was closed, perhaps by another thread
├── ConnectionFailed           no server answered, for as long as it was tried
├── TimedOut                   the caller's own limit; the request goes on, and `request_id` leads to it
└── ApiError                   what a server answered: status, type, detail, request_id, retry_after_s, field
    ├── Refused                the call came to nothing
    │   ├── InvalidRequest         400, and what has no class of its own
    │   ├── Unauthenticated        401
    │   ├── Forbidden              403
    │   ├── NotFound               404
    │   │   └── ResultExpired      it was there, and its time is over
    │   ├── Conflict               409
    │   ├── StreamNotKept          410
    │   ├── TooLarge               413
    │   ├── IdempotencyKeyReused   422
    │   ├── TooManyRequests        429
    │   │   ├── QueueFull
    │   │   ├── AccountFull
    │   │   └── RateLimited
    │   └── ServerFailed           5xx
    │       └── Unavailable        503
    └── RequestFailed          the request was accepted, and ended without a result
        ├── FunctionFailed         the function's own 4xx or 5xx; `content` is what it said
        ├── RequestCancelled
        ├── RequestExpired         its deadline came first
        ├── QueueTimeout           nobody began it in time; it never ran
        ├── RunTimeout             it ran for too long
        ├── RequestDead            its workers or containers kept dying; `cause` says how
        ├── RequestRefused         it was refused and never ran
        └── StreamCut              its answer broke off
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar

REQUEST_ID = "nvcf-reqid"
STATUS = "nvcf-status"
_FIELD = re.compile(r"\bfield (?P<name>[\w.\[\]-]+)")
_SHOWN = 300
_OF_A_PROXY = (502, 503, 504)
_NO_PATH = "no such path"
_STRANGER = "; is the URL that of such a server? `url`, --url, FNQUEUE_URL or the configuration file say where it is"
NO_SERVER = "; where a server is say `url`, --url, FNQUEUE_URL or the configuration file, and `fnqueue dev` starts one"
NO_BLOBS = "; files and large results are with the server's blob store, which has to be reached from here too"


class FnqueueError(Exception):
    """Whatever the client raises of its own. `retryable` says whether the same call may go well later."""

    retryable: bool = False
    # What its text ends with, where every such error has the same remedy.
    remedy: ClassVar[str] = ""


class ConfigurationError(FnqueueError):
    """The client does not know where to call, or with which key."""


class UnknownFunction(FnqueueError):
    """No function that the key covers has this name, or more than one has."""


class ClientClosed(FnqueueError):
    """The client was closed before the call was answered."""


class ConnectionFailed(FnqueueError):
    """No server answered, for as long as it was tried. Whether it was heard is not known."""

    retryable = True


class TimedOut(FnqueueError, TimeoutError):
    """The limit of the caller was reached. What was accepted goes on: `request_id` leads to it, if it is known."""

    def __init__(self, message: str, *, request_id: str | None = None) -> None:
        super().__init__(message)
        self.request_id = request_id


class ApiError(FnqueueError):
    """An answer that is an error (RFC 9457).

    `type` tells the kinds of one status apart, `retry_after_s` is what the server asks for, `field` names the part of
    a request that is wrong, `outcome_unknown` says that it may run all the same. `headers` (names in lower case) and
    `content` are as they came.
    """

    def __init__(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        problem = _problem(content)
        self.status = status
        self.type = str(problem.get("type", "about:blank"))
        self.title = str(problem.get("title", ""))
        self.detail = str(problem.get("detail") or problem.get("error") or _start(content) or self.title)
        self.request_id: str | None = headers.get(REQUEST_ID) or problem.get("requestId")
        self.retry_after_s = retry_after_s(headers)
        self.field: str | None = problem.get("field") or _field(self.detail)
        self.cause: str | None = problem.get("cause")
        self.outcome_unknown = problem.get("outcome") == "unknown"
        self.headers = {name.lower(): value for name, value in headers.items()}
        self.content = content
        told = f"{status}: {self.detail}" if self.detail else f"the server answered {status}"
        super().__init__(told + self._next_step(bool(problem)))

    def _next_step(self, is_ours: bool) -> str:
        """What to do about it, behind a semicolon."""
        return self.remedy if is_ours else ""

    def __reduce__(self) -> tuple[type[ApiError], tuple[int, dict[str, str], bytes]]:
        """It can be sent to another process."""
        return type(self), (self.status, self.headers, self.content)


class Refused(ApiError):
    """The call came to nothing."""

    def _next_step(self, is_ours: bool) -> str:
        of_a_store = self.content.lstrip().startswith((b"<?xml", b"<Error"))
        if of_a_store or (self.status in _OF_A_PROXY and not is_ours):
            return ""
        return self.remedy if is_ours and self.detail != _NO_PATH else _STRANGER

    @property
    def retryable(self) -> bool:  # type: ignore[override]  # of the status, not of the class
        return self.status in (408, 425, 429) or self.status >= 500


class InvalidRequest(Refused):
    """The server does not take such a request."""


class Unauthenticated(Refused):
    """The key is missing, unknown, expired or suspended."""

    remedy = "; a key is given by `key`, --key, FNQUEUE_API_KEY or the configuration file"


class Forbidden(Refused):
    """The key does not cover this."""

    remedy = "; whoever has manage_keys can make one that does: fnqueue keys create"


class NotFound(Refused):
    """There is no such thing, or it is somebody else's."""


class ResultExpired(NotFound):
    """The result was kept for as long as results are kept."""


class Conflict(Refused):
    """What is there already stands against it."""


class StreamNotKept(Refused):
    """A part of the stream that was asked for is not kept."""


class TooLarge(Refused):
    """The body is larger than the server takes: send files as files, which are uploaded."""


class IdempotencyKeyReused(Refused):
    """The key was used for another function or input."""


class TooManyRequests(Refused):
    """Later. It did not run, and will not."""


class QueueFull(TooManyRequests):
    """The function's queue takes no more for now."""


class AccountFull(TooManyRequests):
    """The account has as much in its queues as it may."""


class RateLimited(TooManyRequests):
    """The function's rate is used up for now."""


class ServerFailed(Refused):
    """The server could not do it."""


class Unavailable(ServerFailed):
    """The server cannot do it now."""


class RequestFailed(ApiError):
    """The request was accepted, and ended without a result. It stays so: `request_id` leads to its receipt."""


class FunctionFailed(RequestFailed):
    """The function answered with an error."""


class RequestCancelled(RequestFailed):
    """Somebody cancelled it."""


class RequestExpired(RequestFailed):
    """Its deadline came before its end."""


class QueueTimeout(RequestFailed):
    """No worker began it within its queue timeout; it never ran."""


class RunTimeout(RequestFailed):
    """It ran for longer than its run timeout."""


class RequestDead(RequestFailed):
    """Its workers or containers kept dying; it may be a dead letter."""


class RequestRefused(RequestFailed):
    """It was refused after it had been noted, and never ran."""


class StreamCut(RequestFailed):
    """Its answer broke off, and is not made again."""


_BY_STATUS: dict[int, type[Refused]] = {
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    429: TooManyRequests,
    503: Unavailable,
}
_BY_TYPE: dict[str, type[Refused]] = {
    "result-expired": ResultExpired,
    "stream-not-kept": StreamNotKept,
    "idempotency-key-reused": IdempotencyKeyReused,
    "queue-full": QueueFull,
    "account-full": AccountFull,
    "rate-limited": RateLimited,
}
_ENDS: dict[str, type[RequestFailed]] = {
    "request-cancelled": RequestCancelled,
    "request-expired": RequestExpired,
    "queue-timeout": QueueTimeout,
    "run-timeout": RunTimeout,
    "request-dead": RequestDead,
    "request-refused": RequestRefused,
    "stream-cut": StreamCut,
}
_OURS = "urn:fnqueue:problem-details:"


def of_answer(status: int, headers: Mapping[str, str], content: bytes) -> ApiError:
    """The error that an answer of 400 or more is. Names of `headers` are in lower case, or in any.

    An answer with `NVCF-STATUS` tells how a request ended (contract/invocation.md §2.2); without, a call was refused.
    """
    named = str(_problem(content).get("type", ""))
    word = named.removeprefix(_OURS) if named.startswith(_OURS) else ""
    if STATUS in headers:
        return _ENDS.get(word, FunctionFailed)(status, headers, content)
    fallback = ServerFailed if status >= 500 else InvalidRequest
    return _BY_TYPE.get(word, _BY_STATUS.get(status, fallback))(status, headers, content)


def remedy(status: int) -> str:
    """What to do about a refusal of this status, as its error says; '' where that depends."""
    return _BY_STATUS[status].remedy if status in _BY_STATUS else ""


def retry_after_s(headers: Mapping[str, str], *, now: datetime | None = None) -> float | None:
    """`Retry-After` in seconds, given as such or as a date; None where there is none that can be read."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0.0, (at - (now or datetime.now(UTC))).total_seconds())


def _problem(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _start(content: bytes) -> str:
    return "" if _problem(content) else content[:_SHOWN].decode(errors="replace").strip()


def _field(detail: str) -> str | None:
    found = _FIELD.search(detail)
    return found["name"] if found else None
