"""From POST to result, on both families (contract/invocation.md §2 to §5, as amended by DESIGN §4)."""

from __future__ import annotations

import asyncio
import io
import uuid
import zipfile
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import pytest

from tests.e2e.conftest import (
    MIRROR,
    NVCF,
    QUEUE_LIMIT,
    Gate,
    Mirror,
    Site,
    begun,
    exchange,
    idle,
    invoke_path,
    ordered,
    production_only,
    slug,
)
from tests.house import Caller, Function, Reply

MIB = 1024 * 1024
NOW = {"Prefer": "respond-async"}


# -- bodies and types --------------------------------------------------------------------------

CONTENTS = {
    "json": ("application/json", b'{"a": [1, 2.50, "\xc3\xbc"]}'),
    "every byte": ("application/octet-stream", bytes(range(256))),
    "an image": ("image/png", b"\x89PNG\r\n\x1a\n\x00"),
    "parameters": ('multipart/form-data; boundary="a b"', b"--a b\r\n\r\nx\r\n--a b--\r\n"),
    "text in another charset": ("text/plain; charset=utf-16", "ü".encode("utf-16")),
    "json that is not UTF-8": ("application/json", b'{"a": "\xff\xfe"}'),
    "json nested a million deep": ("application/json", b"[" * 1_000_000),
    "nothing": ("application/json", b""),
    "above what a message carries": ("application/x-large", b"\x00\xff" * (150 * 1024)),
    "just as much as is allowed": ("application/x-large", b"x" * 5 * MIB),
    "what says that it is compressed and is not": ("text/plain", b"plain"),
}


@pytest.mark.parametrize("content", CONTENTS)
async def test_any_bytes_of_any_type_come_and_go_untouched(mirror: Mirror, content: str) -> None:
    content_type, body = CONTENTS[content]
    extra = {"Content-Encoding": "gzip"} if "compressed" in content else {}
    told = await mirror.post(body[: 64 * 1024], {"tell": True}, headers={"Content-Type": content_type})
    assert dict(told.json["headers"])["Content-Type"] == content_type
    answer = await mirror.post(body, headers={"Content-Type": content_type, **extra})
    assert (answer.status, answer.headers["NVCF-STATUS"]) == (200, "fulfilled")
    assert (answer.headers["Content-Type"], answer.body) == (content_type, body)


async def test_a_chunked_body_is_the_same_as_one_with_a_length(mirror: Mirror) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * 100_000

    async with (
        aiohttp.ClientSession() as session,
        session.post(
            mirror.caller.url + mirror.path, data=chunks(), headers={"Authorization": f"Bearer {mirror.caller.key}"}
        ) as response,
    ):
        assert (response.status, await response.read()) == (200, b"x" * 1_000_000)


async def test_a_body_without_a_type_is_json_to_the_function_unless_passed_through(mirror: Mirror) -> None:
    raw = ("nvcf-feature-disable-worker-compatibility", "true")
    for extra, expected in (([], ["application/json"]), ([raw], [])):
        order = list(ordered({"tell": True}).items())
        reply = await exchange(mirror.caller, "POST", mirror.path, headers=order + extra, body=b"{}")
        found = [value for name, value in reply.json["headers"] if name.lower() == "content-type"]
        assert found == expected


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_byte_too_much_is_413_and_points_to_assets(mirror: Mirror, chunked: bool) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(6):
            yield b"x" * MIB

    body: Any = chunks() if chunked else b"x" * (5 * MIB + 1)
    headers = {"Authorization": f"Bearer {mirror.caller.key}"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(mirror.caller.url + mirror.path, data=body, headers=headers) as response,
    ):
        problem = await response.json(content_type="application/problem+json")
    assert response.status == 413
    assert response.headers["Connection"] == "close"
    assert problem["type"] == "urn:fnqueue:problem-details:payload-too-large"
    assert f"{5 * MIB} bytes" in problem["detail"]
    assert "NVCF-INPUT-ASSET-REFERENCES" in problem["detail"]


# -- headers to the function -------------------------------------------------------------------


