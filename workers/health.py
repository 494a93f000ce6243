"""Is the container fit for work, and who is told: the gate of the sidecar, and its status server."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from aiohttp import web

from broker.errors import ConfigurationError, FnqueueError
from broker.settings import ControllerSettings, SidecarSettings
from broker.telemetry.exposition import CONTENT_TYPE, Exposition
from broker.telemetry.metrics import Metrics
from workers.inference import Inference

logger = logging.getLogger(__name__)

_LAST_ANSWERS_S = 5.0
# Of a container that takes half an hour to be well, what it says differently, and no more of it than is read.
_FAULTS_TOLD = 10
_EVERYWHERE = frozenset({"", "0.0.0.0", "::"})
# Addresses for examples (RFC 5737, RFC 3849).
_ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}


class NeverReady(FnqueueError):
    """The container did not become healthy in time; names what was checked and what it said."""


class Gate:
    """Open while the container is healthy, until it is condemned. `full` tells whether all of its slots are taken."""

    def __init__(self, inference: Inference, settings: SidecarSettings, *, full: Callable[[], bool]) -> None:
        self._inference = inference
        self._settings = settings
        self._full = full
        self._opened = asyncio.Event()
        self._shut = asyncio.Event()
        self._shut.set()
        self._checking = asyncio.Lock()
        self._checked = 0
        self._sentence = ""

    @property
    def healthy(self) -> bool:
        return self._opened.is_set()

    @property
    def fault(self) -> str:
        """Why it is shut, '' while it is open."""
        return "" if self.healthy else self._sentence or self._inference.fault

    @property
    def condemned(self) -> bool:
        return bool(self._sentence)

    def condemn(self, why: str) -> None:
        """Shut it for good."""
        self._sentence = why
        self._shut_now()

    async def start(self) -> None:
        """Return at the first healthy answer. Raises NeverReady after `ready_timeout_s`."""
        told: set[str] = set()
        try:
            async with asyncio.timeout(self._settings.ready_timeout_s):
                while not await self.check():  # the container announces nothing
                    if self.fault not in told and len(told) < _FAULTS_TOLD:
                        told.add(self.fault)
                        logger.info("container_not_ready", extra={"public": True, "cause": self.fault})
                    await asyncio.sleep(self._settings.health_start_interval_s)
        except TimeoutError as exc:
            raise NeverReady(
                f"the container was not ready after {self._settings.ready_timeout_s:g} s: {self._inference.fault}"
            ) from exc

    async def check(self) -> bool:
        """Open or shut the gate by what the container answers to one question that is asked from now on. Those who
        want to know at the same time, because their calls were cut, share it."""
        begun = self._checked
        async with self._checking:
            if self._checked == begun:
                self._checked += 1
                await self._ask()
        return self.healthy

    async def _ask(self) -> None:
        well = await self._inference.healthy()
        if self.condemned:
            return
        if well:
            self._shut.clear()
            self._opened.set()
        elif not (self._inference.silent and self._full()):
            # A container that serves one call at a time cannot answer while it works; that is no fault.
            self._shut_now()

    def _shut_now(self) -> None:
        self._opened.clear()
        self._shut.set()

    async def check_when_due(self) -> None:
        """The next check of the steady state: soon while there is a recovery to wait for."""
        if self.healthy:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.health_interval_s):
                    await self.shut()  # somebody else found it ill
        if not self.healthy:
            await asyncio.sleep(self._settings.health_start_interval_s)
        await self.check()

    async def opened(self) -> None:
        await self._opened.wait()

    async def shut(self) -> None:
        await self._shut.wait()


def status_address(host: str, port: int) -> str:
    """`host:port` by which others reach a status server that listens there; '' for none, which is port 0. Of one that
    listens everywhere, by this machine's own address."""
    if not port:
        return ""
    if host in _EVERYWHERE:
        family = socket.AF_INET6 if host == "::" else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe, suppress(OSError):
            # Nothing is sent: it only has the route looked up that leads out of this machine.
            probe.connect((_ELSEWHERE[family], 9))
            host = str(probe.getsockname()[0])
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@asynccontextmanager
async def status_server(
    settings: SidecarSettings | ControllerSettings,
    metrics: Metrics,
    ready: Callable[[], Awaitable[str]],
    *routes: web.RouteDef,
) -> AsyncIterator[int]:
    """Serve `/metrics`, `/v1/health/live`, `/v1/health/ready` and `routes` while the body runs, at the port that this
    is; 0 for none.

    `ready` returns '' or what is missing. Calls that are being answered when the body is over get a few seconds more.

    Raises:
        ConfigurationError: the port cannot be listened on. A default that is taken is gone without.
    """
    host, port = settings.status_host, settings.status_port
    if not port:
        yield 0
        return

    async def live_route(_: web.Request) -> web.Response:
        return web.json_response({"status": "OK"})

    async def ready_route(_: web.Request) -> web.Response:
        missing = await ready()
        return web.json_response({"status": missing or "OK"}, status=503 if missing else 200)

    async def metrics_route(_: web.Request) -> web.Response:
        return web.Response(body=await exposition.text(), headers={"Content-Type": CONTENT_TYPE})

    app = web.Application()
    app.add_routes(
        [
            web.get("/metrics", metrics_route),
            web.get("/v1/health/live", live_route),
            web.get("/v1/health/ready", ready_route),
            *routes,
        ]
    )
    with Exposition(metrics) as exposition:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=_LAST_ANSWERS_S)
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, host, 0 if port == "any" else port).start()
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE or "status_port" in settings.model_fields_set:
                    raise ConfigurationError(
                        f"status_port: {host}:{port} cannot be listened on: {exc.strerror}"
                    ) from exc
                logger.warning("status_port_taken", extra={"port": port})
            yield next((int(address[1]) for address in runner.addresses), 0)
        finally:
            await runner.cleanup()
