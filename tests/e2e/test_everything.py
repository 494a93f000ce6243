"""The example that uses all that a function may do (examples/everything), on both families."""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import pytest

from tests.e2e.conftest import NVCF
from tests.eventually import eventually
from tests.house import Caller, Function, Reply
from tests.sse import listening

IMAGE = "fnqueue/everything:latest"
WORDS = ["once", "upon", "a", "time"]
GRPC = {"protocol": "gRPC", "uri": "/", "port": 50051, "timeout": "PT5S", "expectedStatusCode": 200}


@pytest.fixture(scope="module")
async def everything(caller: Caller) -> AsyncIterator[Function]:
    secrets = [{"name": "api-token", "value": "s3cret"}]
    function = await caller.deploy(IMAGE, inference_url="/run", concurrency=4, health=GRPC, secrets=secrets)
    yield function
    await function.undeploy()


async def own(everything: Function, method: str, path: str, *, body: bytes | None = None) -> Reply:
    """A call of the function in its own name."""
    return await everything.caller.call(method, path, body=body, headers={"function-id": everything.id})


async def stats(everything: Function) -> dict[str, Any]:
    return dict((await own(everything, "GET", "/stats")).json)


async def told(everything: Function, order: Any, *, headers: Mapping[str, str] | None = None) -> Reply:
    """The end of the request, past its progress."""
    reply = await everything.caller.invoke(everything.id, order, headers=headers)
    return reply if reply.status != 202 else await everything.caller.result(reply.request_id)


async def unpacked(reply: Reply) -> dict[str, bytes]:
    assert reply.status == 302, reply
    async with aiohttp.ClientSession() as anybody, anybody.get(reply.headers["Location"]) as response:
        archive = zipfile.ZipFile(io.BytesIO(await response.read()))
    return {name: archive.read(name) for name in archive.namelist()}


async def test_a_story_is_told(caller: Caller, everything: Function) -> None:
    reply = await told(everything, {"words": WORDS})
    assert (reply.status, reply.json) == (200, {"request": reply.request_id, "story": "once upon a time"})
    receipt = (await caller.call("GET", f"{NVCF}/requests/{reply.request_id}")).json
    assert [attempt["outcome"] for attempt in receipt["attempts"]] == ["fulfilled"]
    assert "container;dur=" in reply.headers["Server-Timing"]


async def test_words_of_assets_become_files_beside_the_answer(caller: Caller, everything: Function) -> None:
    kind, about = "text/plain", "a beginning"
    made = (await caller.call("POST", f"{NVCF}/assets", data={"contentType": kind, "description": about})).json
    signed = {"Content-Type": kind, "x-amz-meta-nvcf-asset-description": about}
    async with (
        aiohttp.ClientSession() as anybody,
        anybody.put(made["uploadUrl"], data=b"it was", headers=signed) as put,
    ):
        assert put.status == 200
    named = {"NVCF-INPUT-ASSET-REFERENCES": made["assetId"]}
    reply = await told(everything, {"words": ["dark"], "chapters": True}, headers=named)
    files = await unpacked(reply)
    assert json.loads(files.pop(f"{reply.request_id}.response"))["story"] == "it was dark"
    assert files == {"chapters/1.txt": b"it\n", "chapters/2.txt": b"was\n", "chapters/3.txt": b"dark\n"}


async def test_a_long_answer_becomes_a_file(everything: Function) -> None:
    reply = await told(everything, {"words": WORDS, "padding": 6_000_000})
    [content] = (await unpacked(reply)).values()
    assert len(content) > 6_000_000


async def test_each_word_is_told_while_it_is_written(caller: Caller, everything: Function) -> None:
    request_id = await caller.submit(everything.id, {"words": WORDS, "pause": 0.3})
    url, keyed = f"{caller.url}{NVCF}/requests/{request_id}/events", {"Authorization": f"Bearer {caller.key}"}
    async with asyncio.timeout(30), aiohttp.ClientSession() as session, listening(session, url, headers=keyed) as heard:
        progress = [event.data for event in await heard.rest() if event.name == "progress"]
    assert [each["percentComplete"] for each in progress] == [25, 50, 75, 100]
    assert progress[1]["partialResponse"] == {"story": "once upon"}
    assert (await caller.result(request_id)).json["story"] == "once upon a time"


