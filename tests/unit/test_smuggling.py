"""Requests that a proxy and this server might take for different ones, as bytes (field/security.md)."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.unit.container import FUNCTION_ID, VERSION_ID
from tests.unit.test_server import INVOKE, KEY, House, opened

HANG_S = 60.0
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
# What somebody would smuggle in: its answer could not be told from one to whoever comes next.
SMUGGLED = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with opened(tmp_path_factory.mktemp("house"), queue_limit=100) as found:
        yield found


def head(path: str = INVOKE, *, version: str = "1.1", close: bool = False) -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: x", f"Authorization: Bearer {KEY}", "Prefer: respond-async"]
    if close:
        lines.append("Connection: close")
    return "".join(f"{line}\r\n" for line in lines).encode()


async def talk(house: House, sent: bytes) -> list[int]:
    """The statuses of all answers, once the server has closed. Fails when it does not."""
    address = urlsplit(house.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(sent)
        async with asyncio.timeout(HANG_S):
            answer = await reader.read()
    except ConnectionResetError:
        return []
    finally:
        writer.close()
    return [int(status) for status in re.findall(rb"HTTP/1\.\d (\d{3})", answer)]


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(b"Content-Length: 13\r\n" + CHUNKED + b"0\r\n\r\n", id="CL.TE"),
        pytest.param(b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n5c\r\n", id="TE.CL"),
        pytest.param(b"Content-Length: 2, 2\r\n\r\n{}", id="two lengths in one line"),
        pytest.param(b"Content-Length\t: 2\r\n\r\n{}", id="blank before the colon"),
        pytest.param(b"Content-Length: \r\n\r\n{}", id="empty length"),
        pytest.param(b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", id="chunked twice"),
        pytest.param(b"Transfer-Encoding: chunked\r\n" + CHUNKED + b"0\r\n\r\n", id="two codings in two lines"),
        pytest.param(b"Transfer-Encoding: chunked, identity\r\n\r\n2\r\n{}\r\n0\r\n\r\n", id="not chunked last"),
        pytest.param(b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", id="a coding that stays"),
        pytest.param(b"Transfer-Encoding:\x0bchunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", id="a vertical tab"),
        pytest.param(b'Transfer-Encoding: "chunked"\r\n\r\n2\r\n{}\r\n0\r\n\r\n', id="quoted"),
        pytest.param(b"X-A: a\r\nTransfer-Encoding\r\n : chunked\r\n\r\n0\r\n\r\n", id="folded name"),
        pytest.param(b"X-A: a\r\n\tb\r\nContent-Length: 2\r\n\r\n{}", id="folded value"),
        pytest.param(b"X-A: a\r\r\nContent-Length: 2\r\n\r\n{}", id="two carriage returns"),
        pytest.param(b"\rX-A: a\r\nContent-Length: 2\r\n\r\n{}", id="a carriage return first"),
        pytest.param(b"X-A: a\nContent-Length: 2\r\n\r\n{}", id="a bare line feed"),
        pytest.param(b"X-A\x00: a\r\nContent-Length: 2\r\n\r\n{}", id="a null in a name"),
        pytest.param(b"X-A: a\x7f\r\nContent-Length: 2\r\n\r\n{}", id="a control character in a value"),
        pytest.param(CHUNKED + b"2;a=\n1\r\n{}\r\n0\r\n\r\n", id="a line feed in a chunk extension"),
        pytest.param(CHUNKED + b"2\n{}\n0\n\n", id="chunks that end in line feeds"),
        pytest.param(CHUNKED + b"2\r\n{}0\r\n\r\n", id="a chunk without its end"),
        pytest.param(CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n", id="a chunk size with a prefix"),
        pytest.param(CHUNKED + b" 2\r\n{}\r\n0\r\n\r\n", id="a blank before a chunk size"),
        pytest.param(CHUNKED + b"10000000000000002\r\n{}\r\n0\r\n\r\n", id="a chunk size of 17 digits"),
        pytest.param(CHUNKED + b"2\r\n{}\r\n0\r\nContent-Length: 5\r\n\r\n", id="a length in the trailer"),
    ],
)
async def test_what_two_servers_could_read_differently_is_refused_and_ends_the_connection(
    house: House, rest: bytes
) -> None:
    before = await house.queued()
    statuses = await talk(house, head() + rest + SMUGGLED)
    assert statuses == [400]
    assert await house.queued() == before


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(b"Content-Length: 2\r\n\r\n{}", id="a length"),
        pytest.param(b"Transfer-Encoding: CHUNKED\r\n\r\n2\r\n{}\r\n0\r\n\r\n", id="chunks, in capitals"),
        pytest.param(CHUNKED + b"2;a=1;b\r\n{}\r\n0;c\r\n\r\n", id="chunk extensions"),
        pytest.param(b"Content_Length: 90\r\nContent-Length: 2\r\n\r\n{}", id="an underscore"),
        pytest.param(CHUNKED + b"1\r\n{\r\n" + b"1\r\n \r\n" * 5_000 + b"1\r\n}\r\n0\r\n\r\n", id="chunks of one byte"),
    ],
)
async def test_what_has_one_meaning_only_is_one_request(house: House, rest: bytes) -> None:
    assert await talk(house, head(close=True) + rest) == [202]
    delivery = await house.broker.queue.take("65721e80-9b32-4396-9bec-8c08256297cf")
    assert delivery is not None
    assert (delivery.job.body[:1], delivery.job.body[-1:]) == (b"{", b"}")
    await delivery.ack()


@pytest.mark.parametrize("framing", [b"Content-Length: 2\r\n\r\n{}", CHUNKED + b"2\r\n{}\r\n0\r\n\r\n"])
async def test_an_old_client_gets_one_answer_and_no_second_request_is_read(house: House, framing: bytes) -> None:
    sent = head(version="1.0") + b"Connection: keep-alive\r\n" + framing
    assert await talk(house, sent + SMUGGLED) == [202]


async def test_a_host_is_given_once_and_a_target_names_no_other_server(house: House) -> None:
    """An absolute target wins over the Host, and is looked for here."""
    for line, status in (
        (b"GET /health HTTP/1.1\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n", 400),
        (b"GET http://169.254.169.254/latest HTTP/1.1\r\nHost: x\r\n", 401),
        (b"GET http://169.254.169.254/health HTTP/1.1\r\nHost: x\r\n", 200),
        (b"CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: x\r\n", 401),
    ):
        assert await talk(house, line + b"Connection: close\r\n\r\n") == [status], line


@pytest.mark.parametrize("command", ["api", "sidecar"])
def test_no_process_starts_with_the_parser_that_is_not_strict(tmp_path: Path, command: str) -> None:
    settings = {
        "FNQUEUE_QUEUE_URL": "amqp://127.0.0.1:1",
        "FNQUEUE_STORE_URL": "redis://127.0.0.1:1",
        "FNQUEUE_BLOBS_URL": f"file://{tmp_path}",
        "FNQUEUE_SECRET_KEY": "s" * 32,
        "FNQUEUE_FUNCTION_ID": FUNCTION_ID,
        "FNQUEUE_FUNCTION_VERSION_ID": VERSION_ID,
        "FNQUEUE_PORT": "0",
    }
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fnqueue", command],
        env={**os.environ, **settings, "AIOHTTP_NO_EXTENSIONS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "aiohttp came without its HTTP parser in C" in done.stderr
