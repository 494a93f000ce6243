"""What surrounds every handler: the log line, CORS, and errors turned into problems, from the outside in."""

from __future__ import annotations

import logging
import time
from collections.abc import MutableMapping
from functools import cache, lru_cache

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.typedefs import Handler, Middleware

from api import figures, headers, problems
from api.front import Front
from api.notes import Notes, notes_of
from broker.errors import BadRequest, FnqueueError, PayloadTooLarge, QueueFull, TryLater, Unauthenticated
from broker.model import Record
from broker.telemetry import logs
from broker.telemetry.metrics import REFUSALS, Metrics

logger = logging.getLogger(__name__)

# Routes whose errors say nothing of the path: a foreign ID must read like one that never existed (PROTOCOL P8).
ABOUT_A_REQUEST = ("/nvcf/pexec/", "/nvcf/exec/", "/requests/")
# Answered on connections that are one too many: whoever watches this server would take it for dead.
ABOUT_THIS_SERVER = frozenset({"/health", "/livez", "/readyz"})
SERVER = "fnqueue"  # and not which versions of what
_PREFLIGHT_S = "86400"


def observing(front: Front) -> Middleware:
    """Refuses on connections that are one too many, logs one line per invocation, and closes the connections that are
    not to be kept."""

    @web.middleware
    async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
        started_at = time.perf_counter()
        surplus = front.connections.met(request.protocol)
        refusal = _misframed(request) or (surplus if request.path not in ABOUT_THIS_SERVER else None)
        try:
            if refusal is None:
                response = await handler(request)
            else:
                response = _problem(request, refusal)
                response.force_close()
        except BaseException:
            note_gone(front, request, started_at)
            raise
        if request.version < HttpVersion11:
            # HTTP/1.0 keeps connections by a habit that no two servers share (RFC 9112 §6.1, §9.3).
            response.force_close()
        complete(front, request, response, started_at)
        return response

    return observe


def complete(front: Front, request: web.Request, response: web.StreamResponse, started_at: float) -> None:
    """What every answer gets: its last headers, and its log line."""
    notes = notes_of(request)
    if close_after(front, notes, response.headers):
        response.force_close()
    tell(front.metrics, request, notes, response.status, started_at)


def close_after(front: Front, notes: Notes, answered: MutableMapping[str, str]) -> bool:
    """Set the last headers of an answer; returns whether its connection is not to be kept."""
    answered[hdrs.SERVER] = SERVER
    if notes.taken is not None and notes.taken.quotas:
        answered.update(headers.rate_limit(notes.taken.quotas))
    return front.calls.stopping


def note_gone(front: Front, request: web.Request, started_at: float) -> None:
    """Nobody is left to answer: the client has gone. 499 is what proxies log then."""
    tell(front.metrics, request, notes_of(request), 499, started_at)


def _misframed(request: web.Request) -> BadRequest | None:
    """Codings that nobody here undoes would reach the container as its body, and a proxy may have undone them."""
    if request.headers.get("Transfer-Encoding", "chunked").lower() == "chunked":
        return None
    return BadRequest("Transfer-Encoding may only be chunked", field="Transfer-Encoding")


def tell(metrics: Metrics, request: web.Request, notes: Notes, status: int, started_at: float) -> None:
    """Count and log what is answered now."""
    duration_s = time.perf_counter() - started_at
    record, invokes = notes.record, request.method == "POST" if notes.invokes is None else notes.invokes
    invoked = record is not None and invokes
    figures.answered(metrics, request, notes, status, duration_s, invoked=invoked)
    if notes.refused is not None:
        metrics.count(REFUSALS, *notes.refused)
    _log(request, record, status, duration_s, logging.INFO if invoked else logging.DEBUG)


def _log(request: web.Request, record: Record | None, status: int, duration_s: float, level: int) -> None:
    if not logger.isEnabledFor(level):
        return
    facts: dict[str, object] = {"status": status, "duration_ms": round(duration_s * 1000, 1)}
    if record is None:
        what = {"method": request.method, "path": request.path}
        logger.log(level, "answered", extra={**facts, **what})
        return
    facts["request_id"], facts["state"] = record.id, record.state
    if level == logging.INFO:
        _answered(record.function_id, record.version_id, record.account).add(facts)
    else:
        whose = {"function_id": record.function_id, "version_id": record.version_id, "account": record.account}
        logger.debug("answered", extra={**whose, **facts})