FORGED = (
    "nvcf-reqid", "NVCF-SUB", "Nvcf-NcaId", "NVCF_NCAID", "NVCF-FUNCTION-NAME", "NVCF-FUNCTION-ID",
    "NVCF-FUNCTION-VERSION-ID", "NVCF-FUNCTION-ASSET-IDS", "NVCF-ASSET-DIR", "NVCF-LARGE-OUTPUT-DIR",
    "NVCF-MAX-RESPONSE-SIZE-BYTES", "NVCF-NSPECTID", "NVCF-BACKEND", "NVCF-INSTANCETYPE", "NVCF-REGION", "NVCF-ENV",
    "NVCF-INVOCATION-REGION", "NVCF-STATUS", "NVCF-PERCENT-COMPLETE",
)  # fmt: skip


async def test_the_function_is_told_who_asks_for_what_and_nothing_of_the_caller_in_its_place(
    site: Site, mirror: Mirror
) -> None:
    forged = dict.fromkeys(FORGED, "forged")
    reply = await mirror.post(b"{}", {"tell": True}, headers={**forged, "NVCF-POLL-SECONDS": "30", "Cookie": "a=b"})
    request_id = reply.request_id
    said = {name: value for name, value in reply.json["headers"] if name.upper().startswith(("NVCF-", "NVCF_"))}
    folders = {name: said.pop(name) for name in ("NVCF-ASSET-DIR", "NVCF-LARGE-OUTPUT-DIR")}
    assert 25 <= int(said.pop("NVCF-POLL-SECONDS")) <= 30
    assert said == {
        "NVCF-REQID": request_id,
        "NVCF-SUB": "admin",
        "NVCF-NCAID": "default",
        "NVCF-FUNCTION-NAME": "under-test",
        "NVCF-FUNCTION-ID": mirror.function.id,
        "NVCF-FUNCTION-VERSION-ID": mirror.function.version_id,
        "NVCF-MAX-RESPONSE-SIZE-BYTES": str(5 * MIB),
        "NVCF-NSPECTID": "",
        "NVCF-BACKEND": "local",
        "NVCF-INSTANCETYPE": "CPU",
        "NVCF-REGION": "here",
        "NVCF-ENV": "local",
        "NVCF-INVOCATION-REGION": "here",
    }
    assert all(folder.endswith(f"/{request_id}") for folder in folders.values())
    assert not {name.lower() for name, _ in reply.json["headers"]} & {"authorization", "cookie", "prefer"}
    assert mirror.caller.key not in reply.body.decode()


async def test_hop_by_hop_headers_and_what_connection_names_stay_here(mirror: Mirror) -> None:
    sent: list[tuple[str, str | bytes]] = [
        *ordered({"tell": True}).items(),
        ("Connection", "keep-alive, X-Private"),
        ("X-Private", "1"),
        ("Keep-Alive", "timeout=5"),
        ("Proxy-Authorization", "Basic YTpi"),
        ("Proxy-Connection", "close"),
        ("TE", "trailers"),
        ("Trailer", "X-Late"),
        ("X-Public", "ü".encode()),
        ("X-Twice", "one"),
        ("X-Twice", "two"),
        ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    ]
    reply = await exchange(mirror.caller, "POST", mirror.path, headers=sent, body=b"{}")
    came = [(name.lower(), value.encode("latin-1").decode()) for name, value in reply.json["headers"]]
    names = [name for name, _ in came]
    for dropped in ("x-private", "keep-alive", "proxy-authorization", "proxy-connection", "te", "trailer"):
        assert dropped not in names
    assert [pair for pair in came if pair[0].startswith(("x-public", "x-twice", "traceparent"))] == [
        ("x-public", "ü"),
        ("x-twice", "one"),
        ("x-twice", "two"),
        ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    ]


async def test_the_function_gets_a_post_at_its_own_path_without_the_callers_query(mirror: Mirror) -> None:
    reply = await mirror.caller.call(
        "POST", f"{mirror.path}?token=secret&x=1", body=b"payload", headers=ordered({"tell": True})
    )
    assert (reply.json["method"], reply.json["path"]) == ("POST", "/v1/mirror")
    assert "secret" not in reply.body.decode()


# -- the function's answer ---------------------------------------------------------------------


