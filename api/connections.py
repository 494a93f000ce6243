"""The connections of a listener: how many there may be, and how long one may say nothing or take nothing."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

from aiohttp import web

from broker.errors import FnqueueError, Overloaded, TooManyRequests
from broker.settings import ApiSettings

logger = logging.getLogger(__name__)

# Connections beyond the limit that are kept long enough to be told so; those beyond these are cut.
SURPLUS = 64
# How fast an answer has to be taken that needs longer than `send_timeout_s`.
SLOWEST_BYTES_PER_S = 16 * 1024
# Who has just connected has a request on its way, and makes no room for others.
_SETTLING_S = 1.0
_LOOK_S = 1.0
_RETRY_S = 1.0


class Connections:
    """Of one listener. What breaks a time limit is cut within a second of it."""

    def __init__(self, settings: ApiSettings, *, most: int, most_per_address: int = 0) -> None:
        """Of one address there may be any number where `most_per_address` is 0."""
        self._head_timeout_s = settings.head_timeout_s
        self._send_timeout_s = settings.send_timeout_s
        self._most = most
        self._most_per_address = most_per_address
        self._open: set[Connection] = set()
        self._per_address: Counter[str] = Counter()
        # Of whom no request came yet, the oldest first.
        self._silent: dict[web.RequestHandler, float] = {}
        self._refused: dict[web.RequestHandler, FnqueueError] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._open)

    def factory(self, server: web.Server, **options: Any) -> Callable[[], Connection]:
        """What makes a listener's protocols; `options` are those of aiohttp's."""
        loop = asyncio.get_running_loop()
        return lambda: Connection(self, server, loop=loop, **options)

    def met(self, connection: web.RequestHandler) -> FnqueueError | None:
        """A request has come on this connection; why it is not to be answered, if it is one too many."""
        self._silent.pop(connection, None)
        return self._refused.get(connection) if self._refused else None

    def watch(self) -> None:
        """From now on, until `stop`."""
        loop = asyncio.get_running_loop()
        self.look(loop.time())
        self._timer = loop.call_later(_LOOK_S, self.watch)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def enter(self, connection: Connection, now: float) -> bool:
        """Whether it may stay, be it only to be refused in words."""
        self._open.add(connection)
        self._per_address[connection.address] += 1
        refusal: FnqueueError | None = None
        beyond = 0
        if self._most_per_address:
            beyond = self._per_address[connection.address] - self._most_per_address
            if beyond > 0:
                refusal = TooManyRequests(
                    f"there are {self._most_per_address} connections from this address already", retry_after_s=_RETRY_S
                )
        if refusal is None and len(self._open) > self._most and not self._make_room(now):
            beyond = len(self._open) - self._most
            refusal = Overloaded("this server has as many connections as it may", retry_after_s=_RETRY_S)
        if beyond > SURPLUS:
            return False
        self._silent[connection] = now
        if refusal is not None:
            self._refused[connection] = refusal
        return True

    def leave(self, connection: Connection) -> None:
        if connection not in self._open:
            return
        self._open.discard(connection)
        self._silent.pop(connection, None)
        self._refused.pop(connection, None)
        self._per_address[connection.address] -= 1
        if not self._per_address[connection.address]:
            del self._per_address[connection.address]

    def look(self, now: float) -> None:
        for connection, since in list(self._silent.items()):
            if now - since < self._head_timeout_s:
                break
            del self._silent[connection]
            connection.force_close()
        for each in list(self._open):
            if each.stalls(now, self._send_timeout_s):
                each.cut()

    def _make_room(self, now: float) -> bool:
        """A flood of connections that ask for nothing keeps nobody out."""
        oldest = next(iter(self._silent), None)
        if oldest is None or now - self._silent[oldest] < _SETTLING_S:
            return False
        del self._silent[oldest]
        oldest.force_close()
        return True


class Connection(web.RequestHandler):
    """aiohttp's, counted."""

    __slots__ = ("_connections", "_owed_bytes", "_owed_since", "_owed_then_bytes", "_wire", "address")

    def __init__(
        self, connections: Connections, server: web.Server, *, loop: asyncio.AbstractEventLoop, **options: Any
    ) -> None:
        super().__init__(server, loop=loop, **options)
        self._connections = connections
        # Kept until the connection is lost: aiohttp forgets one that it closes, and what is unsent may take long.
        self._wire: asyncio.Transport | None = None
        self.address = ""
        self._owed_since = 0.0
        self._owed_then_bytes = 0  # when it was first seen
        self._owed_bytes = 0  # when it was last seen

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._wire = cast("asyncio.Transport", transport)  # uvloop's is one in all but its base class
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if peer else ""
        if self._connections.enter(self, self._loop.time()):
            super().connection_made(transport)
        else:
            self._wire.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.leave(self)
        self._wire = None
        super().connection_lost(exc)

    def stalls(self, now: float, patience_s: float) -> bool:
        """Whether the client does not take what it is sent: less than SLOWEST_BYTES_PER_S, for longer than that."""
        owed_bytes = self._wire.get_write_buffer_size() if self._wire is not None else 0
        if not owed_bytes or owed_bytes > self._owed_bytes:
            self._owed_since, self._owed_then_bytes = now, owed_bytes
        self._owed_bytes = owed_bytes
        if not owed_bytes:
            return False
        taken_bytes = self._owed_then_bytes - owed_bytes
        return now - self._owed_since > patience_s + taken_bytes / SLOWEST_BYTES_PER_S

    def cut(self) -> None:
        """What is unsent is lost; the request's result is not."""
        if self._wire is not None:
            logger.info("slow_reader_cut", extra={"unsent_bytes": self._owed_bytes})
            self._wire.abort()