@lru_cache(maxsize=1024)
def _answered(function_id: str, version_id: str, account: str) -> logs.Note:
    whose: dict[str, object] = {"function_id": function_id, "version_id": version_id, "account": account}
    return logs.Note(logger, "answered", whose)


def sharing(front: Front) -> Middleware:
    """CORS without credentials, for the origins of `cors_origins`; answers preflights without asking for a key."""

    @web.middleware
    async def share(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        if request.method == "OPTIONS" and response.status == 405:
            response = web.Response(headers={"Allow": response.headers["Allow"]})
        if _admit(front, request, response) and request.method == "OPTIONS":
            response.headers["Access-Control-Allow-Methods"] = response.headers.get("Allow", "GET, POST, DELETE")
            response.headers["Access-Control-Allow-Headers"] = request.headers.get(
                "Access-Control-Request-Headers", "Authorization"
            )
            response.headers["Access-Control-Max-Age"] = _PREFLIGHT_S
        return response

    return share


def mark(front: Front, request: web.Request, response: web.StreamResponse) -> None:
    """Set before a response begins what the others get when they are complete."""
    response.headers["Server"] = SERVER
    _admit(front, request, response)


def _admit(front: Front, request: web.Request, response: web.StreamResponse) -> bool:
    """Say that the page that asks may read the answer, if it may."""
    origin = request.headers.get("Origin")
    if origin is None:
        return False
    allowed = _origins(front.settings.cors_origins)
    if not (allowed & {"*", origin}):
        return False
    response.headers["Access-Control-Allow-Origin"] = "*" if "*" in allowed else origin
    if "*" not in allowed and not response.prepared:
        response.headers.add("Vary", "Origin")
    exposed = response.headers.get(headers.EXPOSE_HEADERS, "").split(",")
    response.headers[headers.EXPOSE_HEADERS] = ", ".join(headers.exposed(exposed))
    return True


@cache
def _origins(setting: str) -> frozenset[str]:
    return frozenset(origin.strip() for origin in setting.split(",") if origin.strip())


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The outermost net: whatever a handler raises is answered as a problem."""
    try:
        return await handler(request)
    except Exception as error:  # noqa: BLE001  the outermost: nothing of it may reach the client
        return failed(request, error)


def failed(request: web.Request, error: Exception) -> web.Response:
    """The problem that tells the client of the error that is handled now; raises it where the client has gone."""
    match error:
        case FnqueueError():
            return _problem(request, error)
        case web.HTTPMethodNotAllowed():
            return _problem(request, problems.WrongMethod(", ".join(sorted(error.allowed_methods))))
        case web.HTTPNotFound():
            return _problem(request, _no_such_path(request))
    if request.transport is None:
        raise error
    logger.exception("fault", extra={"method": request.method, "path": request.path})
    return _problem(request, error)


def _problem(request: web.Request, error: Exception) -> web.Response:
    notes = notes_of(request)
    record = notes.record
    instance = "" if _about_a_request(request.path) else request.path
    if isinstance(error, TryLater | PayloadTooLarge):
        notes.refused = problems.kind_of(error).word, error.limit if isinstance(error, QueueFull) else ""
    response = problems.response(error, instance=instance, request_id=record.id if record else "")
    if isinstance(error, problems.CLOSING):
        response.force_close()
    return response


def _about_a_request(path: str) -> bool:
    return any(part in path for part in ABOUT_A_REQUEST) or path.endswith("/position")


def _no_such_path(request: web.Request) -> FnqueueError:
    """Upstream's: who comes without credentials is not told which paths exist."""
    if not headers.bearer(request.headers):
        return Unauthenticated("the Authorization header is missing or not of the form: Bearer <API key>")
    return problems.NoSuchPath("no such path")
