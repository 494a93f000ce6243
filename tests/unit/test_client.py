"""What the client says to a server, and what it makes of the answers. The servers of tests/e2e are real ones."""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from fnqueue import errors
from fnqueue.client import AsyncClient, Download, Upload
from fnqueue.errors import (
    ConnectionFailed,
    FunctionFailed,
    NotFound,
    QueueFull,
    RequestCancelled,
    ServerFailed,
    StreamCut,
    TimedOut,
    UnknownFunction,
)
from fnqueue.events import Done, Eta, Queued, Running
from fnqueue.inputs import File
from tests.unit.service import (
    ASSET_ID,
    FUNCTION_ID,
    KEY,
    REQUEST_ID,
    Service,
    ended,
    event,
    events,
    hang_up,
    never,
    pending,
    problem,
    serving,
)

PEXEC = f"POST /pexec/functions/{FUNCTION_ID}"
STATUS = f"GET /pexec/status/{REQUEST_ID}"
EVENTS = f"GET /requests/{REQUEST_ID}/events"


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with serving() as found:
        yield found


@pytest.fixture
async def client(service: Service) -> AsyncIterator[AsyncClient]:
    async with service.client() as found:
        yield found


# -- handing in --------------------------------------------------------------------------------


async def test_a_request_is_handed_in_without_waiting_for_it(service: Service, client: AsyncClient) -> None:
    service.will(pending())
    handle = await client.function(FUNCTION_ID, queue_timeout_s=9.5, headers={"X-Mine": "1"}).spawn(message="hello")
    [call] = service.heard
    assert handle.id == REQUEST_ID
    assert json.loads(call.body) == {"message": "hello"}
    assert call.headers["Prefer"] == "respond-async"
    assert call.headers["Authorization"] == f"Bearer {KEY}"
    assert (call.headers["NVCF-QUEUE-TIMEOUT-SECONDS"], call.headers["X-Mine"]) == ("10", "1")
    assert len(call.headers["Idempotency-Key"]) == 36


async def test_a_callback_is_of_a_function_or_of_one_request(service: Service, client: AsyncClient) -> None:
    service.will(pending(), pending())
    function = client.function(FUNCTION_ID, callback="https://example.com/all")
    await function.spawn(message="hello")
    await function.spawn(message="hello", callback="none")
    told = [call.headers["NVCF-CALLBACK-URL"] for call in service.heard]
    assert told == ["https://example.com/all", "none"]


async def test_what_fails_on_the_way_is_repeated_under_the_same_key(service: Service, client: AsyncClient) -> None:
    service.will(hang_up, problem(503, **{"Retry-After": "3"}), problem(502), pending())
    await client.function(FUNCTION_ID).spawn(message="hello")
    assert service.calls == [PEXEC] * 4
    assert len({call.headers["Idempotency-Key"] for call in service.heard}) == 1
    assert len({call.body for call in service.heard}) == 1
    assert service.slept[1] >= 3.0


async def test_two_calls_have_two_keys_and_one_that_is_given_is_used(service: Service, client: AsyncClient) -> None:
    service.will(pending(), pending(), pending())
    function = client.function(FUNCTION_ID)
    await function.spawn()
    await function.spawn()
    await function.spawn(idempotency_key="order-17")
    keys = [call.headers["Idempotency-Key"] for call in service.heard]
    assert len(set(keys)) == 3
    assert keys[2] == "order-17"


async def test_a_refusal_is_raised_once_its_time_is_over(service: Service) -> None:
    service.will(problem(429, "queue-full", **{"Retry-After": "7"}))
    async with service.client(retry_for_s=5.0) as client:
        with pytest.raises(QueueFull) as refused:
            await client.function(FUNCTION_ID).spawn()
    assert refused.value.retry_after_s == 7.0
    assert service.slept == []


async def test_what_cannot_go_well_is_raised_at_once(service: Service, client: AsyncClient) -> None:
    service.will(problem(422, "idempotency-key-reused"))
    with pytest.raises(errors.IdempotencyKeyReused, match="because"):
        await client.function(FUNCTION_ID).spawn(idempotency_key="used")
    assert len(service.heard) == 1


