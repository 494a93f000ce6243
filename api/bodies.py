"""Request bodies: read with a size, a time and a share of this process's memory or disk as limits."""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from aiohttp import ClientError, StreamReader, web
from aiohttp.http_exceptions import HttpProcessingError

from api.problems import BodyTooSlow
from broker.errors import BadRequest, Overloaded, PayloadTooLarge
from broker.invocations import BodyFile
from broker.settings import ApiSettings

# How fast a body has to come that takes longer than `body_timeout_s`.
SLOWEST_BYTES_PER_S = 16 * 1024
_RETRY_S = 1.0
_WRITE_BYTES = 1024 * 1024


class Body(Protocol):
    """One that has arrived. Close it, once, when it is not needed any more."""

    @property
    def body(self) -> bytes | BodyFile: ...

    def close(self) -> None: ...


class Bodies:
    """Reads bodies. Those that are held at once are `inflight_bodies` at most, an empty one counted as any, and have
    `inflight_body_bytes` together, and on disk `spool_bytes`."""

    def __init__(self, settings: ApiSettings) -> None:
        self._most = settings.inflight_bodies
        self._most_bytes = settings.inflight_body_bytes
        self._max_bytes = settings.max_body_bytes
        self._timeout_s = settings.body_timeout_s
        self._free = settings.inflight_bodies
        self._free_bytes = settings.inflight_body_bytes
        self._inline_bytes = settings.inline_body_bytes
        self._max_streamed_bytes = settings.max_streamed_body_bytes
        self._spool_dir = settings.spool_dir or tempfile.gettempdir()
        self._free_spool_bytes = settings.spool_bytes

    @property
    def held(self) -> int:
        """How many are in memory now."""
        return self._most - self._free

    @property
    def held_bytes(self) -> int:
        return self._most_bytes - self._free_bytes

    async def read(self, request: web.Request) -> Held:
        """The whole body; close what is returned once the body is not needed any more.

        Raises:
            PayloadTooLarge: at once where the length is declared.
            Overloaded: other bodies fill the memory.
            BodyTooSlow, BadRequest: it did not come, or not whole.
        """
        content = request.content
        came = content.is_eof()  # with its headers: the common case, and no timer for it
        size_bytes = content.total_bytes if came else request.content_length or 0
        if size_bytes > self._max_bytes:
            raise self._too_large()
        held = Held(self)
        try:
            held.take(size_bytes)
            held.body = content.read_nowait() if came else await self._receive(content, held)
        except BaseException:
            held.close()
            raise
        return held

    async def receive(self, request: web.Request) -> Body:
        """The whole body, of up to `max_streamed_body_bytes`: in memory if a message can carry it, else on disk.

        Raises:
            PayloadTooLarge: at once where the length is declared.
            Overloaded: other bodies fill the memory or the disk.
            BodyTooSlow, BadRequest: it did not come, or not whole.
        """
        declared_bytes = request.content_length or 0
        if declared_bytes > self._max_streamed_bytes:
            raise self._too_large_to_stream()
        if declared_bytes > self._free_spool_bytes:
            raise self._disk_full()
        held = Held(self)
        chunks = self._chunks(request)
        received = bytearray()
        try:
            async for chunk in chunks:
                received += chunk
                held.take(len(chunk))
                if len(received) > self._inline_bytes:
                    held.take(_WRITE_BYTES)
                    spooled = await self._spool(received, chunks)
                    held.close()
                    return spooled
        except BaseException:
            held.close()
            raise
        held.body = bytes(received)
        return held

    async def _spool(self, begun: bytearray, chunks: AsyncIterator[bytes]) -> Spooled:
        """The rest of a body, into a file; little more than `_WRITE_BYTES` are in memory at any time. What was only
        announced takes no part of the disk: somebody could announce all of it, and take his time."""
        spooled = Spooled(self)
        try:
            with _disk_faults():
                spooled.create(self._spool_dir)
            digest, size_bytes, pending = hashlib.sha256(), 0, begun
            while pending:
                size_bytes += len(pending)
                if size_bytes > self._max_streamed_bytes:
                    raise self._too_large_to_stream()
                spooled.take(size_bytes - spooled.taken_bytes)
                digest.update(pending)
                with _disk_faults():
                    await asyncio.to_thread(_append, spooled.path, pending)
                pending = bytearray()
                async for chunk in chunks:
                    pending += chunk
                    if len(pending) >= _WRITE_BYTES:
                        break
            spooled.sha256 = digest.digest()
        except BaseException:
            spooled.close()
            raise
        return spooled

    async def _chunks(self, request: web.Request) -> AsyncIterator[bytes]:
        """The body as it comes; one that takes long has to keep a pace."""
        loop = asyncio.get_running_loop()
        until, received_bytes = loop.time() + self._timeout_s, 0
        while True:
            try:
                async with asyncio.timeout_at(until + received_bytes / SLOWEST_BYTES_PER_S):
                    chunk = await request.content.readany()
            except TimeoutError:
                raise BodyTooSlow(
                    f"the body did not arrive within {self._timeout_s:g} s and a second for every "
                    f"{SLOWEST_BYTES_PER_S} bytes"
                ) from None
            except (ClientError, HttpProcessingError, ConnectionError) as exc:
                raise BadRequest("failed to read request body: it ended early or is not well-formed") from exc
            if not chunk:
                return
            received_bytes += len(chunk)
            yield chunk

    async def _receive(self, content: StreamReader, held: Held) -> bytes:
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

    def _too_large_to_stream(self) -> PayloadTooLarge:
        limit_bytes = self._max_streamed_bytes
        return PayloadTooLarge(f"the body is larger than {limit_bytes} bytes", limit_bytes=limit_bytes)

    def _disk_full(self) -> Overloaded:
        return Overloaded("this server has as many request bodies on its disk as it may", retry_after_s=_RETRY_S)

    def reserve_disk(self, size_bytes: int) -> None:
        if size_bytes > self._free_spool_bytes:
            raise self._disk_full()
        self._free_spool_bytes -= size_bytes

    def free_disk(self, size_bytes: int) -> None:
        self._free_spool_bytes += size_bytes

    def enter(self) -> None:
        if not self._free:
            raise Overloaded("this server has as many requests to accept as it may", retry_after_s=_RETRY_S)
        self._free -= 1

    def leave(self) -> None:
        self._free += 1

    def reserve(self, size_bytes: int) -> None:
        if size_bytes > self._free_bytes:
            raise Overloaded("this server holds as many request bodies as it may", retry_after_s=_RETRY_S)
        self._free_bytes -= size_bytes

    def free(self, size_bytes: int) -> None:
        self._free_bytes += size_bytes


