"""The HTTP server: listens, serves, and stops without dropping anybody who waits."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from api.app import make_app
from api.front import Front
from broker.backends.files import FileBlobs
from broker.errors import ConfigurationError
from broker.ports import Broker
from broker.settings import ApiSettings

logger = logging.getLogger(__name__)

# Longer than most proxies keep theirs (60 s), so that it is never us who closes under a request.
KEEPALIVE_S = 75.0
BACKLOG = 4096
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}


@asynccontextmanager
async def serving(broker: Broker, settings: ApiSettings, *, reuse_port: bool = False) -> AsyncIterator[str]:
    """Serve the API during the body; yields the URL it answers at.

    On exit nobody new is let in, who waits is answered at once, and what is being submitted gets
    `shutdown_grace_s` seconds.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    front = Front.over(broker, settings)
    app = make_app(front)

    async def wake(_: web.Application) -> None:
        front.calls.interrupt()

    app.on_shutdown.append(wake)
    runner = web.AppRunner(
        app,
        access_log=None,
        logger=_http_logger(),
        handler_cancellation=True,
        shutdown_timeout=max(0.1, settings.shutdown_grace_s),
        keepalive_timeout=KEEPALIVE_S,
        auto_decompress=False,
    )
    await runner.setup()
    assert runner.server is not None, "it was set up"
    try:
        front.newcomers.watch(runner.server)
        url = await _listen(runner, settings, reuse_port=reuse_port)
        if isinstance(broker.blobs, FileBlobs):
            broker.blobs.set_base_url(settings.public_url or url)
        logger.info("api_started", extra={"url": url})
        yield url
        logger.info("api_stopping")
    finally:
        front.newcomers.stop()
        await runner.cleanup()
        await front.calls.finish(grace_s=settings.shutdown_grace_s)


def _http_logger() -> logging.Logger:
    """aiohttp's own, but for requests that are not HTTP: anybody can send those, and they may hold credentials."""

    def is_ours(line: logging.LogRecord) -> bool:
        return not (line.exc_info and isinstance(line.exc_info[1], HttpProcessingError))

    found = logging.getLogger(f"{__name__}.http")
    found.filters[:] = [is_ours]
    return found


async def _listen(runner: web.AppRunner, settings: ApiSettings, *, reuse_port: bool) -> str:
    """The URL of the address that was bound."""
    site = web.TCPSite(runner, settings.host, settings.port, backlog=BACKLOG, reuse_port=reuse_port or None)
    try:
        await site.start()
    except OSError as exc:
        raise ConfigurationError(_why(exc, settings)) from exc
    host = _WILDCARDS.get(settings.host, f"[{settings.host}]" if ":" in settings.host else settings.host)
    return f"http://{host}:{site.port}"


def _why(error: OSError, settings: ApiSettings) -> str:
    at = f"{settings.host}:{settings.port}"
    if error.errno == errno.EADDRINUSE:
        return f"port {settings.port} is taken on {settings.host}; choose another with --port or FNQUEUE_PORT"
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"cannot listen on {at}: {settings.host} is not an address of this machine"
    return f"cannot listen on {at}: {os.strerror(error.errno) if error.errno else error}"