async def test_nobody_there_is_an_error_that_names_no_more_than_the_host() -> None:
    async with AsyncClient("http://127.0.0.1:9", KEY, retry_for_s=0.0) as client:
        with pytest.raises(ConnectionFailed, match=r"^http://127\.0\.0\.1:9: ") as failed:
            await client.function(FUNCTION_ID).spawn()
    assert KEY not in str(failed.value)


async def test_a_server_that_is_none_is_told_from_one(service: Service, client: AsyncClient) -> None:
    service.will(web.Response(text="<html>hello</html>"), web.Response(text="<html>hello</html>"))
    with pytest.raises(ServerFailed, match="hello"):
        await client.function(FUNCTION_ID).spawn()
    with pytest.raises(ServerFailed, match="hello"):
        await client.assets()


async def test_a_time_limit_ends_a_call_that_is_not_answered(service: Service, client: AsyncClient) -> None:
    service.will(never)
    with pytest.raises(TimedOut):
        await client.function(FUNCTION_ID).spawn(timeout_s=0.05)


async def test_cancelling_closes_the_connection_and_leaves_the_client_usable(
    service: Service, client: AsyncClient
) -> None:
    service.will(never, ended("later"))
    waiting = asyncio.ensure_future(client.handle(REQUEST_ID).get())
    await service.heard_of(1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.wait_for(service.left.wait(), 30)
    assert (await client.handle(REQUEST_ID).get()).json() == "later"


@pytest.mark.parametrize("key", ["", "two\nlines", "schlüssel", "k" * 256])
async def test_a_key_that_is_none_is_refused_before_anything_is_sent(client: AsyncClient, key: str) -> None:
    with pytest.raises(ValueError, match="1 to 255 printable ASCII"):
        await client.function(FUNCTION_ID).spawn(idempotency_key=key)


@pytest.mark.parametrize("value", ["two\nlines", "schlüssel"])
async def test_what_cannot_be_a_header_is_no_failure_of_the_connection(client: AsyncClient, value: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be sent|ascii"):
        await client.function(FUNCTION_ID, headers={"X-Mine": value}).spawn()


async def test_input_is_one_value_or_fields_and_not_both(client: AsyncClient) -> None:
    with pytest.raises(TypeError, match="not as both"):
        await client.function(FUNCTION_ID).spawn({"a": 1}, b=2)


# -- names -------------------------------------------------------------------------------------


def functions(*rows: tuple[str, str, str]) -> web.Response:
    return web.json_response({"functions": [{"id": i, "name": n, "status": s} for i, n, s in rows]})


async def test_a_name_is_looked_up_once(service: Service, client: AsyncClient) -> None:
    service.will(functions((FUNCTION_ID, "ocr", "ACTIVE"), (ASSET_ID, "ocr", "INACTIVE")), pending(), pending())
    await client.function("ocr").spawn()
    await client.function("ocr").spawn()
    assert service.calls == ["GET /functions?visibility=private", PEXEC, PEXEC]


async def test_a_name_whose_function_is_gone_is_looked_up_again(service: Service, client: AsyncClient) -> None:
    gone = problem(404, "not-found")
    service.will(functions((ASSET_ID, "ocr", "ACTIVE")), gone, functions((FUNCTION_ID, "ocr", "ACTIVE")), pending())
    await client.function("ocr").spawn()
    assert service.calls[-1] == PEXEC


async def test_an_id_that_is_unknown_is_not_asked_for_twice(service: Service, client: AsyncClient) -> None:
    service.will(problem(404, "not-found"))
    with pytest.raises(NotFound):
        await client.function(FUNCTION_ID).spawn()


async def test_a_name_that_several_have_names_them(service: Service, client: AsyncClient) -> None:
    service.will(functions((FUNCTION_ID, "ocr", "ACTIVE"), (ASSET_ID, "ocr", "ACTIVE")))
    with pytest.raises(UnknownFunction, match=f"{ASSET_ID}, {FUNCTION_ID}"):
        await client.function("ocr").spawn()


async def test_what_others_share_is_found_after_what_is_ones_own(service: Service, client: AsyncClient) -> None:
    service.will(functions(), functions((FUNCTION_ID, "ocr", "ACTIVE")), pending(), functions(), functions())
    await client.function("ocr").spawn()
    with pytest.raises(UnknownFunction, match="'none'"):
        await client.function("none").spawn()


# -- waiting -----------------------------------------------------------------------------------


async def test_polls_are_no_faster_than_told(service: Service, client: AsyncClient) -> None:
    service.will(pending(**{"Retry-After": "4"}), pending(**{"Retry-After": "2"}), ended({"text": "hi"}))
    result = await client.handle(REQUEST_ID).get()
    assert result.json() == {"text": "hi"}
    assert service.slept == [4.0, 2.0]
    assert service.calls == [STATUS] * 3


async def test_a_poll_comes_sooner_when_the_server_tells_that_there_is_a_result(
    service: Service, client: AsyncClient
) -> None:
    service.tells = True
    done = events(event("started", "1.0", attempt=1), event("done", "1.0.done", status="fulfilled", statusCode=200))
    service.will(pending(**{"Retry-After": "600"}), done, ended("told"))
    handle = await client.function(FUNCTION_ID).spawn()
    assert (await handle.get()).json() == "told"
    assert service.calls == [PEXEC, EVENTS, STATUS]
    assert service.slept == []


async def test_one_call_is_enough_for_a_result_that_comes_soon(service: Service, client: AsyncClient) -> None:
    service.will(ended("at once"))
    result = await client.function(FUNCTION_ID).run(message="hello")
    assert (result.json(), result.request_id) == ("at once", REQUEST_ID)
    assert 1 <= int(service.heard[0].headers["NVCF-POLL-SECONDS"]) <= 60


async def test_the_server_answers_before_the_caller_gives_up(service: Service, client: AsyncClient) -> None:
    """So that whoever does knows which request goes on."""
    service.will(*(each for _ in range(2) for each in (pending(), ended("later"))))
    await client.function(FUNCTION_ID).run(timeout_s=1.9)
    await client.function(FUNCTION_ID).run(timeout_s=40.0)
    little, much = (service.heard[at].headers for at in (0, 2))
    assert little["Prefer"] == "respond-async"
    assert int(much["NVCF-POLL-SECONDS"]) < 40


async def test_a_wait_that_breaks_is_taken_up_again(service: Service, client: AsyncClient) -> None:
    service.will(hang_up, pending(), hang_up, problem(503), ended("after all"))
    assert (await client.function(FUNCTION_ID).run()).json() == "after all"
    assert service.calls == [PEXEC] * 2 + [STATUS] * 3


async def test_a_wait_that_takes_too_long_says_which_request_goes_on(service: Service, client: AsyncClient) -> None:
    service.will(never)
    with pytest.raises(TimeoutError, match=REQUEST_ID) as over:
        await client.handle(REQUEST_ID).get(timeout_s=0.05)
    assert isinstance(over.value, TimedOut)
    assert over.value.request_id == REQUEST_ID


async def test_an_error_of_the_function_is_raised_with_what_it_said(service: Service, client: AsyncClient) -> None:
    service.will(ended({"error": "no text"}, status=422), web.json_response({"type": "x"}, status=410))
    with pytest.raises(FunctionFailed, match="no text") as failed:
        await client.handle(REQUEST_ID).get()
    assert (failed.value.status, failed.value.request_id) == (422, REQUEST_ID)


async def test_cancelling_what_has_ended_is_no_error(service: Service, client: AsyncClient) -> None:
    service.will(web.json_response({}, status=202), problem(409, "conflict"))
    handle = client.handle(REQUEST_ID)
    assert [await handle.cancel(), await handle.cancel()] == [True, False]


async def test_an_id_that_is_none_never_becomes_a_path(client: AsyncClient) -> None:
    for wrong in ("", "../admin", f"{REQUEST_ID}/x"):
        with pytest.raises(ValueError, match="not an ID"):
            client.handle(wrong)


# -- large results -----------------------------------------------------------------------------


def archive() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as found:
        found.writestr(f"{REQUEST_ID}.response", b'{"pages": 2}')
        found.writestr("pages/1.txt", b"one")
        found.writestr("pages/2.txt", b"two")
    return packed.getvalue()


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def elsewhere(service: Service, **headers: str) -> web.Response:
    return ended(status=302, Location=f"{service.url}/blobs/result.zip?signature=s", **headers)


async def test_a_large_result_is_fetched_without_the_key(service: Service, client: AsyncClient, tmp_path: Path) -> None:
    service.will(elsewhere(service), web.Response(body=archive(), content_type="application/zip"))
    with await client.handle(REQUEST_ID).get() as result:
        assert result.json() == {"pages": 2}
        assert result.files == ["pages/1.txt", "pages/2.txt"]
        assert result.read("pages/2.txt") == b"two"
        with pytest.raises(KeyError):
            result.read(f"{REQUEST_ID}.response")
        assert result.save(tmp_path / "answer.json") == tmp_path / "answer.json"
        assert len(result.extract(tmp_path / "out")) == 2
    assert contents(tmp_path) == {"answer.json": '{"pages": 2}', "out/pages/1.txt": "one", "out/pages/2.txt": "two"}
    assert "Authorization" not in service.heard[1].headers


async def test_a_download_that_breaks_goes_on_where_it_was(service: Service, client: AsyncClient) -> None:
    content = archive()

    async def half(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(content)), "ETag": '"v1"'})
        await response.prepare(request)
        await response.write(content[:100])
        return await hang_up(request)

    async def rest(request: web.Request) -> web.StreamResponse:
        assert request.headers["If-Range"] == '"v1"'
        assert request.headers["Range"] == "bytes=100-"
        return web.Response(status=206, body=content[100:], headers={"ETag": '"v1"'})

    async def replaced(request: web.Request) -> web.StreamResponse:
        return web.Response(body=content)

    for second in (rest, replaced):
        told: list[Download] = []
        service.will(elsewhere(service), half, second)
        with await client.handle(REQUEST_ID).get(progress=told.append) as result:
            assert result.json() == {"pages": 2}
        assert {each.size_bytes for each in told} == {len(content)}
        assert [each.received_bytes for each in told] == [100, len(content)]


