"""Bodies that are small on the way and large where they are read, or never end (field/security.md)."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest

from tests.unit.test_server import FUNCTION, INVOKE, NVCF, VERSION, House, opened

MIB = 1024 * 1024
UNPACKED_BYTES = 64 * MIB
# Routes whose bodies are read as JSON, by who parses them.
PARSED = [
    ("POST", f"{NVCF}/functions"),
    ("POST", f"{NVCF}/exec/functions/{FUNCTION}"),
    ("POST", f"{NVCF}/assets"),
    ("PUT", f"{NVCF}/secrets/functions/{FUNCTION}/versions/{VERSION}"),
    ("POST", "/v1/keys"),
]


@pytest.fixture(scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    paces: dict[str, Any] = {"account_calls_per_s": 0, "function_calls_per_s": 0}
    async with opened(tmp_path_factory.mktemp("house"), body_timeout_s=1.0, **paces) as found:
        yield found


async def status_of(house: House, method: str, path: str, body: object, **headers: str) -> int:
    sent = {"Content-Type": "application/json", **headers}
    async with asyncio.timeout(60), house.client.request(method, path, data=body, headers=sent) as response:
        assert len(await response.read()) < 4096
        return response.status


@pytest.mark.parametrize(("method", "path"), PARSED)
@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(lambda: b"[" * 10**6, id="nested lists"),
        pytest.param(lambda: b'{"name":' * 10**5 + b"1", id="nested objects"),
        pytest.param(lambda: b'{"name": ' + b"9" * 10**6 + b"}", id="a number of a million digits"),
        pytest.param(lambda: b'{"name": 1e999999999}', id="a number beyond all"),
        pytest.param(lambda: b'{"name": "' + b"\\u0000" * 10**5 + b'"}', id="a hundred thousand nulls"),
        pytest.param(lambda: json.dumps({f"k{n}": n for n in range(10**5)}).encode(), id="a hundred thousand members"),
    ],
)
async def test_what_is_costly_to_parse_is_refused(
    house: House, method: str, path: str, bomb: Callable[[], bytes]
) -> None:
    assert await status_of(house, method, path, bomb()) == 400


@pytest.mark.parametrize(("method", "path"), PARSED)
@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_nothing_is_unpacked_to_be_parsed(house: House, method: str, path: str, encoding: str) -> None:
    pack = gzip.compress if encoding == "gzip" else zlib.compress
    packed = pack(b'{"name": "' + bytes(UNPACKED_BYTES))
    assert await status_of(house, method, path, packed, **{"Content-Encoding": encoding}) == 400


async def test_what_is_for_the_function_goes_on_packed(house: House) -> None:
    packed = gzip.compress(bytes(UNPACKED_BYTES))
    sent = {"Content-Encoding": "gzip", "Prefer": "respond-async"}
    assert await status_of(house, "POST", INVOKE, packed, **sent) == 202
    delivery = await house.broker.queue.take(VERSION)
    assert delivery is not None
    assert delivery.job.body == packed
    assert ("Content-Encoding", "gzip") in delivery.job.headers
    await delivery.ack()


@pytest.mark.parametrize(("method", "path"), [PARSED[0], ("POST", INVOKE)])
@pytest.mark.parametrize(
    "piece",
    [pytest.param(b"10000\r\n" + b"[" * 65536 + b"\r\n", id="large"), pytest.param(b"1\r\n[\r\n", id="one byte")],
)
async def test_a_body_without_an_end_is_cut_off(house: House, method: str, path: str, piece: bytes) -> None:
    reader, writer = await house.connect(f"{method} {path} HTTP/1.1", "Transfer-Encoding: chunked")
    sent_bytes, burst = 0, piece * (65536 // len(piece) + 1)
    answering = asyncio.create_task(reader.readline())
    async with asyncio.timeout(60):
        while not answering.done():
            writer.write(burst)
            sent_bytes += len(burst)
            with suppress(ConnectionError):
                await writer.drain()
            await asyncio.sleep(0)
    writer.close()
    with suppress(ConnectionError):
        status = int((await answering).split()[1])
        assert status in (408, 413)
    assert sent_bytes < 256 * MIB
