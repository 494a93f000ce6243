"""What a client of a stream gets, over back ends in memory; the test is the worker."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest

from broker.model import EVENT_STREAM, STREAM_CUT, Flow, Job, Lease, Outcome, Record, RequestState
from broker.ports import StreamWriter
from tests.eventually import eventually
from tests.unit.test_server import INVOKE, NVCF, VERSION, House, Replicated, opened
from workers.events import Events, Pieces

KEPT_BYTES = 64 * 1024
EVENTS = {"Accept": EVENT_STREAM}
RAW = ("Accept: text/event-stream", "Content-Length: 0")
HEAD = Outcome(
    status=200, headers=(("Content-Type", "text/event-stream; charset=utf-8"), ("X-Own", "1")), streamed=True
)
PLAIN = Outcome(status=200, headers=(("Content-Type", "application/x-lines"),), streamed=True)


@dataclass(kw_only=True)
class Work:
    """One attempt of a streaming job."""

    house: House
    job: Job
    lease: Lease
    writer: StreamWriter
    cutter: Events | Pieces = field(default_factory=lambda: Events(limit_bytes=KEPT_BYTES // 2))

    async def begin(self, head: Outcome = HEAD) -> None:
        if not head.event_stream:
            self.cutter = Pieces(limit_bytes=KEPT_BYTES // 2)
        await self.writer.append(head=head)

    async def send(self, *pieces: bytes) -> Flow:
        return await self.writer.append([chunk for piece in pieces for chunk in self.cutter.feed(piece)])

    async def settle(self, state: RequestState = RequestState.FULFILLED, outcome: Outcome = HEAD) -> None:
        await self.house.broker.results.settle(self.lease, self.job, state, outcome)

    async def record(self) -> Record:
        record = await self.house.broker.results.read(self.job.id)
        assert record is not None
        return record


@asynccontextmanager
async def work(house: House) -> AsyncIterator[Work]:
    """The next job, as a sidecar takes it."""
    await house.some_queued()
    delivery = await house.broker.queue.take(VERSION)
    assert delivery is not None
    assert delivery.job.streaming
    claim = await house.broker.results.claim(delivery.job, worker="w", lease_s=60, max_attempts=3)
    assert claim.lease is not None
    await delivery.ack()
    async with house.broker.streams.write(claim.lease) as writer:
        yield Work(house=house, job=delivery.job, lease=claim.lease, writer=writer)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path, stream_bytes=KEPT_BYTES, stream_keepalive_s=1) as found:
        yield found


@asynccontextmanager
async def invoked(house: House, **headers: str) -> AsyncIterator[tuple[Work, aiohttp.ClientResponse]]:
    """A call whose answer has begun."""
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        calling = group.create_task(house.client.post(INVOKE, data=b"{}", headers={**EVENTS, **headers}))
        async with work(house) as job:
            await job.begin()
            async with await calling as response:
                yield job, response


@asynccontextmanager
async def resumed(
    house: House, request_id: str, last_id: str | None = None, **headers: str
) -> AsyncIterator[aiohttp.ClientResponse]:
    sent = {**EVENTS, **headers} | ({} if last_id is None else {"Last-Event-ID": last_id})
    async with (
        asyncio.timeout(20),
        house.client.get(f"{NVCF}/pexec/status/{request_id}", headers=sent) as response,
    ):
        yield response


async def finished(house: House, pieces: Sequence[bytes], outcome: Outcome = HEAD) -> str:
    """The ID of a request whose answer was streamed while nobody read it."""
    request_id = await submitted(house)
    async with work(house) as job:
        await job.begin(outcome)
        await job.send(*pieces)
        await job.settle(outcome=outcome)
    return request_id


async def submitted(house: House) -> str:
    async with house.client.post(INVOKE, data=b"{}", headers={**EVENTS, "Prefer": "respond-async"}) as response:
        assert response.status == 202
        return response.headers["NVCF-REQID"]


def ids(text: bytes) -> list[str]:
    return re.findall(r"^id: ?(.*)$", text.decode(), re.MULTILINE)


def without_ids(text: bytes) -> bytes:
    return re.sub(rb"id: fnq-[0-9-]+(?:-end)?\n", b"", text)


def error_of(text: bytes) -> dict[str, Any]:
    """What the last event says."""
    last = text.removesuffix(b"\n\n").rpartition(b"\n\n")[2].decode().splitlines()
    assert "event: error" in last, text
    found: dict[str, Any] = json.loads("\n".join(line[6:] for line in last if line.startswith("data: ")))
    return found


async def test_each_event_arrives_when_it_was_sent(house: House) -> None:
    async with invoked(house) as (job, response):
        assert (response.status, response.content_type) == (200, EVENT_STREAM)
        assert response.headers["NVCF-REQID"] == job.job.id
        assert response.headers["NVCF-STATUS"] == "fulfilled"
        assert response.headers["X-Own"] == "1"
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["Access-Control-Expose-Headers"] == "nvcf-reqid"
        for at in range(5):
            await job.send(f"data: {at}\n\n".encode())
            assert without_ids(await response.content.readuntil(b"\n\n")) == f"data: {at}\n\n".encode()
        await job.settle()
        assert await response.read() == b""
    assert (await job.record()).state is RequestState.FULFILLED


async def test_every_event_has_an_id_and_comments_have_none(house: House) -> None:
    async with invoked(house) as (job, response):
        await job.send(b": hello\n\n", b"data: 1\n\n", b"id: own\r\ndata: 2\r\n\r\n", b"data: 3\r\r", b"retry: 1\n\n")
        await job.settle()
        assert await response.read() == (
            b": hello\n\ndata: 1\nid: fnq-1-18\n\nid: own\r\ndata: 2\r\n\r\ndata: 3\rid: fnq-1-47\n\rretry: 1\n\n"
        )


async def test_a_client_goes_on_behind_the_event_that_it_names(house: House) -> None:
    request_id = await finished(house, [f"data: {at}\n\n".encode() for at in range(10)])
    async with resumed(house, request_id) as response:
        whole = await response.read()
    for at, last_id in enumerate(ids(whole)[:-1]):
        async with resumed(house, request_id, last_id) as response:
            expected = b"".join(f"data: {left}\n\n".encode() for left in range(at + 1, 10))
            assert without_ids(await response.read()) == expected


async def test_a_client_goes_on_while_the_answer_comes(house: House) -> None:
    async with invoked(house) as (job, response):
        await job.send(b"data: 1\n\n", b"data: 2\n\n")
        [first] = ids(await response.content.readuntil(b"\n\n"))
        response.close()
        async with resumed(house, job.job.id, first) as again:
            await job.send(b"data: 3\n\n")
            await job.settle()
            assert without_ids(await again.read()) == b"data: 2\n\ndata: 3\n\n"


async def test_a_client_may_name_the_beginning(house: House) -> None:
    request_id = await finished(house, [b"data: 1\n\n"])
    async with resumed(house, request_id, "fnq-1-0") as response:
        assert without_ids(await response.read()) == b"data: 1\n\n"


async def test_a_client_goes_on_behind_an_id_of_the_container(house: House) -> None:
    request_id = await finished(house, [b"id: a\ndata: 1\n\n", b"data: 2\n\n", b"id: b\ndata: 3\n\n"])
    async with resumed(house, request_id, "a") as response:
        assert without_ids(await response.read()) == b"data: 2\n\nid: b\ndata: 3\n\n"


@pytest.mark.parametrize("last_id", ["fnq-1-39", "b"])
async def test_who_has_had_everything_is_told_so(house: House, last_id: str) -> None:
    request_id = await finished(house, [b"id: a\ndata: 1\n\n", b"data: 2\n\n", b"id: b\ndata: 3\n\n"])
    async with resumed(house, request_id, last_id) as response:
        assert (response.status, response.headers["NVCF-STATUS"]) == (204, "fulfilled")


@pytest.mark.parametrize("last_id", ["fnq-1-5", "fnq-2-9", "fnq-1-999", "nobody's", "twice", "fnq-1-x"])
async def test_an_event_that_is_not_there_is_gone(house: House, last_id: str) -> None:
    pieces = [b"data: 1\n\n", b"id: twice\ndata: 2\n\n", b"id: x\ndata: 3\n\n", b"id: twice\ndata: 4\n\n"]
    request_id = await finished(house, pieces)
    async with resumed(house, request_id, last_id) as response:
        assert response.status == 410
        assert (await response.json())["type"] == "urn:fnqueue:problem-details:stream-not-kept"


async def test_an_event_that_was_dropped_is_gone(house: House) -> None:
    block = b"data: " + b"x" * 1016 + b"\n\n"
    request_id = await submitted(house)
    async with work(house) as job:
        await job.begin()
        for _ in range(100):
            await job.send(block)
        await job.settle()
    for last_id in (None, "fnq-1-1024"):
        async with resumed(house, request_id, last_id) as response:
            assert response.status == 410
    async with resumed(house, request_id, f"fnq-1-{36 * 1024}") as response:
        assert without_ids(await response.read()) == block * 64
    async with house.client.get(f"{NVCF}/pexec/status/{request_id}") as response:
        assert response.status == 410
        assert (await response.json())["detail"] == "the answer was streamed, and its beginning is not kept any more"


async def test_a_stream_can_be_had_as_a_whole(house: House) -> None:
    pieces = [b"\xef\xbb\xbfdata: 1\n\n", b": ping\n\n", b"data: 2\r\r"]
    request_id = await finished(house, pieces)
    async with house.client.get(f"{NVCF}/pexec/status/{request_id}") as response:
        assert (response.status, response.content_type, response.headers["X-Own"]) == (200, EVENT_STREAM, "1")
        assert await response.read() == b"".join(pieces)


async def test_a_poll_without_events_waits_for_the_end(house: House) -> None:
    async with invoked(house) as (job, response):
        await job.send(b"data: 1\n\n")
        url = f"{NVCF}/pexec/status/{job.job.id}"
        async with house.client.get(url, headers={"NVCF-POLL-SECONDS": "1"}) as poll:
            assert (poll.status, poll.headers["NVCF-STATUS"]) == (202, "in-progress")
        await job.settle()
        await response.read()


async def test_a_call_that_waits_in_vain_is_answered_202_and_can_be_streamed_later(house: House) -> None:
    async with house.client.post(INVOKE, data=b"{}", headers={**EVENTS, "NVCF-POLL-SECONDS": "1"}) as response:
        assert (response.status, response.headers["NVCF-STATUS"]) == (202, "pending-evaluation")
        request_id = response.headers["NVCF-REQID"]
    async with work(house) as job:
        assert job.job.id == request_id
        await job.begin()
        assert (await job.send(b"data: 1\n\n")).unattended_s == 0  # its client is expected back
        await job.settle()
    async with resumed(house, request_id) as again:
        assert without_ids(await again.read()) == b"data: 1\n\n"


async def test_nobody_is_told_to_have_had_everything_before_the_end_is_durable(house: House) -> None:
    request_id = await finished(house, [b"id: a\ndata: 1\n\n"])
    store = cast("Replicated", house.broker.results)
    store.replica_away = True
    async with resumed(house, request_id, "a", **{"NVCF-POLL-SECONDS": "0"}) as response:
        assert response.status == 503
    store.replica_away = False
    async with resumed(house, request_id, "a") as response:
        assert response.status == 204


async def test_a_worker_that_dies_ends_the_stream_with_an_error(house: House) -> None:
    async with invoked(house) as (job, response):
        await job.send(b"data: 1\n\n")
        assert await house.broker.results.release(job.lease, refund=False) is RequestState.ERRORED
        text = await response.read()
        assert text.startswith(b"data: 1\n")
        problem = error_of(text)
        assert (problem["status"], problem["detail"], problem["requestId"]) == (502, STREAM_CUT, job.job.id)
    last_id = ids(text)[-1]
    async with resumed(house, job.job.id, ids(text)[0]) as again:
        assert error_of(b"\n\n" + await again.read()) == problem
    async with resumed(house, job.job.id, last_id) as again:
        assert again.status == 204
    async with house.client.get(f"{NVCF}/pexec/status/{job.job.id}") as poll:
        assert (poll.status, poll.headers["NVCF-STATUS"]) == (502, "errored")


async def test_what_the_sidecar_says_of_the_end_is_handed_on(house: House) -> None:
    async with invoked(house) as (job, response):
        await job.send(b"data: 1\n\n")
        said = Outcome(status=500, headers=(("Content-Type", "application/problem+json"),), body=b'{"detail":\n"why"}')
        await job.settle(RequestState.ERRORED, said)
        assert error_of(await response.read()) == {"detail": "why"}


async def test_a_cancelled_request_ends_its_stream(house: House) -> None:
    async with invoked(house) as (job, response):
        await job.send(b"data: 1\n\n")
        await house.broker.results.cancel(job.job.id, reason="enough")
        problem = error_of(await response.read())
        assert (problem["status"], problem["detail"]) == (410, "enough")


async def test_an_end_without_a_body_is_an_ordinary_answer(house: House) -> None:
    async with asyncio.TaskGroup() as group:
        calling = group.create_task(house.client.post(INVOKE, data=b"{}", headers=EVENTS))
        async with work(house) as job:
            await job.begin()
            await job.settle(RequestState.ERRORED, Outcome(status=500, body=b"no"))
    # Its head may have been sent before.
    async with calling.result() as response:
        assert response.status in (200, 500)
        await response.read()


async def test_an_answer_that_is_no_stream_passes_through(house: House) -> None:
    async with asyncio.TaskGroup() as group:
        calling = group.create_task(house.client.post(INVOKE, data=b"{}", headers=EVENTS))
        async with work(house) as job:
            await job.settle(RequestState.ERRORED, Outcome(status=418, headers=(("X-Own", "1"),), body=b"no"))
    async with calling.result() as response:
        assert (response.status, response.headers["X-Own"], await response.read()) == (418, "1", b"no")


async def test_a_body_of_another_type_is_streamed_as_it_is(house: House) -> None:
    async with asyncio.TaskGroup() as group:
        calling = group.create_task(house.client.post(INVOKE, data=b"{}", headers=EVENTS))
        async with work(house) as job:
            await job.begin(PLAIN)
            async with await calling as response:
                await job.send(b"1\n\n")
                assert await response.content.readuntil(b"\n\n") == b"1\n\n"
                await asyncio.sleep(1.2)  # no comments in between
                await job.send(b"2\n\n")
                await job.settle(outcome=PLAIN)
                assert await response.read() == b"2\n\n"


async def test_a_body_of_another_type_that_is_cut_off_does_not_look_whole(house: House) -> None:
    async with asyncio.TaskGroup() as group:
        calling = group.create_task(house.client.post(INVOKE, data=b"{}", headers=EVENTS))
        async with work(house) as job:
            await job.begin(PLAIN)
            async with await calling as response:
                await job.send(b"1\n\n")
                await response.content.readuntil(b"\n\n")
                await house.broker.results.release(job.lease, refund=False)
                with pytest.raises(aiohttp.ClientPayloadError):
                    await response.read()


async def test_another_attempt_goes_on_if_nothing_of_the_body_was_sent(house: House) -> None:
    async with invoked(house) as (job, response):
        await house.broker.results.release(job.lease, refund=False)
        claim = await house.broker.results.claim(job.job, worker="w2", lease_s=60, max_attempts=3)
        assert claim.lease is not None
        async with house.broker.streams.write(claim.lease) as writer:
            again = replace(job, lease=claim.lease, writer=writer)
            await again.begin()
            await again.send(b"data: 1\n\n")
            await again.settle()
        assert await response.read() == b"data: 1\nid: fnq-2-9\n\n"


async def test_another_attempt_that_answers_in_another_way_is_an_error(house: House) -> None:
    async with invoked(house) as (job, response):
        await house.broker.results.release(job.lease, refund=False)
        claim = await house.broker.results.claim(job.job, worker="w2", lease_s=60, max_attempts=3)
        assert claim.lease is not None
        async with house.broker.streams.write(claim.lease) as writer:
            again = replace(job, lease=claim.lease, writer=writer)
            await again.begin(replace(HEAD, status=503))
            await again.send(b"data: 1\n\n")
        assert "another way" in error_of(b"\n\n" + await response.read())["detail"]


async def test_a_silent_stream_is_kept_alive(house: House) -> None:
    async with invoked(house) as (job, response):
        assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"
        await job.send(b"data: 1\n\n")
        assert without_ids(await response.content.readuntil(b"\n\n")) == b"data: 1\n\n"
        await job.settle()


async def test_a_client_that_leaves_is_missed_by_the_worker(house: House) -> None:
    async with invoked(house) as (job, response):
        await job.send(b"data: 1\n\n")
        await response.content.readuntil(b"\n\n")
        response.close()

        async def unattended() -> bool:
            return (await job.writer.append()).unattended_s > 0

        await eventually(unattended, bool)
        assert (await job.record()).state is RequestState.RUNNING


async def test_a_client_that_leaves_before_the_answer_is_missed_too(house: House) -> None:
    calling = asyncio.ensure_future(house.client.post(INVOKE, data=b"{}", headers=EVENTS))
    async with work(house) as job:

        async def attended() -> bool:
            return (await job.writer.append()).unattended_s > 0

        await asyncio.sleep(0.1)
        calling.cancel()
        await eventually(attended, bool)


async def test_with_on_disconnect_a_client_that_leaves_before_the_answer_cancels(tmp_path: Path) -> None:
    async with opened(tmp_path, on_disconnect="cancel") as house:
        calling = asyncio.ensure_future(house.client.post(INVOKE, data=b"{}", headers=EVENTS))
        async with work(house) as job:
            await asyncio.sleep(0.1)
            calling.cancel()
            await eventually(job.record, lambda record: record.state is RequestState.CANCELLED)


async def test_what_a_client_has_not_read_is_told_to_the_worker(house: House) -> None:
    block = b"data: " + b"x" * 8184 + b"\n\n"
    async with invoked(house) as (job, response):
        await job.send(block, block)
        for _ in range(2):
            await response.content.readuntil(b"\n\n")

        async def unread() -> int:
            return (await job.writer.append()).unread_bytes

        await eventually(unread, lambda size: size == 0 or size <= 2 * len(block))


async def test_a_client_that_takes_nothing_is_left_and_the_request_goes_on(tmp_path: Path) -> None:
    block = b"data: " + b"x" * 16 * 1024 + b"\n\n"
    async with opened(tmp_path, stream_bytes=64 * 1024 * 1024, stream_write_timeout_s=1) as house:
        reader, writer = await house.connect(
            f"POST {INVOKE} HTTP/1.1", "Accept: text/event-stream", "Content-Length: 0"
        )
        async with work(house) as job:
            await job.begin()
            await reader.readuntil(b"\r\n\r\n")
            for _ in range(800):
                await job.send(block)

            async def unattended() -> float:
                return (await job.writer.append()).unattended_s

            await eventually(unattended, bool, within_s=20)
            assert (await job.record()).state is RequestState.RUNNING
        writer.close()


async def test_a_server_that_stops_lets_its_clients_go_on_elsewhere(tmp_path: Path) -> None:
    async with AsyncExitStack() as server:
        house = await server.enter_async_context(opened(tmp_path))
        reader, writer = await house.connect(f"POST {INVOKE} HTTP/1.1", *RAW)
        async with work(house) as job:
            await job.begin()
            await job.send(b"data: 1\n\n")
            await reader.readuntil(b"data: 1\n")
            await server.aclose()
            rest = await asyncio.wait_for(reader.read(), 20)
            assert b"this server is stopping" in rest
            assert not rest.endswith(b"0\r\n\r\n")  # which would be the end of the body
            assert (await job.record()).state is RequestState.RUNNING
        writer.close()


async def test_strangers_learn_nothing(house: House) -> None:
    nobodys = "0655fbd8-96c2-4a19-b877-4d42dfeceedf"
    async with resumed(house, nobodys, "fnq-1-5") as response:
        assert response.status == 404


@pytest.mark.parametrize("headers", [{"Accept": "text/event-stream;q=1"}, {"Accept": "TEXT/Event-Stream"}])
async def test_the_media_type_counts_and_not_its_spelling(house: House, headers: Mapping[str, str]) -> None:
    async with invoked(house, **headers) as (job, response):
        await job.settle()
        assert response.status == 200


async def test_a_browsers_page_may_read_it(house: House) -> None:
    async with invoked(house, Origin="https://a.example") as (job, response):
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert response.headers["Server"] == "fnqueue"
        await job.settle()


async def test_the_same_key_leads_to_the_same_stream(house: House) -> None:
    async with invoked(house, **{"Idempotency-Key": "k"}) as (job, response):
        await job.send(b"data: 1\n\n", b"data: 2\n\n")
        await job.settle()
        first, _ = ids(await response.read())
        again = {**EVENTS, "Idempotency-Key": "k"}
        async with house.client.post(INVOKE, data=b"{}", headers=again) as second:
            assert without_ids(await second.read()) == b"data: 1\n\ndata: 2\n\n"
        async with house.client.post(INVOKE, data=b"{}", headers={**again, "Last-Event-ID": first}) as third:
            assert without_ids(await third.read()) == b"data: 2\n\n"


async def test_the_same_key_leads_to_what_is_kept_of_the_stream(house: House) -> None:
    block = b"data: " + b"x" * 1016 + b"\n\n"
    async with invoked(house, **{"Idempotency-Key": "k"}) as (job, response):
        for _ in range(100):
            await job.send(block)
            await response.content.readuntil(b"\n\n")
        await job.settle()
    sent = {**EVENTS, "Idempotency-Key": "k", "Last-Event-ID": f"fnq-1-{99 * 1024}"}
    async with house.client.post(INVOKE, data=b"{}", headers=sent) as again:
        assert without_ids(await again.read()) == block


async def test_one_shot_results_are_given_once(tmp_path: Path) -> None:
    async with opened(tmp_path, one_shot_results=True) as house:
        request_id = await finished(house, [b"data: 1\n\n"])
        async with resumed(house, request_id) as response:
            assert without_ids(await response.read()) == b"data: 1\n\n"
        async with resumed(house, request_id) as response:
            assert response.status == 404
