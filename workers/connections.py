"""Connections to the container for jobs whose body is at hand: one POST at a time, and nothing around it.

aiohttp's parser reads all answers but the plainest, so that a container is understood here as everywhere else. Its
session is left out: cookies, redirects, proxies, tracing and time-outs of several kinds are of no use towards a
container, and cost more than all the rest of an exchange.
"""

from __future__ import annotations

import asyncio
import math
import re
import select
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import aiohttp
from aiohttp import hdrs
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import RawResponseMessage
from multidict import istr
from yarl import URL

# With `briefly`: how long an exchange may take, and a connection be idle or old, for it to be used again; and how old
# where it keeps nobody waiting.
SHORT_S, BRIEFLY_S, OLD_S, OLDEST_S = 0.2, 0.2, 1.0, 10.0
# Above, an answer is not plain: aiohttp has limits of its own, and reads what is large while it comes.
MAX_HEAD_BYTES = 8190
MAX_PLAIN_BYTES = 256 * 1024

# A head in which everything is where RFC 9112 has it, in one way only.
_HEAD = re.compile(rb"HTTP/1\.1 ([2-5][0-9]{2}) [ -~]*\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[ -~]*\r\n){1,64})\r\n")
_FIELD = re.compile(r"([^:]+): *([^\r]*)\r\n")
_LENGTH = re.compile(r"[0-9]{1,9}")
# With no body, whatever their heads say.
_EMPTY = frozenset({b"204", b"304"})
# What tells how an answer is framed. Those without a meaning here are aiohttp's to understand.
_FRAMING = frozenset({"connection", "content-length", "transfer-encoding", "upgrade"})
# As aiohttp's parser spells the names that it knows.
_SPELLED = {name.lower(): str(name) for name in vars(hdrs).values() if isinstance(name, istr)}
_PERSISTENCE = {"close": True, "keep-alive": False}


class Plain:
    """An answer that is here as a whole. `length` is that of its body, which may still be on its way."""

    __slots__ = ("body", "closes", "headers", "length", "status")

    def __init__(self, status: int, headers: Sequence[tuple[str, str]], *, length: int, closes: bool) -> None:
        self.status = status
        self.headers = headers
        self.length = length
        self.closes = closes
        self.body = b""


def plain_head(raw: bytes) -> Plain | None:
    """What a head says, line ends and all; None for one that is not plain."""
    match = _HEAD.fullmatch(raw)
    if match is None or match[1] in _EMPTY or b" \r\n" in raw:
        return None
    headers = []
    length, closes = "", False
    for name, value in _FIELD.findall(match[2].decode()):
        key = name.lower()
        headers.append((_SPELLED.get(key, name), value))
        if key not in _FRAMING:
            continue
        if key == "content-length" and not length and _LENGTH.fullmatch(value):
            length = value
        elif key == "connection" and value.lower() in _PERSISTENCE:
            closes = closes or _PERSISTENCE[value.lower()]
        else:
            return None
    return Plain(int(match[1]), headers, length=int(length), closes=closes) if length else None


class _Handler(ResponseHandler):
    """One that resumes only what was paused: at the end of every answer it is told to, twice."""

    def resume_reading(self, resume_parser: bool = True) -> None:
        if self._reading_paused:
            super().resume_reading(resume_parser)