async def test_a_link_that_has_expired_is_asked_for_again(service: Service, client: AsyncClient) -> None:
    service.will(elsewhere(service), web.Response(status=403), elsewhere(service), web.Response(body=archive()))
    with await client.handle(REQUEST_ID).get() as result:
        assert result.files
    assert service.calls.count(STATUS) == 2


# -- files -------------------------------------------------------------------------------------


def made(service: Service) -> web.Response:
    return web.json_response(
        {
            "assetId": ASSET_ID,
            "uploadUrl": f"{service.url}/blobs/input?signature=s",
            "contentType": "image/png",
            "description": "a.png",
        }
    )


async def test_a_large_file_is_uploaded_named_and_deleted_in_the_end(
    service: Service, client: AsyncClient, tmp_path: Path
) -> None:
    content, picture = b"p" * 3_000_000, tmp_path / "a.png"
    picture.write_bytes(content)
    told: list[Upload] = []
    service.will(made(service), hang_up, web.Response(), pending(), ended("read"), web.Response(status=204))
    async with service.client(max_body_bytes=1000) as small:
        handle = await small.function(FUNCTION_ID).spawn(image=picture, progress=told.append)
        assert (await handle.get()).json() == "read"
    create, _, put, post, _, delete = service.heard
    assert json.loads(create.body) == {"contentType": "image/png", "description": "a.png"}
    assert (put.method, put.path, put.body) == ("PUT", "/blobs/input?signature=s", content)
    assert (put.headers["Content-Type"], put.headers["x-amz-meta-nvcf-asset-description"]) == ("image/png", "a.png")
    assert put.headers["Content-Length"] == "3000000"
    assert "Authorization" not in put.headers
    assert post.headers["NVCF-INPUT-ASSET-REFERENCES"] == ASSET_ID
    assert json.loads(post.body) == {"image": f"data:image/png;asset_id,{ASSET_ID}"}
    assert (delete.method, delete.path) == ("DELETE", f"/v2/nvcf/assets/{ASSET_ID}")
    assert told[-1] == Upload(name="a.png", sent_bytes=3_000_000, size_bytes=3_000_000)


