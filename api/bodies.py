"""Request bodies: read with a size, a time and a share of this process's memory as limits."""

from __future__ import annotations

import asyncio

from aiohttp import ClientError, web
from aiohttp.http_exceptions import HttpProcessingError

from api.problems import BodyTooSlow
from broker.errors import BadRequest, Overloaded, PayloadTooLarge
from broker.settings import ApiSettings

_RETRY_S = 1.0


class Bodies:
    """Reads bodies. All that are held at once have `inflight_body_bytes` together."""

    def __init__(self, settings: ApiSettings) -> None:
        self._max_bytes = settings.max_body_bytes
        self._timeout_s = settings.body_timeout_s
        self._free_bytes = settings.inflight_body_bytes

    async def read(self, request: web.Request) -> Held:
        """The whole body; close what is returned once the body is not needed any more.

        Raises:
            PayloadTooLarge: at once where the length is declared.
            Overloaded: other bodies fill the memory.
            BodyTooSlow, BadRequest: it did not come, or not whole.
        """
        declared_bytes = request.content_length or 0
        if declared_bytes > self._max_bytes:
            raise self._too_large()
        held = Held(self)
        try:
            held.take(declared_bytes)
            held.body = await self._receive(request, held)
        except BaseException:
            held.close()
            raise
        return held

    async def _receive(self, request: web.Request, held: Held) -> bytes:
        content = request.content
        if content.is_eof():  # it came with its headers: the common case, and no timer for it
            body = content.read_nowait()
            self._count(held, len(body))
            return body
        received = bytearray()
        try:
            async with asyncio.timeout(self._timeout_s):
                while chunk := await content.readany():
                    received += chunk
                    self._count(held, len(received))
        except TimeoutError:
            raise BodyTooSlow(f"the body did not arrive within {self._timeout_s:g} s") from None
        except (ClientError, HttpProcessingError, ConnectionError) as exc:
            raise BadRequest("failed to read request body: it ended early or is not well-formed") from exc
        return bytes(received)

    def _count(self, held: Held, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise self._too_large()
        held.take(size_bytes - held.taken_bytes)

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"the body is larger than {self._max_bytes} bytes; upload large inputs as assets (POST /v2/nvcf/assets) "
            "and name them in NVCF-INPUT-ASSET-REFERENCES",
            limit_bytes=self._max_bytes,
        )

    def reserve(self, size_bytes: int) -> None:
        if size_bytes > self._free_bytes:
            raise Overloaded("this server holds as many request bodies as it may", retry_after_s=_RETRY_S)
        self._free_bytes -= size_bytes

    def free(self, size_bytes: int) -> None:
        self._free_bytes += size_bytes


class Held:
    """A body and its share of the memory; `close` gives the share back, once."""

    __slots__ = ("_bodies", "body", "taken_bytes")

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.body = b""
        self.taken_bytes = 0

    def take(self, more_bytes: int) -> None:
        if more_bytes > 0:
            self._bodies.reserve(more_bytes)
            self.taken_bytes += more_bytes

    def close(self) -> None:
        self._bodies.free(self.taken_bytes)
        self.taken_bytes = 0
        self.body = b""
