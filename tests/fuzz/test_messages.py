"""Messages of the queue that are not as a front end wrote them: refused in words, or run like any other, and the worker
goes on with the next one."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import orjson
import pytest
from aiormq.abc import AbstractChannel
from hypothesis import event, given
from hypothesis import strategies as st
from pamqp.commands import Basic

from broker.backends.codec import Unreadable, pack_job
from broker.backends.files import open_blobs
from broker.backends.memory.catalog import MemoryCatalog
from broker.backends.rabbitmq.messages import ENVELOPE, SIGNATURE, properties, read
from broker.backends.rabbitmq.queue import RabbitQueue, open_queue
from broker.backends.rabbitmq.wire import Message, _properties
from broker.backends.redis.store import open_store
from broker.model import Channel, Job, Outcome, RequestState, Verdict
from broker.ports import Store
from broker.settings import Settings
from broker.signatures import NO_SIGNATURES, NotOurs, Signatures
from infra.local.servers import RabbitMQ, Redis
from tests.contract.queues import raw_channel, soon
from tests.eventually import eventually
from tests.fuzz.fuzzing import STRANGE, Complaints, damaged, fuzzed
from tests.unit.container import VERSION_ID, a_job, container, settings_for
from tests.unit.test_sidecar import ASSET, LendingQueue, Rig
from tests.unit.test_sidecar import Store as MemoryStore
from workers.sidecar import serve

HANG_S = 60.0
AT_ONCE = 5
OURS = Signatures(keys={"k": b"k" * 32})
DB = 6
# As long in every run: the cases must not depend on the clock.
NOW = int(time.time()) + 0.5
FIELDS = sorted(orjson.loads(pack_job(a_job())[0]))


@st.composite
def messages(draw: st.DrawFn, signatures: Signatures = NO_SIGNATURES) -> tuple[Job, Basic.Properties, bytes]:
    """A good job, and a message of it that is not as it was sent."""
    job = a_job(id=str(draw(st.uuids(version=4))), created_at=NOW, deadline_at=NOW + 3600)
    if draw(st.booleans()):
        job = replace(job, assets=(ASSET,), streaming=draw(st.booleans()), queue_deadline_at=job.deadline_at)
    if draw(st.integers(0, 5)) == 0:
        job = replace(job, channel=Channel(url="http://127.0.0.1:9/x", token="t"))
    envelope, body = pack_job(job)
    raw = properties(job, envelope, signatures.sign(job.version_id, envelope, body))
    sent = Basic.Properties()
    sent.unmarshal(int.from_bytes(raw[:2]), raw[2:])
    headers = dict(sent.headers or {})
    for _ in range(draw(st.integers(1, 2))):
        match draw(st.integers(0, 9)):
            case 0 | 1:
                envelope = draw(damaged(envelope))
                headers[ENVELOPE] = envelope.decode(errors="replace")
            case 2 | 3 | 4:
                envelope = draw(retyped(envelope))
                headers[ENVELOPE] = envelope.decode(errors="replace")
            case 5:
                body = draw(damaged(body))
            case 6:
                sent.message_id = draw(st.sampled_from([None, "", "x", ASSET, job.id.upper(), job.id + " "]))
            case 7:
                headers.pop(draw(st.sampled_from([ENVELOPE, SIGNATURE])), None)
            case 8:
                headers[draw(st.sampled_from([ENVELOPE, SIGNATURE, "x-death", "x-first-death-reason"]))] = draw(
                    IN_HEADERS
                )
            case _:
                if isinstance(mac := headers.get(SIGNATURE), str):
                    headers[SIGNATURE] = draw(damaged(mac.encode())).decode(errors="replace")
    sent.headers = headers
    return job, sent, body


# What AMQP carries in a header.
IN_HEADERS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**31), 2**31),
    st.text(max_size=8),
    st.sampled_from([[], {}, [1], {"reason": 1}, [{"reason": ["x"]}], [{}], 1.5]),
)


@st.composite
def retyped(draw: st.DrawFn, envelope: bytes) -> bytes:
    """An envelope with a field gone, twice, or of another type; as it is, if it is none any more."""
    try:
        fields = orjson.loads(envelope)
        assert isinstance(fields, dict)
    except (ValueError, AssertionError):
        return envelope
    name = draw(st.sampled_from(FIELDS))
    match draw(st.integers(0, 3)):
        case 0:
            fields.pop(name, None)
        case 1:
            return orjson.dumps(fields)[:-1] + b"," + orjson.dumps({name: draw(STRANGE)})[1:]
        case _:
            fields[name] = draw(STRANGE)
    try:
        return orjson.dumps(fields)
    except TypeError:  # numbers that JSON cannot hold
        return envelope


def received(sent: Basic.Properties, body: bytes) -> Message:
    raw = sent.marshal()
    return Message(0, *_properties(raw, 0, len(raw)), body)


def accepted(sent: Basic.Properties, body: bytes, signatures: Signatures = NO_SIGNATURES) -> Job | None:
    try:
        return read(received(sent, body), VERSION_ID, signatures)
    except (Unreadable, NotOurs):
        return None


@fuzzed(400)
@given(message=messages(OURS))
def test_of_a_signed_message_nothing_that_counts_can_be_changed(message: tuple[Job, Basic.Properties, bytes]) -> None:
    job, sent, body = message
    found = accepted(sent, body, OURS)
    event("refused" if found is None else "accepted")
    assert found is None or found == job
    if (sent.headers or {}).get(SIGNATURE) is not None:
        assert accepted(sent, body, replace(OURS, lenient=True)) in (None, job)


# -- the sidecar -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def rig(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """A sidecar at work, with its queue and store in memory."""
    folder = tmp_path_factory.mktemp("sidecar")
    (folder / "scratch").mkdir()
    async with container() as box:
        settings = settings_for(folder, box.port, scratch_dir=str(folder / "scratch"), max_request_concurrency=AT_ONCE)
        async with open_blobs("file://", settings) as blobs:
            queue = LendingQueue()
            await queue.declare(VERSION_ID)
            made = Rig(box, queue, MemoryStore(settings), MemoryCatalog(), blobs, settings)
            working = asyncio.create_task(serve(made.broker, settings, made.stop))
            yield made
            made.stop.set()
            async with asyncio.timeout(HANG_S):
                await working


def new(message: tuple[Job, Basic.Properties, bytes]) -> tuple[Basic.Properties, bytes]:
    """With an ID that was never used. It is not drawn: cases must not depend on those before them."""
    job, sent, body = message
    headers = dict(sent.headers or {})
    envelope, request_id = headers.get(ENVELOPE), str(uuid.uuid4())
    if isinstance(envelope, str):
        headers[ENVELOPE] = envelope.replace(job.id, request_id)
    return Basic.Properties(headers=headers, message_id=sent.message_id), body


@fuzzed(60)
@given(tried=st.lists(messages(), min_size=1, max_size=AT_ONCE))
async def test_what_is_not_refused_is_run_or_ended_and_the_next_job_runs(
    rig: Rig, complaints: Complaints, tried: list[tuple[Job, Basic.Properties, bytes]]
) -> None:
    jobs = {job.id: job for message in tried if (job := accepted(*new(message))) is not None}
    event(f"{len(jobs)} of {len(tried)} accepted")
    rig.box.bodies.clear()
    rig.box.headers.clear()
    async with asyncio.timeout(HANG_S):
        for job in jobs.values():
            await rig.queue.publish(job, timeout_s=1)
        good = await rig.submit()
        record = await rig.ended(good)
        assert record.state is RequestState.FULFILLED
        for job in jobs.values():
            await eventually(partial(rig.results.read, job.id), lambda seen: seen is None or seen.state.terminal)
        await eventually(lambda: rig.queue.depth(VERSION_ID), lambda depth: depth == 0)
    complaints.none()


# -- the store ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def store(redis_server: Redis) -> AsyncIterator[Store]:
    async with open_store(f"{redis_server.url.rpartition('/')[0]}/{DB}", Settings()) as opened:
        yield opened


@fuzzed(100)
@given(message=messages())
async def test_what_is_not_refused_can_be_claimed_settled_and_read(
    store: Store, complaints: Complaints, message: tuple[Job, Basic.Properties, bytes]
) -> None:
    job = accepted(*new(message))
    if job is None:
        return
    results = store.results
    async with asyncio.timeout(HANG_S):
        claim = await results.claim(job, worker="w", lease_s=15, max_attempts=3)
        if claim.lease is not None:
            done = await results.settle(claim.lease, job, RequestState.FULFILLED, Outcome(status=200))
            assert done is RequestState.FULFILLED
        ended = await results.end(job, RequestState.DEAD, reason="x")
        assert ended.verdict is Verdict.SETTLED
        assert (await store.upkeep.restore(job)).terminal
        record = await results.read(job.id)
    assert record is not None
    assert record.state.terminal
    complaints.none()


# -- RabbitMQ ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def queue(rabbitmq: RabbitMQ) -> AsyncIterator[RabbitQueue]:
    async with open_queue(rabbitmq.url, Settings(), OURS, settle_s=0) as opened:
        yield opened


@pytest.fixture(scope="module")
async def channel(rabbitmq: RabbitMQ) -> AsyncIterator[AbstractChannel]:
    async with raw_channel(rabbitmq.url) as opened:
        yield opened


@fuzzed(5)
@given(tried=st.lists(messages(OURS), min_size=6, max_size=10, unique_by=lambda message: message[0].id))
async def test_a_worker_on_rabbitmq_outlives_what_is_not_ours(
    queue: RabbitQueue,
    channel: AbstractChannel,
    complaints: Complaints,
    tmp_path_factory: pytest.TempPathFactory,
    tried: list[tuple[Job, Basic.Properties, bytes]],
) -> None:
    await queue.declare(VERSION_ID)
    complaints.lines.clear()
    folder = tmp_path_factory.mktemp("sidecar")
    (folder / "scratch").mkdir()
    async with asyncio.timeout(HANG_S * 2), container() as box:
        settings = settings_for(folder, box.port, scratch_dir=str(folder / "scratch"), max_request_concurrency=2)
        async with open_blobs("file://", settings) as blobs:
            rig = Rig(box, cast("Any", queue), MemoryStore(settings), MemoryCatalog(), blobs, settings)
            async with rig.sidecar():
                for _, sent, body in tried:
                    await soon(channel.basic_publish(body, routing_key=f"fnq.v.{VERSION_ID}", properties=sent))
                assert (await rig.ended(await rig.submit())).state is RequestState.FULFILLED
                await eventually(lambda: queue.depth(VERSION_ID), lambda depth: depth == 0)
    refused = [line for line in complaints.lines if line == "message_unreadable"]
    assert len(refused) == sum(accepted(sent, body, OURS) is None for _, sent, body in tried)
    await queue.delete(VERSION_ID)
    complaints.none()
