"""What a controller answers: that it lives, that its servers answer, and how much work a version has."""

from __future__ import annotations

import uuid
from contextlib import AbstractAsyncContextManager

from aiohttp import web

from broker.errors import StoreUnavailable, Unavailable
from broker.ports import Broker
from workers.controller.board import Board
from workers.health import status_server
from workers.loops import together


def serve_status(port: int, broker: Broker, board: Board) -> AbstractAsyncContextManager[None]:
    """Serve `/v1/health/live`, `/v1/health/ready`, `/v1/versions/{id}/load` and `/v1/conservation` while the body runs;
    port 0 serves none. Every controller answers, whether it leads or not; only the one that leads has figures.

    Raises ConfigurationError when it is entered: the port cannot be listened on.
    """

    async def ready() -> str:
        try:
            async with together() as group:
                group.create_task(broker.queue.ping())
                group.create_task(broker.results.ping())
        except Unavailable as exc:
            return str(exc)
        return ""

    async def load_route(request: web.Request) -> web.Response:
        """For autoscalers. Never a zero that is only a missing answer: that is a 503, on which they change nothing."""
        try:
            version_id = str(uuid.UUID(request.match_info["version_id"]))
        except ValueError as exc:
            raise web.HTTPNotFound from exc
        try:
            (load,) = await broker.results.load([version_id])
        except StoreUnavailable as exc:
            raise web.HTTPServiceUnavailable(text=str(exc)) from exc
        return web.json_response(
            {
                "load": load.queued + load.running,
                "queued": load.queued,
                "running": load.running,
                "oldestAgeS": round(load.oldest_age_s, 3),
            }
        )

    async def conservation_route(_: web.Request) -> web.Response:
        return web.json_response(board.facts())

    return status_server(
        port,
        ready,
        web.get("/v1/versions/{version_id}/load", load_route),
        web.get("/v1/conservation", conservation_route),
    )
