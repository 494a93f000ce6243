"""Bad input, on both families: always refused in words, never our fault, never for ever (field/faults.md 47 to 52)."""

from __future__ import annotations

import asyncio
import re
import uuid
from urllib.parse import urlsplit

import pytest

from tests.e2e.conftest import (
    MISFITS,
    NVCF,
    QUEUE_LIMIT,
    TALK_S,
    UNKNOWN_ID,
    Mirror,
    Site,
    exchange,
    slug,
    talk,
)
from tests.house import Caller

# -- names and words ---------------------------------------------------------------------------

ROUTES = [
    ("POST", "pexec/functions/{}"),
    ("POST", "pexec/functions/{}/versions/" + UNKNOWN_ID),
    ("POST", "pexec/functions/" + UNKNOWN_ID + "/versions/{}"),
    ("GET", "pexec/status/{}"),
    ("DELETE", "requests/{}"),
    ("GET", "queues/{}/position"),
    ("GET", "queues/functions/{}"),
    ("GET", "queues/functions/{}/versions/" + UNKNOWN_ID),
    ("GET", "queues/functions/" + UNKNOWN_ID + "/versions/{}"),
    ("POST", "functions/{}/versions"),
    ("GET", "functions/{}/versions"),
    ("GET", "functions/{}/versions/" + UNKNOWN_ID),
    ("GET", "functions/" + UNKNOWN_ID + "/versions/{}"),
    ("DELETE", "functions/{}/versions/" + UNKNOWN_ID),
    ("POST", "deployments/functions/{}/versions/" + UNKNOWN_ID),
    ("GET", "deployments/functions/" + UNKNOWN_ID + "/versions/{}"),
    ("DELETE", "deployments/functions/" + UNKNOWN_ID + "/versions/{}"),
    ("GET", "assets/{}"),
    ("DELETE", "assets/{}"),
]
NOT_IDS = [
    "x",
    "0",
    "%20",
    f"{{{UNKNOWN_ID}}}",
    f"%7B{UNKNOWN_ID}%7D",
    f"urn:uuid:{UNKNOWN_ID}",
    UNKNOWN_ID.replace("-", ""),
    UNKNOWN_ID + "0",
    UNKNOWN_ID[:-1] + "g",
    "%D9%A0" + UNKNOWN_ID[1:],  # an Arabic zero, which int() and UUID() take for one
    f"{UNKNOWN_ID}%00",
    f"{UNKNOWN_ID}%0A",
    "%FF%FE",
    "..%2F..%2Fetc%2Fpasswd",
    "'%20OR%201=1--",
    "a" * 7_000,
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_what_is_no_id_is_400_everywhere_and_an_unknown_one_404(caller: Caller, method: str, path: str) -> None:
    body = b'{"name": "a", "inferenceUrl": "/", "containerImage": "i"}' if method == "POST" else b""
    if path.startswith("deployments") and method == "POST":
        body = b'{"deploymentSpecifications": [{"gpu": "CPU", "minInstances": 0, "maxInstances": 1}]}'
    for given in NOT_IDS:
        reply = await exchange(caller, method, f"{NVCF}/{path.format(given)}", body=body)
        assert (reply.status, slug(reply)) == (400, "bad-request"), given
        assert re.fullmatch(r"(function|functionVersion|request|asset)Id is not a UUID", reply.json["detail"])
    for given in (UNKNOWN_ID.upper(), str(uuid.uuid4())):
        reply = await exchange(caller, method, f"{NVCF}/{path.format(given)}", body=body)
        assert (reply.status, slug(reply)) == (404, "not-found"), given


@pytest.mark.parametrize(
    "path", ["/nowhere", "/v2", f"{NVCF}/functions/", f"{NVCF}//functions", f"{NVCF}/pexec", "/v2/nvcf/../.."]
)
async def test_an_unknown_path_is_404_for_who_has_a_key_and_401_for_others(caller: Caller, path: str) -> None:
    reply = await exchange(caller, "GET", path)
    assert (reply.status, slug(reply)) == (404, "not-found")
    answer = await talk(caller.url, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert status_of(answer) == 401


def status_of(answer: bytes) -> int:
    found = re.match(rb"HTTP/\d\.\d (\d{3}) ", answer)
    assert found, answer
    return int(found.group(1))


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", f"pexec/functions/{UNKNOWN_ID}", "POST"),
        ("POST", f"pexec/status/{UNKNOWN_ID}", "GET, HEAD"),
        ("PUT", "functions", "GET, HEAD, POST"),
        ("PATCH", f"deployments/functions/{UNKNOWN_ID}/versions/{UNKNOWN_ID}", "DELETE, GET, HEAD, POST, PUT"),
        ("POST", f"requests/{UNKNOWN_ID}", "DELETE, GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_405_and_told_the_right_ones(
    caller: Caller, method: str, path: str, allowed: str
) -> None:
    reply = await exchange(caller, method, f"{NVCF}/{path}")
    assert (reply.status, slug(reply), reply.headers["Allow"]) == (405, "method-not-allowed", allowed)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"true", b"7", b'"text"', b"[1]", b"{", b'{"name": ', b'{"name": "a"}}', b"{'name': 'a'}",
        b"\xff\xfe{}", b'{"name": "\xff"}', b'{"name": "\\ud800"}', b"[" * 100_000, b'{"a":' * 100_000,
        b'{"name": ' + b"9" * 5000 + b"}", b'{"name": "a", "name": 1}', b"\x00", b"name=a",
    ],
    ids=range(19),
)  # fmt: skip
@pytest.mark.parametrize("path", ["functions", "assets", f"deployments/functions/{UNKNOWN_ID}/versions/{UNKNOWN_ID}"])
async def test_a_body_that_is_not_what_is_asked_for_is_400(caller: Caller, path: str, body: bytes) -> None:
    reply = await exchange(caller, "POST", f"{NVCF}/{path}", body=body)
    assert (reply.status, slug(reply) in MISFITS) == (400, True)
    assert reply.json["detail"]
    assert len(reply.body) < 4000


