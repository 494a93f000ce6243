"""Answers of a container, byte by byte: whatever it says, each request ends, no fault is ours, and the sidecar goes
on."""

from __future__ import annotations

import asyncio
import gzip
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from api import answers
from broker.backends import codec
from broker.backends.files import open_blobs
from broker.backends.memory.catalog import MemoryCatalog
from broker.model import Record
from tests.fuzz.fuzzing import Complaints, damaged, fuzzed
from tests.unit.container import VERSION_ID, settings_for
from tests.unit.test_sidecar import LendingQueue, Rig, Store
from workers.sidecar import serve

HANG_S = 90.0
AT_ONCE = 6
RUN_TIMEOUT_S = 1.0
BOMB = gzip.compress(b"\x00" * 10_000_000)

STATUS_LINES = [
    "HTTP/1.1 200 OK", "HTTP/1.1 200 OK", "HTTP/1.1 200 OK", "HTTP/1.0 200 OK", "HTTP/1.1 201",
    "HTTP/1.1 204 No Content",
    "HTTP/1.1 302 Found", "HTTP/1.1 304 Not Modified", "HTTP/1.1 400 Bad", "HTTP/1.1 429 Busy", "HTTP/1.1 500 Oh",
    "HTTP/1.1 503 Busy", "HTTP/1.1 599 x", "HTTP/1.1 600 x", "HTTP/1.1 999 x", "HTTP/1.1 100 Continue",
    "HTTP/1.1 099 x",
    "HTTP/1.1 101 Switching Protocols", "HTTP/1.1 103 Early Hints", "HTTP/1.1 -1 x", "HTTP/1.1 2000 x", "HTTP/2 200 OK",
    "HTTP/3.7 200 OK", "ICY 200 OK", "200 OK", "", "\x00", "HTTP/1.1 200 \xff", "HTTP/1.1 200 " + "x" * 9000,
    "HTTP/1.1",
]  # fmt: skip
HEADERS = [
    "Content-Length: 4", "Content-Length: 0", "Content-Length: -1", "Content-Length: 99999999999999999999",
    "Content-Length: 4, 4", "Content-Length: x", "Transfer-Encoding: chunked", "Transfer-Encoding: gzip",
    "Transfer-Encoding: chunked, chunked", "Connection: close", "Connection: keep-alive", "Connection: upgrade",
    "Content-Encoding: gzip", "Content-Encoding: nope", "Content-Type: text/event-stream", "Content-Type: \xff",
    "Content-Type: application/json; charset=\x00", "Retry-After: 1", "Retry-After: -1", "Retry-After: 9" + "9" * 30,
    "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT", "Retry-After: \xb2", "Location: http://169.254.169.254/",
    "Location: //[",
    "Set-Cookie: a=b", "NVCF-STATUS: forged", "Server-Timing: x", "X: " + "v" * 9000, "X" * 9000 + ": v", ": v",
    "no colon",
    "X\x00: v", "X: \x00", "X: a\r\n folded", "\xe9: v", "X: \udce9", "Trailer: X", "Content-Range: bytes 0-3/4",
    "Date: x",
    "Upgrade: websocket", "Access-Control-Expose-Headers: \xff,,", "Content-Disposition: attachment; filename=\"\n\"",
]  # fmt: skip
BODIES = [
    b"", b"done", b"longer than told", b"\x00\xff", b"{", BOMB, BOMB[:-9], b"x" * 300_000,
    b"4\r\ndone\r\n0\r\n\r\n", b"4\r\ndone\r\n", b"4\r\ndo", b"-1\r\n", b"FFFFFFFFFFFFFFFFFF\r\nx",
    b"0\r\nA: b\r\n\r\n",
    b"4;" + b"e" * 9000 + b"\r\ndone\r\n0\r\n\r\n", b"4\ndone\n0\n\n", b"data: 1\n\n", b"id: \x00\ndata\n\ndata: 2\r\r",
    b"data: " + b"y" * 70_000, b"5\r\ndata:\r\n2\r\n\n\n\r\n0\r\n\r\n", b'{"error": 7}', b'{"error": "\\ud800"}',
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """What the container says to a first attempt, in what pieces, and whether it hangs up then. It answers any other
    as it should."""

    said: tuple[bytes, ...]
    closes: bool
    job: dict[str, Any]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lines = [draw(st.sampled_from(STATUS_LINES)), *draw(st.lists(st.sampled_from(HEADERS), max_size=4))]
    body = draw(st.sampled_from(BODIES))
    if draw(st.booleans()):
        lines.append(f"Content-Length: {len(body)}")
    end = draw(st.sampled_from(["\r\n", "\r\n", "\r\n", "\n"]))
    said = (end.join(lines) + end * 2).encode("latin-1", errors="replace") + body
    match draw(st.integers(0, 5)):
        case 0 | 1:
            said = draw(damaged(said))
        case 2:
            said = said[: draw(st.integers(0, min(400, len(said))))]
        case 3:
            said = b"HTTP/1.1 100 Continue\r\n\r\n" * draw(st.integers(1, 3)) + said
        case _:
            pass
    cut = draw(st.integers(0, min(300, len(said))))
    job: dict[str, Any] = draw(
        st.sampled_from(
            [{}, {}, {"passthrough": True}, {"streaming": True}, {"method": "HEAD", "target": "/x?y"}, {"target": "/x"}]
        )
    )
    closes = draw(st.integers(0, 15)) > 0
    return Case((said[:cut], said[cut:]), closes, job)


@dataclass
class Bench:
    rig: Rig
    saying: dict[str, Case] = field(default_factory=dict)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self.answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        headers = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:] if line)
        await reader.readexactly(int(headers.get("content-length", 0)))
        case = self.saying.pop(headers.get("nvcf-reqid", ""), None)
        if case is None:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone")
            await writer.drain()
            return True
        for part in case.said:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        if not case.closes:
            await reader.read(1)
        return False

    async def ended(self, case: Case) -> Record:
        """How the request ends to whose first attempt the container says this."""
        request_id = str(uuid.uuid4())
        self.saying[request_id] = case
        record = await self.rig.ended(await self.rig.submit(id=request_id, **case.job))
        self.saying.pop(request_id, None)
        return record


