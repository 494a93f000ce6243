"""The internal listener of a front end, for who runs it: metrics and health, without a key."""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from aiohttp import web

from api import figures
from api.front import Front
from api.routes import health
from broker.errors import ConfigurationError
from broker.telemetry.exposition import CONTENT_TYPE, Exposition

logger = logging.getLogger(__name__)

_LAST_ANSWERS_S = 1.0
_WILDCARDS = frozenset({"", "0.0.0.0", "::"})


@asynccontextmanager
async def shown(front: Front) -> AsyncIterator[None]:
    """Serve `/metrics`, `/v1/health/live` and `/v1/health/ready` while the body runs; port 0 serves none.

    Raises:
        ConfigurationError: the port cannot be listened on, or is the public one. A default that is taken is gone
            without.
    """
    settings = front.settings
    if settings.status_port and settings.status_port == settings.port and _overlap(settings.status_host, settings.host):
        raise ConfigurationError(f"status_port: {settings.port} is the public port; metrics are not for everybody")
    with figures.shown(front), Exposition(front.metrics) as exposition:
        if not settings.status_port:
            yield
            return
        runner = web.AppRunner(_app(front, exposition), access_log=None, shutdown_timeout=_LAST_ANSWERS_S)
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, settings.status_host, settings.status_port).start()
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE or "status_port" in settings.model_fields_set:
                    raise ConfigurationError(
                        f"status_port: {settings.status_host}:{settings.status_port} cannot be listened on: "
                        f"{exc.strerror}"
                    ) from exc
                logger.warning("status_port_taken", extra={"port": settings.status_port})
            yield
        finally:
            await runner.cleanup()


def _app(front: Front, exposition: Exposition) -> web.Application:
    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=await exposition.text(), headers={"Content-Type": CONTENT_TYPE})

    app = web.Application()
    app.add_routes(
        [
            web.get("/metrics", metrics),
            web.get("/v1/health/live", partial(health.live, front)),
            web.get("/v1/health/ready", partial(health.ready, front)),
        ]
    )
    return app


def _overlap(one: str, other: str) -> bool:
    return one == other or bool(_WILDCARDS & {one, other})