async def test_the_functions_headers_reach_the_caller_but_for_what_is_not_its_to_say(mirror: Mirror) -> None:
    raw = b"\r\n".join([
        b"HTTP/1.1 200 Fine",
        b"Content-Type: text/x-own; v=1",
        b"Connection: close, X-Private",
        b"X-Private: 1",
        b"Keep-Alive: timeout=5",
        b"Trailer: X-Late",
        b"X-Public: one",
        b"X-Public: two",
        b"Cache-Control: no-store",
        b"Access-Control-Expose-Headers: x-public",
        b"Access-Control-Allow-Origin: https://elsewhere.example",
        b"NVCF-REQID: forged",
        b"NVCF-STATUS: forged",
        b"nvcf-percent-complete: 7",
        b"Set-Cookie: a=b",
        b"Server: mine",
        b"Location: http://elsewhere.example/",
        b"Content-Length: 2",
        b"",
        b"ok",
    ])  # fmt: skip
    reply = await exchange(mirror.caller, "POST", mirror.path, headers=list(ordered({"raw": raw}).items()))
    assert (reply.status, reply.body) == (200, b"ok")
    headers = multiple(reply)
    assert headers.pop("nvcf-reqid") != ["forged"]
    del headers["date"]
    [timing] = headers.pop("server-timing")
    assert timing.startswith("queue;dur=")
    assert headers == {
        "content-type": ["text/x-own; v=1"],
        "x-public": ["one", "two"],
        "cache-control": ["no-store"],
        "access-control-expose-headers": ["nvcf-reqid, x-public"],
        "nvcf-status": ["fulfilled"],
        "content-length": ["2"],
        "server": ["fnqueue"],
    }


def multiple(reply: Reply) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in reply.headers.items():
        found.setdefault(name.lower(), []).append(value)
    return found


@pytest.mark.parametrize(
    ("container", "status"), [(200, 200), (201, 201), (202, 200), (204, 204), (301, 301), (302, 302), (307, 307)]
)
async def test_what_is_no_error_is_fulfilled_and_a_redirect_leads_nowhere(
    mirror: Mirror, container: int, status: int
) -> None:
    content = b"" if container == 204 else b"told"
    away = [["Location", f"{mirror.caller.url}/health"]]
    reply = await mirror.post(b"{}", {"status": container, "headers": away, "body": content})
    assert (reply.status, reply.headers["NVCF-STATUS"], reply.body) == (status, "fulfilled", content)
    assert "Location" not in reply.headers


@pytest.mark.parametrize(
    ("container", "slug_", "title"),
    [
        (400, "bad-request", "Bad Request"),
        (404, "not-found", "Not Found"),
        (422, "unprocessable-entity", "Unprocessable Entity"),
        (429, "too-many-requests", "Too Many Requests"),
        (499, "", None),
        (500, "internal-server-error", "Internal Server Error"),
        (503, "service-unavailable", "Service Unavailable"),
    ],
)
async def test_an_error_of_the_function_is_a_problem_and_is_not_tried_again(
    mirror: Mirror, container: int, slug_: str, title: str | None
) -> None:
    for body, detail in (
        (b'{"error": "too warm"}', "too warm"),
        (b'{"error": {"code": 1}}', "Inference error"),
        (b"oops", "Inference error"),
    ):
        reply = await mirror.post(b"{}", {"status": container, "body": body})
        assert (reply.status, reply.headers["NVCF-STATUS"]) == (container, "errored")
        assert reply.headers["Content-Type"] == "application/problem+json"
        expected = {
            "type": f"urn:inference-service:problem-details:{slug_}",
            "title": title,
            "status": container,
            "detail": detail,
            "requestId": reply.request_id,
        }
        assert reply.json == {name: value for name, value in expected.items() if value is not None}


@pytest.mark.parametrize(
    "asked", [{"nvcf-feature-disable-worker-compatibility": "true"}, {"Accept": "text/event-stream"}]
)
async def test_passed_through_an_error_keeps_its_body_and_headers(mirror: Mirror, asked: Mapping[str, str]) -> None:
    order = {"status": 418, "headers": [["X-Pot", "short"], ["Content-Type", "text/plain"]], "body": b"no"}
    reply = await mirror.post(b"{}", order, headers=asked)
    assert (reply.status, reply.body, reply.headers["X-Pot"]) == (418, b"no", "short")
    assert (reply.headers["Content-Type"], reply.headers["NVCF-STATUS"]) == ("text/plain", "errored")


