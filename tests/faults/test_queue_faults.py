"""RabbitMQ killed, frozen, starved and cut off, under load."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from broker.backends.rabbitmq.queue import RabbitQueue, open_queue
from broker.errors import CircuitOpen, PublishRejected, PublishUnconfirmed, QueueMissing, Unavailable
from broker.model import Job
from broker.settings import Settings
from infra.local.servers import RabbitMQ
from tests.contract.queues import a_job, receive, soon
from tests.frozen import frozen

PUBLISH_S = 2.0
RENEW_S = 5.0
PUBLISHERS = 16
JOBS_AFTER = 100

# Seen on RabbitMQ 3.10.8: a quorum queue that is killed with messages in the first second of its life elects no
# leader after the restart, until `ra:trigger_election` (as rabbitmq-server#10070). No event tells when it is safe.
FLEDGED_S = 2.5

# A machine that is loaded may take this long over a restart or a rabbitmqctl.
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def node(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    with RabbitMQ(tmp_path_factory.mktemp("faulty-rabbitmq")) as node:
        yield node


@pytest.fixture
async def server(node: RabbitMQ) -> RabbitMQ:
    """The file's own server, running: what a test kills it may leave dead."""
    await asyncio.to_thread(node.start)
    return node


@pytest.fixture
async def queue(server: RabbitMQ) -> AsyncIterator[RabbitQueue]:
    # RabbitMQ 3.10 now and then cancels no consumer of a deleted queue; then silence is all there is to go by.
    async with open_queue(server.url, Settings(publish_timeout_s=PUBLISH_S), renew_s=RENEW_S) as queue:
        yield queue


@pytest.fixture
async def version_id(queue: RabbitQueue) -> str:
    version_id = str(uuid.uuid4())
    await queue.declare(version_id)
    return version_id


async def publish(queue: RabbitQueue, job: Job) -> None:
    """Until it is confirmed."""
    while True:
        try:
            return await queue.publish(job, timeout_s=PUBLISH_S)
        except Unavailable:
            await asyncio.sleep(0.05)  # as submit does


async def test_nodes_that_are_away_are_passed_over(server: RabbitMQ, version_id: str) -> None:
    place = f"127.0.0.1:{server.port}"
    url = server.url.replace(place, f"127.0.0.1:1,{place},127.0.0.1:2")
    async with open_queue(url, Settings()) as queue:
        job = a_job(version_id)
        await publish(queue, job)
        assert await queue.depth(version_id) == 1
        async with queue.consume(version_id, prefetch=1) as deliveries:
            assert [received.id for received in await receive(deliveries, 1)] == [job.id]


