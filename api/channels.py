"""The calls of this process that a sidecar attaches to, and their ends of the channels.

A channel belongs to this process: the caller's connection is here and nowhere else. What is kept of its token is a
hash, in memory, until a sidecar has shown the token once or the call is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from aiohttp import WSMsgType, web

from api.problems import TimedOut, WorkerLost
from broker import channels
from broker.channels import CloseCode, Garbled, Kind, Message
from broker.errors import FnqueueError, Overloaded
from broker.model import Channel
from broker.settings import ApiSettings

STOPPING = "this server is stopping; connect again"
# For the last words on either side, once everything is over.
FAREWELL_S = 3.0
_CLOSE_S = 2.0
_RETRY_S = 1.0


class Stopped(Exception):
    """We end the channel: `code` closes a WebSocket, `error` is for a caller who has no answer yet."""

    def __init__(self, code: CloseCode, error: FnqueueError) -> None:
        super().__init__(str(error))
        self.code = code
        self.error = error


class Channels:
    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings
        self._lines: set[Line] = set()
        self._waiting: dict[bytes, Line] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        self.url = ""
        """Where sidecars reach this process; '' until it listens."""

    @property
    def open(self) -> int:
        """How many there are now."""
        return len(self._lines)

    @contextmanager
    def line(self) -> Iterator[Line]:
        """A new channel's end, for as long as the body runs; its sidecar is let go afterwards.

        Raises:
            Overloaded: this process has as many as it may have.
        """
        if len(self._lines) >= self._settings.max_channels or not self.url:
            raise Overloaded(
                "this server holds as many open connections to functions as it may", retry_after_s=_RETRY_S
            )
        line = Line(self, self._settings)
        self._lines.add(line)
        self._empty.clear()
        try:
            yield line
        finally:
            line.revoke()
            line.release()
            self._lines.discard(line)
            if not self._lines:
                self._empty.set()

    def expect(self, line: Line, token_hash: bytes) -> None:
        """From now on, the token with this hash is the line's."""
        self._waiting[token_hash] = line

    def redeem(self, token_hash: bytes) -> Line | None:
        """Whose it is; from now on, it is nobody's."""
        return self._waiting.pop(token_hash, None)

    async def drain(self) -> None:
        """Return when no channel is open any more. After `channel_drain_s`, those that are will be closed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.channel_drain_s):
                await self._empty.wait()
        for line in self._lines:
            line.stop()
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                await self._empty.wait()


class Line:
    """One end of a channel: first it waits to be attached, then it passes messages, then it is released."""

    def __init__(self, home: Channels, settings: ApiSettings) -> None:
        self._home = home
        self._token_hash = b""
        self._idle_s = settings.channel_idle_s
        self._loop = asyncio.get_running_loop()
        self._socket: web.WebSocketResponse[bool] | None = None
        self._attached = asyncio.Event()
        self._stopping = asyncio.Event()
        self._released = asyncio.Event()
        self._seen_at = self._loop.time()
        self._last_word = ""
        self.received_bytes = 0
        self.sent_bytes = 0

    def channel(self, *, websocket: bool, body_bytes: int) -> Channel:
        """What the job carries to the sidecar, with a new token."""
        self.revoke()
        token = channels.new_token()
        self._token_hash = channels.token_hash(token)
        self._home.expect(self, self._token_hash)
        return Channel(url=self._home.url, token=token, websocket=websocket, body_bytes=body_bytes)

    @property
    def attached(self) -> bool:
        return self._attached.is_set()

    async def attachment(self) -> None:
        """Return once a sidecar is there."""
        await self._attached.wait()

    def revoke(self) -> None:
        """Let no sidecar attach any more."""
        self._home.redeem(self._token_hash)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Be attached by the sidecar that sent this request, until released."""
        opened = web.WebSocketResponse(
            timeout=_CLOSE_S, autoclose=False, compress=False, max_msg_size=channels.MESSAGE_MAX_BYTES + 1
        )
        await opened.prepare(request)
        try:
            if (connection := opened.get_extra_info("socket")) is not None:
                channels.keep_alive(connection)
            self._socket, self._seen_at = opened, self._loop.time()
            self._attached.set()
            await self._released.wait()
            with suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(FAREWELL_S):
                    if self._last_word:
                        await opened.send_bytes(channels.message(Kind.ABORT, self._last_word.encode()))
                    await opened.close(drain=False)
        finally:
            if request.transport is not None:
                request.transport.abort()
        return opened

    async def receive(self) -> Message:
        """Raises WorkerLost."""
        assert self._socket is not None, "nobody is attached"
        got = await self._socket.receive()
        if got.type is not WSMsgType.BINARY:
            raise WorkerLost("the worker that ran this call was lost")
        self._seen_at = self._loop.time()
        self.received_bytes += len(got.data)
        try:
            return channels.parse(got.data)
        except Garbled as exc:
            raise WorkerLost("the worker that ran this call cannot be understood") from exc

    async def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Returns when there is room for more. When nobody is there any more, `receive` tells, after all that was
        sent before; here, it is no error."""
        assert self._socket is not None, "nobody is attached"
        with suppress(ConnectionError):
            await self._socket.send_bytes(channels.message(kind, payload))
        self._seen_at = self._loop.time()
        self.sent_bytes += len(payload) + 1

    def touch(self) -> None:
        """The caller took or gave something."""
        self._seen_at = self._loop.time()

    async def watch(self) -> None:
        """Raise Stopped when nothing has passed for too long, or `stop` was called."""
        while (left_s := self._seen_at + self._idle_s - self._loop.time()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._stopping.wait()
                raise Stopped(CloseCode.SERVICE_RESTART, Overloaded(STOPPING))
        raise Stopped(CloseCode.GOING_AWAY, TimedOut(f"nothing was sent or received for {self._idle_s:g} s"))

    def stop(self) -> None:
        """End what goes on, soon."""
        self._stopping.set()

    def release(self, last_word: str = "") -> None:
        """Let the sidecar go. `last_word` is why, when it has to break off. Only the first call counts."""
        if not self._released.is_set():
            self._last_word = last_word
            self._released.set()
