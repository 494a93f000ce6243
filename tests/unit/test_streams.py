"""The sidecar that streams, over the memory back ends, before a real container on the loopback."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from broker.backends.memory.streams import MemoryStreams
from broker.model import EVENT_STREAM, STREAM_CUT, Excerpt, Job, Record, RequestState
from broker.ports import StreamReader
from tests.eventually import eventually
from tests.unit import test_sidecar
from tests.unit.container import Handler, answer
from tests.unit.test_sidecar import Rig
from workers.streams import ABANDONED

rig = test_sidecar.rig

KEPT_BYTES = 64 * 1024
EVENT = b"data: " + b"x" * 1016 + b"\n\n"  # 1 KiB


def streaming(*pieces: bytes, content_type: str = EVENT_STREAM, then: Handler | None = None) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": content_type, "X-Own": "1"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        if then is not None:
            await then(request)
        return response

    return handle


async def dies(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    await asyncio.sleep(0.05)
    request.transport.abort()
    await asyncio.sleep(30)
    return web.Response()


async def hangs(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(30)
    return web.Response()


class Stream:
    """The stream of one job, as a front end reads it."""

    def __init__(self, reader: StreamReader) -> None:
        self.reader = reader

    async def read(self, after: int = 0, *, attended_s: float = 0.0) -> Excerpt:
        excerpt = await self.reader.read(after, limit_bytes=KEPT_BYTES, attended_s=attended_s)
        assert excerpt is not None
        return excerpt

    async def written(self, size_bytes: int) -> Excerpt:
        async with asyncio.timeout(20):
            while (excerpt := await self.read()).written < size_bytes:
                await self.reader.changed(1)
        return excerpt


@asynccontextmanager
async def started(rig: Rig, **given: Any) -> AsyncIterator[tuple[Job, Stream]]:
    """A streaming job in a sidecar of its own."""
    rig.set(stream_bytes=KEPT_BYTES)
    async with rig.sidecar():
        job = await rig.submit(passthrough=True, streaming=True, **given)
        async with MemoryStreams(rig.results, rig.settings).follow(job.id) as reader:
            yield job, Stream(reader)


async def run(rig: Rig, **given: Any) -> tuple[Record, Excerpt]:
    async with started(rig, **given) as (job, stream):
        return await rig.ended(job), await stream.read()


async def test_an_answer_arrives_as_it_was_sent(rig: Rig) -> None:
    rig.box.handler = streaming(b"data: 1\n\nda", b"ta: 2\n\n")
    record, excerpt = await run(rig)
    assert record.state is RequestState.FULFILLED
    assert excerpt.head is not None
    assert record.outcome == excerpt.head
    assert (excerpt.head.status, dict(excerpt.head.headers)["X-Own"]) == (200, "1")
    assert [chunk.data for chunk in excerpt.chunks] == [b"data: 1\n\n", b"data: 2\n\n"]
    await rig.nothing_left()


async def test_a_stream_is_billed_by_what_was_handed_on(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rig.box.handler = streaming(b"data: 1\n\nda", b"ta: 2\n\n")
    await run(rig)
    [line] = [vars(found) for found in caplog.records if vars(found).get("event_type") == "NVCF_Invocation"]
    assert (line["response_type"], line["size"]) == ("FULFILLED", 18)


async def test_an_event_is_there_before_the_answer_ends(rig: Rig) -> None:
    rig.box.handler = streaming(b"data: 1\n\n", then=hangs)
    async with started(rig) as (job, stream):
        excerpt = await stream.written(9)
        assert (excerpt.state, excerpt.head is not None) == (RequestState.RUNNING, True)
        await rig.results.cancel(job.id, reason="seen enough")
        await asyncio.wait_for(rig.box.left.wait(), 20)


async def test_the_head_is_there_before_the_body(rig: Rig) -> None:
    rig.box.handler = streaming(then=hangs)
    async with started(rig) as (job, stream):
        async with asyncio.timeout(20):
            while (await stream.read()).head is None:
                await stream.reader.changed(1)
        await rig.results.cancel(job.id, reason="seen enough")


async def test_what_is_here_at_once_is_no_stream(rig: Rig) -> None:
    rig.box.handler = lambda _: answer(b'{"error": "no"}', status=422)
    record, excerpt = await run(rig)
    assert record.outcome is not None
    assert (record.state, record.outcome.status, record.outcome.streamed) == (RequestState.ERRORED, 422, False)
    if record.outcome.body:
        assert (record.outcome.body, excerpt.head) == (b'{"error": "no"}', None)


async def test_another_content_type_is_streamed_too(rig: Rig) -> None:
    rig.box.handler = streaming(b"\x00\xff", b"\n\n", content_type="application/octet-stream", then=hangs)
    async with started(rig) as (job, stream):
        excerpt = await stream.written(4)
        assert b"".join(chunk.data for chunk in excerpt.chunks) == b"\x00\xff\n\n"
        assert not any(chunk.event for chunk in excerpt.chunks)
        await rig.results.cancel(job.id, reason="seen enough")


async def test_a_status_of_failure_is_streamed_as_it_is(rig: Rig) -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=503, headers={"Content-Type": EVENT_STREAM})
        await response.prepare(request)
        await response.write(b"data: busy\n\n")
        return response

    rig.box.handler = handle
    record, excerpt = await run(rig)
    assert record.state is RequestState.ERRORED
    assert excerpt.head is not None
    assert (excerpt.head.status, excerpt.written) == (503, 12)


async def test_a_container_that_dies_in_the_body_ends_the_request(rig: Rig) -> None:
    rig.box.handler = streaming(b"data: 1\n\ndata: 2", then=dies)
    record, excerpt = await run(rig)
    assert (record.state, record.attempt, len(rig.box.bodies)) == (RequestState.ERRORED, 1, 1)
    assert record.outcome is not None
    assert (record.outcome.status, record.outcome.streamed) == (500, False)
    assert [chunk.data for chunk in excerpt.chunks] == [b"data: 1\n\n"]  # and nothing of an event that is not whole


async def test_a_container_that_dies_before_the_body_is_tried_again(rig: Rig) -> None:
    handlers = [streaming(then=dies), streaming(b"data: 1\n\n")]

    async def handle(request: web.Request) -> web.StreamResponse:
        return await handlers.pop(0)(request)

    rig.box.handler = handle
    record, excerpt = await run(rig)
    assert (record.state, record.attempt, excerpt.written) == (RequestState.FULFILLED, 2, 9)


async def test_an_event_beyond_the_limit_ends_the_request(rig: Rig) -> None:
    rig.box.handler = streaming(b"data: 1\n\n", b"x" * KEPT_BYTES)
    record, excerpt = await run(rig)
    assert record.outcome is not None
    assert (record.state, record.outcome.status) == (RequestState.ERRORED, 500)
    assert f"larger than {KEPT_BYTES // 2} bytes".encode() in record.outcome.body
    assert excerpt.written == 9


async def test_a_run_timeout_in_the_body_ends_the_request(rig: Rig) -> None:
    rig.set(run_timeout_s=1)
    rig.box.handler = streaming(b"data: 1\n\n", then=hangs)
    record, excerpt = await run(rig)
    assert (record.state, excerpt.written) == (RequestState.TIMED_OUT, 9)


async def test_a_container_waits_for_its_reader(rig: Rig) -> None:
    sent = 0

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={"Content-Type": EVENT_STREAM})
        await response.prepare(request)
        for _ in range(20 * 1024):  # far more than all buffers between
            await response.write(EVENT)
            sent += 1
        return response

    rig.box.handler = handle
    async with started(rig) as (job, stream):
        await stream.written(KEPT_BYTES // 2)
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.2)
        assert sent < 15 * 1024
        stuck = await stream.read()
        assert len(stuck.chunks) * 1024 <= KEPT_BYTES
        after = 0
        async with asyncio.timeout(30):
            while not (excerpt := await stream.read(after, attended_s=30)).state.terminal or excerpt.chunks:
                assert all(chunk.data == EVENT for chunk in excerpt.chunks)
                assert not excerpt.chunks or excerpt.chunks[0].start == after
                after = excerpt.chunks[-1].end if excerpt.chunks else after
                if not excerpt.chunks:
                    await stream.reader.changed(1)
        assert after == 20 * 1024 * 1024
        assert (await rig.ended(job)).state is RequestState.FULFILLED


async def test_a_request_whose_reader_left_for_good_is_cancelled(rig: Rig) -> None:
    rig.set(stream_grace_s=1)
    rig.box.handler = streaming(b"data: 1\n\n", then=hangs)
    async with started(rig) as (job, stream):
        await stream.written(9)
        await stream.read(attended_s=60)
        await stream.reader.leave(expected_back=False)
        record = await rig.ended(job)
        assert (record.state, record.reason) == (RequestState.CANCELLED, ABANDONED)
        await asyncio.wait_for(rig.box.left.wait(), 20)
    await rig.nothing_left()


async def test_a_request_that_waits_for_a_reader_for_too_long_is_cancelled(rig: Rig) -> None:
    rig.set(stream_grace_s=1)
    rig.box.handler = streaming(EVENT * 40, then=hangs)
    async with started(rig) as (job, _):
        assert (await rig.ended(job)).reason == ABANDONED


async def test_a_request_whose_reader_left_before_it_began_does_not_run_for_long(rig: Rig) -> None:
    rig.set(stream_grace_s=1, stream_bytes=KEPT_BYTES)
    rig.box.handler = hangs
    job = await rig.submit(passthrough=True, streaming=True)
    async with MemoryStreams(rig.results, rig.settings).follow(job.id) as reader:
        await reader.read(0, limit_bytes=1, attended_s=60)
        await reader.leave(expected_back=False)
    rig.results.offset_s = 2
    await asyncio.sleep(1.1)
    async with rig.sidecar():
        assert (await rig.ended(job)).state is RequestState.CANCELLED


async def test_a_sidecar_that_must_stop_ends_the_stream(rig: Rig) -> None:
    rig.set(drain_s=0)
    rig.box.handler = streaming(b"data: 1\n\n", then=hangs)
    async with started(rig) as (job, stream):
        await stream.written(9)
        rig.stop.set()
        record = await rig.ended(job)
        assert (record.state, record.reason) == (RequestState.ERRORED, STREAM_CUT)
    await rig.nothing_left()


async def test_a_sidecar_that_stops_finishes_the_stream(rig: Rig) -> None:
    finish = asyncio.Event()

    async def waits(_: web.Request) -> web.StreamResponse:
        await finish.wait()
        return web.Response()

    rig.box.handler = streaming(b"data: 1\n\n", then=waits)
    async with started(rig) as (job, stream):
        await stream.written(9)
        rig.stop.set()
        await asyncio.sleep(0.05)
        finish.set()
        assert (await rig.ended(job)).state is RequestState.FULFILLED


async def test_an_expired_lease_appends_nothing_more(rig: Rig) -> None:
    """A worker that was frozen finds that its stream was ended, and stops."""
    rig.box.handler = streaming(b"data: 1\n\n", then=hangs)
    async with started(rig) as (job, stream):
        await stream.written(9)
        rig.results.offset_s = 10
        claim = await rig.results.claim(job, worker="other", lease_s=30, max_attempts=3)
        assert claim.state is RequestState.ERRORED
        await asyncio.wait_for(rig.box.left.wait(), 20)
        assert (await stream.read()).written == 9

        async def idle() -> int:
            return rig.box.running

        await eventually(idle, lambda running: running == 0)


@pytest.mark.parametrize("encoding", ["gzip", "br"])
async def test_compressed_events_are_not_cut_as_events(rig: Rig, encoding: str) -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": EVENT_STREAM, "Content-Encoding": encoding})
        await response.prepare(request)
        await response.write(b"\x1f\n\ndata: noise\n\n")
        await asyncio.sleep(0.05)
        return response

    rig.box.handler = handle
    _, excerpt = await run(rig)
    assert [chunk.event for chunk in excerpt.chunks] == [False]
