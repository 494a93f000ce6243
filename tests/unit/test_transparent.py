"""Invocation in the function's own name: what is addressed to a function, and what passes on both ways."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientPayloadError, ClientResponse, web
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from api.routes.transparent import Address, address_of, is_addressed, needs_channel
from broker.errors import BadRequest
from broker.model import Job, Outcome, RequestState
from tests.eventually import eventually
from tests.unit.test_event_streams import HEAD as EVENTS
from tests.unit.test_event_streams import PLAIN, Work, work
from tests.unit.test_server import FUNCTION, KEY, NOBODYS, NOW, NVCF, VERSION, House, caller, opened, slug

HOST = f"{FUNCTION}.invocation.example.com"
MIB = 1024 * 1024


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path, stream_keepalive_s=1) as found:
        yield found


def asked(target: str = "/", method: str = "GET", *, host: str = "api.example.com", **named: str) -> web.Request:
    headers = CIMultiDict({"Host": host, **{name.replace("_", "-"): value for name, value in named.items()}})
    return make_mocked_request(method, target, headers=headers)


# -- what is addressed to a function -----------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "function_id", "version_id", "rest"),
    [
        (f"{FUNCTION}.localhost", FUNCTION, "", "localhost"),
        (f"{FUNCTION}.localhost:8080", FUNCTION, "", "localhost:8080"),
        (f"{FUNCTION.upper()}.Invocation.Example.COM", FUNCTION, "", "invocation.example.com"),
        (f"{FUNCTION}.example.com.", FUNCTION, "", "example.com."),
        (f"{VERSION}.{FUNCTION}.example.com", FUNCTION, VERSION, "example.com"),
        (f"{VERSION}.{FUNCTION.upper()}.localhost:80", FUNCTION, VERSION, "localhost:80"),
        # Without anything behind, the second is what is behind the first.
        (f"{VERSION}.{FUNCTION}", VERSION, "", FUNCTION),
        (f"{VERSION}.{FUNCTION}:80", VERSION, "", f"{FUNCTION}:80"),
        (f"{FUNCTION}.{'0' * 36}.example.com", FUNCTION, "", f"{'0' * 36}.example.com"),
        (f"{FUNCTION}.xn--bcher-kva.example", FUNCTION, "", "xn--bcher-kva.example"),
    ],
)
def test_a_host_that_begins_with_ids_is_a_functions(host: str, function_id: str, version_id: str, rest: str) -> None:
    request = asked("/a?b", host=host)
    assert is_addressed(request)
    assert address_of(request) == Address(
        function_id=function_id, version_id=version_id, target="/a?b", by_host=True, host=rest
    )


@pytest.mark.parametrize(
    "host",
    [
        "",
        "localhost:8080",
        "[::1]:8080",
        FUNCTION,
        f"{FUNCTION}:8080",
        f"{FUNCTION}.",
        f"{FUNCTION}.:80",
        f"api.{FUNCTION}.example.com",
        f"x{FUNCTION}.example.com",
        f"{FUNCTION}x.example.com",
        f"{FUNCTION.replace('-', '')}.example.com",
        f"{{{FUNCTION}}}.example.com",
        f"{FUNCTION[:-1]}é.example.com",
        f"{FUNCTION[:-1]}\u0661.example.com",
        f"{FUNCTION}\u3002example.com",
    ],
)
def test_every_other_host_is_ours(host: str) -> None:
    assert not is_addressed(asked(host=host))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"function_id": FUNCTION}, (FUNCTION, "")),
        ({"function_id": f" {FUNCTION.upper()} "}, (FUNCTION, "")),
        ({"function_id": FUNCTION, "function_version_id": VERSION.upper()}, (FUNCTION, VERSION)),
    ],
)
@pytest.mark.parametrize("host", ["example.com", f"{NOBODYS}.example.com", f"{NOBODYS}.{NOBODYS}.example.com"])
def test_headers_win_over_the_host(given: Mapping[str, str], expected: tuple[str, str], host: str) -> None:
    request = asked("/health", host=host, **given)
    assert is_addressed(request)
    found = address_of(request)
    assert (found.function_id, found.version_id) == expected
    assert (found.by_host, found.host) == (False, "example.com")


def test_a_version_alone_names_no_function() -> None:
    assert not is_addressed(asked(function_version_id=VERSION))


@pytest.mark.parametrize(
    "given", [{"function_id": "x"}, {"function_id": ""}, {"function_id": FUNCTION, "function_version_id": "x"}]
)
def test_a_header_that_is_no_id_is_refused(given: Mapping[str, str]) -> None:
    request = asked(**given)
    assert is_addressed(request)
    with pytest.raises(BadRequest, match="is not a UUID"):
        address_of(request)


@pytest.mark.parametrize(("second", "fine"), [(FUNCTION, True), (NOBODYS, False)])
def test_an_id_that_is_given_twice_has_to_be_the_same(second: str, *, fine: bool) -> None:
    headers = CIMultiDict([("Host", "h"), ("function-id", FUNCTION), ("Function-ID", second)])
    request = make_mocked_request("GET", "/", headers=headers)
    if fine:
        assert address_of(request).function_id == FUNCTION
    else:
        with pytest.raises(BadRequest, match="more than once"):
            address_of(request)


TARGETS = [
    "/",
    "/a/../b/./c//d",
    "//elsewhere.example/x",
    "/%2e%2e/%2F%00?q=%20+%zz&&x=1;y=%C3%BC=",
    "/@elsewhere.example:80/",
    "/a\\b|c^d`e{f}",
    "/?",
]


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_stays_as_it_came(target: str) -> None:
    assert address_of(asked(target, function_id=FUNCTION)).target == target


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (f"http://{HOST}/a?b", "/a?b"),
        (f"http://{HOST}", "/"),
        (f"http://{HOST}?b", "/?b"),
        (f"HTTP://{HOST}:80//x", "//x"),
    ],
)
def test_an_absolute_target_names_the_host(target: str, path: str) -> None:
    request = asked(target, host="api.example.com")
    assert is_addressed(request)
    assert (address_of(request).function_id, address_of(request).target) == (FUNCTION, path)
    assert not is_addressed(asked("http://api.example.com/", host=HOST))


def test_options_of_everything_is_about_the_root() -> None:
    assert address_of(asked("*", "OPTIONS", function_id=FUNCTION)).target == "/"


@pytest.mark.parametrize(("method", "target"), [("GET", "/é"), ("GET", "/a#b"), ("CONNECT", "/"), ("GET", "a")])
def test_what_is_no_target_is_refused(method: str, target: str) -> None:
    with pytest.raises(BadRequest, match="not a path"):
        address_of(asked(target, method, function_id=FUNCTION))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, False),
        ({"Upgrade": "h2c"}, False),
        ({"Transfer_Encoding": "chunked"}, False),
        ({"Upgrade": "WebSocket"}, True),
        ({"Upgrade": "h2c, websocket"}, True),
        ({"nvcf_feature_enable_only_stream_full_request": "true"}, True),
    ],
)
def test_what_needs_a_channel(given: Mapping[str, str], *, expected: bool) -> None:
    assert needs_channel(asked(host=HOST, **given)) is expected


# -- what reaches the function -----------------------------------------------------------------


async def job_of(house: House, method: str = "GET", path: str = "/", **sent: Any) -> Job:
    headers = {"Host": HOST, **NOW, **sent.pop("headers", {})}
    async with house.client.request(method, path, headers=headers, **sent) as response:
        assert response.status == 202, await response.text()
    return await house.finish()


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "POST", "PROPFIND"])
async def test_the_job_is_what_was_asked_for(house: House, method: str) -> None:
    job = await job_of(house, method, "/v2/nvcf/functions?a=b", data=b"" if method in ("GET", "HEAD") else b"body")
    assert (job.method, job.target) == (method, "/v2/nvcf/functions?a=b")
    assert job.body == (b"" if method in ("GET", "HEAD") else b"body")
    assert job.passthrough


@pytest.mark.parametrize(
    ("line", "target"),
    [
        *((f"GET {target}", target) for target in TARGETS),
        (f"GET http://{HOST}/a/../b?c", "/a/../b?c"),
        ("OPTIONS *", "/"),
    ],
)
async def test_a_target_is_taken_off_the_wire_as_it_came(house: House, line: str, target: str) -> None:
    named = [f"function-id: {FUNCTION}", "Prefer: respond-async", "Content-Length: 0"]
    reader, writer = await house.connect(f"{line} HTTP/1.1", *named)
    assert b" 202 " in await asyncio.wait_for(reader.readline(), 20)
    writer.close()
    assert (await house.finish()).target == target


@pytest.mark.parametrize("line", ["GET /\u00e9", "GET /a#b", "CONNECT elsewhere.example:443"])
async def test_what_is_no_target_is_400(house: House, line: str) -> None:
    reader, writer = await house.connect(f"{line} HTTP/1.1", f"function-id: {FUNCTION}", "Content-Length: 0")
    assert b" 400 " in await asyncio.wait_for(reader.readline(), 20)
    writer.close()
    assert await house.queued() == 0


async def test_headers_beat_every_path_of_ours(house: House) -> None:
    for path in ("/health", f"{NVCF}/pexec/functions/{NOBODYS}", f"{NVCF}/accounts/other/functions", "/nowhere"):
        job = await job_of(house, "POST", path, headers={"Host": "api", "function-id": FUNCTION})
        assert (job.account, job.target) == ("default", path)


async def test_the_function_is_not_told_what_is_spoken_to_us(house: House) -> None:
    sent = {
        "Authorization": f"Bearer {KEY}",
        "Cookie": "a=b",
        "Connection": "X-Private",
        "X-Private": "1",
        "Proxy-Authorization": "Basic YTpi",
        "NVCF-SUB": "forged",
        "nvcf_ncaid": "forged",
        "X-Public": "1",
    }
    here = dict((await job_of(house, headers={**sent, "Host": "api", "function-id": FUNCTION})).headers)
    own = dict((await job_of(house, headers=sent)).headers)
    secret = {"authorization", "connection", "x-private", "proxy-authorization", "nvcf-sub", "nvcf_ncaid", "host"}
    for found in (here, own):
        assert found["X-Public"] == "1"
        assert not {name.lower() for name in found} & {*secret, "function-id", "nvcf-poll-seconds", "prefer"}
    # Those of this server's own host are not the function's.
    assert (own.get("Cookie"), here.get("Cookie")) == ("a=b", None)


async def test_the_wait_of_an_event_stream_is_that_of_any_other(house: House) -> None:
    waiting = asyncio.create_task(asyncio.wait_for(get(house, headers={"Accept": "text/event-stream"}), 20))
    await house.some_queued()
    assert (await house.finish()).poll_s == 60
    await waiting


# -- who may -----------------------------------------------------------------------------------


async def get(house: House, path: str = "/", method: str = "GET", **sent: Any) -> tuple[int, Any, bytes]:
    headers = {"Host": HOST, **sent.pop("headers", {})}
    async with house.client.request(method, path, headers=headers, allow_redirects=False, **sent) as response:
        return response.status, response.headers, await response.read()


async def test_an_address_opens_nothing_that_the_credential_does_not(house: House) -> None:
    async with caller(house, "other") as stranger:
        for named in ({"Host": HOST}, {"function-id": FUNCTION}, {"Host": f"{NOBODYS}.x"}, {"function-id": NOBODYS}):
            async with stranger.get("/", headers=named) as response:
                assert response.status == 404
    async with caller(house, "default", "list_functions") as unable, unable.get("/", headers={"Host": HOST}) as found:
        assert found.status == 403
    for bad in ("", "Basic YTpi", "Bearer nobody"):
        status, headers, body = await get(house, headers={"Authorization": bad})
        assert (status, headers["WWW-Authenticate"], slug(body)) == (401, "Bearer", "unauthorized")


async def test_a_missing_credential_is_told_before_anything_else(house: House) -> None:
    status, _, body = await get(house, headers={"Authorization": "", "function-id": "x"})
    assert (status, slug(body)) == (401, "unauthorized")


async def test_a_version_of_another_function_is_404(house: House) -> None:
    status, _, _ = await get(house, headers={"Host": f"{VERSION}.{NOBODYS}.x"})
    assert status == 404


async def test_a_rate_limit_counts_it(house: House) -> None:
    row = await house.broker.catalog.versions.get(VERSION)
    assert row is not None
    limited = {"rateLimit": "1-H"}
    async with house.client.put(f"{NVCF}/ratelimit/functions/{FUNCTION}/versions/{VERSION}", json=limited) as response:
        assert response.status == 204
    assert (await get(house, headers=NOW))[0] == 202
    assert (await get(house, headers=NOW))[0] == 429


# -- the answer --------------------------------------------------------------------------------


async def answered(house: House, outcome: Outcome, method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
    waiting = asyncio.create_task(get(house, method=method, headers=headers))
    await house.some_queued()
    await house.finish(outcome)
    return await waiting


@pytest.mark.parametrize("status", [200, 201, 202, 204, 206, 301, 304, 307, 404, 418, 500, 503, 599])
async def test_the_status_is_the_functions_own(house: House, status: int) -> None:
    body = b"" if status in (204, 304) else b"told"
    found, headers, content = await answered(house, Outcome(status=status, body=body))
    assert (found, content) == (status, body)
    assert headers["NVCF-STATUS"] == ("fulfilled" if status < 400 else "errored")
    assert headers["NVCF-REQID"]


OWN = (
    ("Location", "/elsewhere"),
    ("Set-Cookie", "a=1"),
    ("Set-Cookie", "b=2"),
    ("Access-Control-Allow-Origin", "https://page.example"),
    ("Access-Control-Expose-Headers", "x-own"),
    ("Refresh", "1"),
    ("X-Own", "1"),
    ("X-Own", "2"),
    ("Connection", "close"),
    ("Strict-Transport-Security", "max-age=1"),
    ("Server", "mine"),
    ("NVCF-REQID", "forged"),
)


async def test_the_headers_are_the_functions_own_but_for_those_of_the_connection(house: House) -> None:
    _, headers, _ = await answered(house, Outcome(status=302, headers=OWN), Origin="https://page.example")
    assert headers.getall("Set-Cookie") == ["a=1", "b=2"]
    assert headers.getall("X-Own") == ["1", "2"]
    assert headers.getall("Access-Control-Allow-Origin") == ["https://page.example"]
    assert headers["Access-Control-Expose-Headers"] == "nvcf-reqid, x-own"
    assert (headers["Location"], headers["Refresh"], headers["Server"]) == ("/elsewhere", "1", "fnqueue")
    assert headers["NVCF-REQID"] != "forged"
    assert "Strict-Transport-Security" not in headers


async def test_cookies_are_only_for_a_host_of_the_functions_own(house: House) -> None:
    named = {"Host": "api", "function-id": FUNCTION}
    _, headers, _ = await answered(house, Outcome(status=200, headers=OWN), **named)
    assert "Set-Cookie" not in headers
    assert headers["X-Own"] == "1"


async def test_the_length_of_what_a_head_does_not_bring_is_told(house: House) -> None:
    outcome = Outcome(status=200, headers=(("Content-Length", "12345"), ("ETag", '"x"')))
    status, headers, body = await answered(house, outcome, "HEAD")
    assert (status, headers["Content-Length"], headers["ETag"], body) == (200, "12345", '"x"', b"")


async def test_a_preflight_is_the_functions_to_answer(house: House) -> None:
    asks = {"Origin": "https://page.example", "Access-Control-Request-Method": "PUT"}
    said = (("Access-Control-Allow-Methods", "PUT"),)
    status, headers, _ = await answered(house, Outcome(status=204, headers=said), "OPTIONS", **asks)
    assert (status, headers["Access-Control-Allow-Methods"]) == (204, "PUT")
    assert "Access-Control-Allow-Origin" not in headers


async def test_who_has_to_ask_again_is_sent_to_this_server_and_not_to_the_function(house: House) -> None:
    port = house.url.rpartition(":")[2]
    status, headers, _ = await get(house, headers={**NOW, "Host": f"{FUNCTION}.127.0.0.1:{port}"})
    assert (status, headers["NVCF-STATUS"]) == (202, "pending-evaluation")
    await house.finish(Outcome(status=202, headers=OWN, body=b"told"))
    async with house.client.get(headers["Location"], allow_redirects=False) as response:
        assert (response.status, await response.read()) == (200, b"told")
        # Here they would be said in this server's name.
        assert not {"Location", "Set-Cookie", "Refresh", "Access-Control-Allow-Origin"} & set(response.headers)


async def test_an_idempotency_key_is_for_one_method_and_path(house: House) -> None:
    key = NOW | {"Idempotency-Key": "k"}
    first = (await get(house, "/a", headers=key))[1]["NVCF-REQID"]
    assert (await get(house, "/a", headers=key))[1]["NVCF-REQID"] == first
    for method, path in (("GET", "/b"), ("DELETE", "/a")):
        assert (await get(house, path, method, headers=key))[0] == 422


# -- large bodies ------------------------------------------------------------------------------


async def chunks(count: int, size_bytes: int = MIB) -> AsyncIterator[bytes]:
    for number in range(count):
        yield bytes([number % 256]) * size_bytes


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_large_body_goes_through_a_file_to_the_blob_store(tmp_path: Path, chunked: bool) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    whole = b"".join([piece async for piece in chunks(20)])
    async with opened(tmp_path, spool_dir=str(spool), inflight_body_bytes=5 * MIB) as house:
        job = await job_of(house, "PUT", "/large", data=chunks(20) if chunked else whole)
        assert (job.body, job.body_key) == (b"", f"inputs/default/{job.id}")
        assert await house.broker.blobs.get(job.body_key, limit_bytes=30 * MIB) == whole
        assert job.body_sha256 == hashlib.sha256(whole).hexdigest()
        assert list(spool.iterdir()) == []


async def test_what_a_message_can_carry_goes_with_it(tmp_path: Path) -> None:
    async with opened(tmp_path, spool_dir="/nowhere") as house:
        body = b"x" * (256 * 1024)
        assert (await job_of(house, "PUT", "/", data=body)).body == body
        assert (await job_of(house, "PUT", "/", data=chunks(2, 1000))).body == b"\0" * 1000 + b"\1" * 1000
        status, _, problem = await get(house, method="PUT", data=body + b"x")
        assert (status, slug(problem)) == (503, "overloaded")


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_is_413_and_leaves_nothing(tmp_path: Path, chunked: bool) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    async with opened(tmp_path, spool_dir=str(spool), max_streamed_body_bytes=2 * MIB) as house:
        sent: Any = chunks(3) if chunked else b"x" * (3 * MIB)
        status, headers, body = await get(house, method="PUT", data=sent)
        assert (status, slug(body), headers["Connection"]) == (413, "payload-too-large", "close")
        assert f"{2 * MIB} bytes" in json.loads(body)["detail"]
        assert list(spool.iterdir()) == []
        assert await house.queued() == 0


async def test_bodies_on_disk_have_a_budget_and_give_it_back(tmp_path: Path) -> None:
    async with opened(tmp_path, spool_bytes=3 * MIB) as house:
        for _ in range(3):
            assert (await get(house, method="PUT", data=chunks(3), headers=NOW))[0] == 202
        assert (await get(house, method="PUT", data=chunks(4), headers=NOW))[0] == 503
        assert (await get(house, method="PUT", data=b"x" * (4 * MIB), headers=NOW))[0] == 503
        assert (await get(house, method="PUT", data=chunks(3), headers=NOW))[0] == 202


async def test_a_body_that_stops_coming_is_408_and_leaves_nothing(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    async with opened(tmp_path, spool_dir=str(spool), body_timeout_s=0.2, inline_body_bytes=1000) as house:
        reader, writer = await house.connect("PUT / HTTP/1.1", f"function-id: {FUNCTION}", "Content-Length: 4000")
        writer.write(b"x" * 3000)
        answer = await asyncio.wait_for(reader.readuntil(b"}"), 20)
        assert answer.startswith(b"HTTP/1.1 408 ")
        writer.close()
        assert list(spool.iterdir()) == []


async def test_a_sender_that_leaves_leaves_nothing(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    async with opened(tmp_path, spool_dir=str(spool), spool_bytes=2 * MIB) as house:
        _, writer = await house.connect("PUT / HTTP/1.1", f"function-id: {FUNCTION}", f"Content-Length: {2 * MIB}")
        writer.write(b"x" * MIB)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

        async def taken() -> int:
            return (await get(house, method="PUT", data=b"x" * (2 * MIB), headers=NOW))[0]

        await eventually(taken, lambda status: status != 503)
        assert list(spool.iterdir()) == []


# -- answers on their way ----------------------------------------------------------------------


@asynccontextmanager
async def streamed(
    house: House, head: Outcome = PLAIN, method: str = "GET", **headers: str
) -> AsyncIterator[tuple[Work, ClientResponse]]:
    """A call whose answer has begun."""
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        sent = {"Host": HOST, **headers}
        calling = group.create_task(house.client.request(method, "/", headers=sent, allow_redirects=False))
        async with work(house) as job:
            await job.begin(head)
            async with await calling as response:
                yield job, response


def with_headers(head: Outcome, *more: tuple[str, str], status: int = 200) -> Outcome:
    return replace(head, status=status, headers=(*head.headers, *more))


async def test_a_body_is_handed_on_while_it_comes(house: House) -> None:
    head = with_headers(PLAIN, *OWN, status=202)
    async with streamed(house, head) as (job, response):
        assert (response.status, response.headers["NVCF-STATUS"]) == (202, "fulfilled")
        assert response.headers.getall("Set-Cookie") == ["a=1", "b=2"]
        assert response.headers["Location"] == "/elsewhere"
        for piece in (b"one", b"\x00\xff"):
            await job.send(piece)
            assert await response.content.readexactly(len(piece)) == piece
        await job.settle(outcome=head)
        assert await response.read() == b""


async def test_the_length_that_the_function_told_is_told(house: House) -> None:
    head = with_headers(PLAIN, ("Content-Length", "6"))
    async with streamed(house, head) as (job, response):
        assert response.headers["Content-Length"] == "6"
        assert "Transfer-Encoding" not in response.headers
        await job.send(b"abc", b"def")
        await job.settle(outcome=head)
        assert await response.read() == b"abcdef"


@pytest.mark.parametrize("told", [(), (("Content-Length", "6"),)])
async def test_a_body_that_is_cut_off_does_not_look_whole(house: House, told: tuple[tuple[str, str], ...]) -> None:
    async with streamed(house, with_headers(PLAIN, *told)) as (job, response):
        await job.send(b"abc")
        await job.settle(RequestState.ERRORED, Outcome(status=500, body=b"cut"))
        with pytest.raises(ClientPayloadError):
            await response.read()


async def test_events_of_a_function_in_its_own_name_are_bytes_like_any_other(house: House) -> None:
    async with streamed(house, EVENTS, Accept="text/event-stream", **{"Last-Event-ID": "7"}) as (job, response):
        assert dict(job.job.headers)["Last-Event-ID"] == "7"
        await job.send(b"data: 1\n\n")
        # Of a later reader of ours, the silence has been long enough for a sign of life.
        path = f"{NVCF}/pexec/status/{job.job.id}"
        async with house.client.get(path, headers={"Accept": "text/event-stream"}) as ours:
            await ours.content.readuntil(b": keep-alive\n\n")
        await job.send(b"id: 8\ndata: 2\n\n")
        await job.settle(outcome=EVENTS)
        assert await response.read() == b"data: 1\n\nid: 8\ndata: 2\n\n"


async def test_events_that_are_cut_off_have_no_event_of_ours(house: House) -> None:
    async with streamed(house, EVENTS) as (job, response):
        await job.send(b"data: 1\n\n")
        await job.settle(RequestState.ERRORED, Outcome(status=500, body=b"cut"))
        assert await response.content.readany() == b"data: 1\n\n"
        with pytest.raises(ClientPayloadError):
            await response.read()


async def test_who_asks_again_is_handed_on_what_is_too_large_to_wait_for(tmp_path: Path) -> None:
    whole = b"".join(bytes([number]) * 1024 for number in range(200))
    async with opened(tmp_path, stream_bytes=64 * 1024) as house, asyncio.timeout(20):
        _, headers, _ = await get(house, headers=NOW)
        path = f"{NVCF}/pexec/status/{headers['NVCF-REQID']}"
        async with work(house) as job, asyncio.TaskGroup() as group:
            asking = group.create_task(house.client.get(path))
            head = with_headers(PLAIN, *OWN)
            await job.begin(head)
            async with await asking as response:
                assert (response.status, response.headers["X-Own"]) == (200, "1")
                assert not {"Location", "Set-Cookie"} & set(response.headers)
                received = bytearray()
                for at in range(0, len(whole), 1024):
                    await job.send(whole[at : at + 1024])
                    received += await response.content.readexactly(1024)
                await job.settle(outcome=head)
                assert await response.read() == b""
        assert received == whole
        async with house.client.get(path) as late:
            assert (late.status, slug(await late.read())) == (410, "stream-not-kept")


async def test_what_is_kept_of_a_stream_can_be_read_again(house: House) -> None:
    async with streamed(house) as (job, response):
        await job.send(b"small")
        await job.settle(outcome=PLAIN)
        assert await response.read() == b"small"
        request_id = response.headers["NVCF-REQID"]
    async with house.client.get(f"{NVCF}/pexec/status/{request_id}") as again:
        assert (again.status, await again.read()) == (200, b"small")


async def test_a_caller_that_leaves_before_the_answer_leaves_the_request_running(house: House) -> None:
    leaving = asyncio.create_task(get(house))
    await house.some_queued()
    leaving.cancel()
    await asyncio.wait([leaving])
    await house.client.get("/livez")  # seen by the server after the one that was left
    async with work(house) as job:
        flow = await job.writer.append()
        assert (flow.state, flow.unattended_s) == (RequestState.RUNNING, 0)
        await job.settle(outcome=Outcome(status=200, body=b"done"))
    async with house.client.get(f"{NVCF}/pexec/status/{job.job.id}") as response:
        assert await response.read() == b"done"