class _Line(asyncio.Protocol):
    """One connection. It reads plain answers; from the first other one on, or one that is to be read while it comes,
    aiohttp's `handler` has it. `since` is when it was last sent something, or kept."""

    def __init__(self) -> None:
        self.handler: _Handler | None = None
        self.opened_at = self.since = time.monotonic()
        self.used = False
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._watched: select.poll | None = None
        self._closing = False
        self._answered: asyncio.Future[Plain | None] | None = None
        self._largest_bytes = 0
        self._data = b""
        self._plain: Plain | None = None
        self._body_at = 0

    def ask(self, request: bytes, *, largest_bytes: int) -> asyncio.Future[Plain | None] | None:
        """The answer, if it is plain and its body not larger; None, at once or later, if `handler` has it. Both raise
        aiohttp.ClientError: the connection was lost."""
        transport = self._transport
        if transport is None or transport.is_closing():
            raise aiohttp.ServerDisconnectedError
        self.since = time.monotonic()
        if self.handler is None and largest_bytes:
            self._largest_bytes, self._data, self._plain = largest_bytes, b"", None
            self._answered = self._loop.create_future()
            transport.write(request)
            return self._answered
        handler = self.handler or self._hand_over(transport)
        handler.set_response_params(read_until_eof=True, auto_decompress=False)
        transport.write(request)
        return None

    @property
    def reusable(self) -> bool:
        """Whether all of the last answer was read, and the container leaves the connection open behind it."""
        return not (self._closing if self.handler is None else self.handler.should_close)

    def silent(self) -> bool:
        """Asked of the system, because the loop may not have seen yet that it was closed."""
        transport = self._transport
        if transport is None or transport.is_closing() or not self.reusable:
            return False
        if self._watched is None:
            self._watched = select.poll()
            self._watched.register(transport.get_extra_info("socket"), select.POLLIN)
        return not self._watched.poll(0)

    def close(self) -> None:
        if self._transport is not None:
            (self.handler or self._transport).close()

    def abort(self) -> None:
        if self._transport is not None:
            (self.handler or self._transport).abort()

    # -- asyncio.Protocol, until the handler takes its place --------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        if self._answered is not None and not self._answered.done():
            lost = aiohttp.ClientOSError(*exc.args) if isinstance(exc, OSError) else aiohttp.ServerDisconnectedError()
            answered, self._answered = self._answered, None
            answered.set_exception(lost)

    def data_received(self, data: bytes) -> None:
        answered = self._answered
        if answered is None or answered.done():
            self._closing = True  # nobody asked for that
            return
        if self._data:
            data = self._data + data
        plain = self._plain
        if plain is None:
            end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) + 4
            if end < 4 and len(data) < MAX_HEAD_BYTES:
                self._data = data
                return
            plain, self._body_at = plain_head(data[:end]), end
        left = plain.length - len(data) + self._body_at if plain is not None else -1
        if plain is None or left < 0 or plain.length > self._largest_bytes:
            self._give_up(answered, data)
        elif left:
            self._plain, self._data = plain, data
        else:
            plain.body = data[self._body_at :]
            self._closing = plain.closes
            answered.set_result(plain)

    def _give_up(self, answered: asyncio.Future[Plain | None], data: bytes) -> None:
        assert self._transport is not None, "it is connected"
        handler = self._hand_over(self._transport)
        handler.set_response_params(read_until_eof=True, auto_decompress=False)
        handler.data_received(data)
        answered.set_result(None)

    def _hand_over(self, transport: asyncio.Transport) -> _Handler:
        handler = self.handler = _Handler(self._loop)
        handler.connection_made(transport)
        transport.set_protocol(handler)
        self._data = b""
        return handler


class Exchange:
    """An answer whose head is there; `content` is its body as it comes. To be ended with `release`."""

    __slots__ = ("_connections", "_keep", "_line", "content", "content_length", "headers", "status", "url")

    def __init__(
        self,
        connections: Connections,
        line: _Line,
        message: RawResponseMessage,
        content: aiohttp.StreamReader,
        *,
        url: URL,
        keep: bool,
    ) -> None:
        self._connections = connections
        self._line = line
        self._keep = keep
        self.status = message.code
        self.headers: Mapping[str, str] = message.headers
        self.content = content
        self.content_length = _length(message.headers.get("Content-Length"))
        self.url = url

    def release(self) -> None:
        """Whatever of the answer was not read is not wanted."""
        self._connections.leave(self._line, keep=self._keep and self.content.is_eof())


