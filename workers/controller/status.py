"""What a controller answers: that it lives, that its servers answer, how much work a version has, and what became of
everything that was accepted."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict

from aiohttp import web

from broker.errors import StoreUnavailable, Unavailable
from broker.ports import Broker
from broker.settings import ControllerSettings
from broker.telemetry.metrics import Process
from workers.controller.auditor import Auditor
from workers.controller.figures import Figures
from workers.health import status_server
from workers.loops import together

# A sidecar beside somebody's code names its own; a URL of anything else is none.
_ADDRESS = re.compile(r"(?:[0-9A-Za-z.-]{1,253}|\[[0-9a-fA-F:]{2,39}\]):[0-9]{1,5}", re.ASCII)


class Status:
    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.figures = Figures()

    @property
    def auditor(self) -> Auditor | None:
        """While this controller leads."""
        return self.figures.auditor

    @asynccontextmanager
    async def shown(self, settings: ControllerSettings) -> AsyncIterator[None]:
        """Serve `/metrics`, `/v1/health/live`, `/v1/health/ready`, `/v1/versions/{id}/load`, `/v1/targets` and
        `/v1/conservation` while the body runs; port 0 serves none. Every controller answers, whether it leads or not.

        Raises ConfigurationError: the port cannot be listened on.
        """
        routes = (
            web.get("/v1/versions/{version_id}/load", self._load),
            web.get("/v1/targets", self._targets),
            web.get("/v1/conservation", self._conservation),
        )
        metrics = self._broker.metrics
        metrics.announce(Process.CONTROLLER)
        with metrics.reading(self.figures.read):
            async with status_server(settings, metrics, self._fault, *routes):
                yield

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

    async def _targets(self, _: web.Request) -> web.Response:
        """The sidecars that can be scraped, as Prometheus' HTTP service discovery reads them. Never a list that is only
        a part: that is a 503, on which it keeps the one that it has."""
        catalog = self._broker.catalog
        try:
            rows = await catalog.deployments.list()
            reports = await asyncio.gather(*(catalog.instances(row.item.version_id) for row in rows))
        except StoreUnavailable as exc:
            raise web.HTTPServiceUnavailable(text=str(exc)) from exc
        return web.json_response(
            [
                {"targets": [instance.status_address], "labels": {"instance_id": instance.id}}
                for reported in reports
                for instance in reported
                if _ADDRESS.fullmatch(instance.status_address)
            ]
        )

    async def _conservation(self, _: web.Request) -> web.Response:
        return web.json_response(self.facts())
