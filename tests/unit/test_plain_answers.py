"""Answers of containers that are read without aiohttp's parser: they mean what it makes of them, and all others are
left to it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from tests.unit.container import a_job, raw_container, settings_for
from workers.connections import Connections, Plain, plain_head
from workers.inference import AttemptFailed, ContainerLost, Inference

PLAIN = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n",
    b"HTTP/1.1 500 Internal Server Error\r\ncontent-length:2\r\nX: a b\r\nX:  c\r\n\r\n",
    b"HTTP/1.1 404 \r\nContent-Length: 02\r\nEmpty:\r\n\r\n".replace(b"404 ", b"404 Not Found"),
    b"HTTP/1.1 200 OK\r\nConnection: Keep-Alive\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n",
]
OTHERS = {
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n",
    "informational": b"HTTP/1.1 103 Early Hints\r\nContent-Length: 2\r\n\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\n",
    "status of four digits": b"HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\n",
    "no length": b"HTTP/1.1 200 OK\r\nX: y\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n",
    "signed length": b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\n",
    "length of two parts": b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\n",
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "chunked with a length": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
    "upgrade": b"HTTP/1.1 200 OK\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n",
    "names a header": b"HTTP/1.1 200 OK\r\nConnection: close, X\r\nContent-Length: 2\r\n\r\n",
    "folded": b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 2\r\n\r\n",
    "bare line feed": b"HTTP/1.1 200 OK\r\nX: a\nContent-Length: 2\r\n\r\n",
    "bare return": b"HTTP/1.1 200 OK\r\nX: a\rb\r\nContent-Length: 2\r\n\r\n",
    "space in a name": b"HTTP/1.1 200 OK\r\nX : a\r\nContent-Length: 2\r\n\r\n",
    "space behind a value": b"HTTP/1.1 200 OK\r\nContent-Length: 2 \r\n\r\n",
    "tab": b"HTTP/1.1 200 OK\r\nX:\ta\r\nContent-Length: 2\r\n\r\n",
    "not ASCII": b"HTTP/1.1 200 OK\r\nX: \xe4\r\nContent-Length: 2\r\n\r\n",
    "no colon": b"HTTP/1.1 200 OK\r\nX\r\nContent-Length: 2\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 64 + b"Content-Length: 2\r\n\r\n",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
}


async def read(reply: bytes, *, plain_bytes: int) -> tuple[object, ...]:
    """What is made of it, at last the error."""
    async with raw_container(reply) as port:
        connections = Connections("127.0.0.1", port, kept_s=1, connect_s=30)
        url = URL(f"http://127.0.0.1:{port}/infer")
        try:
            answer = await connections.post(url, [], b"{}", keep=False, plain_bytes=plain_bytes)
            if isinstance(answer, Plain):
                return (answer.status, answer.headers, answer.body)
            head = (answer.status, list(answer.headers.items()))
            try:
                return (*head, await answer.content.read())
            except aiohttp.ClientError as exc:
                return (*head, type(exc))
            finally:
                answer.release()
        except (aiohttp.ClientError, HttpProcessingError) as exc:
            return (type(exc),)


@pytest.mark.parametrize("head", PLAIN, ids=range(len(PLAIN)))
async def test_a_plain_answer_is_what_aiohttp_makes_of_it(head: bytes) -> None:
    assert plain_head(head) is not None
    for body in (b"ok", b"ok, and more"):
        assert await read(head + body, plain_bytes=2) == await read(head + body, plain_bytes=0)


@pytest.mark.parametrize("head", OTHERS.values(), ids=OTHERS)
async def test_any_other_answer_is_aiohttps_to_understand(head: bytes) -> None:
    assert plain_head(head) is None
    assert await read(head + b"ok", plain_bytes=2) == await read(head + b"ok", plain_bytes=0)


async def served(tmp_path: Path, *pieces: bytes) -> tuple[int, bytes]:
    """What is made of an answer that comes in these pieces."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with Inference(settings_for(tmp_path, port)) as inference:
            got = await inference.infer(a_job(), (), body=b"{}", spill=lambda: tmp_path / "spill")
            return got.status, got.body


@pytest.mark.parametrize("pieces", [1, 7, 40])
async def test_an_answer_may_come_in_any_pieces(tmp_path: Path, pieces: int) -> None:
    reply = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 50\r\n\r\n" + b"x" * 50
    cut = [reply[at : at + pieces] for at in range(0, len(reply), pieces)]
    assert await served(tmp_path, *cut) == (200, b"x" * 50)


async def test_a_head_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AttemptFailed):
        await served(tmp_path, b"HTTP/1.1 200 OK\r\nX: ", *[b"y" * 1000] * 20)


async def test_a_body_that_ends_too_early_loses_the_container(tmp_path: Path) -> None:
    with pytest.raises(ContainerLost):
        await served(tmp_path, b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok")
