"""One suite for every Streams back end, as two processes see one store."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

import pytest

from broker.connect import open_broker
from broker.model import STREAM_CUT, Chunk, Draft, Excerpt, Flow, Job, Lease, Outcome, Record, RequestState, Verdict
from broker.ports import Broker, Results, StreamReader, Streams
from broker.settings import Settings
from infra.local.servers import Redis
from tests.eventually import eventually

KEPT_BYTES = 64 * 1024
HEAD = Outcome(status=200, headers=(("Content-Type", "text/event-stream"), ("X-Ünicode", "é")), streamed=True)
LEASE_S = 0.2
RUNNING = RequestState.RUNNING


@dataclass(frozen=True, kw_only=True)
class Stores:
    """One store as a worker and a front end see it."""

    worker: Broker
    front: Broker

    @property
    def results(self) -> Results:
        return self.worker.results

    @property
    def writing(self) -> Streams:
        return self.worker.streams

    @property
    def reading(self) -> Streams:
        return self.front.streams

    async def accept(self) -> Job:
        draft = Draft(
            id=str(uuid.uuid4()),
            account="acme",
            function_id=str(uuid.uuid4()),
            version_id=str(uuid.uuid4()),
            digest="d" * 64,
            deadline_s=60,
        )
        record = await self.results.create(draft, queue_limit=10, watch=False)
        return Job(
            id=record.id,
            account=record.account,
            function_id=record.function_id,
            version_id=record.version_id,
            subject="key",
            created_at=record.created_at,
            deadline_at=record.deadline_at,
            digest=draft.digest,
        )

    async def running(self, *, lease_s: float = 30) -> tuple[Job, Lease]:
        job = await self.accept()
        return job, await self.claimed(job, lease_s=lease_s)

    async def claimed(self, job: Job, *, lease_s: float = 30) -> Lease:
        claim = await self.results.claim(job, worker="w", lease_s=lease_s, max_attempts=3)
        assert claim.lease is not None, claim
        return claim.lease

    async def append(self, lease: Lease, chunks: Iterable[Chunk] = (), *, head: Outcome | None = None) -> Flow:
        async with self.writing.write(lease) as writer:
            return await writer.append(tuple(chunks), head=head)

    async def read(self, job: Job, after: int = 0, *, limit_bytes: int = KEPT_BYTES * 2) -> Excerpt:
        async with self.reading.follow(job.id) as reader:
            return await seen(reader, after, limit_bytes=limit_bytes)

    async def record(self, job: Job) -> Record:
        record = await self.front.results.read(job.id)
        assert record is not None
        return record


@pytest.fixture(params=["memory", "redis"])
async def stores(request: pytest.FixtureRequest) -> AsyncIterator[Stores]:
    url = "memory://"
    if request.param == "redis":
        server: Redis = request.getfixturevalue("redis_server")
        url = server.url
    settings = Settings.model_validate({"store_url": url, "stream_bytes": KEPT_BYTES, "lease_s": LEASE_S * 5})
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(open_broker(settings))
        front = worker if url == "memory://" else await stack.enter_async_context(open_broker(settings))
        yield Stores(worker=worker, front=front)


async def seen(
    reader: StreamReader, after: int = 0, *, limit_bytes: int = KEPT_BYTES * 2, attended_s: float = 0.0
) -> Excerpt:
    excerpt = await reader.read(after, limit_bytes=limit_bytes, attended_s=attended_s)
    assert excerpt is not None
    return excerpt


def chunks_of(*pieces: bytes, after: int = 0) -> list[Chunk]:
    found = []
    for piece in pieces:
        after += len(piece)
        found.append(Chunk(data=piece, end=after, event=True))
    return found


def blocks(count: int, *, after: int = 0) -> list[Chunk]:
    """Of 1 KiB each."""
    return chunks_of(*(bytes([65 + at % 26]) * 1024 for at in range(count)), after=after)


async def test_chunks_are_read_as_they_were_appended(stores: Stores) -> None:
    job, lease = await stores.running()
    chunks = [
        Chunk(data=b"\xef\xbb\xbf", end=3),
        Chunk(data=b"data: \x00\xff\n\n", end=13, event=True, event_id="é 1"),
        Chunk(data=b"data: 2\n\n", end=22, event=True),
    ]
    await stores.append(lease, chunks[:2], head=HEAD)
    await stores.append(lease, chunks[2:])
    assert await stores.read(job) == Excerpt(state=RUNNING, attempt=1, written=22, head=HEAD, chunks=tuple(chunks))


async def test_a_reader_begins_behind_any_chunk(stores: Stores) -> None:
    job, lease = await stores.running()
    chunks = chunks_of(b"one", b"two", b"three")
    await stores.append(lease, chunks)
    assert (await stores.read(job, after=3)).chunks == tuple(chunks[1:])
    assert (await stores.read(job, after=11)).chunks == ()


async def test_reading_gives_about_as_much_as_was_asked_and_at_least_one_chunk(stores: Stores) -> None:
    job, lease = await stores.running()
    await stores.append(lease, blocks(60))
    assert [chunk.end for chunk in (await stores.read(job, limit_bytes=1)).chunks] == [1024]
    assert (await stores.read(job, after=1024, limit_bytes=40 * 1024)).chunks[-1].end == 41 * 1024
    assert len((await stores.read(job)).chunks) == 60


async def test_appending_again_changes_nothing(stores: Stores) -> None:
    job, lease = await stores.running()
    chunks = chunks_of(b"one", b"two", b"three")
    await stores.append(lease, chunks[:2], head=HEAD)
    again = await stores.append(lease, chunks, head=HEAD)
    assert again == Flow(state=RUNNING, unread_bytes=11)
    assert (await stores.read(job)).chunks == tuple(chunks)


async def test_a_gap_is_refused(stores: Stores) -> None:
    job, lease = await stores.running()
    await stores.append(lease, chunks_of(b"one"))
    assert (await stores.append(lease, chunks_of(b"three", after=6))).cut
    assert (await stores.read(job)).written == 3


async def test_a_stream_that_is_gone_is_not_begun_again(stores: Stores) -> None:
    job = replace(await stores.accept(), id=str(uuid.uuid4()))
    lease = Lease(request_id=job.id, version_id=job.version_id, attempt=1, token="t")
    assert (await stores.append(lease, chunks_of(b"one"))).cut
    async with stores.reading.follow(job.id) as reader:
        assert await reader.read(0, limit_bytes=1) is None


async def test_nothing_is_appended_to_a_cancelled_request(stores: Stores) -> None:
    job, lease = await stores.running()
    await stores.append(lease, chunks_of(b"one"))
    await stores.results.cancel(job.id, reason="changed my mind")
    assert await stores.append(lease, chunks_of(b"two", after=3)) == Flow(state=RequestState.CANCELLED)
    excerpt = await stores.read(job)
    assert (excerpt.state, excerpt.written) == (RequestState.CANCELLED, 3)


async def test_a_worker_that_lost_its_lease_appends_nothing(stores: Stores) -> None:
    job, late = await stores.running(lease_s=0.01)
    await eventually(lambda: _granted(stores, job), bool)
    flow = await stores.append(late, chunks_of(b"late"), head=HEAD)
    assert flow.state is RequestState.QUEUED
    excerpt = await stores.read(job)
    assert (excerpt.attempt, excerpt.written, excerpt.head) == (2, 0, None)


async def _granted(stores: Stores, job: Job) -> bool:
    claim = await stores.results.claim(job, worker="other", lease_s=30, max_attempts=3)
    return claim.verdict is Verdict.GRANTED


async def test_an_attempt_that_sent_no_body_yet_may_be_repeated(stores: Stores) -> None:
    job, lease = await stores.running()
    await stores.append(lease, head=HEAD)
    assert await stores.results.release(lease, refund=False) is RequestState.QUEUED
    second = await stores.claimed(job)
    other = replace(HEAD, status=201)
    await stores.append(second, chunks_of(b"one"), head=other)
    excerpt = await stores.read(job)
    assert (excerpt.attempt, excerpt.head, excerpt.written) == (2, other, 3)


async def test_an_attempt_that_began_its_body_is_not_repeated_when_it_is_released(stores: Stores) -> None:
    job, lease = await stores.running()
    await stores.append(lease, chunks_of(b"one"), head=HEAD)
    assert await stores.results.release(lease, refund=True) is RequestState.ERRORED
    record = await stores.record(job)
    assert (record.state, record.reason, record.attempt) == (RequestState.ERRORED, STREAM_CUT, 1)
    assert (await stores.results.load([job.version_id]))[0].running == 0


async def test_an_attempt_that_began_its_body_is_not_repeated_by_another_worker(stores: Stores) -> None:
    job, lease = await stores.running(lease_s=0.01)
    await stores.append(lease, chunks_of(b"one"), head=HEAD)

    async def settled() -> bool:
        claim = await stores.results.claim(job, worker="other", lease_s=30, max_attempts=3)
        return (claim.verdict, claim.state) == (Verdict.SETTLED, RequestState.ERRORED)

    await eventually(settled, bool)
    assert (await stores.record(job)).reason == STREAM_CUT


async def test_a_reader_ends_the_stream_of_a_worker_that_fell_silent(stores: Stores) -> None:
    job, lease = await stores.running(lease_s=0.01)
    await stores.append(lease, chunks_of(b"one"), head=HEAD)
    assert (await stores.read(job)).state is RUNNING
    async with asyncio.timeout(20), stores.reading.follow(job.id) as reader:
        while (await seen(reader)).state is RUNNING:
            await reader.changed(LEASE_S)
    assert (await stores.record(job)).reason == STREAM_CUT


async def test_a_request_without_a_stream_is_left_to_the_next_worker(stores: Stores) -> None:
    job, _ = await stores.running(lease_s=0.01)
    async with stores.reading.follow(job.id) as reader:
        await reader.changed(LEASE_S * 6)
        assert (await seen(reader)).state is RUNNING


@pytest.mark.parametrize("cause", ["head", "chunks", "end"])
async def test_a_waiting_reader_is_told(stores: Stores, cause: str) -> None:
    job, lease = await stores.running()
    await stores.append(lease, chunks_of(b"one"))
    async with stores.reading.follow(job.id) as reader:
        await seen(reader)
        waiting = asyncio.ensure_future(reader.changed(30))
        if cause == "end":
            await stores.results.settle(lease, job, RequestState.FULFILLED, HEAD)
        else:
            head, chunks = (HEAD, []) if cause == "head" else (None, chunks_of(b"two", after=3))
            await stores.append(lease, chunks, head=head)
        async with asyncio.timeout(20):
            await waiting
        excerpt = await seen(reader, 3)
        assert (excerpt.state.terminal, excerpt.head, excerpt.written) == {
            "head": (False, HEAD, 3),
            "chunks": (False, None, 6),
            "end": (True, None, 3),
        }[cause]


async def test_who_waits_for_the_end_is_told_that_there_is_a_head(stores: Stores) -> None:
    job, lease = await stores.running()
    async with stores.front.results.watch(job.id) as watch:
        assert (await stores.record(job)).head is None
        await watch.read()
        waiting = asyncio.ensure_future(watch.changed(30))
        await stores.append(lease, head=HEAD)
        async with asyncio.timeout(20):
            await waiting
        record = await watch.read()
    assert record is not None
    assert (record.state, record.head) == (RUNNING, HEAD)
    await stores.results.settle(lease, job, RequestState.FULFILLED, HEAD)
    assert (await stores.record(job)).head is None


async def test_every_reader_is_told(stores: Stores) -> None:
    job, lease = await stores.running()
    async with AsyncExitStack() as stack:
        opened = (stores.reading, stores.reading, stores.writing)
        readers = [await stack.enter_async_context(streams.follow(job.id)) for streams in opened]
        for reader in readers:
            await seen(reader)
        waiting = [asyncio.ensure_future(reader.changed(30)) for reader in readers]
        await stores.append(lease, chunks_of(b"one"))
        async with asyncio.timeout(20):
            await asyncio.gather(*waiting)


async def test_only_the_latest_bytes_are_kept(stores: Stores) -> None:
    job, lease = await stores.running()
    everything = blocks(100)
    for at in range(0, 100, 7):
        await stores.append(lease, everything[at : at + 7])
    excerpt = await stores.read(job)
    assert excerpt.written == 100 * 1024
    assert excerpt.chunks == tuple(everything[-KEPT_BYTES // 1024 :])


async def test_the_writer_learns_how_much_is_unread(stores: Stores) -> None:
    job, lease = await stores.running()
    await stores.append(lease, blocks(10))
    async with stores.reading.follow(job.id) as reader:
        await seen(reader, 4 * 1024)
        assert (await stores.append(lease)).unread_bytes == 10 * 1024  # who only looks has read nothing
        await seen(reader, 4 * 1024, attended_s=30)
        assert (await stores.append(lease)).unread_bytes == 6 * 1024


async def test_a_writer_that_waits_is_told_when_most_was_read(stores: Stores) -> None:
    job, lease = await stores.running()
    async with stores.writing.write(lease) as writer, stores.reading.follow(job.id) as reader:
        flow = await writer.append(blocks(40))
        assert flow.unread_bytes > KEPT_BYTES // 2
        waiting = asyncio.ensure_future(writer.drained(30))
        await seen(reader, 30 * 1024, attended_s=30)
        async with asyncio.timeout(20):
            await waiting
        assert (await writer.append()).unread_bytes == 10 * 1024


async def test_a_stream_that_nobody_was_meant_to_read_yet_is_not_unattended(stores: Stores) -> None:
    _, lease = await stores.running()
    await stores.append(lease, blocks(1))
    assert (await stores.append(lease)).unattended_s == 0


async def test_a_reader_that_vanished_is_missed_when_its_time_is_over(stores: Stores) -> None:
    job, lease = await stores.running()
    async with stores.reading.follow(job.id) as reader:
        await seen(reader, attended_s=0.3)
    assert (await stores.append(lease)).unattended_s == 0
    await eventually(lambda: _unattended(stores, lease), bool)
    await stores.read(job)  # who only looks is no reader
    assert await _unattended(stores, lease)


async def test_a_reader_that_leaves_is_missed_at_once(stores: Stores) -> None:
    job, lease = await stores.running()
    async with stores.reading.follow(job.id) as reader:
        await seen(reader, attended_s=60)
        await reader.leave(expected_back=False)
        await eventually(lambda: _unattended(stores, lease), bool)
        await seen(reader, attended_s=60)
        assert not await _unattended(stores, lease)


async def test_a_reader_that_is_expected_back_is_not_missed(stores: Stores) -> None:
    job, lease = await stores.running()
    async with stores.reading.follow(job.id) as reader:
        await seen(reader, attended_s=0.01)
        await eventually(lambda: _unattended(stores, lease), bool)
        await reader.leave(expected_back=True)
    assert not await _unattended(stores, lease)


async def test_a_reader_is_missed_as_soon_as_the_writer_has_to_wait_for_one(stores: Stores) -> None:
    _, lease = await stores.running()
    await stores.append(lease, blocks(40))
    await eventually(lambda: _unattended(stores, lease), bool)


async def _unattended(stores: Stores, lease: Lease) -> bool:
    return (await stores.append(lease)).unattended_s > 0


async def test_a_finished_stream_can_still_be_read(stores: Stores) -> None:
    job, lease = await stores.running()
    chunks = chunks_of(b"one", b"two")
    await stores.append(lease, chunks, head=HEAD)
    await stores.results.settle(lease, job, RequestState.FULFILLED, HEAD)
    assert await stores.read(job) == Excerpt(
        state=RequestState.FULFILLED, attempt=1, written=6, head=HEAD, chunks=tuple(chunks)
    )
    assert (await stores.record(job)).outcome == HEAD


async def test_a_forgotten_stream_is_gone(stores: Stores) -> None:
    job, lease = await stores.running()
    await stores.append(lease, chunks_of(b"one"), head=HEAD)
    await stores.results.settle(lease, job, RequestState.FULFILLED, HEAD)
    await stores.results.forget(job.id)
    async with stores.reading.follow(job.id) as reader:
        assert await reader.read(0, limit_bytes=100) is None


async def test_small_and_large_chunks_are_read_in_order(stores: Stores) -> None:
    """What is small may reach a reader on another way than what is large."""
    chosen = random.Random(3)
    pieces = [bytes([at % 256]) * chosen.choice((1, 40, 3000, 9000)) for at in range(300)]
    chunks = chunks_of(*pieces)
    _, lease = running = await stores.running()

    async def write() -> None:
        async with stores.writing.write(lease) as writer:
            await writer.append(head=HEAD)
            at = 0
            while at < len(chunks):
                portion = chunks[at : at + chosen.randint(1, 3)]
                at += len(portion)
                flow = await writer.append(portion)
                while flow.unread_bytes > KEPT_BYTES // 2:
                    await writer.drained(5)
                    flow = await writer.append()

    found: list[Chunk] = []
    async with asyncio.timeout(30), asyncio.TaskGroup() as group, stores.reading.follow(running[0].id) as reader:
        writing = group.create_task(write())
        while len(found) < len(chunks):
            after = found[-1].end if found else 0
            excerpt = await seen(reader, after, attended_s=30)
            found += excerpt.chunks
            if not excerpt.chunks:
                await reader.changed(5)
        await writing
    assert found == chunks


async def test_many_streams_are_read_whole_and_in_order(stores: Stores) -> None:
    """Every reader on its own hints, while the writers send as fast as they may."""

    async def write(lease: Lease) -> None:
        async with stores.writing.write(lease) as writer:
            for at in range(200):
                await writer.append(chunks_of(f"{at:04}".encode(), after=at * 4))

    async def read(job: Job) -> bytes:
        found = b""
        async with stores.reading.follow(job.id) as reader:
            while len(found) < 800:
                chunks = (await seen(reader, len(found), attended_s=30)).chunks
                found += b"".join(chunk.data for chunk in chunks)
                if not chunks:
                    await reader.changed(30)
        return found

    running = [await stores.running() for _ in range(20)]
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        reading = [group.create_task(read(job)) for job, _ in running]
        for _, lease in running:
            group.create_task(write(lease))
    whole = b"".join(f"{at:04}".encode() for at in range(200))
    assert [task.result() for task in reading] == [whole] * 20
