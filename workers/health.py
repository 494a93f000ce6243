"""Is the container fit for work, and who is told: the gate of the sidecar, and its status server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from aiohttp import web

from broker.errors import ConfigurationError, FnqueueError
from broker.settings import SidecarSettings
from workers.inference import Inference

_LAST_ANSWERS_S = 5.0


class NeverReady(FnqueueError):
    """The container did not become healthy in time; names what was checked and what it said."""


class Gate:
    """Open while the container is healthy. `full` tells whether all of its slots are taken."""

    def __init__(self, inference: Inference, settings: SidecarSettings, *, full: Callable[[], bool]) -> None:
        self._inference = inference
        self._settings = settings
        self._full = full
        self._opened = asyncio.Event()
        self._shut = asyncio.Event()
        self._shut.set()
        self._checking = asyncio.Lock()
        self._checked = 0

    @property
    def healthy(self) -> bool:
        return self._opened.is_set()

    @property
    def fault(self) -> str:
        """Why it is shut, '' while it is open."""
        return "" if self.healthy else self._inference.fault

    async def start(self) -> None:
        """Return at the first healthy answer. Raises NeverReady after `ready_timeout_s`."""
        try:
            async with asyncio.timeout(self._settings.ready_timeout_s):
                while not await self.check():  # noqa: ASYNC110  the container announces nothing
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
        if await self._inference.healthy():
            self._shut.clear()
            self._opened.set()
        elif not (self._inference.silent and self._full()):
            # A container that serves one call at a time cannot answer while it works; that is no fault.
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


@asynccontextmanager
async def status_server(port: int, ready: Callable[[], Awaitable[str]], *routes: web.RouteDef) -> AsyncIterator[None]:
    """Serve `/v1/health/live`, `/v1/health/ready` and `routes` on every address while the body runs; port 0 serves
    none.

    `ready` returns '' or what is missing. Calls that are being answered when the body is over get a few seconds more.

    Raises:
        ConfigurationError: the port cannot be listened on.
    """
    if not port:
        yield
        return

    async def live_route(_: web.Request) -> web.Response:
        return web.json_response({"status": "OK"})

    async def ready_route(_: web.Request) -> web.Response:
        missing = await ready()
        return web.json_response({"status": missing or "OK"}, status=503 if missing else 200)

    app = web.Application()
    app.add_routes([web.get("/v1/health/live", live_route), web.get("/v1/health/ready", ready_route), *routes])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=_LAST_ANSWERS_S)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, port=port).start()
        except OSError as exc:
            raise ConfigurationError(f"status_port: {port} cannot be listened on: {exc.strerror}") from exc
        yield
    finally:
        await runner.cleanup()