@pytest.mark.parametrize(
    "raw",
    [
        b"no HTTP at all\r\n\r\n",
        b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nBad Name: 1\r\nContent-Length: 0\r\n\r\n",
    ],
)
async def test_an_answer_that_is_not_http_is_an_error_and_not_ours(mirror: Mirror, raw: bytes) -> None:
    reply = await mirror.post(b"{}", {"raw": raw})
    assert (reply.status, reply.headers["NVCF-STATUS"]) == (500, "errored")
    assert reply.json["type"] == "urn:inference-connection:problem-details:internal-server-error"


async def test_an_answer_without_a_length_ends_with_its_connection(mirror: Mirror) -> None:
    reply = await mirror.post(b"{}", {"raw": b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nall of it"})
    assert (reply.status, reply.body, reply.headers["Content-Length"]) == (200, b"all of it", "9")


# -- large results -----------------------------------------------------------------------------


async def fetched(site: Site, reply: Reply) -> zipfile.ZipFile:
    """What the link leads to, for somebody without a key."""
    assert (reply.status, reply.body, reply.headers["NVCF-STATUS"]) == (302, b"", "fulfilled")
    async with aiohttp.ClientSession() as anybody, anybody.get(reply.headers["Location"]) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/zip"
        return zipfile.ZipFile(io.BytesIO(await response.read()))


async def test_an_answer_above_five_mebibytes_is_a_zip_behind_a_signed_link(site: Site, mirror: Mirror) -> None:
    exactly = await mirror.post(b"{}", {"size_bytes": 5 * MIB})
    assert (exactly.status, len(exactly.body)) == (200, 5 * MIB)
    reply = await mirror.post(b"{}", {"size_bytes": 5 * MIB + 1})
    archive = await fetched(site, reply)
    assert archive.namelist() == [f"{reply.request_id}.response"]
    assert archive.read(f"{reply.request_id}.response") == b"m" * (5 * MIB + 1)
    again = await mirror.caller.status(reply.request_id)
    assert (await fetched(site, again)).namelist() == archive.namelist()


async def test_files_of_the_function_come_with_its_answer_in_a_zip(site: Site, mirror: Mirror) -> None:
    files = {"a.txt": "A", "deep/er/b.txt": "B", "progress": "{}", "half.partial": "no"}
    reply = await mirror.post(b"the answer", {"files": files})
    archive = await fetched(site, reply)
    assert {name: archive.read(name) for name in archive.namelist()} == {
        f"{reply.request_id}.response": b"the answer",
        "a.txt": b"A",
        "deep/er/b.txt": b"B",
    }


async def test_a_link_that_was_changed_is_refused(site: Site, mirror: Mirror) -> None:
    location = (await mirror.post(b"x", {"files": {"a": "A"}})).headers["Location"]
    async with aiohttp.ClientSession() as anybody:
        for changed in (location[:-4] + "0000", location.replace(".zip", ".zap", 1), location.partition("?")[0]):
            async with anybody.get(changed) as response:
                assert response.status in (400, 403), changed


# -- waiting and polling -----------------------------------------------------------------------


async def test_a_request_is_pending_then_in_progress_then_done(
    caller: Caller, recorder: Function, gate: Gate, site: Site
) -> None:
    first = await begun(caller, recorder, gate.order())
    accepted = await caller.invoke(recorder.id, gate.order(), wait_s=1)
    seen = [accepted, await caller.status(accepted.request_id), await caller.status(first)]
    for reply, status in zip(seen, ("pending-evaluation", "pending-evaluation", "in-progress"), strict=True):
        assert (reply.status, reply.body, reply.headers["NVCF-STATUS"]) == (202, b"", status)
        assert reply.headers["Retry-After"] == "1"
        assert reply.headers["Location"] == f"{caller.url}{NVCF}/pexec/status/{reply.request_id}"
        assert reply.headers["Access-Control-Expose-Headers"] == "nvcf-reqid"
        assert reply.headers["Content-Length"] == "0"
        assert "Content-Type" not in reply.headers
    gate.open()
    for request_id in (first, accepted.request_id):
        reply = await caller.result(request_id)
        assert (reply.status, reply.json["id"], reply.request_id) == (200, request_id, request_id)
        assert reply.headers["NVCF-STATUS"] == "fulfilled"


async def test_a_result_is_read_again_and_again_and_never_changes(mirror: Mirror) -> None:
    for order in ({"status": 201}, {"status": 500}):
        first = await mirror.post(b"once", order)
        for _ in range(3):
            again = await mirror.caller.status(first.request_id.upper())
            for reply in (first, again):
                assert reply.request_id == first.request_id
            assert (again.status, again.body) == (first.status, first.body)
            assert again.headers["NVCF-STATUS"] == first.headers["NVCF-STATUS"]
            assert again.headers["Content-Type"] == first.headers["Content-Type"]


async def test_a_poll_is_answered_as_soon_as_there_is_a_result(caller: Caller, recorder: Function, gate: Gate) -> None:
    request_id = await begun(caller, recorder, gate.order())
    polls = [asyncio.create_task(caller.status(request_id, wait_s=30)) for _ in range(5)]
    await asyncio.wait(polls, timeout=0.5)
    assert not any(poll.done() for poll in polls)
    gate.open()
    replies = await asyncio.wait_for(asyncio.gather(*polls), 20)
    assert {(reply.status, reply.body) for reply in replies} == {(200, replies[0].body)}


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("0", True),
        ("1", True),
        ("3600", True),
        *((text, False) for text in ("3601", "-1", "1000000000", "1e9", "a", "1.5", "")),
    ],
)
async def test_poll_seconds_are_whole_seconds_up_to_an_hour(mirror: Mirror, text: str, good: bool) -> None:
    posted = await mirror.post(headers={"NVCF-POLL-SECONDS": text})
    done = posted.request_id if posted.status == 200 else str(uuid.uuid4())
    polled = await mirror.caller.call("GET", f"{NVCF}/pexec/status/{done}", headers={"NVCF-POLL-SECONDS": text})
    for reply in (posted, polled):
        if good:
            assert reply.status == 200
        else:
            assert (reply.status, reply.json["detail"]) == (400, "failed to parse poll duration")