class Held:
    """A body and its share of the memory; `close` gives the share back, once. Making one raises Overloaded."""

    __slots__ = ("_bodies", "_closed", "body", "taken_bytes")

    def __init__(self, bodies: Bodies) -> None:
        bodies.enter()
        self._bodies = bodies
        self._closed = False
        self.body = b""
        self.taken_bytes = 0

    def take(self, more_bytes: int) -> None:
        if more_bytes > 0:
            self._bodies.reserve(more_bytes)
            self.taken_bytes += more_bytes

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._bodies.leave()
        self._bodies.free(self.taken_bytes)
        self.taken_bytes = 0
        self.body = b""


class Spooled:
    """A body in a file, and its share of the disk; `close` removes the one and gives the other back, once."""

    __slots__ = ("_bodies", "path", "sha256", "taken_bytes")

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.path = Path()
        self.sha256 = b""
        self.taken_bytes = 0

    @property
    def body(self) -> BodyFile:
        return BodyFile(path=self.path, sha256=self.sha256)

    def create(self, folder: str) -> None:
        """Make the file, for this user alone. Raises OSError."""
        descriptor, path = tempfile.mkstemp(prefix="fnqueue-body-", dir=folder)
        os.close(descriptor)
        self.path = Path(path)

    def take(self, more_bytes: int) -> None:
        if more_bytes > 0:
            self._bodies.reserve_disk(more_bytes)
            self.taken_bytes += more_bytes

    def close(self) -> None:
        if self.path.name:
            self.path.unlink(missing_ok=True)
        self._bodies.free_disk(self.taken_bytes)
        self.taken_bytes = 0


def _append(path: Path, content: bytearray) -> None:
    """Not to a file that is gone: whoever left meanwhile has removed it, and nobody would do so again."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


@contextmanager
def _disk_faults() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise Overloaded("this server cannot write request bodies to its disk", retry_after_s=_RETRY_S) from exc
