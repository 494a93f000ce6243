"""What a controller tells about itself: a small HTTP server for operators and probes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict

from aiohttp import web

from broker.errors import ConfigurationError
from workers.controller.auditor import Auditor


class Board:
    """`auditor` is set while this controller leads."""

    def __init__(self) -> None:
        self.auditor: Auditor | None = None

    @asynccontextmanager
    async def shown(self, port: int) -> AsyncIterator[None]:
        """Serve it on every address while the body runs; port 0 serves none.

        Raises:
            ConfigurationError: the port cannot be listened on.
        """
        if not port:
            yield
            return
        app = web.Application()
        app.add_routes([web.get("/v1/health/live", self._live), web.get("/v1/conservation", self._conservation)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, port=port).start()
            except OSError as exc:
                raise ConfigurationError(
                    f"FNQUEUE_CONTROLLER_STATUS_PORT: {port} cannot be listened on: {exc.strerror}"
                ) from exc
            yield
        finally:
            await runner.cleanup()

    def facts(self) -> dict[str, object]:
        """`conservation` is null until all was counted once, and both are where another controller leads."""
        auditor = self.auditor
        counted = auditor.conservation if auditor else None
        return {
            "leads": auditor is not None,
            "conservation": asdict(counted) | {"balanced": counted.balanced} if counted else None,
            "mended": asdict(auditor.mended) if auditor else None,
        }

    async def _live(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "OK"})

    async def _conservation(self, _: web.Request) -> web.Response:
        return web.json_response(self.facts())