async def test_prefer_says_how_long_to_wait_too(caller: Caller, recorder: Function, gate: Gate) -> None:
    await begun(caller, recorder, gate.order())
    for preference, applied in (("respond-async", "respond-async"), ("wait=1", "wait=1")):
        reply = await caller.call(
            "POST", invoke_path(recorder), data=gate.order(), headers={"Prefer": preference}, timeout_s=5
        )
        assert (reply.status, reply.headers["Preference-Applied"]) == (202, applied)
        assert (await caller.cancel(reply.request_id)).status == 202


async def test_who_asks_for_504_gets_it_while_queued_and_the_request_is_removed(
    site: Site, caller: Caller, recorder: Function, gate: Gate
) -> None:
    asks = {"nvcf-feature-enable-gateway-timeout": "true"}
    running = await caller.invoke(recorder.id, gate.order(), wait_s=1, headers=asks)
    assert (running.status, running.headers["NVCF-STATUS"]) == (202, "in-progress")
    name = str(uuid.uuid4())
    queued = await caller.invoke(recorder.id, {"id": name}, wait_s=1, headers=asks)
    assert (queued.status, queued.headers["NVCF-STATUS"], queued.body) == (504, "errored", b"")
    assert (await caller.depth(recorder.id)).json["queues"][0]["queueDepth"] == 0
    gone = await caller.status(queued.request_id)
    assert (gone.status, slug(gone)) == (410, "request-cancelled")
    gate.open()
    await idle(caller, recorder)
    assert site.record.counts("start")[name] == 0


async def test_a_caller_that_leaves_does_not_take_its_request_along(
    site: Site, caller: Caller, recorder: Function, gate: Gate
) -> None:
    name = str(uuid.uuid4())
    leaving = asyncio.create_task(caller.invoke(recorder.id, gate.order(id=name)))
    await site.record.saw("start", name)
    leaving.cancel()
    await asyncio.wait([leaving])
    gate.open()
    await site.record.saw("done", name)
    assert site.record.counts("aborted")[name] == 0


# -- repeats and refusals ----------------------------------------------------------------------


async def test_a_key_joins_repeats_to_one_request_and_refuses_another_body(mirror: Mirror) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    first = await mirror.post(b"one", headers=key)
    again = await mirror.post(b"one", headers=key)
    assert (again.status, again.request_id, again.body) == (200, first.request_id, b"one")
    other = await mirror.post(b"two", headers=key)
    assert (other.status, slug(other)) == (422, "idempotency-key-reused")
    assert "NVCF-REQID" not in other.headers