async def test_a_file_under_a_key_is_the_same_asset_after_a_crash(service: Service, client: AsyncClient) -> None:
    file = File(b"p", "image/png", "a.png", upload=True)

    def there() -> web.Response:
        return web.json_response({"asset": {"assetId": ASSET_ID}})

    service.will(made(service), problem(404, "not-found"), web.Response(), pending(), made(service), there(), pending())
    function = client.function(FUNCTION_ID)
    await function.spawn(file, idempotency_key="order-17")
    await function.spawn(file, idempotency_key="order-17")
    creates = [call for call in service.heard if call.path.endswith("/assets")]
    assert len({call.headers["Idempotency-Key"] for call in creates}) == 1
    assert [call.method for call in service.heard].count("PUT") == 1
    service.will(made(service), there(), pending())
    await function.spawn(File(b"q", "image/png", "a.png", upload=True), idempotency_key="order-17")
    assert service.heard[-3].headers["Idempotency-Key"] != creates[0].headers["Idempotency-Key"]


async def test_the_files_of_a_dead_request_stay_for_its_redrive(service: Service, client: AsyncClient) -> None:
    service.will(made(service), web.Response(), pending())
    handle = await client.function(FUNCTION_ID).spawn(File(b"p", upload=True))
    body = {"type": "urn:fnqueue:problem-details:request-dead", "cause": "attempts-exhausted"}
    service.will(ended(body, status=500))
    with pytest.raises(errors.RequestDead) as dead:
        await handle.get()
    assert dead.value.cause == "attempts-exhausted"
    assert service.calls[-1] == STATUS


