"""Connections on which no request has come yet."""

from __future__ import annotations

import asyncio

from aiohttp import web

# aiohttp alone gives a client as long for its first request as for its next one, which is more than a minute.
FIRST_REQUEST_S = 9.0
_LOOK_S = 1.0


class Newcomers:
    """Closes connections that were opened and then say nothing, or not all of a request's head, for nine seconds."""

    def __init__(self) -> None:
        self._known: set[web.RequestHandler] = set()
        self._since: dict[web.RequestHandler, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def met(self, connection: web.RequestHandler) -> None:
        """A request has come on this connection."""
        self._known.add(connection)

    def watch(self, server: web.Server) -> None:
        """From now on, until `stop`."""
        loop = asyncio.get_running_loop()
        self._look(set(server.connections), loop.time())
        self._timer = loop.call_later(_LOOK_S, self.watch, server)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self, connections: set[web.RequestHandler], now: float) -> None:
        self._known &= connections
        self._since = {each: self._since.get(each, now) for each in connections - self._known}
        for connection, since in self._since.items():
            if now - since >= FIRST_REQUEST_S:
                connection.force_close()