@pytest.mark.parametrize(
    "sent",
    [
        ("Idempotency-Key", ""),
        ("Idempotency-Key", "x" * 256),
        ("Idempotency-Key", "ü".encode()),
        ("Idempotency-Key", b"a\tb"),
        ("NVCF-POLL-SECONDS", "9" * 5000),
        ("NVCF-INPUT-ASSET-REFERENCES", "x," * 2000),
        ("NVCF-INPUT-ASSET-REFERENCES", b"\xff"),
        ("X-Mine", b"\xff\xfe"),
        ("Content-Type", b"\xff"),
        ("Accept", b"\xff"),
        ("Origin", b"\xff"),
        ("X-Half-A-Letter", "ü".encode()[:1]),
        ("X-Surrogate", "\udcff".encode("utf-8", "surrogatepass")),
    ],
)
async def test_a_header_that_cannot_be_right_is_400_that_names_it(
    mirror: Mirror, sent: tuple[str, str | bytes]
) -> None:
    reply = await exchange(mirror.caller, "POST", mirror.path, headers=[sent], body=b"{}")
    assert (reply.status, slug(reply)) == (400, "bad-request")
    assert sent[0] in reply.json["detail"] or reply.json["detail"] == "failed to parse poll duration"


@pytest.mark.parametrize(
    "sent",
    [
        ("Prefer", b"\xff"),
        ("Prefer", ";;==,,wait=, respond-async=x;y"),
        ("NVCF-POLL-SECONDS", b"\xff"),
        ("Cookie", b"\xff"),
        ("nvcf-feature-enable-gateway-timeout", "perhaps"),
        ("Connection", ",,\t, close"),
        ("X-Empty", ""),
    ],
)
async def test_a_header_that_says_nothing_is_no_harm(mirror: Mirror, sent: tuple[str, str | bytes]) -> None:
    reply = await exchange(mirror.caller, "POST", mirror.path, headers=[sent], body=b"{}")
    assert reply.status in (200, 202)


async def test_too_many_headers_for_the_function_are_400(mirror: Mirror) -> None:
    for sent in ([(f"X-{n}", "v") for n in range(70)], [(f"X-{n}", "v" * 8000) for n in range(5)]):
        reply = await exchange(mirror.caller, "POST", mirror.path, headers=sent, body=b"{}")
        assert (reply.status, slug(reply)) == (400, "bad-request")
        assert "64 headers" in reply.json["detail"]


# -- HTTP that is broken -----------------------------------------------------------------------

HEAD = "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n"


def raw(mirror: Mirror, rest: bytes) -> bytes:
    return HEAD.format(path=mirror.path, key=mirror.caller.key).encode() + rest


@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
        b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
        b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"Content-Length: -2\r\n\r\n{}",
        b"Content-Length: +2\r\n\r\n{}",
        b"Content-Length: 2 2\r\n\r\n{}",
        b"Content-Length: 0x2\r\n\r\n{}",
        b"Content-Length: 99999999999999999999999\r\n\r\n{}",
        b"Transfer-Encoding: identity\r\n\r\n{}",
        b"Transfer-Encoding: xchunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"Transfer-Encoding : chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n-1\r\nab",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcdefgh\r\n0\r\n\r\n",
        b"Host: y\r\nContent-Length: 2\r\n\r\n{}",
        b"X-A: a\r\n b\r\nContent-Length: 2\r\n\r\n{}",
        b"X-A: a\nContent-Length: 2\n\n{}",
        b"X-A: a\x00b\r\nContent-Length: 2\r\n\r\n{}",
        b"X-A: a\rb\r\nContent-Length: 2\r\n\r\n{}",
        b"X-\xff: a\r\nContent-Length: 2\r\n\r\n{}",
        b": a\r\nContent-Length: 2\r\n\r\n{}",
        b"X A: a\r\nContent-Length: 2\r\n\r\n{}",
        b"X-A: " + b"a" * 9 * 1024 + b"\r\nContent-Length: 2\r\n\r\n{}",
        b"".join(b"X-%d: a\r\n" % n for n in range(200)) + b"Content-Length: 2\r\n\r\n{}",
    ],
    ids=range(24),
)
async def test_what_two_servers_could_read_differently_is_refused_at_once(mirror: Mirror, rest: bytes) -> None:
    answer = await talk(mirror.caller.url, raw(mirror, rest))
    assert status_of(answer) == 400
    assert answer.count(b"HTTP/1.") == 1


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\nHost: x\n\n",
        b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"BREW /health HTTP/1.1\r\nHost: x\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x00" * 100,
    ],
    ids=range(10),
)
async def test_what_is_not_http_is_refused_at_once(site: Site, sent: bytes) -> None:
    answer = await talk(site.url, sent)
    assert status_of(answer) == 400