async def test_the_files_of_a_refused_request_are_deleted_unless_its_key_may_have_led_to_another(
    service: Service, client: AsyncClient
) -> None:
    file, refused = File(b"p", upload=True), [problem(403, "forbidden") for _ in range(2)]
    service.will(made(service), web.Response(), refused[0], web.Response(status=204))
    with pytest.raises(errors.Forbidden):
        await client.function(FUNCTION_ID).spawn(file)
    assert service.calls[-1] == f"DELETE /assets/{ASSET_ID}"
    service.will(made(service), problem(404, "not-found"), web.Response(), refused[1])
    with pytest.raises(errors.Forbidden):
        await client.function(FUNCTION_ID).spawn(file, idempotency_key="order-17")
    assert service.calls[-1] == PEXEC


async def test_an_asset_that_was_tidied_away_is_uploaded_again(service: Service, client: AsyncClient) -> None:
    gone = problem(404, "not-found")
    service.will(made(service), web.Response(), gone, web.Response(status=204))
    service.will(made(service), web.Response(), pending())
    await client.function(FUNCTION_ID).spawn(File(b"p", upload=True))
    assert service.calls.count("POST /assets") == 2


# -- events and streams ------------------------------------------------------------------------


async def test_events_go_on_behind_the_last_one_when_the_connection_breaks(
    service: Service, client: AsyncClient
) -> None:
    service.tells = True
    queued = event("queued", positionInQueue=2, queueLength=5, eta={"p50Seconds": 4.5, "p90Seconds": 9})
    service.will(
        events("retry: 1500\n\n", queued, event("started", "1.0", attempt=1), cut=True),
        problem(503, **{"Retry-After": "9"}),
        events(event("progress", "1.1", attempt=1, percentComplete=40, partialResponse={"text": "so"})),
        events(": keep-alive\n\n", event("new-kind"), event("done", "1.1.done", status="fulfilled", statusCode=200)),
    )
    found = [each async for each in client.handle(REQUEST_ID).events()]
    assert found == [
        Queued(position=2, length=5, eta=Eta(p50_s=4.5, p90_s=9.0)),
        Running(attempt=1),
        Running(attempt=1, percent=40, partial={"text": "so"}),
        Done(status="fulfilled", status_code=200),
    ]
    assert service.calls == [EVENTS] * 4
    assert [call.headers.get("Last-Event-ID") for call in service.heard] == [None, "1.0", "1.0", "1.1"]
    assert service.slept[0] >= 1.5
    assert service.slept[1] >= 9.0


