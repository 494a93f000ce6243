"""What a container says while it works, and the events of a request, on both families (contract/invocation.md §8.3)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.e2e.conftest import NVCF, UNKNOWN_ID, Gate, idle, production_only
from tests.house import Caller, Function, Reply
from tests.sse import Listening, listening


class Steps:
    """The progress of one job, each step behind a gate, and the gate of its answer."""

    def __init__(self, folder: Path, *said: Any) -> None:
        self._gates = [folder / f"step-{number}" for number in range(len(said))]
        self._answer = folder / "answer"
        texts = (each if isinstance(each, str) else json.dumps(each) for each in said)
        self.order = {
            "progress": [[str(gate), text] for gate, text in zip(self._gates, texts, strict=True)],
            "gate": str(self._answer),
        }

    def open(self, *numbers: int) -> None:
        for number in numbers:
            self._gates[number].touch()

    def answer(self) -> None:
        for gate in (*self._gates, self._answer):
            gate.touch()


def said(percent: int, **partial: Any) -> dict[str, Any]:
    return {"id": UNKNOWN_ID, "progress": percent, "partialResponse": partial or None}


def told(reply: Reply) -> tuple[int, str | None, bytes]:
    return reply.status, reply.headers.get("NVCF-PERCENT-COMPLETE"), reply.body


@asynccontextmanager
async def listener(caller: Caller, request_id: str, *, last_id: str = "") -> AsyncIterator[Listening]:
    url = f"{caller.url}{NVCF}/requests/{request_id}/events"
    keyed = {"Authorization": f"Bearer {caller.key}"}
    async with (
        asyncio.timeout(40),
        aiohttp.ClientSession() as session,
        listening(session, url, headers=keyed, last_id=last_id) as found,
    ):
        yield found


async def test_each_update_ends_one_wait_in_order_and_the_last_one_is_repeated(
    caller: Caller, recorder: Function, tmp_path: Path
) -> None:
    steps = Steps(tmp_path, said(10, text="a"), said(20), "{ no JSON", said(150, text="ü"))
    steps.open(0)
    first = await caller.invoke(recorder.id, steps.order)
    assert told(first) == (202, "10", b'{"text":"a"}')
    assert (first.headers["NVCF-STATUS"], first.headers["Content-Type"]) == ("in-progress", "application/json")
    waiting = asyncio.create_task(caller.status(first.request_id, wait_s=30))
    steps.open(1)
    assert told(await asyncio.wait_for(waiting, 20)) == (202, "20", b"null")
    assert told(await caller.status(first.request_id, wait_s=1)) == (202, "20", b"null")
    waiting = asyncio.create_task(caller.status(first.request_id, wait_s=30))
    steps.open(2, 3)
    assert told(await asyncio.wait_for(waiting, 20)) == (202, "100", '{"text":"ü"}'.encode())
    steps.answer()
    result = await caller.result(first.request_id)
    assert (result.status, result.headers["NVCF-STATUS"]) == (200, "fulfilled")
    assert "NVCF-PERCENT-COMPLETE" not in result.headers


async def test_updates_that_nobody_read_wait_for_the_polls(caller: Caller, recorder: Function, tmp_path: Path) -> None:
    steps = Steps(tmp_path, *(said(percent) for percent in (10, 20, 30)))
    request_id = await caller.submit(recorder.id, steps.order)
    async with listener(caller, request_id) as found:
        for number in range(3):
            steps.open(number)
            await found.until("progress")
    polls = [await caller.status(request_id, wait_s=1) for _ in range(4)]
    assert [told(reply)[1] for reply in polls] == ["10", "20", "30", "30"]
    steps.answer()
    await caller.result(request_id)


async def test_a_result_comes_at_once_whatever_was_not_read(caller: Caller, recorder: Function, tmp_path: Path) -> None:
    steps = Steps(tmp_path, *(said(percent) for percent in (10, 20)))
    request_id = await caller.submit(recorder.id, steps.order)
    async with listener(caller, request_id) as found:
        steps.open(0)
        await found.until("progress")
        steps.answer()
        await found.until("done")
    assert told(await caller.status(request_id))[:2] == (200, None)


async def test_a_request_is_listened_to_from_the_queue_to_its_result(
    caller: Caller, recorder: Function, tmp_path: Path, gate: Gate
) -> None:
    await idle(caller, recorder)
    ahead = await caller.submit(recorder.id, gate.order())
    between = await caller.submit(recorder.id)
    steps = Steps(tmp_path, said(50, done=["one"]))
    request_id = await caller.submit(recorder.id, steps.order)
    async with listener(caller, request_id) as found:
        assert (await found.until("queued")).data["positionInQueue"] == 2
        gate.open()
        await caller.result(ahead)
        await caller.result(between)
        await found.until("started")
        steps.open(0)
        progress = await found.until("progress")
        assert (progress.data["percentComplete"], progress.data["partialResponse"]) == (50, {"done": ["one"]})
        async with listener(caller, request_id, last_id=progress.id) as later:
            steps.answer()
            done = await found.until("done")
            assert await found.next() is None
            assert [event.name for event in await later.rest()] == ["done"]
    assert (done.data["status"], done.data["statusCode"]) == ("fulfilled", 200)
    assert done.data["location"] == f"{caller.url}{NVCF}/pexec/status/{request_id}"
    async with listener(caller, request_id, last_id=done.id) as over:
        assert over.response.status == 204


@production_only
async def test_a_strangers_request_cannot_be_told_from_one_that_never_was(
    caller: Caller, stranger: Caller, recorder: Function
) -> None:
    request_id = await caller.submit(recorder.id)

    async def ask(asked: str) -> tuple[int, list[tuple[str, str]], bytes]:
        reply = await stranger.call("GET", f"{NVCF}/requests/{asked}/events")
        return reply.status, [pair for pair in reply.headers.items() if pair[0] != "Date"], reply.body

    assert await ask(request_id) == await ask(UNKNOWN_ID)
    assert (await ask(request_id))[0] == 404
    await caller.result(request_id)


@pytest.fixture(autouse=True)
async def leaves_it_idle(caller: Caller, recorder: Function) -> AsyncIterator[None]:
    yield
    await idle(caller, recorder)