async def test_who_says_nothing_or_half_of_it_is_cut_off(site: Site, mirror: Mirror) -> None:
    silent = [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: x\r\nX-"]
    halves = [
        raw(mirror, b"Content-Length: 20\r\n\r\n{}"),
        raw(mirror, b"Content-Length: 20\r\nExpect: 100-continue\r\n\r\n"),
        raw(mirror, b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"),
        raw(mirror, b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n"),
        raw(mirror, b"Content-Length: 20\r\n\r\n{}").replace(mirror.path.encode(), f"{NVCF}/functions".encode()),
    ]
    trickling = asyncio.create_task(trickle(site))
    talks = await asyncio.gather(*(talk(site.url, sent) for sent in (*silent, *halves)))
    assert set(talks[: len(silent)]) == {b""}
    for answer in talks[len(silent) :]:
        assert status_of(answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")) == 408
    await trickling
    assert (await mirror.post()).status == 200


async def trickle(site: Site) -> None:
    """Send a head a byte at a time until the server closes."""
    reader, writer = await asyncio.open_connection(urlsplit(site.url).hostname, urlsplit(site.url).port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: ")
    closed = asyncio.create_task(reader.read())
    async with asyncio.timeout(TALK_S):
        while not closed.done():
            writer.write(b"a")
            await asyncio.wait([closed], timeout=0.5)
    writer.close()


async def test_who_hangs_up_in_the_middle_leaves_nothing_behind(mirror: Mirror) -> None:
    for rest in (
        b"Content-Length: 20\r\n\r\n{}",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n",
        b"Content-Len",
    ):
        for _ in range(QUEUE_LIMIT):
            await talk(mirror.caller.url, raw(mirror, rest), close=True)
    [queue] = (await mirror.caller.depth(mirror.function.id)).json["queues"]
    assert (queue["queueDepth"], queue["inFlight"]) == (0, 0)


async def test_requests_in_one_pipe_are_answered_in_order(mirror: Mirror) -> None:
    def one(number: int, more: bytes = b"") -> bytes:
        request = raw(mirror, b"Content-Length: 1\r\n" + more + b"\r\n%d" % number)
        return request if number == 5 else request.replace(b"Connection: close\r\n", b"")

    slow = b'X-Mirror: {"delay_s": 0.3}\r\n'
    pipe = one(1, slow) + one(2) + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + one(4, slow) + one(5)
    answer = await talk(mirror.caller.url, pipe)
    bodies = re.findall(rb"\r\n\r\n(.*?)(?=HTTP/1\.1|\Z)", answer, re.DOTALL)
    assert bodies == [b"1", b"2", b'{"status":"OK"}', b"4", b"5"]


async def test_a_pipe_ends_at_a_bad_request(mirror: Mirror) -> None:
    good = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = await talk(mirror.caller.url, good + b"NONSENSE\r\n\r\n" + good)
    statuses = re.findall(rb"HTTP/1\.\d (\d{3})", answer)
    assert statuses in ([b"200", b"400"], [b"400"])  # what came in one piece with it is refused with it


async def test_a_client_that_waits_for_100_continue_gets_it(mirror: Mirror) -> None:
    reader, writer = await asyncio.open_connection(
        urlsplit(mirror.caller.url).hostname, urlsplit(mirror.caller.url).port
    )
    writer.write(raw(mirror, b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n"))
    assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20) == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"hello")
    answer = await asyncio.wait_for(reader.read(), 20)
    assert (status_of(answer), answer.endswith(b"hello")) == (200, True)
    writer.close()


async def test_what_is_refused_leaves_no_secret_and_no_alarm_in_the_log(site: Site) -> None:
    for line in (
        b"Authorization: Bearer canary\x00x",
        b"Authorization : Bearer canary",
        b"Authorization: Basic canary",
    ):
        answer = await talk(site.url, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + line + b"\r\n\r\n")
        assert status_of(answer) in (200, 400)
    log = site.log.read_text()
    assert "canary" not in log
    assert "Traceback" not in log
    assert site.key not in log


async def test_everything_still_works_after_all_that(mirror: Mirror) -> None:
    for path in ("/health", "/readyz", "/livez"):
        assert (await mirror.caller.call("GET", path)).status == 200
    assert (await mirror.post(b"still here")).body == b"still here"