async def test_listening_has_a_limit(service: Service, client: AsyncClient) -> None:
    service.tells = True
    service.will(never)
    with pytest.raises(TimedOut):
        await anext(client.handle(REQUEST_ID).events(timeout_s=0.05))


async def test_a_stream_goes_on_behind_its_last_event(service: Service, client: AsyncClient) -> None:
    service.will(
        pending(),
        pending(**{"Retry-After": "2"}),
        events("data: one\nid: fnq-1-0\n\n", "event: word\ndata: two\nid: fnq-1-9\n\n", "data: cut off", cut=True),
        events("data: three\nid: fnq-1-20\n\n"),
    )
    found = [each async for each in client.function(FUNCTION_ID).stream(prompt="hello")]
    assert [(each.event, each.data) for each in found] == [("message", "one"), ("word", "two"), ("message", "three")]
    assert service.calls == [PEXEC] + [STATUS] * 3
    assert {call.headers["Accept"] for call in service.heard} == {"text/event-stream"}
    assert service.heard[-1].headers["Last-Event-ID"] == "fnq-1-9"


async def test_a_stream_that_broke_off_for_good_ends_with_its_reason(service: Service, client: AsyncClient) -> None:
    told = {"type": "urn:fnqueue:problem-details:stream-cut", "status": 502, "requestId": REQUEST_ID, "detail": "lost"}
    own = 'event: error\ndata: {"mine": true}\nid: a\n\n'
    service.will(events(own, f"event: error\ndata: {json.dumps(told)}\nid: b\n\n"))
    stream = client.handle(REQUEST_ID).stream()
    assert (await anext(stream)).json() == {"mine": True}
    with pytest.raises(StreamCut, match="lost"):
        await anext(stream)


async def test_an_answer_that_is_no_stream_is_one_event(service: Service, client: AsyncClient) -> None:
    service.will(ended({"text": "whole"}))
    assert [each.json() async for each in client.handle(REQUEST_ID).stream()] == [{"text": "whole"}]
    service.will(ended({"type": "urn:fnqueue:problem-details:request-cancelled"}, status=410))
    with pytest.raises(RequestCancelled):
        _ = [each async for each in client.handle(REQUEST_ID).stream()]


async def test_leaving_a_stream_closes_its_connection(service: Service, client: AsyncClient) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: one\nid: 1\n\n")
        return await never(request)

    service.will(endless)
    stream = client.handle(REQUEST_ID).stream()
    assert (await anext(stream)).data == "one"
    await stream.aclose()
    await asyncio.wait_for(service.left.wait(), 30)


# -- many --------------------------------------------------------------------------------------


async def test_leaving_a_map_cancels_its_requests(service: Service, client: AsyncClient) -> None:
    cancelled = web.json_response({}, status=202)
    service.will(pending(), ended("first"), pending(), never, cancelled)
    results = client.function(FUNCTION_ID).map(range(9), concurrency=1)
    assert (await anext(results)).get().json() == "first"
    second = asyncio.ensure_future(anext(results))
    await service.heard_of(4)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert service.calls[-1] == f"DELETE /requests/{REQUEST_ID}"


async def test_a_map_has_no_more_at_once_than_connections(client: AsyncClient) -> None:
    with pytest.raises(ValueError, match="max_connections"):
        client.function(FUNCTION_ID).map([], concurrency=101)


async def test_a_closed_client_says_so(client: AsyncClient) -> None:
    await client.close()
    with pytest.raises(errors.ClientClosed):
        await client.assets()
