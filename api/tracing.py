"""A span for each request that is answered, where tracing is on; where it is off, there is nothing to go through."""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from api.front import Front
from api.middleware import ABOUT_THIS_SERVER
from api.notes import notes_of
from broker.telemetry.tracing import HEADERS

CLIENT_LEFT = 499  # what proxies log then


def traced(front: Front) -> list[Middleware]:
    """The outermost, so that what the others log has the trace's ID."""
    tracing = front.broker.tracing
    if tracing is None:
        return []

    @web.middleware
    async def trace(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in ABOUT_THIS_SERVER:
            return await handler(request)
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else ""
        carrier = {name: request.headers.getall(name, []) for name in HEADERS}
        with tracing.serve(request.method, route, request.path, carrier) as served:
            status = CLIENT_LEFT
            try:
                response = await handler(request)
                status = response.status
            finally:
                served.answered(status)
                if (record := notes_of(request).record) is not None:
                    served.about(
                        {
                            "request.id": record.id,
                            "function.id": record.function_id,
                            "version.id": record.version_id,
                            "account": record.account,
                            "state": record.state.value,
                        }
                    )
        return response

    return [trace]
