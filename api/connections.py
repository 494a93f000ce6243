"""The connections of a listener: how many there may be, and how long one may say nothing or take nothing."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, cast

from aiohttp import StreamReader, web
from aiohttp.http_parser import RawRequestMessage
from aiohttp.http_writer import StreamWriter

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

# Answers a request; returns whether its connection may be kept.
Serve = Callable[[web.Request], Coroutine[Any, Any, bool]]


class Connections:
    """Of one listener. What breaks a time limit is cut within a second of it."""

    def __init__(self, settings: ApiSettings, *, most: int, most_per_address: int = 0) -> None:
        """Of one address there may be any number where `most_per_address` is 0."""
        self._head_timeout_s = settings.head_timeout_s
        self._send_timeout_s = settings.send_timeout_s
        self._most = most
        self._most_per_address = most_per_address
        self.short_way: Callable[[Connection, RawRequestMessage], Serve | None] = _none
        """What serves a request that is not to go through the server's own machinery, None for one that is."""
        self.abandon: Callable[[asyncio.Task[None]], object] = asyncio.Task.cancel
        """Ends the task of a request on the short way whose client has gone."""
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
    """aiohttp's, counted, and with a short way for what is asked on an idle connection.

    Its server wakes a task for each request, which makes another one and waits for that, and then looks for what may
    be left of all that a request can be: a quarter of what an invocation costs a front end. On the short way a request
    has one task. Its parser, its flow control, its time limits and all of its state are aiohttp's either way: while a
    request is on the short way, the attributes of the base class say what they say of any request under way.
    """

    __slots__ = (
        "_connections",
        "_held_up",
        "_idle",
        "_owed_bytes",
        "_owed_since",
        "_owed_then_bytes",
        "_serving",
        "_wire",
        "address",
    )

    def __init__(
        self, connections: Connections, server: web.Server, *, loop: asyncio.AbstractEventLoop, **options: Any
    ) -> None:
        super().__init__(server, loop=loop, **options)
        self._connections = connections
        # Kept until the connection is lost: aiohttp forgets one that it closes, and what is unsent may take long.
        self._wire: asyncio.Transport | None = None
        self.address = ""
        self._held_up = False
        self._owed_since = 0.0
        self._owed_then_bytes = 0  # when it was first seen
        self._owed_bytes = 0  # when it was last seen
        self._serving: asyncio.Task[None] | None = None
        # What aiohttp's loop waits on for the next request, while one is on the short way.
        self._idle: asyncio.Future[None] | None = None

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
        if self._serving is not None:
            self._connections.abandon(self._serving)

    def data_received(self, data: bytes) -> None:
        waiter = self._waiter
        if waiter is None or self._messages or waiter.done():
            super().data_received(data)
            return
        self._waiter = None  # so that nobody is woken before it is known for what
        super().data_received(data)
        if self._messages and not (len(self._messages) == 1 and self._take_short_way(waiter)):
            waiter.set_result(None)
        if self._idle is None:
            self._waiter = waiter

    def _take_short_way(self, waiter: asyncio.Future[None]) -> bool:
        """Whether the one request that has come is now served."""
        message, payload = self._messages[0]
        if not isinstance(message, RawRequestMessage):
            return False
        serve = self._connections.short_way(self, message)
        if serve is None or self._manager is None or self._parser is None:
            return False
        self._messages.popleft()
        self._parser.message_consumed()
        self._manager.requests_count += 1
        assert self._request_factory is not None, "it has a manager"
        assert self._task_handler is not None, "it waits"
        request = self._request_factory(message, payload, self, StreamWriter(self, self._loop), self._task_handler)
        self._idle = waiter
        self._request_in_progress = True
        self._current_request = request
        self._serving = self._loop.create_task(self._serve(serve(cast("web.Request", request)), payload))
        return True

    async def _serve(self, serving: Coroutine[Any, Any, bool], payload: StreamReader) -> None:
        keep = False
        try:
            keep = await serving and (payload.is_eof() or await self._read_off(payload))
        except ConnectionError:
            self.log_debug("Ignored premature client disconnection")
        except Exception as exc:  # noqa: BLE001  nobody else would hear of it
            self.log_exception("Unhandled exception", exc_info=exc)
        finally:
            self._conclude(keep=keep)

    async def _read_off(self, payload: StreamReader) -> bool:
        """Whether the rest of a body that nobody wants came before long; the next request is behind it."""
        try:
            async with asyncio.timeout(self._lingering_time):
                while not payload.is_eof():
                    await payload.readany()
        except TimeoutError:
            return False
        return True

    def _conclude(self, *, keep: bool) -> None:
        """As aiohttp does at the end of each request."""
        self._serving = self._current_request = None
        self._request_in_progress = False
        if self._handler_waiter is not None and not self._handler_waiter.done():
            self._handler_waiter.set_result(None)
        waiter, self._idle = self._idle, None
        if self._manager is None or waiter is None or waiter.done():  # it is lost
            return
        self._waiter = waiter
        if not keep or self._close or self._force_close:
            self.force_close()
        elif self._messages:
            waiter.set_result(None)
        else:
            self._keepalive = True
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
            if self._keepalive_handle is None:
                self._keepalive_handle = self._loop.call_at(self._next_keepalive_close_time, self._process_keepalive)

    def pause_reading(self) -> None:
        self._held_up = True
        super().pause_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Not where nothing was paused: aiohttp does it twice for each body, and has its parser look at nothing."""
        if self._held_up:
            self._held_up = False
            super().resume_reading(resume_parser)

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


def _none(connection: Connection, message: RawRequestMessage) -> None:
    return None
