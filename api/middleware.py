"""What surrounds every handler: the log line, CORS, and errors turned into problems, from the outside in."""

from __future__ import annotations

import logging
import time
from functools import cache

from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler, Middleware

from api import figures, headers, problems
from api.front import Front
from broker.errors import BadRequest, FnqueueError, PayloadTooLarge, QueueFull, TryLater, Unauthenticated
from broker.model import Record, Taken
from broker.telemetry import logs
from broker.telemetry.metrics import REFUSALS, Metrics

logger = logging.getLogger(__name__)

# Set by the handlers of an invocation, for whoever answers or logs it.
RECORD = web.RequestKey("record", Record)
# Set by the handler of an invocation before it may refuse it: where the function's rate limits stand.
TAKEN = web.RequestKey("taken", Taken)

# Set by what invokes by any method; otherwise a POST does.
INVOKES = web.RequestKey("invokes", bool)
# Why it was refused, where another time or another server would have done: the problem's type, and the limit met.
REFUSED = web.RequestKey("refused", tuple[str, str])

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
    response.headers["Server"] = SERVER
    if (taken := request.get(TAKEN)) is not None and taken.quotas:
        response.headers.update(headers.rate_limit(taken.quotas))
    if front.calls.stopping:
        response.force_close()
    _tell(front.metrics, request, response.status, started_at)


def note_gone(front: Front, request: web.Request, started_at: float) -> None:
    """Nobody is left to answer: the client has gone. 499 is what proxies log then."""
    _tell(front.metrics, request, 499, started_at)


def _misframed(request: web.Request) -> BadRequest | None:
    """Codings that nobody here undoes would reach the container as its body, and a proxy may have undone them."""
    if request.headers.get("Transfer-Encoding", "chunked").lower() == "chunked":
        return None
    return BadRequest("Transfer-Encoding may only be chunked", field="Transfer-Encoding")


def _tell(metrics: Metrics, request: web.Request, status: int, started_at: float) -> None:
    duration_s = time.perf_counter() - started_at
    record = request.get(RECORD)
    invokes = record is not None and request.get(INVOKES, request.method == "POST")
    figures.answered(
        metrics, request, status, duration_s, invoked=record if invokes else None, in_its_name=INVOKES in request
    )
    if (refused := request.get(REFUSED)) is not None:
        metrics.count(REFUSALS, *refused)
    _log(request, record, status, duration_s, logging.INFO if invokes else logging.DEBUG)


def _log(request: web.Request, record: Record | None, status: int, duration_s: float, level: int) -> None:
    if not logger.isEnabledFor(level):
        return
    facts: dict[str, object] = {"status": status, "duration_ms": round(duration_s * 1000, 1)}
    if record is not None:
        facts |= {
            "request_id": record.id,
            "function_id": record.function_id,
            "version_id": record.version_id,
            "account": record.account,
            "state": record.state.value,
        }
    else:
        facts |= {"method": request.method, "path": request.path}
    if level == logging.INFO:
        logs.note(logger, "answered", facts)
    else:
        logger.debug("answered", extra=facts)


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
    record = request.get(RECORD)
    instance = "" if _about_a_request(request.path) else request.path
    if isinstance(error, TryLater | PayloadTooLarge):
        request[REFUSED] = problems.kind_of(error).word, error.limit if isinstance(error, QueueFull) else ""
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
