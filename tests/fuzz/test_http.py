"""Bytes to the front end, over sockets: whatever comes, each answer is HTTP, none is a fault of ours, and the next
client is served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.app import operations
from api.front import Front
from broker.model import Outcome, RequestState
from tests.eventually import eventually
from tests.fuzz.fuzzing import Complaints, damaged, fuzzed, within
from tests.unit.test_server import FUNCTION, INVOKE, KEY, VERSION, House, opened

# What a test waits for at most; nothing depends on how fast anything is.
HANG_S = 60.0
# How long a server may say nothing before a client that has sent all is taken to have heard all.
QUIET_S = 0.02
AT_ONCE = 6

PATHS = sorted(
    {
        re.sub(r"\{(\w+)[^}]*\}", lambda found: VERSION if "version" in found[1] else FUNCTION, operation.path)
        for operation in operations(cast("Front", None))
    }
    | {INVOKE, "/", "*", "/metrics", "/v2/orgs/o/nvcf/functions", "/blobs/x?sig=1"}
)
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PRI", "get", "G T", "", "A" * 300]
VERSIONS = [
    "HTTP/1.1",
    "HTTP/1.1",
    "HTTP/1.1",
    "HTTP/1.0",
    "HTTP/2.0",
    "HTTP/0.9",
    "HTTP/11",
    "HTTP/1.",
    "http/1.1",
    "",
]
OF_HTTP = [
    "Content-Length: 2", "Content-Length: 0", "Content-Length: -1", "Content-Length: +2", "Content-Length: 0x2",
    "Content-Length: 99999999999999999999", "Content-Length: 2, 2", "Content-Length : 2", "content-length:2",
    "Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: chunked, identity",
    "Transfer-Encoding: xchunked", "Transfer-Encoding:\tchunked", "Transfer-Encoding: chunked\r\n folded",
    "Expect: 100-continue", "Expect: 200-ok", "Connection: close", "Connection: keep-alive", "Connection: upgrade",
    "Upgrade: websocket", "Upgrade: h2c", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: x", "Host: other", "Host: a:b", "Host: \xff", "Host: [::1",
    "Content-Encoding: gzip", "Content-Type: application/json; charset=nope", "Content-Type: multipart/form-data",
    "Content-Type: \x00", "Content-Type: application/x-www-form-urlencoded", "Range: bytes=0-", "If-Match: *",
    "Accept: text/event-stream", "Accept: */*;q=x", "Accept-Encoding: \xff", "Cookie: a=\"", "Origin: null",
    "X: " + "v" * 9000, "X" * 9000 + ": v", ": v", "no colon", "\x00: v", "X: \x00", " X: v", "X\t: v", "X:\x0bv",
]  # fmt: skip
OF_OURS = [
    "Prefer: respond-async", "Prefer: wait=x", "Prefer: wait=99999999999", "NVCF-POLL-SECONDS: 1",
    "NVCF-POLL-SECONDS: -1", "NVCF-POLL-SECONDS: 9" + "9" * 40, "NVCF-POLL-SECONDS: \u0661", "Idempotency-Key: k",
    "Idempotency-Key: " + "k" * 999, "NVCF-INPUT-ASSET-REFERENCES: x,,", "NVCF-FUNCTION-ID: x",
    "Last-Event-ID: fnq-1-x",
    "NVCF-REQUEST-TIMEOUT: nan", "NVCF-SUB: \xff", "function-id: " + FUNCTION, "Authorization: Basic x",
    "Authorization: Bearer \xff\xfe", "Authorization: Bearer", "Access-Control-Request-Method: \xe9",
]  # fmt: skip
BODIES = [
    b"",
    b"{}",
    b"{",
    b"[" * 5000,
    b"null",
    b"\xff\xfe",
    b'{"name": 1}',
    b'{"a":' * 3000,
    b"a=b&c",
    b"\x00" * 70000,
]
CHUNKED = [
    b"0\r\n\r\n", b"2\r\n{}\r\n0\r\n\r\n", b"2;ext=\"x\r\n{}\r\n0\r\n\r\n", b"-1\r\n\r\n", b"ffffffffffffffff\r\n{}",
    b"2\r\n{}", b"2\n{}\n0\n\n", b"G\r\n", b"2\r\n{}XX0\r\n\r\n", b"0\r\nTrailer: x\r\n\r\n", b"0x2\r\n{}\r\n0\r\n\r\n",
    b"1\r\n{\r\n1\r\n}\r\n0\r\nA: b\r\nContent-Length: 5\r\n\r\n", b"0" * 5000 + b"\r\n\r\n", b" 2\r\n{}\r\n0\r\n\r\n",
]  # fmt: skip


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Right as a whole or wrong in any part."""
    method = draw(st.sampled_from(METHODS[:5] * 3 + METHODS))
    path = draw(st.sampled_from(PATHS))
    path += draw(
        st.sampled_from(["", "", "", "?limit=x&limit=-1", "?a=%ff", "/%00", "%", "#f", "?" + "q" * 9000, " x", "/.."])
    )
    if draw(st.integers(0, 9)) == 0:
        path = draw(
            st.sampled_from(["http://h" + path, "//" + path, path.upper(), path[1:], "h:1", "", "\xe9", "/\x00"])
        )
    line = f"{method} {path} {draw(st.sampled_from(VERSIONS))}"
    lines = ["Host: h", f"Authorization: Bearer {KEY}"]
    body = draw(st.sampled_from(BODIES))
    match draw(st.integers(0, 3)):
        case 0:
            lines.append("Transfer-Encoding: chunked")
            body = draw(st.sampled_from(CHUNKED))
        case 1 | 2:
            lines.append(f"Content-Length: {len(body)}")
        case _:
            pass
    lines += draw(st.lists(st.sampled_from(OF_HTTP + OF_OURS), max_size=3))
    if draw(st.integers(0, 4)) == 0:
        del lines[draw(st.integers(0, len(lines) - 1))]
    end = draw(st.sampled_from(["\r\n", "\r\n", "\r\n", "\r\n", "\n", "\r"]))
    head = end.join([line, *lines]) + end + end
    return head.encode("utf-8" if draw(st.booleans()) else "latin-1", errors="replace") + body


