"""The HTTP server: listens, serves, and stops without dropping anybody who waits."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Any, cast

from aiohttp import http_parser, web
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from api import shortcut, status
from api.app import make_app
from api.channels import FAREWELL_S
from api.connections import Connections
from api.front import Front
from api.middleware import SERVER
from api.open_files import allowed
from api.routes import attach
from broker.backends.files import FileBlobs
from broker.errors import ConfigurationError
from broker.ports import Broker
from broker.settings import ApiSettings

logger = logging.getLogger(__name__)

# Longer than most proxies keep theirs (60 s), so that it is never us who closes under a request.
KEEPALIVE_S = 75.0
BACKLOG = 4096
# Addresses for examples (RFC 5737, RFC 3849).
_ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
_PORT = "--port or FNQUEUE_PORT"
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}


@asynccontextmanager
async def serving(broker: Broker, settings: ApiSettings, *, reuse_port: bool = False) -> AsyncIterator[str]:
    """Serve the API during the body; yields the URL it answers at.

    On exit nobody new is let in, who waits is answered at once, and what is being submitted gets
    `shutdown_grace_s` seconds.

    Raises:
        ConfigurationError: the address cannot be listened on, or aiohttp's parser is the lax one.
    """
    _require_strict_parser()
    front = Front.over(broker, settings)
    runner = web.AppRunner(
        make_app(front), handler_cancellation=True, shutdown_timeout=max(0.1, settings.shutdown_grace_s)
    )
    await runner.setup()
    assert runner.server is not None, "it was set up"
    runner.server.request_factory = partial(cast("Any", runner.server.request_factory), _cls=_Asked)
    if broker.tracing is None:  # spans are made by the application's outermost middleware
        front.connections.short_way, front.connections.abandon = shortcut.of(front), front.calls.abandon
    try:
        async with _attaching(front), status.shown(front):
            try:
                async with _listening(
                    runner,
                    front.connections,
                    settings.host,
                    settings.port,
                    named=_PORT,
                    reuse_port=reuse_port,
                ) as port:
                    url = _url(settings.host, port)
                    if isinstance(broker.blobs, FileBlobs):
                        broker.blobs.set_base_url(settings.public_url or url)
                    logger.info("api_started", extra={"url": url})
                    yield url
                    logger.info("api_stopping")
            finally:
                # Its ears are closed to every connection by now, and the clean-up goes on so: no channel outlives that.
                front.calls.interrupt()
                await front.channels.drain()
                await runner.cleanup()
    finally:
        await front.calls.finish(grace_s=settings.shutdown_grace_s)


@contextmanager
def reserved(settings: ApiSettings) -> Iterator[int]:
    """Keep the address for processes that will share it, during the body; yields the port.

    Raises:
        ConfigurationError: it cannot be listened on, or not by several.
    """
    if not hasattr(socket, "SO_REUSEPORT"):
        raise ConfigurationError("FNQUEUE_PROCESSES: on this system a port cannot be shared by several processes")
    with ExitStack() as held:
        try:
            [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
                settings.host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            bound = held.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound.bind(address)
        except OSError as exc:
            raise ConfigurationError(_why(exc, settings.host, settings.port, _PORT)) from exc
        yield int(bound.getsockname()[1])


@asynccontextmanager
async def _attaching(front: Front) -> AsyncIterator[None]:
    """Let sidecars attach to this process's channels, at an address that no other process has.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    settings = front.settings
    # Each of these is for a channel that a connection of a client's was let in for.
    connections = Connections(settings, most=allowed(settings.max_connections))
    host = settings.attach_host or settings.host
    runner = web.AppRunner(attach.make_app(front, connections), shutdown_timeout=FAREWELL_S)
    await runner.setup()
    try:
        async with _listening(runner, connections, host, settings.attach_port, named="FNQUEUE_ATTACH_PORT") as port:
            front.channels.url = str(
                URL.build(scheme="http", host=_address(settings, host), port=port, path=attach.PATH)
            )
            yield
    finally:
        await runner.cleanup()


@asynccontextmanager
async def _listening(
    runner: web.AppRunner, connections: Connections, host: str, port: int, *, named: str, reuse_port: bool = False
) -> AsyncIterator[int]:
    """Let clients connect during the body; yields the port. `named` is the setting that chooses it.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    assert runner.server is not None, "it was set up"
    factory = connections.factory(
        runner.server,
        access_log=None,
        logger=_http_logger(),
        keepalive_timeout=KEEPALIVE_S,
        auto_decompress=False,
    )
    try:
        server = await asyncio.get_running_loop().create_server(
            factory, host, port, backlog=BACKLOG, reuse_port=reuse_port or None
        )
    except OSError as exc:
        raise ConfigurationError(_why(exc, host, port, named)) from exc
    connections.watch()
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        connections.stop()
        server.close()


class _Asked(web.Request):
    """What is no request reaches no handler and no middleware; its answer must not tell what this server is made of
    either. The hook is private, but the only place; a test notices when it is gone."""

    def get(self, key: Any, default: Any = None) -> Any:
        """Mapping's raises and catches an error for each of the facts that a plain request has not."""
        return self._state.get(key, default)

    def __setitem__(self, key: Any, value: Any) -> None:
        """aiohttp's looks for keys that are texts, to warn of them."""
        self._state[key] = value

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        if self._match_info is None:
            response.headers["Server"] = SERVER
        await super()._prepare_hook(response)


def _address(settings: ApiSettings, host: str) -> str:
    """How sidecars on other machines call this one."""
    if settings.attach_address or host not in _WILDCARDS:
        return settings.attach_address or host
    family = socket.AF_INET6 if host == "::" else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: it only has the route looked up that leads out of this machine.
            probe.connect((_ELSEWHERE[family], 9))
        except OSError:
            return "::1" if host == "::" else "127.0.0.1"
        return str(probe.getsockname()[0])


def _require_strict_parser() -> None:
    """aiohttp's parser in Python takes what others read differently, and a proxy in front may be one of those."""
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise ConfigurationError(
            "aiohttp came without its HTTP parser in C, or AIOHTTP_NO_EXTENSIONS is set; the other one is not strict "
            "enough to face clients: pip install --force-reinstall --only-binary :all: aiohttp"
        )


def _http_logger() -> logging.Logger:
    """aiohttp's own, but for requests that are not HTTP: anybody can send those, and they may hold credentials."""

    def is_ours(line: logging.LogRecord) -> bool:
        return not (line.exc_info and isinstance(line.exc_info[1], HttpProcessingError))

    found = logging.getLogger(f"{__name__}.http")
    found.filters[:] = [is_ours]
    # It warns of subprotocols that nobody speaks, and shows them; browsers hide credentials there.
    logging.getLogger("aiohttp.websocket").setLevel(logging.ERROR)
    return found


def _url(host: str, port: int) -> str:
    """Where clients on this machine reach a listener."""
    named = _WILDCARDS.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{named}:{port}"


def _why(error: OSError, host: str, port: int, setting: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken on {host}; choose another with {setting}"
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"cannot listen on {host}:{port}: {host} is not an address of this machine"
    return f"cannot listen on {host}:{port}: {os.strerror(error.errno) if error.errno else error}"
