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


class Exchange:
    """An answer whose head is there; `content` is its body as it comes. To be ended with `release`."""

    __slots__ = ("_connections", "_handler", "_keep", "content", "content_length", "headers", "status", "url")

    def __init__(
        self,
        connections: Connections,
        handler: ResponseHandler,
        message: RawResponseMessage,
        content: aiohttp.StreamReader,
        *,
        url: URL,
        keep: bool,
    ) -> None:
        self._connections = connections
        self._handler = handler
        self._keep = keep
        self.status = message.code
        self.headers: CIMultiDictProxy[str] = message.headers
        self.content = content
        self.content_length = _length(message.headers.get("Content-Length"))
        self.url = url

    def release(self) -> None:
        """Whatever of the answer was not read is not wanted."""
        if self._keep and self.content.is_eof() and not self._handler.should_close:
            self._connections.keep(self._handler)
        else:
            self._handler.close()


class Connections:
    """To one container. A kept one is the last that was used, so that few stay open."""

    def __init__(self, host: str, port: int, *, kept_s: float, connect_s: float) -> None:
        self._host = host
        self._port = port
        self._kept_s = kept_s
        self._connect_s = connect_s
        self._idle: list[tuple[ResponseHandler, float]] = []
        self._sweep: asyncio.TimerHandle | None = None
        self._heads: dict[URL, str] = {}

    async def post(self, url: URL, headers: Iterable[tuple[str, str]], body: bytes, *, keep: bool) -> Exchange:
        """The answer to one request, which is sent once. `keep` uses a kept connection, and keeps it again.

        Raises:
            NotReached: nothing was sent.
            aiohttp.ClientError, HttpProcessingError: the connection was lost, or what came was not HTTP.
            ValueError: a header that HTTP cannot carry.
        """
        request = self._request(url, headers, body, keep=keep)
        handler = self._kept() if keep else None
        if handler is None:  # not `or`: one with nothing in it counts as false
            handler = await self._open(url)
        try:
            handler.set_response_params(read_until_eof=True, auto_decompress=False)
            transport = handler.transport
            if transport is None:
                raise aiohttp.ServerDisconnectedError
            transport.write(request)
            while True:
                message, content = await handler.read()
                if not 100 <= message.code <= 199 or message.code == 101:
                    return Exchange(self, handler, message, content, url=url, keep=keep)
        except BaseException:
            handler.abort()
            raise

    def keep(self, handler: ResponseHandler) -> None:
        self._idle.append((handler, time.monotonic()))
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(self._kept_s, self._close_old)

    def close(self) -> None:
        """Of those that are kept; the others belong to who uses them."""
        idle, self._idle = self._idle, []
        for handler, _ in idle:
            handler.close()
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None

    def _kept(self) -> ResponseHandler | None:
        """One on which the container has been silent since, and which it has not closed: one that closes may say why
        first (408), which would be read as the answer to the next job."""
        oldest = time.monotonic() - self._kept_s
        while self._idle:
            handler, since = self._idle.pop()
            if since >= oldest and _silent(handler):
                return handler
            handler.close()
        return None

    def _close_old(self) -> None:
        oldest = time.monotonic() - self._kept_s
        old = [handler for handler, since in self._idle if since < oldest]
        self._idle = self._idle[len(old) :]  # in the order of their last use
        for handler in old:
            handler.close()
        self._sweep = None
        if self._idle:
            self._sweep = asyncio.get_running_loop().call_later(self._kept_s, self._close_old)

    async def _open(self, url: URL) -> ResponseHandler:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_s):
                _, handler = await loop.create_connection(lambda: ResponseHandler(loop), self._host, self._port)
        except TimeoutError as exc:
            raise NotReached(f"{url.host}:{url.port} was not reached in time") from exc
        except OSError as exc:
            raise NotReached(f"{url.host}:{url.port} was not reached") from exc
        return handler

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