@st.composite
def conversations(draw: st.DrawFn) -> bytes:
    """What one client sends over one connection."""
    sent = b"".join(draw(st.lists(requests(), min_size=1, max_size=3)))
    match draw(st.integers(0, 5)):
        case 0 | 1:
            sent = draw(damaged(sent))
        case 2:
            sent = sent[: draw(st.integers(0, len(sent)))]
        case 3 if draw(st.booleans()):
            sent = draw(st.binary(max_size=200))
        case _:
            pass
    return sent


# -- what comes back ---------------------------------------------------------------------------

# aiohttp answers in the version it was asked in, whatever that is.
_STATUS = re.compile(rb"HTTP/\d\.\d ([1-5]\d\d) [\t\x20-\x7e]*")
_HEADER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[ \t]*[\t\x20-\x7e\x80-\xff]*")


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


class Incomplete(Exception):
    """The bytes end within an answer."""


def replies(said: bytes) -> list[Reply]:
    """Fails for what is not HTTP. Raises Incomplete."""
    found: list[Reply] = []
    while said:
        head, blank, rest = said.partition(b"\r\n\r\n")
        if not blank:
            raise Incomplete
        line, *lines = head.split(b"\r\n")
        status = _STATUS.fullmatch(line)
        assert status, line
        assert all(_HEADER.fullmatch(each) for each in lines), head
        pairs = [each.decode("latin-1").split(":", 1) for each in lines]
        names = [name.lower() for name, _ in pairs]
        assert len(names) - len(set(names) - {"set-cookie"}) <= names.count("set-cookie"), head
        headers = {name.lower(): value.strip() for name, value in pairs}
        assert not {"content-length", "transfer-encoding"} <= set(headers), head
        code = int(status[1])
        if code == 101:
            return [*found, Reply(code, headers, b"")]
        if code < 200 or code in (204, 304):
            body, said = b"", rest
        elif headers.get("transfer-encoding", "").lower() == "chunked":
            body, said = unchunked(rest)
        elif "content-length" in headers:
            length = int(headers["content-length"])
            if len(rest) < length:
                raise Incomplete
            body, said = rest[:length], rest[length:]
        else:
            body, said = rest, b""
        found.append(Reply(code, headers, body))
    return found