@pytest.fixture(scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    folder = tmp_path_factory.mktemp("sidecar")
    (folder / "scratch").mkdir()
    made: list[Bench] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await made[0].serve(reader, writer)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    settings = settings_for(
        folder,
        server.sockets[0].getsockname()[1],
        scratch_dir=str(folder / "scratch"),
        max_request_concurrency=AT_ONCE,
        run_timeout_s=RUN_TIMEOUT_S,
        max_response_bytes=100_000,
        max_artifact_bytes=1024 * 1024,
        max_retry_after_s=1,
        health_interval_s=1,
    )
    async with open_blobs("file://", settings) as blobs:
        queue = LendingQueue()
        await queue.declare(VERSION_ID)
        rig = Rig(cast("Any", None), queue, Store(settings), MemoryCatalog(), blobs, settings)
        made.append(Bench(rig))
        working = asyncio.create_task(serve(rig.broker, settings, rig.stop))
        yield made[0]
        rig.stop.set()
        async with asyncio.timeout(HANG_S):
            await working
    server.close()
    await server.wait_closed()


@fuzzed(40)
@given(tried=st.lists(cases(), min_size=1, max_size=AT_ONCE))
async def test_whatever_a_container_answers_its_request_ends_and_the_next_one_runs(
    bench: Bench, complaints: Complaints, tried: list[Case]
) -> None:
    async with asyncio.timeout(HANG_S):
        records = await asyncio.gather(*(bench.ended(case) for case in tried))
        good = await bench.ended(Case((b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n", b"good"), True, {}))
    for record in (*records, good):
        assert record.state.terminal
        if record.outcome is not None:
            assert codec.unpack_outcome(codec.pack_outcome(record.outcome)) == record.outcome
        said = answers.answer(record, status_url="/", download_url=lambda *_: "http://h/x")
        assert 200 <= said.status <= 599
        event(f"{record.state} {said.status}, {record.attempt} attempts")
        assert not any(mark in name + value for name, value in said.headers.items() for mark in "\r\n\x00")
    assert good.outcome is not None
    assert good.outcome.body == b"good"
    complaints.none()
