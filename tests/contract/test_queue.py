"""One suite for every back end of the Queue port, then what only RabbitMQ can get wrong."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import pytest
from aiormq.abc import AbstractChannel, DeliveredMessage
from pamqp.commands import Basic
from pydantic import SecretStr

from broker.backends.codec import pack_job
from broker.backends.memory.queue import MemoryQueue
from broker.backends.rabbitmq.deliveries import Lane
from broker.backends.rabbitmq.queue import RabbitQueue, open_queue
from broker.errors import ConfigurationError, PublishRejected, QueueMissing, Unavailable
from broker.model import Job
from broker.ports import Queue
from broker.settings import Settings, SidecarSettings
from broker.signatures import Signatures
from infra.local.servers import RabbitMQ
from tests.contract.queues import SOON_S, a_job, a_job_to_expire, dead_letter, raw_channel, receive, soon
from tests.eventually import eventually

ROUNDS = range(3)  # concurrency is tried more than once
PUBLISH_S = 10.0
MAX_LENGTH = 5
RENEW_S = 0.1  # a test does not wait a minute


@pytest.fixture(params=["memory", "rabbitmq"])
def backend(request: pytest.FixtureRequest) -> Literal["memory", "rabbitmq"]:
    name: Literal["memory", "rabbitmq"] = request.param
    return name


@pytest.fixture
async def queue(backend: str, request: pytest.FixtureRequest) -> AsyncIterator[Queue]:
    if backend == "memory":
        yield MemoryQueue(max_length=1000)
        return
    async with open_queue(request.getfixturevalue("rabbitmq").url, Settings(), renew_s=RENEW_S, settle_s=0) as queue:
        yield queue


@pytest.fixture
async def version_id(queue: Queue) -> AsyncIterator[str]:
    async for version_id in _declared(queue):
        yield version_id


@pytest.fixture
async def rabbit_queue(rabbitmq: RabbitMQ) -> AsyncIterator[RabbitQueue]:
    async with open_queue(rabbitmq.url, Settings(), settle_s=0) as queue:
        yield queue


@pytest.fixture
async def rabbit_version_id(rabbit_queue: RabbitQueue) -> AsyncIterator[str]:
    async for version_id in _declared(rabbit_queue):
        yield version_id


@pytest.fixture
async def channel(rabbitmq: RabbitMQ) -> AsyncIterator[AbstractChannel]:
    """Past fnqueue, to the broker itself."""
    async with raw_channel(rabbitmq.url) as channel:
        yield channel


async def _declared(queue: Queue) -> AsyncIterator[str]:
    version_id = str(uuid.uuid4())
    await queue.declare(version_id)
    yield version_id
    await queue.delete(version_id)


async def publish(queue: Queue, jobs: Sequence[Job]) -> None:
    for job in jobs:
        await queue.publish(job, timeout_s=PUBLISH_S)


# -- every back end ----------------------------------------------------------------------------


async def test_jobs_come_in_the_order_of_their_publishing(queue: Queue, version_id: str) -> None:
    jobs = [a_job(version_id) for _ in range(50)]
    await publish(queue, jobs)
    async with queue.consume(version_id, prefetch=8) as deliveries:
        assert await receive(deliveries, 50) == jobs


@pytest.mark.parametrize("round_", ROUNDS)
async def test_concurrent_publishes_are_all_confirmed_and_each_is_delivered_once(
    queue: Queue, version_id: str, round_: int
) -> None:
    jobs = [a_job(version_id) for _ in range(500)]
    async with queue.consume(version_id, prefetch=16) as deliveries, asyncio.TaskGroup() as publishing:
        for job in jobs:
            publishing.create_task(queue.publish(job, timeout_s=PUBLISH_S))
        received = await receive(deliveries, len(jobs))
    assert {job.id for job in received} == {job.id for job in jobs}
    assert await queue.take(version_id) is None


@pytest.mark.parametrize("round_", ROUNDS)
async def test_one_job_published_many_times_at_once_is_confirmed_to_each(
    queue: Queue, version_id: str, round_: int
) -> None:
    job = a_job(version_id)
    async with asyncio.TaskGroup() as publishing:
        for _ in range(20):
            publishing.create_task(queue.publish(job, timeout_s=PUBLISH_S))
    async with queue.consume(version_id, prefetch=1) as deliveries:
        assert await receive(deliveries, 1) == [job]


@pytest.mark.parametrize("body", [b"", b"\x00\xff", os.urandom(256 * 1024)], ids=["empty", "bytes", "256 KiB"])
async def test_a_job_arrives_as_it_was_sent(queue: Queue, version_id: str, body: bytes) -> None:
    job = a_job(
        version_id,
        body=body,
        body_key="inputs/default/1",
        headers=(("X-Name", "Zoë 雪 🧊"), ("X-Quote", 'a "b" \\ c')),
        assets=(str(uuid.uuid4()), str(uuid.uuid4())),
        passthrough=True,
        poll_s=7,
    )
    await publish(queue, [job])
    async with queue.consume(version_id, prefetch=1) as deliveries:
        delivery = await soon(anext(deliveries))
        await delivery.ack()
    assert delivery.job == job
    assert delivery.death == ""


async def test_an_acknowledged_job_makes_room_and_does_not_come_again(queue: Queue, version_id: str) -> None:
    first, second, third = jobs = [a_job(version_id) for _ in range(3)]
    await publish(queue, jobs[:2])
    async with queue.consume(version_id, prefetch=1) as deliveries:
        assert await receive(deliveries, 2) == [first, second]
    await publish(queue, [third])
    async with queue.consume(version_id, prefetch=1) as deliveries:
        assert await receive(deliveries, 1) == [third]


async def test_a_requeued_job_comes_again_before_those_behind_it(queue: Queue, version_id: str) -> None:
    jobs = [a_job(version_id) for _ in range(2)]
    await publish(queue, jobs)
    async with queue.consume(version_id, prefetch=1) as deliveries:
        delivery = await soon(anext(deliveries))
        await delivery.requeue()
        assert await receive(deliveries, 2) == jobs


async def test_a_rejected_job_goes_to_the_dead_letters(queue: Queue, version_id: str) -> None:
    job = a_job(version_id)
    await publish(queue, [job])
    async with queue.consume(version_id, prefetch=1) as deliveries:
        await (await soon(anext(deliveries))).reject()
        dead = await dead_letter(queue, version_id)
    assert dead.job == job
    assert dead.death == "rejected"


async def test_a_job_past_its_time_goes_to_the_dead_letters_though_nobody_consumes(
    queue: Queue, version_id: str
) -> None:
    job, fresh = a_job_to_expire(version_id, after_s=0.05), a_job(version_id)
    await publish(queue, [job, fresh])
    dead = await dead_letter(queue, version_id)
    assert dead.job == job
    assert dead.death == "expired"
    async with queue.consume(version_id, prefetch=1) as deliveries:
        assert await receive(deliveries, 1) == [fresh]


async def test_only_the_first_verb_of_a_delivery_counts(queue: Queue, version_id: str) -> None:
    jobs = [a_job(version_id) for _ in range(2)]
    await publish(queue, jobs)
    async with queue.consume(version_id, prefetch=1) as deliveries:
        delivery = await soon(anext(deliveries))
        await delivery.ack()
        await delivery.ack()
        await delivery.requeue()
        await delivery.reject()
        assert await receive(deliveries, 1) == jobs[1:]
    assert await queue.take(version_id) is None


async def test_prefetch_bounds_the_loans(queue: Queue, version_id: str) -> None:
    jobs = [a_job(version_id) for _ in range(3)]
    await publish(queue, jobs)
    async with queue.consume(version_id, prefetch=2) as deliveries:
        loans = [await soon(anext(deliveries)) for _ in range(2)]
        third = await queue.take(version_id)  # left in the queue, so free for others
        assert third is not None
        assert [loan.job for loan in loans] == jobs[:2]
        assert third.job == jobs[2]
        waiting = asyncio.ensure_future(anext(deliveries))
        await third.requeue()
        await loans[0].ack()
        assert (await soon(waiting)).job == jobs[2]


async def test_a_wait_that_was_cut_short_loses_nothing(queue: Queue, version_id: str) -> None:
    job = a_job(version_id)
    async with queue.consume(version_id, prefetch=1) as deliveries:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(deliveries), 0.02)
        await publish(queue, [job])
        assert await receive(deliveries, 1) == [job]


@pytest.mark.parametrize("round_", ROUNDS)
async def test_closing_a_consumer_gives_back_what_was_not_handed_over(
    queue: Queue, version_id: str, round_: int
) -> None:
    jobs = [a_job(version_id) for _ in range(5)]
    await publish(queue, jobs)
    async with queue.consume(version_id, prefetch=5) as deliveries:
        taken = await soon(anext(deliveries))
    assert taken.job == jobs[0]
    async with queue.consume(version_id, prefetch=5) as deliveries:
        assert await receive(deliveries, 4) == jobs[1:]
        await taken.requeue()  # a loan outlives the consumer it came from
        assert await receive(deliveries, 1) == jobs[:1]


async def test_a_closed_consumer_ends_its_iteration(queue: Queue, version_id: str) -> None:
    async with queue.consume(version_id, prefetch=1) as deliveries:
        waiting = asyncio.ensure_future(_count(deliveries))
        await asyncio.sleep(0)  # it waits now
    assert await soon(waiting) == 0


async def test_take_lends_the_job_at_the_head(queue: Queue, version_id: str) -> None:
    jobs = [a_job(version_id) for _ in range(2)]
    await publish(queue, jobs)
    first, second = await queue.take(version_id), await queue.take(version_id)
    assert first is not None
    assert second is not None
    assert [first.job, second.job] == jobs
    await second.ack()
    await first.requeue()
    async with queue.consume(version_id, prefetch=1) as deliveries:
        assert await receive(deliveries, 1) == jobs[:1]


async def test_take_of_nothing_is_none(queue: Queue, version_id: str) -> None:
    assert await queue.take(version_id) is None
    assert await queue.take(str(uuid.uuid4())) is None


async def test_depth_tells_what_is_ready_and_leaves_out_what_is_on_loan(queue: Queue, version_id: str) -> None:
    await publish(queue, [a_job(version_id) for _ in range(3)])
    await eventually(lambda: queue.depth(version_id), lambda depth: depth == 3)
    delivery = await queue.take(version_id)
    assert delivery is not None
    await eventually(lambda: queue.depth(version_id), lambda depth: depth == 2)
    await delivery.requeue()
    await eventually(lambda: queue.depth(version_id), lambda depth: depth == 3)


async def test_depth_without_a_queue_is_none(queue: Queue) -> None:
    assert await queue.depth(str(uuid.uuid4())) is None


async def test_many_can_ask_for_queues_that_are_missing_at_once(queue: Queue) -> None:
    for _ in range(4):
        assert await asyncio.gather(*(queue.depth(str(uuid.uuid4())) for _ in range(64))) == [None] * 64


async def test_the_dead_letters_have_a_depth(queue: Queue) -> None:
    assert await queue.depth("") is not None


async def test_a_publish_without_a_queue_is_refused(queue: Queue) -> None:
    with pytest.raises(QueueMissing):
        await queue.publish(a_job(str(uuid.uuid4())), timeout_s=PUBLISH_S)


@pytest.mark.parametrize("round_", ROUNDS)
async def test_refusals_reach_the_publishes_they_belong_to(queue: Queue, version_id: str, round_: int) -> None:
    missing = str(uuid.uuid4())
    jobs = [a_job(missing if number % 3 == 0 else version_id) for number in range(90)]
    outcomes = await asyncio.gather(*(queue.publish(job, timeout_s=PUBLISH_S) for job in jobs), return_exceptions=True)
    refused = [job.version_id for job, outcome in zip(jobs, outcomes, strict=True) if outcome is not None]
    assert refused == [missing] * 30
    assert {type(outcome) for outcome in outcomes} == {QueueMissing, type(None)}


async def test_a_deleted_queue_is_missing_and_its_jobs_are_gone(queue: Queue, version_id: str) -> None:
    await publish(queue, [a_job(version_id)])
    await queue.delete(version_id)
    await queue.delete(version_id)
    with pytest.raises(QueueMissing):
        await queue.publish(a_job(version_id), timeout_s=PUBLISH_S)
    await queue.declare(version_id)
    await queue.declare(version_id)
    assert await queue.take(version_id) is None


async def test_a_consumer_outlives_a_queue_that_is_deleted_and_declared_again_at_once(
    queue: Queue, version_id: str
) -> None:
    jobs = [a_job(version_id) for _ in range(2)]
    await publish(queue, jobs[:1])
    async with queue.consume(version_id, prefetch=1) as deliveries:
        delivery = await soon(anext(deliveries))
        await queue.delete(version_id)
        waiting = asyncio.ensure_future(anext(deliveries))
        await delivery.requeue()  # of a job that is gone
        await queue.declare(version_id)
        await publish(queue, jobs[1:])
        assert (await soon(waiting)).job == jobs[1]


async def test_a_full_queue_refuses_until_there_is_room(
    backend: str, version_id: str, queue: Queue, request: pytest.FixtureRequest
) -> None:
    if backend == "memory":
        queue = MemoryQueue(max_length=MAX_LENGTH)
        await queue.declare(version_id)
    else:
        await asyncio.to_thread(_limit, request.getfixturevalue("rabbitmq"), version_id)
    accepted = await _fill(queue, version_id)
    assert accepted >= MAX_LENGTH
    async with queue.consume(version_id, prefetch=10) as deliveries:
        await receive(deliveries, accepted)
    await queue.publish(a_job(version_id), timeout_s=PUBLISH_S)


async def test_a_queue_that_works_answers_a_ping(queue: Queue) -> None:
    await queue.ping()


async def _count(deliveries: AsyncIterator[object]) -> int:
    return len([delivery async for delivery in deliveries])


async def _fill(queue: Queue, version_id: str) -> int:
    """How many jobs it takes: RabbitMQ refuses a little late."""
    for accepted in range(1000):
        try:
            await queue.publish(a_job(version_id), timeout_s=PUBLISH_S)
        except PublishRejected:
            return accepted
    raise AssertionError("never full")


def _limit(server: RabbitMQ, version_id: str) -> None:
    limits = json.dumps({"max-length": MAX_LENGTH, "overflow": "reject-publish"})
    server.ctl("set_policy", "--priority", "1", f"limit-{version_id}", f"^fnq\\.v\\.{version_id}$", limits)


# -- RabbitMQ ----------------------------------------------------------------------------------


async def test_garbage_goes_to_the_dead_letters_and_stops_nobody(
    rabbit_queue: RabbitQueue, rabbit_version_id: str, channel: AbstractChannel, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"fnq.v.{rabbit_version_id}"
    strangers = [pack_job(a_job(str(uuid.uuid4())))[0].decode(), "{not json", '{"v": 99}', "null", "[]"]
    for number, envelope in enumerate(strangers):
        properties = Basic.Properties(headers={"fnq": envelope}, message_id=f"stranger {number}")
        await soon(channel.basic_publish(b"", routing_key=name, properties=properties))
    await soon(channel.basic_publish(b"no header", routing_key=name))
    job = a_job(rabbit_version_id)
    await publish(rabbit_queue, [job])
    with caplog.at_level(logging.ERROR, "broker.backends.rabbitmq"):
        async with rabbit_queue.consume(rabbit_version_id, prefetch=1) as deliveries:
            assert await receive(deliveries, 1) == [job]
    unreadable = [record for record in caplog.records if record.message == "message_unreadable"]
    assert len(unreadable) == len(strangers) + 1
    arrived = [await soon(_get(channel, "fnq.dead")) for _ in unreadable]
    assert sum(message.body == b"no header" for message in arrived) == 1


@pytest.mark.parametrize("backend", ["rabbitmq"])
async def test_who_waits_for_a_slot_looks_seldom(
    queue: Queue, version_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, looked_often, look = 0, asyncio.Event(), Lane.hears_within

    async def counted(lane: Lane, silence_s: float) -> bool:
        nonlocal looks
        heard = await look(lane, silence_s)
        looks += 1
        if looks == 4:
            looked_often.set()
        return heard

    await publish(queue, [a_job(version_id), a_job(version_id)])
    async with queue.consume(version_id, prefetch=1) as deliveries:
        held = await soon(anext(deliveries))
        monkeypatch.setattr(Lane, "hears_within", counted)
        began_at = asyncio.get_running_loop().time()
        waiting = asyncio.ensure_future(anext(deliveries))
        await soon(looked_often.wait())
        waiting.cancel()
        await asyncio.wait([waiting])
        await held.ack()
    assert asyncio.get_running_loop().time() - began_at >= 3 * RENEW_S


async def test_garbage_that_the_broker_cannot_move_to_the_dead_letters_is_gone_and_stops_nobody(
    rabbit_queue: RabbitQueue, rabbit_version_id: str, channel: AbstractChannel
) -> None:
    strange: list[Any] = [[1], {"reason": 1}, 1.5, [{"reason": ["x"]}]]
    for deaths in strange:
        properties = Basic.Properties(headers={"x-death": deaths})
        await soon(channel.basic_publish(b"x", routing_key=f"fnq.v.{rabbit_version_id}", properties=properties))
    job = a_job(rabbit_version_id)
    await publish(rabbit_queue, [job])
    async with rabbit_queue.consume(rabbit_version_id, prefetch=1) as deliveries:
        assert await receive(deliveries, 1) == [job]
    assert await rabbit_queue.depth(rabbit_version_id) == 0


async def test_garbage_among_the_dead_letters_does_not_block_them(
    rabbit_queue: RabbitQueue, rabbit_version_id: str, channel: AbstractChannel
) -> None:
    for _ in range(20):
        await soon(channel.basic_publish(b"garbage", exchange="fnq.dead"))
    job = a_job_to_expire(rabbit_version_id, after_s=0)
    await publish(rabbit_queue, [job])
    assert (await dead_letter(rabbit_queue, rabbit_version_id)).job == job


@pytest.mark.parametrize("fault", ["it is not signed", "it was altered after it was signed"])
async def test_a_message_that_was_not_signed_as_it_is_is_refused_and_named_among_the_dead_letters(
    rabbitmq: RabbitMQ, rabbit_version_id: str, channel: AbstractChannel, fault: str
) -> None:
    name, ours = f"fnq.v.{rabbit_version_id}", Signatures(keys={"k": b"k" * 32})
    job, good = a_job(rabbit_version_id), a_job(rabbit_version_id)
    async with open_queue(rabbitmq.url, Settings(), ours, settle_s=0) as queue:
        await publish(queue, [job])
        taken = await soon(_get(channel, name))
        headers = dict(taken.header.properties.headers or {})
        if fault == "it is not signed":
            del headers["fnq-signature"]
        body = taken.body if fault == "it is not signed" else taken.body + b" "
        properties = Basic.Properties(headers=headers, message_id=job.id)
        await soon(channel.basic_publish(body, routing_key=name, properties=properties))
        await publish(queue, [good])
        async with queue.consume(rabbit_version_id, prefetch=1) as deliveries:
            assert await receive(deliveries, 1) == [good]
        async with asyncio.timeout(SOON_S), queue.dead_letters(prefetch=1) as dead:
            async for letter in dead:
                await letter.ack()
                if letter.job.id == job.id:
                    assert (letter.fault, letter.death, letter.job.account) == (fault, "rejected", "")
                    return


async def test_a_sidecars_keys_are_good_for_its_version_only(
    rabbitmq: RabbitMQ, rabbit_queue: RabbitQueue, rabbit_version_id: str
) -> None:
    ours = Signatures(keys={"k": b"k" * 32})
    given = ours.for_sidecar(rabbit_version_id).get_secret_value()
    theirs = SidecarSettings(function_id="f", function_version_id=rabbit_version_id, message_keys=SecretStr(given))
    other = SidecarSettings(function_id="f", function_version_id=str(uuid.uuid4()), message_keys=SecretStr(given))
    job, forged = a_job(rabbit_version_id), a_job(other.function_version_id)
    async with (
        open_queue(rabbitmq.url, Settings(), ours, settle_s=0) as front,
        open_queue(rabbitmq.url, Settings(), Signatures.of(theirs), settle_s=0) as sidecar,
    ):
        await publish(front, [job])
        taken = await sidecar.take(rabbit_version_id)
        assert taken is not None
        assert taken.job == job
        await taken.ack()
        await front.declare(other.function_version_id)
        await publish(sidecar, [forged])
        assert await front.take(other.function_version_id) is None
        await front.delete(other.function_version_id)


async def test_take_skips_garbage(rabbit_queue: RabbitQueue, rabbit_version_id: str, channel: AbstractChannel) -> None:
    job = a_job(rabbit_version_id)
    await soon(channel.basic_publish(b"garbage", routing_key=f"fnq.v.{rabbit_version_id}"))
    await publish(rabbit_queue, [job])
    taken = await rabbit_queue.take(rabbit_version_id)
    assert taken is not None
    assert taken.job == job
    await taken.ack()


async def test_messages_are_what_the_protocol_says(
    rabbit_queue: RabbitQueue, rabbit_version_id: str, channel: AbstractChannel
) -> None:
    job = a_job(rabbit_version_id, created_at=1000.0, deadline_at=1090.0, body=b"body")
    await publish(rabbit_queue, [job])
    message = await soon(_get(channel, f"fnq.v.{rabbit_version_id}"))
    properties = message.header.properties
    assert message.body == b"body"
    assert properties.message_id == job.id
    assert properties.delivery_mode == 2
    assert properties.expiration == "150000"
    assert properties.content_type == "application/octet-stream"


async def test_headers_that_fit_no_frame_are_refused_and_harm_no_other_publish(
    rabbit_queue: RabbitQueue, rabbit_version_id: str
) -> None:
    large = a_job(rabbit_version_id, headers=(("X-Large", "x" * 200_000),))
    nearly = a_job(rabbit_version_id, headers=(("X-Large", "x" * 120_000),))
    outcomes = await asyncio.gather(
        rabbit_queue.publish(nearly, timeout_s=PUBLISH_S),
        rabbit_queue.publish(large, timeout_s=PUBLISH_S),
        rabbit_queue.publish(a_job(rabbit_version_id), timeout_s=PUBLISH_S),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [type(None), PublishRejected, type(None)]


async def test_a_queue_of_another_type_is_a_configuration_error(
    rabbit_queue: RabbitQueue, channel: AbstractChannel
) -> None:
    version_id = str(uuid.uuid4())
    await soon(channel.queue_declare(f"fnq.v.{version_id}", durable=True))
    with pytest.raises(ConfigurationError, match="x-queue-type"):
        await rabbit_queue.declare(version_id)
    await rabbit_queue.delete(version_id)


async def test_a_wrong_password_is_a_configuration_error_that_does_not_show_it(rabbitmq: RabbitMQ) -> None:
    url = rabbitmq.url.replace("@", "wrong@")
    with pytest.raises(ConfigurationError) as error:
        async with open_queue(url, Settings()):
            pass
    assert "wrong" not in str(error.value)


@pytest.mark.parametrize("url", ["amqp://", "amqp://user:secret@host:port/", "amqp:///vhost"])
async def test_a_bad_url_is_a_configuration_error_that_does_not_show_it(url: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        async with open_queue(url, Settings()):
            pass
    assert "secret" not in str(error.value)


async def test_a_closed_queue_refuses_and_its_unfinished_loans_go_back(
    rabbitmq: RabbitMQ, rabbit_queue: RabbitQueue, rabbit_version_id: str
) -> None:
    job = a_job(rabbit_version_id)
    await publish(rabbit_queue, [job])
    async with open_queue(rabbitmq.url, Settings()) as closed, closed.consume(rabbit_version_id, prefetch=1) as loans:
        loan = await soon(anext(loans))
    with pytest.raises(Unavailable):
        await closed.publish(job, timeout_s=PUBLISH_S)
    with pytest.raises(Unavailable):
        await closed.ping()
    await loan.ack()
    async with rabbit_queue.consume(rabbit_version_id, prefetch=1) as deliveries:
        assert await receive(deliveries, 1) == [job]


async def _get(channel: AbstractChannel, name: str) -> DeliveredMessage:
    """The next message of a queue, which may be on its way still."""
    while True:
        message = await channel.basic_get(name, no_ack=True)
        if message.delivery_tag is not None:
            return message
