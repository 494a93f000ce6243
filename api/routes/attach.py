"""The sidecars' own door: a listener of its own, where nothing but a one-time token opens anything.

Not a part of the public API: an API key is of no use here, and nobody is told why a token is not good.
"""

from __future__ import annotations

from aiohttp import web

from api import headers, problems
from api.connections import Connections
from api.front import Front
from api.middleware import SERVER
from broker.channels import token_hash
from broker.errors import BadRequest, FnqueueError, Unauthenticated

PATH = "/v2/nvcf/worker/request-attach"


def make_app(front: Front, connections: Connections) -> web.Application:
    async def attach(request: web.Request) -> web.StreamResponse:
        connections.met(request.protocol)
        if not web.WebSocketResponse().can_prepare(request):
            return _refused(BadRequest("this is for WebSockets only"))
        token = headers.bearer(request.headers) or ""
        line = front.channels.redeem(token_hash(token))
        if line is None:
            return _refused(Unauthenticated("the token is not good"))
        return await line.serve(request)

    async def elsewhere(request: web.Request) -> web.StreamResponse:
        connections.met(request.protocol)
        return _refused(problems.NoSuchPath("no such path"))

    async def sign(_: web.Request, response: web.StreamResponse) -> None:
        response.headers["Server"] = SERVER

    app = web.Application()
    app.add_routes([web.get(PATH, attach, allow_head=False), web.route("*", "/{path:.*}", elsewhere)])
    app.on_response_prepare.append(sign)
    return app


def _refused(error: FnqueueError) -> web.Response:
    response = problems.response(error)
    response.force_close()
    return response