def unchunked(raw: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        size, line, raw = raw.partition(b"\r\n")
        if not line:
            raise Incomplete
        length = int(size, 16)
        if len(raw) < length + 2:
            raise Incomplete
        body += raw[:length]
        assert raw[length : length + 2] == b"\r\n"
        raw = raw[length + 2 :]
        if not length:
            return body, raw


def check(reply: Reply) -> None:
    assert reply.status not in (500, 501, 502), reply
    assert reply.status < 200 or reply.headers["server"] == "fnqueue", reply
    # Those in plain words are of aiohttp, for what is not HTTP.
    if reply.status >= 400 and not reply.headers["content-type"].startswith("text/plain"):
        assert reply.headers["content-type"] == "application/problem+json", reply
        assert json.loads(reply.body)["status"] == reply.status


# -- the server --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with opened(Path(tmp_path_factory.mktemp("front")), body_timeout_s=5, queue_limit=10_000) as found:
        answering = asyncio.create_task(answer_all(found))
        yield found
        answering.cancel()


async def answer_all(house: House) -> None:
    """A sidecar whose container says `done` to everything, at once."""
    async with house.broker.queue.consume(VERSION, prefetch=1) as deliveries:
        async for delivery in deliveries:
            claim = await house.broker.results.claim(delivery.job, worker="w", lease_s=60, max_attempts=3)
            if claim.lease is not None:
                done = Outcome(status=200, body=b"done")
                await house.broker.results.settle(claim.lease, delivery.job, RequestState.FULFILLED, done)
            await delivery.ack()


async def converse(house: House, sent: bytes) -> tuple[bytes, bool]:
    """What was answered until the server closed, and whether that was of its own accord. Once it has been quiet for a
    moment, the client closes its end, and then the server must."""
    address = urlsplit(house.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    said, hung_up = b"", False
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(sent)
            async with asyncio.timeout(HANG_S):
                while True:
                    try:
                        part = await asyncio.wait_for(reader.read(65536), None if hung_up else QUIET_S)
                    except TimeoutError:
                        if hung_up:
                            raise
                        writer.write_eof()
                        hung_up = True
                        continue
                    if not part:
                        break
                    said += part
    finally:
        writer.close()
    return said, not hung_up


async def is_well(house: House) -> None:
    async with house.client.post(INVOKE, data=b"{}", headers={"Connection": "close"}) as response:
        assert (response.status, await response.read()) == (200, b"done")


def connections(house: House) -> int:
    port = urlsplit(house.url).port
    open_ones = psutil.Process().net_connections("tcp")
    return sum(
        getattr(each.laddr, "port", 0) == port and each.status in ("ESTABLISHED", "CLOSE_WAIT") for each in open_ones
    )


@fuzzed(60)
@given(talks=st.lists(conversations(), min_size=1, max_size=AT_ONCE))
async def test_whatever_clients_send_is_answered_in_http_and_hurts_nobody(
    house: House, complaints: Complaints, talks: list[bytes]
) -> None:
    unhandled: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(repr(context)))
    try:
        async with asyncio.timeout(HANG_S * 2):
            heard = await asyncio.gather(*(converse(house, sent) for sent in talks))
            await within(HANG_S, is_well(house))
    finally:
        asyncio.get_running_loop().set_exception_handler(None)
    for said, whole in heard:
        try:
            for reply in replies(said):
                check(reply)
        except Incomplete:
            assert not whole, said
    complaints.none()
    assert not unhandled


async def test_no_connection_stays_open_after_its_client_has_gone(house: House) -> None:
    async def count() -> int:
        return connections(house)

    for sent in (b"", b"GET", b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nx"):
        await asyncio.gather(*(converse(house, sent) for _ in range(AT_ONCE)))
    await eventually(count, lambda seen: seen == 0)