async def test_events_come_as_they_are_made(caller: Caller, everything: Function) -> None:
    accepted = {"Accept": "text/event-stream"}
    reply = await caller.invoke(everything.id, {"words": WORDS, "pause": 0.01}, headers=accepted)
    events = [line for line in reply.body.decode().splitlines() if line.startswith("data: ")]
    assert events == [f'data: {{"word": "{word}"}}' for word in WORDS]


async def test_an_envelope_reaches_it_too(caller: Caller, everything: Function) -> None:
    path = f"{NVCF}/exec/functions/{everything.id}"
    asked = {"requestBody": {"words": WORDS}}
    reply = await caller.call("POST", path, data=asked)
    while reply.status == 202:
        reply = await caller.call("GET", f"{NVCF}/exec/status/{reply.request_id}")
    assert (reply.json["status"], reply.json["response"]["story"]) == ("fulfilled", "once upon a time")


async def test_what_it_refuses_is_told(caller: Caller, everything: Function) -> None:
    reply = await caller.invoke(everything.id, {"words": 7})
    assert (reply.status, reply.json["detail"]) == (422, "words: must be a list of strings")


async def test_every_method_and_path_is_its_own(everything: Function) -> None:
    reply = await own(everything, "PUT", "/mirror/a/b?c=d", body=b"x" * 7_000_000)
    seen = {"method": "PUT", "path": "/mirror/a/b", "query": "c=d", "bytes": 7_000_000}
    assert (reply.status, reply.headers["Location"], reply.json) == (201, "/mirror/a/b", seen)


async def test_it_can_be_talked_to_while_it_answers(everything: Function) -> None:
    caller = everything.caller
    sent = {"Authorization": f"Bearer {caller.key}", "function-id": everything.id}
    ws: Any
    async with asyncio.timeout(30), aiohttp.ClientSession(caller.url, headers=sent) as session:
        async with session.ws_connect("/chat", protocols=["chat"]) as ws:
            await ws.send_str("hello")
            assert (ws.protocol, await ws.receive_str()) == ("chat", "HELLO")
        turns: asyncio.Queue[bytes] = asyncio.Queue()

        async def body() -> AsyncIterator[bytes]:
            yield b"one"
            yield await turns.get()

        flag = {"nvcf-feature-enable-only-stream-full-request": "true"}
        async with session.post("/shout", data=body(), headers=flag) as answer:
            assert await answer.content.readany() == b"ONE"
            turns.put_nowait(b"two")
            assert await answer.content.readany() == b"TWO"


async def test_more_than_it_has_room_for_are_told_in_turn(everything: Function) -> None:
    before = (await stats(everything)).get("busy", 0)
    order = {"words": ["slowly"], "pause": 0.8}
    replies = await asyncio.gather(*(told(everything, order) for _ in range(3)))
    assert [reply.status for reply in replies] == [200, 200, 200]
    assert (await stats(everything))["busy"] > before


@pytest.mark.parametrize("end", ["cancelled", "late"])
async def test_it_stops_when_nobody_wants_the_story(caller: Caller, everything: Function, end: str) -> None:
    before = (await stats(everything)).get("stopped", 0)
    limits = {"NVCF-RUN-TIMEOUT-SECONDS": "1"} if end == "late" else None
    request_id = await caller.submit(everything.id, {"words": WORDS, "pause": 600}, headers=limits)
    await eventually(lambda: stats(everything), lambda seen: seen["writing"] == 1)
    if end == "cancelled":
        await caller.cancel(request_id)
    assert (await caller.result(request_id)).status == (410 if end == "cancelled" else 504)
    await eventually(lambda: stats(everything), lambda seen: seen["stopped"] == before + 1)


async def test_it_is_given_its_secrets(everything: Function) -> None:
    assert (await stats(everything))["secrets"] == ["api-token"]


async def test_an_instance_that_is_renewed_finishes_its_story(caller: Caller, everything: Function) -> None:
    path = f"{NVCF}/functions/{everything.id}/versions/{everything.version_id}"
    [instance] = (await caller.call("GET", path)).json["function"]["activeInstances"]
    request_id = await caller.submit(everything.id, {"words": WORDS, "pause": 0.2})
    await eventually(lambda: stats(everything), lambda seen: seen["writing"] == 1)
    renewed = await caller.call("DELETE", f"{NVCF}/instances/{instance['instanceId']}")
    assert renewed.status == 204, renewed
    assert (await caller.result(request_id)).json["story"] == "once upon a time"
    receipt = (await caller.call("GET", f"{NVCF}/requests/{request_id}")).json
    assert [attempt["outcome"] for attempt in receipt["attempts"]] == ["fulfilled"]
