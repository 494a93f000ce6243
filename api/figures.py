"""What a front end tells of itself: requests as they are answered, and what it holds when somebody looks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from aiohttp import hdrs, web

from api.front import Front
from api.notes import Notes
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


def answered(
    metrics: Metrics, request: web.Request, notes: Notes, status: int, duration_s: float, *, invoked: bool
) -> None:
    """One request is over. `invoked`: the record that is noted is that of a request that it made."""
    code = str(status)
    method = request.method if request.method in hdrs.METH_ALL else OTHER
    metrics.observe(HTTP_DURATION, duration_s, method, _route(request, notes), code)
    if invoked and (record := notes.record) is not None:
        function_id, version_id = record.function_id, record.version_id
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


def _route(request: web.Request, notes: Notes) -> str:
    if notes.route is not None:
        return notes.route
    if notes.invokes is not None:  # it went past our routes
        return IN_ITS_NAME
    resource = request.match_info.route.resource
    return NO_ROUTE if resource is None else resource.canonical