class Connections:
    """To one container. A kept one is the last that was used, so that few stay open.

    `briefly` keeps those only over which one short exchange follows closely on another, where to open one would cost
    more than the job; and none until the container has been seen to leave one open that it could have closed. A
    container that serves few connections at a time leaves the others unanswered: the old ones go then.
    """

    def __init__(self, host: str, port: int, *, kept_s: float, connect_s: float, briefly: bool = False) -> None:
        self._host = host
        self._port = port
        self._kept_s = BRIEFLY_S if briefly else kept_s
        self._connect_s = connect_s
        self._briefly = briefly
        self._trusted: bool | None = None if briefly else True
        self._idle: list[_Line] = []
        # Of those in use, the ones over which no answer has come yet, in the order in which they were opened.
        self._unheard: dict[_Line, None] = {}
        self._made_way_at = -math.inf
        self._sweep: asyncio.TimerHandle | None = None
        self._heads: dict[URL, str] = {}

    async def post(
        self, url: URL, headers: Iterable[tuple[str, str]], body: bytes, *, keep: bool, plain_bytes: int = 0
    ) -> Exchange | Plain:
        """The answer to one request, which is sent once. `keep` uses a kept connection, and may keep it again. One
        that is plain and has no more than `plain_bytes` comes as a whole, with nothing to release.

        Raises:
            NotReached: nothing was sent.
            aiohttp.ClientError, HttpProcessingError: the connection was lost, or what came was not HTTP.
            ValueError: a header that HTTP cannot carry.
        """
        request = self._request(url, headers, body, keep=keep)
        line = self._kept() if keep else None
        if line is None:
            line = await self._open(url)
            self._unheard[line] = None
        try:
            answered = line.ask(request, largest_bytes=min(plain_bytes, MAX_PLAIN_BYTES))
            if answered is not None and (plain := await answered) is not None:
                self._unheard.pop(line, None)
                self.leave(line, keep=keep)
                return plain
            handler = line.handler
            assert handler is not None, "it has the answer"
            while True:
                message, content = await handler.read()
                if not 100 <= message.code <= 199 or message.code == 101:
                    self._unheard.pop(line, None)
                    return Exchange(self, line, message, content, url=url, keep=keep)
        except BaseException as exc:
            answered = None  # it holds the error, which holds this frame, and with it the body
            self._unheard.pop(line, None)
            if line.used and isinstance(exc, aiohttp.ClientConnectionError):
                self._distrust()
            line.abort()
            raise

    def leave(self, line: _Line, *, keep: bool) -> None:
        """Its answer was read, or is not wanted."""
        if keep and line.reusable:
            self._keep(line)
        else:
            line.close()

    def _keep(self, line: _Line) -> None:
        """For the next request, if it is of use for that."""
        now = time.monotonic()
        short = now - line.since <= SHORT_S
        # One idle connection is enough to see whether the container leaves it open.
        useful = self._trusted or (self._trusted is None and not self._idle)
        if self._briefly and not (short and useful and self._young(line, now)):
            line.close()
            return
        line.since, line.used = now, True
        self._idle.append(line)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(self._kept_s, self._close_old)

    def _young(self, line: _Line, now: float) -> bool:
        """Whether nobody may be waiting for the container to be done with this one."""
        if now - line.opened_at <= OLD_S:
            return True
        unheard = next(iter(self._unheard), None)
        waiting = unheard is not None and now - unheard.opened_at > SHORT_S
        return not waiting and line.opened_at > max(self._made_way_at, now - OLDEST_S)

    def make_way(self) -> None:
        """Somebody else is about to connect to the container: what is old by now will not be kept any more."""
        self._made_way_at = time.monotonic()

    def close(self) -> None:
        """Of those that are kept; the others belong to who uses them."""
        idle, self._idle = self._idle, []
        for line in idle:
            line.close()
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None

    def _kept(self) -> _Line | None:
        """One on which the container has been silent since, and which it has not closed: one that closes may say why
        first (408), which would be read as the answer to the next job."""
        oldest = time.monotonic() - self._kept_s
        while self._idle and self._trusted:
            line = self._idle.pop()
            if line.since >= oldest and line.silent():
                return line
            line.close()
        return None

    def _close_old(self) -> None:
        oldest = time.monotonic() - self._kept_s
        old = [line for line in self._idle if line.since <= oldest]
        self._idle = self._idle[len(old) :]  # in the order of their last use
        if old and self._trusted is None:
            self._trusted = all(line.silent() for line in old)
        for line in old:
            line.close()
        self._sweep = None
        if self._idle:
            self._sweep = asyncio.get_running_loop().call_later(self._kept_s, self._close_old)

    def _distrust(self) -> None:
        """A container that closes what could be used costs attempts."""
        if self._briefly:
            self._trusted = False

    async def _open(self, url: URL) -> _Line:
        try:
            async with asyncio.timeout(self._connect_s):
                _, line = await asyncio.get_running_loop().create_connection(_Line, self._host, self._port)
        except TimeoutError as exc:
            raise NotReached(f"{url.host}:{url.port} was not reached in time") from exc
        except OSError as exc:
            raise NotReached(f"{url.host}:{url.port} was not reached") from exc
        return line

    def _request(self, url: URL, headers: Iterable[tuple[str, str]], body: bytes, *, keep: bool) -> bytes:
        first = self._heads.get(url)
        if first is None:
            first = f"POST {url.raw_path_qs} HTTP/1.1\r\nHost: {url.host_port_subcomponent}\r\n"
            if len(self._heads) < 1000:
                self._heads[url] = first
        fields = [f"{name}: {value}\r\n" for name, value in headers]
        lines = "".join(fields)
        if lines.count("\r") != len(fields) or lines.count("\n") != len(fields) or "\0" in lines:
            raise ValueError("a header holds a line break")
        last = "" if keep else "Connection: close\r\n"
        return f"{first}{lines}Content-Length: {len(body)}\r\n{last}\r\n".encode() + body


class NotReached(aiohttp.ClientConnectionError):
    """Nothing was sent."""


def _length(value: str | None) -> int | None:
    return int(value) if value is not None and value.isdecimal() else None