@contextmanager
def logged(event: str) -> Iterator[asyncio.Event]:
    """Set when the queue logs the event."""
    seen = asyncio.Event()

    class Watcher(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.msg == event:
                seen.set()

    # Whatever an earlier test or its library made of the levels.
    logger, watcher = logging.getLogger("broker.backends.rabbitmq"), Watcher()
    level, disabled = logger.level, logging.root.manager.disable
    logger.setLevel(logging.INFO)
    logging.disable(logging.NOTSET)
    logger.addHandler(watcher)
    try:
        yield seen
    finally:
        logger.removeHandler(watcher)
        logger.setLevel(level)
        logging.disable(disabled)


@pytest.mark.parametrize("round_", range(2))
async def test_no_confirmed_job_is_lost_when_the_broker_is_killed(
    server: RabbitMQ, queue: RabbitQueue, version_id: str, round_: int
) -> None:
    confirmed: set[str] = set()
    refusals: set[type[Exception]] = set()
    flowing, done = asyncio.Event(), asyncio.Event()

    async def keep_publishing() -> None:
        while not done.is_set():
            job = a_job(version_id)
            try:
                await queue.publish(job, timeout_s=PUBLISH_S)
            except Unavailable as exc:
                refusals.add(type(exc))
                await asyncio.sleep(0.05)
            else:
                confirmed.add(job.id)
                if len(confirmed) >= JOBS_AFTER:
                    flowing.set()

    async with asyncio.TaskGroup() as publishing:
        for _ in range(PUBLISHERS):
            publishing.create_task(keep_publishing())
        await asyncio.gather(soon(flowing.wait()), asyncio.sleep(FLEDGED_S))
        await asyncio.to_thread(server.kill)
        before = len(confirmed)
        await asyncio.to_thread(server.start)
        async with asyncio.timeout(60):
            while len(confirmed) < before + JOBS_AFTER:
                await publish(queue, a_job(version_id))
                await asyncio.sleep(0.01)
        done.set()

    assert refusals <= {Unavailable, CircuitOpen, PublishUnconfirmed, PublishRejected, QueueMissing}
    missing = set(confirmed)
    async with asyncio.timeout(60), queue.consume(version_id, prefetch=100) as deliveries:
        while missing:
            missing -= {job.id for job in await receive(deliveries, 1)}


@pytest.mark.parametrize("round_", range(3))
async def test_unsettled_jobs_come_again_after_the_connections_were_closed(
    server: RabbitMQ, queue: RabbitQueue, version_id: str, round_: int
) -> None:
    jobs = [a_job(version_id) for _ in range(3)]
    for job in jobs:
        await publish(queue, job)
    async with queue.consume(version_id, prefetch=3) as deliveries:
        lost = [await soon(anext(deliveries)) for _ in jobs]
        await asyncio.to_thread(server.ctl, "close_all_connections", "a test")
        again = [await soon(anext(deliveries)) for _ in jobs]
        assert {delivery.job.id for delivery in again} == {job.id for job in jobs}
        await lost[0].ack()
        await lost[1].requeue()
        await lost[2].reject()
        for delivery in again:
            await delivery.ack()
        last = a_job(version_id)
        await publish(queue, last)
        assert await receive(deliveries, 1) == [last]
    assert await queue.take(version_id) is None


async def test_a_consumer_resumes_when_its_queue_is_declared_again(queue: RabbitQueue, version_id: str) -> None:
    async with queue.consume(version_id, prefetch=1) as deliveries:
        await publish(queue, a_job(version_id))
        await receive(deliveries, 1)
        waiting = asyncio.ensure_future(anext(deliveries))
        with logged("consume_failed") as failed:
            await queue.delete(version_id)
            await soon(failed.wait())
        await queue.declare(version_id)
        job = a_job(version_id)
        await publish(queue, job)
        assert (await soon(waiting)).job == job


async def test_a_missing_queue_is_logged_once(queue: RabbitQueue, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "broker.backends.rabbitmq")
    version_id = str(uuid.uuid4())
    async with queue.consume(version_id, prefetch=1) as deliveries:
        waiting = asyncio.ensure_future(anext(deliveries))
        with logged("consume_resumed") as resumed:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(resumed.wait(), 1.0)  # some tries
            await queue.declare(version_id)
            await soon(resumed.wait())
        waiting.cancel()
    assert [record.message for record in caplog.records].count("consume_failed") == 1


async def test_no_publish_succeeds_once_its_queue_is_gone(queue: RabbitQueue, version_id: str) -> None:
    await queue.publish(a_job(version_id), timeout_s=PUBLISH_S)
    publishes = [asyncio.ensure_future(queue.publish(a_job(version_id), timeout_s=PUBLISH_S)) for _ in range(200)]
    await queue.delete(version_id)
    late = await asyncio.gather(
        *(queue.publish(a_job(version_id), timeout_s=PUBLISH_S) for _ in range(200)), return_exceptions=True
    )
    early = await asyncio.gather(*publishes, return_exceptions=True)
    assert {type(outcome) for outcome in early} <= {type(None), QueueMissing, PublishUnconfirmed, PublishRejected}
    assert {type(outcome) for outcome in late} <= {QueueMissing, PublishUnconfirmed}
    with pytest.raises(QueueMissing):
        await queue.publish(a_job(version_id), timeout_s=PUBLISH_S)


async def test_a_publish_fails_in_time_while_the_broker_is_away_and_works_when_it_is_back(
    server: RabbitMQ, queue: RabbitQueue, version_id: str
) -> None:
    await queue.publish(a_job(version_id), timeout_s=PUBLISH_S)
    await asyncio.sleep(FLEDGED_S)
    await asyncio.to_thread(server.kill)
    for _ in range(3):
        with pytest.raises(Unavailable):
            await soon(queue.publish(a_job(version_id), timeout_s=PUBLISH_S))
        with pytest.raises(Unavailable):
            await soon(queue.take(version_id))
        with pytest.raises(Unavailable):
            await soon(queue.ping())
    await asyncio.to_thread(server.start)
    job = a_job(version_id)
    await soon(publish(queue, job))
    await soon(queue.ping())


async def test_opening_does_not_need_the_broker(server: RabbitMQ) -> None:
    version_id = str(uuid.uuid4())
    await asyncio.to_thread(server.kill)
    async with open_queue(server.url, Settings()) as queue:
        with pytest.raises(Unavailable):
            await soon(queue.declare(version_id))
        await asyncio.to_thread(server.start)
        async with asyncio.timeout(30):
            while True:
                try:
                    await queue.declare(version_id)
                except Unavailable:
                    await asyncio.sleep(0.05)
                else:
                    break
        job = a_job(version_id)
        await soon(publish(queue, job))
        async with queue.consume(version_id, prefetch=1) as deliveries:
            assert await receive(deliveries, 1) == [job]


async def test_a_consumer_outlives_a_restart_of_the_broker(
    server: RabbitMQ, queue: RabbitQueue, version_id: str
) -> None:
    jobs = [a_job(version_id) for _ in range(2)]
    await publish(queue, jobs[0])
    async with queue.consume(version_id, prefetch=1) as deliveries:
        lost = await soon(anext(deliveries))
        waiting = asyncio.ensure_future(anext(deliveries))
        await asyncio.to_thread(server.restart)
        again = await soon(waiting)
        assert again.job == lost.job == jobs[0]
        await lost.ack()
        await again.ack()
        await soon(publish(queue, jobs[1]))
        assert await receive(deliveries, 1) == jobs[1:]


@pytest.mark.parametrize(
    ("limit", "alarming", "harmless"),
    [
        pytest.param("set_vm_memory_high_watermark", "0.0000001", "0.4", id="memory"),
        pytest.param("set_disk_free_limit", str(10**15), "50000000", id="disk"),
    ],
)
async def test_an_alarm_stops_publishing_and_not_consuming(
    server: RabbitMQ, queue: RabbitQueue, version_id: str, limit: str, alarming: str, harmless: str
) -> None:
    jobs = [a_job(version_id) for _ in range(3)]
    for job in jobs:
        await queue.publish(job, timeout_s=PUBLISH_S)
    await asyncio.to_thread(server.ctl, limit, alarming)
    try:
        with pytest.raises(PublishUnconfirmed):
            await soon(queue.publish(a_job(version_id), timeout_s=PUBLISH_S))
        under_alarm = await asyncio.gather(
            *(soon(queue.publish(a_job(version_id), timeout_s=PUBLISH_S)) for _ in range(50)), return_exceptions=True
        )
        assert {type(outcome) for outcome in under_alarm} <= {Unavailable, PublishUnconfirmed}
        async with queue.consume(version_id, prefetch=1) as deliveries:
            assert await receive(deliveries, 3) == jobs
    finally:
        await asyncio.to_thread(server.ctl, limit, harmless)
    await soon(publish(queue, a_job(version_id)))


async def test_a_blocked_connection_refuses_at_once_without_sending(
    server: RabbitMQ, queue: RabbitQueue, version_id: str
) -> None:
    await queue.publish(a_job(version_id), timeout_s=PUBLISH_S)
    await asyncio.to_thread(server.ctl, "set_vm_memory_high_watermark", "0.0000001")
    try:
        sent = asyncio.ensure_future(queue.publish(a_job(version_id), timeout_s=20))
        refusal: Unavailable | None = None
        async with asyncio.timeout(20):
            while type(refusal) is not Unavailable:  # until RabbitMQ has said that it blocks us
                try:
                    await queue.publish(a_job(version_id), timeout_s=0.5)
                except Unavailable as exc:
                    refusal = exc
        with pytest.raises(Unavailable, match="memory or disk"):
            await queue.ping()
    finally:
        await asyncio.to_thread(server.ctl, "set_vm_memory_high_watermark", "0.4")
    await soon(sent)


async def test_a_frozen_broker_costs_a_publish_no_more_than_its_time(
    server: RabbitMQ, queue: RabbitQueue, version_id: str
) -> None:
    await queue.publish(a_job(version_id), timeout_s=PUBLISH_S)
    with frozen(server.pid, group=True):
        outcomes = await soon(
            asyncio.gather(
                *(queue.publish(a_job(version_id), timeout_s=PUBLISH_S) for _ in range(20)), return_exceptions=True
            )
        )
        assert {type(outcome) for outcome in outcomes} == {PublishUnconfirmed}
        with pytest.raises(Unavailable):
            await soon(queue.publish(a_job(version_id), timeout_s=PUBLISH_S))
        with pytest.raises(Unavailable):
            await soon(queue.take(version_id))
    await soon(publish(queue, a_job(version_id)))


async def test_closing_is_bounded_while_the_broker_is_frozen(server: RabbitMQ) -> None:
    version_id = str(uuid.uuid4())
    with ExitStack() as stack:
        async with asyncio.timeout(60), open_queue(server.url, Settings()) as queue:
            await queue.declare(version_id)
            await publish(queue, a_job(version_id))
            stack.enter_context(frozen(server.pid, group=True))


@pytest.mark.parametrize("round_", range(3))
async def test_a_cancelled_publish_leaves_the_next_one_of_its_id_unharmed(
    queue: RabbitQueue, version_id: str, round_: int
) -> None:
    jobs = [a_job(version_id) for _ in range(50)]
    publishes = [asyncio.ensure_future(queue.publish(job, timeout_s=PUBLISH_S)) for job in jobs]
    await asyncio.sleep(0)
    for publishing in publishes[::2]:
        publishing.cancel()
    await asyncio.gather(*(queue.publish(job, timeout_s=PUBLISH_S) for job in jobs))
    outcomes = await asyncio.gather(*publishes, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {type(None), asyncio.CancelledError}
    missing = {job.id for job in jobs}
    async with queue.consume(version_id, prefetch=50) as deliveries:
        while missing:
            missing -= {job.id for job in await receive(deliveries, 1)}


async def test_a_broker_that_takes_nothing_for_a_callers_whole_patience_is_not_asked(server: RabbitMQ) -> None:
    patience = Settings(publish_timeout_s=1.0, accept_timeout_s=1.0)
    async with open_queue(server.url, patience) as queue:
        version_id = str(uuid.uuid4())
        await queue.declare(version_id)
        await asyncio.to_thread(server.ctl, "set_vm_memory_high_watermark", "0.0000001")
        try:
            while not queue._breaker.open:
                with pytest.raises(Unavailable):
                    await queue.publish(a_job(version_id), timeout_s=1.0)
            assert queue._seeking is not None
            queue._seeking.cancel()
            for _ in range(100):
                with pytest.raises(CircuitOpen):
                    await queue.publish(a_job(version_id), timeout_s=1.0)
        finally:
            await asyncio.to_thread(server.ctl, "set_vm_memory_high_watermark", "0.4")
        queue._breaker.found()
        await publish(queue, a_job(version_id))
        assert not queue._breaker.open