async def test_repeats_at_the_same_time_run_once(site: Site, caller: Caller, recorder: Function) -> None:
    name = str(uuid.uuid4())
    replies = await asyncio.gather(
        *(caller.invoke(recorder.id, {"id": name}, headers={"Idempotency-Key": name}) for _ in range(16))
    )
    assert {(reply.status, reply.request_id) for reply in replies} == {(200, replies[0].request_id)}
    assert site.record.counts("start")[name] == 1


async def test_a_full_queue_is_429_and_what_was_refused_never_runs(
    site: Site, caller: Caller, recorder: Function, gate: Gate
) -> None:
    await begun(caller, recorder, gate.order())
    waiting = [await caller.submit(recorder.id, gate.order()) for _ in range(QUEUE_LIMIT)]
    name = str(uuid.uuid4())
    for headers in ({}, NOW, {"Idempotency-Key": name}):
        refused = await caller.invoke(recorder.id, {"id": name}, headers=headers)
        assert (refused.status, slug(refused), refused.headers["Retry-After"]) == (429, "queue-full", "1")
        assert "NVCF-REQID" not in refused.headers
    assert (await caller.depth(recorder.id)).json["queues"][0]["queueDepth"] == QUEUE_LIMIT
    gate.open()
    for request_id in waiting:
        assert (await caller.result(request_id)).status == 200
    assert site.record.counts("start")[name] == 0
    accepted = await caller.invoke(recorder.id, {"id": name}, headers={"Idempotency-Key": name})
    assert (accepted.status, accepted.json["id"]) == (200, name)


# -- who may -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["", "wrong", "nvapi-" + "x" * 43])
async def test_without_a_good_key_nothing_is_invoked_or_polled(site: Site, mirror: Mirror, key: str) -> None:
    async with site.caller(key) as nobody:
        for method, path in (("POST", mirror.path), ("GET", f"{NVCF}/pexec/status/{uuid.uuid4()}")):
            reply = await nobody.call(method, path, body=b"{}" if method == "POST" else None)
            assert (reply.status, slug(reply)) == (401, "unauthorized")
            assert reply.headers["WWW-Authenticate"] == "Bearer"
            assert reply.headers["Content-Type"] == "application/problem+json"


@production_only
async def test_what_is_anothers_reads_like_what_never_was(mirror: Mirror, stranger: Caller) -> None:
    unknown = f"{NVCF}/pexec/functions/{uuid.uuid4()}"
    done = (await mirror.post()).request_id
    for foreign, nobodys in (
        (("POST", mirror.path), ("POST", unknown)),
        (("POST", f"{mirror.path}/versions/{mirror.function.version_id}"), ("POST", f"{mirror.path}/versions/{done}")),
        (("GET", f"{NVCF}/pexec/status/{done}"), ("GET", f"{NVCF}/pexec/status/{uuid.uuid4()}")),
    ):
        seen = [await stranger.call(method, path) for method, path in (foreign, nobodys)]
        assert [reply.status for reply in seen] == [404, 404]
        assert seen[0].body == seen[1].body


@production_only
async def test_an_idempotency_key_belongs_to_an_account(site: Site, mirror: Mirror, stranger: Caller) -> None:
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    mine = await mirror.post(b"same", headers=headers)
    async with site.caller(await site.new_key("default", "invoke_function")) as colleague:
        assert (await mirror.post(b"same", headers=headers, caller=colleague)).request_id == mine.request_id
    theirs = Mirror(await stranger.deploy(MIRROR), stranger)
    try:
        reply = await theirs.post(b"other", headers=headers)
        assert (reply.status, reply.body) == (200, b"other")
        assert reply.request_id != mine.request_id
    finally:
        await theirs.function.undeploy()


@production_only
async def test_a_key_without_the_scope_is_403(site: Site, mirror: Mirror) -> None:
    async with site.caller(await site.new_key("default", "queue_details", "list_functions")) as reader:
        refused = [
            await mirror.post(caller=reader),
            await reader.call("GET", f"{NVCF}/pexec/status/{uuid.uuid4()}"),
            await reader.cancel(str(uuid.uuid4())),
        ]
        for reply in refused:
            assert (reply.status, slug(reply)) == (403, "forbidden")
            assert "invoke_function" in reply.json["detail"]
        assert (await reader.depth(mirror.function.id)).status == 200
