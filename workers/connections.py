"""Connections to the container for jobs whose body is at hand: one POST at a time, and nothing around it.

aiohttp's parser reads the answers, so a container is understood here as everywhere else. Its session is left out:
cookies, redirects, proxies, tracing and time-outs of several kinds are of no use towards a container, and cost more
than all the rest of an exchange.
"""

from __future__ import annotations

import asyncio
import select
import time
from collections.abc import Iterable

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import RawResponseMessage
from multidict import CIMultiDictProxy
from yarl import URL

# With `briefly`: how long an exchange may take, and a connection be idle or old, for it to be used again.
SHORT_S, BRIEFLY_S, OLD_S = 0.2, 0.2, 1.0


class _Line:
    """One connection; `since` is when it was last sent something, or kept."""

    __slots__ = ("handler", "opened_at", "since", "used")

    def __init__(self, handler: ResponseHandler) -> None:
        self.handler = handler
        self.opened_at = self.since = time.monotonic()
        self.used = False


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
        self.headers: CIMultiDictProxy[str] = message.headers
        self.content = content
        self.content_length = _length(message.headers.get("Content-Length"))
        self.url = url

    def release(self) -> None:
        """Whatever of the answer was not read is not wanted."""
        if self._keep and self.content.is_eof() and not self._line.handler.should_close:
            self._connections.keep(self._line)
        else:
            self._line.handler.close()


class Connections:
    """To one container. A kept one is the last that was used, so that few stay open.

    `briefly` keeps those only over which one short exchange follows closely on another, where to open one would cost
    more than the job; and none until the container has been seen to leave one open that it could have closed.
    """

    def __init__(self, host: str, port: int, *, kept_s: float, connect_s: float, briefly: bool = False) -> None:
        self._host = host
        self._port = port
        self._kept_s = BRIEFLY_S if briefly else kept_s
        self._connect_s = connect_s
        self._briefly = briefly
        self._trusted: bool | None = None if briefly else True
        self._idle: list[_Line] = []
        self._sweep: asyncio.TimerHandle | None = None
        self._heads: dict[URL, str] = {}

    async def post(self, url: URL, headers: Iterable[tuple[str, str]], body: bytes, *, keep: bool) -> Exchange:
        """The answer to one request, which is sent once. `keep` uses a kept connection, and may keep it again.

        Raises:
            NotReached: nothing was sent.
            aiohttp.ClientError, HttpProcessingError: the connection was lost, or what came was not HTTP.
            ValueError: a header that HTTP cannot carry.
        """
        request = self._request(url, headers, body, keep=keep)
        line = self._kept() if keep else None
        if line is None:
            line = await self._open(url)
        handler = line.handler
        try:
            handler.set_response_params(read_until_eof=True, auto_decompress=False)
            transport = handler.transport
            if transport is None:
                raise aiohttp.ServerDisconnectedError
            line.since = time.monotonic()
            transport.write(request)
            while True:
                message, content = await handler.read()
                if not 100 <= message.code <= 199 or message.code == 101:
                    return Exchange(self, line, message, content, url=url, keep=keep)
        except BaseException as exc:
            if line.used and isinstance(exc, aiohttp.ClientConnectionError):
                self._distrust()
            handler.abort()
            raise

    def keep(self, line: _Line) -> None:
        """For the next request, if it is of use for that."""
        now = time.monotonic()
        short = now - line.since <= SHORT_S and now - line.opened_at <= OLD_S
        # One idle connection is enough to see whether the container leaves it open.
        useful = self._trusted or (self._trusted is None and not self._idle)
        if self._briefly and not (short and useful):
            line.handler.close()
            return
        line.since, line.used = now, True
        self._idle.append(line)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(self._kept_s, self._close_old)

    def close(self) -> None:
        """Of those that are kept; the others belong to who uses them."""
        idle, self._idle = self._idle, []
        for line in idle:
            line.handler.close()
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None

    def _kept(self) -> _Line | None:
        """One on which the container has been silent since, and which it has not closed: one that closes may say why
        first (408), which would be read as the answer to the next job."""
        oldest = time.monotonic() - self._kept_s
        while self._idle and self._trusted:
            line = self._idle.pop()
            if line.since >= oldest and _silent(line.handler):
                return line
            line.handler.close()
        return None

    def _close_old(self) -> None:
        oldest = time.monotonic() - self._kept_s
        old = [line for line in self._idle if line.since <= oldest]
        self._idle = self._idle[len(old) :]  # in the order of their last use
        if old and self._trusted is None:
            self._trusted = all(_silent(line.handler) for line in old)
        for line in old:
            line.handler.close()
        self._sweep = None
        if self._idle:
            self._sweep = asyncio.get_running_loop().call_later(self._kept_s, self._close_old)

    def _distrust(self) -> None:
        """A container that closes what could be used costs attempts."""
        if self._briefly:
            self._trusted = False

    async def _open(self, url: URL) -> _Line:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_s):
                _, handler = await loop.create_connection(lambda: ResponseHandler(loop), self._host, self._port)
        except TimeoutError as exc:
            raise NotReached(f"{url.host}:{url.port} was not reached in time") from exc
        except OSError as exc:
            raise NotReached(f"{url.host}:{url.port} was not reached") from exc
        return _Line(handler)

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


def _silent(handler: ResponseHandler) -> bool:
    """Asked of the system, because the loop may not have seen yet that it was closed."""
    transport = handler.transport
    if transport is None or transport.is_closing() or handler.should_close:
        return False
    watched = select.poll()
    watched.register(transport.get_extra_info("socket"), select.POLLIN)
    return not watched.poll(0)


def _length(value: str | None) -> int | None:
    return int(value) if value is not None and value.isdecimal() else None
