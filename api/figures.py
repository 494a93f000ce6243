"""What a front end tells of itself: requests as they are answered, and what it holds when somebody looks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from aiohttp import hdrs, web

from api.front import Front
from broker.model import Record
from broker.telemetry.metrics import (
    BODIES,
    BODY_BYTES,
    CHANNELS,
    CONNECTIONS,
    EVENT_STREAMS,
    FUNCTION_LATENCY,
    FUNCTION_REQUESTS,
    HTTP_DURATION,
    INVOCATION_ERRORS,
    WAITING_CALLERS,
    Metrics,
    Process,
    Reading,
)

# OpenTelemetry's word for methods that are not the usual ones.
OTHER = "_OTHER"
IN_ITS_NAME, NO_ROUTE = "(function)", "(none)"
# Set by what serves a request without the router: the template of the path that it has there.
ROUTE = web.RequestKey("route", str)


def answered(
    metrics: Metrics, request: web.Request, status: int, duration_s: float, *, invoked: Record | None, in_its_name: bool
) -> None:
    """One request is over. `invoked` is the request that it made, if it was an invocation; `in_its_name`: it went past
    our routes."""
    code = str(status)
    method = request.method if request.method in hdrs.METH_ALL else OTHER
    metrics.observe(HTTP_DURATION, duration_s, method, IN_ITS_NAME if in_its_name else _route(request), code)
    if invoked is not None:
        function_id, version_id = invoked.function_id, invoked.version_id
        metrics.count(FUNCTION_REQUESTS, function_id, version_id)
        metrics.observe(FUNCTION_LATENCY, duration_s, function_id, version_id)
        if status >= 400:
            metrics.count(INVOCATION_ERRORS, function_id, version_id, code)


@contextmanager
def shown(front: Front) -> Iterator[None]:
    """While the body runs, what this process holds can be asked for."""

    def read() -> Iterable[Reading]:
        return (
            Reading(CONNECTIONS, len(front.connections)),
            Reading(WAITING_CALLERS, front.calls.waiters),
            Reading(EVENT_STREAMS, front.listeners.open),
            Reading(CHANNELS, front.channels.open),
            Reading(BODIES, front.bodies.held),
            Reading(BODY_BYTES, front.bodies.held_bytes),
        )

    front.metrics.announce(Process.API)
    with front.metrics.reading(read):
        yield


def _route(request: web.Request) -> str:
    known: str | None = request.get(ROUTE)
    if known is not None:
        return known
    resource = request.match_info.route.resource
    return NO_ROUTE if resource is None else resource.canonical
