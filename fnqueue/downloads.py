"""Large results: from a signed URL into a file, gone on with where a connection broke."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import IO

from fnqueue.errors import ConnectionFailed
from fnqueue.retries import Failures
from fnqueue.transport import Call, Stream, Transport, limited

Received = Callable[[int, int], None]


async def fetch(
    transport: Transport, url: str, sink: IO[bytes], *, give_up_at: float, received: Received
) -> Mapping[str, str]:
    """The headers of what was fetched. `received` is told how many bytes are there, and of how many, 0 where the server
    does not say. Raises as `Transport.call`; Forbidden once the URL has expired."""
    tag, failures = "", Failures()
    while True:
        # If-Range: what was replaced meanwhile begins anew, and is not glued to a beginning of something else.
        behind = {"Range": f"bytes={sink.tell()}-", "If-Range": tag} if tag and sink.tell() else {}
        async with transport.answered(Call(method="GET", path=url, headers=behind), give_up_at=give_up_at) as stream:
            if stream.status != 206:
                sink.seek(0)
                sink.truncate()
            tag = stream.headers.get("etag", "")
            start = sink.tell()
            try:
                async with limited(give_up_at):
                    await _copy(stream, sink, received)
                return stream.headers
            except ConnectionFailed as exc:
                failures = (Failures() if sink.tell() > start else failures).one_more(transport.now())
                error = exc
        await transport.wait_after(error, failures, give_up_at=give_up_at)


async def _copy(stream: Stream, sink: IO[bytes], received: Received) -> None:
    length = stream.headers.get("content-length", "")
    size_bytes = sink.tell() + int(length) if length.isdecimal() else 0
    async for chunk in stream.chunks():
        await asyncio.to_thread(sink.write, chunk)
        received(sink.tell(), size_bytes)
