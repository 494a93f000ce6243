"""What a controller answers: that it lives, that its servers answer, how much work a version has, and what became of
everything that was accepted."""

from __future__ import annotations

import uuid
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict

from aiohttp import web

from broker.errors import StoreUnavailable, Unavailable
from broker.ports import Broker
from workers.controller.auditor import Auditor
from workers.health import status_server
from workers.loops import together


class Status:
    """`auditor` is set while this controller leads."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.auditor: Auditor | None = None

    def shown(self, port: int) -> AbstractAsyncContextManager[None]:
        """Serve `/v1/health/live`, `/v1/health/ready`, `/v1/versions/{id}/load` and `/v1/conservation` while the body
        runs; port 0 serves none. Every controller answers, whether it leads or not.

        Raises ConfigurationError when it is entered: the port cannot be listened on.
        """
        return status_server(
            port,
            self._fault,
            web.get("/v1/versions/{version_id}/load", self._load),
            web.get("/v1/conservation", self._conservation),
        )

    def facts(self) -> dict[str, object]:
        """`conservation` is null until all was counted once, and both are where another controller leads."""
        auditor = self.auditor
        counted = auditor.conservation if auditor else None
        return {
            "leads": auditor is not None,
            "conservation": asdict(counted) | {"balanced": counted.balanced} if counted else None,
            "mended": asdict(auditor.mended) if auditor else None,
        }

    async def _fault(self) -> str:
        try:
            async with together() as group:
                group.create_task(self._broker.queue.ping())
                group.create_task(self._broker.results.ping())
        except Unavailable as exc:
            return str(exc)
        return ""

    async def _load(self, request: web.Request) -> web.Response:
        """For autoscalers. Never a zero that is only a missing answer: that is a 503, on which they change nothing."""
        try:
            version_id = str(uuid.UUID(request.match_info["version_id"]))
        except ValueError as exc:
            raise web.HTTPNotFound from exc
        try:
            (load,) = await self._broker.results.load([version_id])
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

    async def _conservation(self, _: web.Request) -> web.Response:
        return web.json_response(self.facts())
