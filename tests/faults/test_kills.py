"""Whatever process dies, what was accepted is answered once. Every fault strikes at a known step."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import aiohttp
import psutil
import pytest
import redis
from aiohttp import web
from pydantic import SecretStr
from redis.asyncio import Redis as RedisClient

from broker.connect import open_broker
from broker.model import Job
from broker.settings import Settings
from fnqueue import AsyncClient, Done
from infra.local.servers import S3, RabbitMQ, Redis
from tests.eventually import eventually
from tests.house import RECORDER, Caller, Function, House, users
from tests.receiver import receiving
from tests.sse import Listening, listening

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shared:
    """Servers that a test may hurt: every test here has the first ones to itself while it runs."""

    rabbitmq: RabbitMQ
    redis: Redis
    s3: S3


@pytest.fixture(scope="module")
def servers(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("servers")
    rabbitmq, redis, s3 = RabbitMQ(folder / "rabbitmq"), Redis(folder / "redis"), S3(folder / "s3")
    try:
        for server in (rabbitmq, redis, s3):
            server.start()
        yield Shared(rabbitmq, redis, s3)
    finally:
        for server in (rabbitmq, redis, s3):
            server.kill()


@pytest.fixture
def make_house(servers: Shared, tmp_path: Path) -> Iterator[Callable[..., House]]:
    """Starts a house; one per test. The servers are whole again when it is called."""
    started: list[House] = []

    def make(*, fronts: int = 1, **settings: str) -> House:
        for server in (servers.rabbitmq, servers.redis, servers.s3):
            server.start()
        with redis.Redis.from_url(servers.redis.url) as client:
            client.flushall()  # no deployment of an earlier test is the next controller's to keep
        house = House(tmp_path, *users(servers.rabbitmq, servers.redis, servers.s3), fronts=fronts, **settings)
        started.append(house)
        house.start()
        return house

    try:
        yield make
    finally:
        for server in (servers.rabbitmq, servers.redis, servers.s3):
            server.start()
        for house in started:
            house.stop()


class Gate:
    """Jobs that name it finish once it is open."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self) -> None:
        self._path.touch()

    def __str__(self) -> str:
        return str(self._path)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


async def make(make_house: Callable[..., House], **options: object) -> House:
    return await asyncio.to_thread(lambda: make_house(**options))


async def is_running(caller: Caller, request_id: str) -> None:
    await eventually(
        lambda: caller.status(request_id), lambda reply: reply.headers.get("NVCF-STATUS") == "in-progress", within_s=30
    )


async def kill_sidecar(house: House) -> None:
    [sidecar] = house.sidecars()
    sidecar.kill()
    await gone(sidecar)


async def another(house: House, but: set[int]) -> psutil.Process | None:
    """A sidecar that lives and is none of these."""
    return next((found for found in house.sidecars() if found.pid not in but and found.is_running()), None)


async def gone(process: psutil.Process) -> None:
    async def lives() -> bool:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE

    await eventually(lives, lambda alive: not alive)


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """The process and all below it stand still."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


async def upload_asset(caller: Caller) -> str:
    made = await caller.call("POST", "/v2/nvcf/assets", data={"contentType": "text/plain", "description": "an input"})
    assert made.status == 200, made
    async with aiohttp.ClientSession() as session:
        signed = {"Content-Type": "text/plain", "x-amz-meta-nvcf-asset-description": "an input"}
        async with session.put(made.json["uploadUrl"], data=b"content", headers=signed) as put:
            assert put.status == 200
    return str(made.json["assetId"])


async def test_a_worker_killed_between_claim_and_post_runs_the_request_once(
    servers: Shared, make_house: Callable[..., House], gate: Gate
) -> None:
    house = await make(make_house)
    async with house.caller() as caller:
        function = await caller.deploy(RECORDER)
        asset = await upload_asset(caller)
        occupying = await caller.submit(function.id, {"gate": str(gate)})
        await house.record.saw("start", occupying)
        request_id = await caller.submit(function.id, headers={"NVCF-INPUT-ASSET-REFERENCES": asset})
        with frozen(servers.s3.pid):
            gate.open()
            await is_running(caller, request_id)  # claimed, and its input does not come
            await kill_sidecar(house)
        reply = await caller.result(request_id)
        assert (reply.status, reply.json["id"]) == (200, request_id)
        assert house.record.counts("start")[request_id] == 1


async def test_a_worker_killed_between_answer_and_settle_runs_again_and_one_result_shows(
    servers: Shared, make_house: Callable[..., House], gate: Gate
) -> None:
    house = await make(make_house)
    async with house.caller() as caller:
        function = await caller.deploy(RECORDER)
        request_id = await caller.submit(function.id, {"gate": str(gate)})
        await house.record.saw("start", request_id)
        await asyncio.to_thread(servers.redis.kill)
        gate.open()
        await house.record.saw("done", request_id)
        await kill_sidecar(house)
        await asyncio.to_thread(servers.redis.start)
        reply = await caller.result(request_id)
        assert (reply.status, reply.json["id"]) == (200, request_id)
        assert house.record.counts("start")[request_id] == 2
        assert (await caller.status(request_id)).body == reply.body


async def test_a_result_that_was_stored_but_not_acknowledged_is_not_run_again(
    servers: Shared, make_house: Callable[..., House], gate: Gate
) -> None:
    house = await make(make_house)
    async with house.caller() as caller:
        function = await caller.deploy(RECORDER)
        request_id = await caller.submit(function.id, {"gate": str(gate)})
        await house.record.saw("start", request_id)
        await asyncio.to_thread(servers.rabbitmq.kill)
        gate.open()
        assert (await caller.result(request_id)).status == 200
        await kill_sidecar(house)
        await asyncio.to_thread(servers.rabbitmq.start)
        after = await caller.invoke(function.id, {"id": "after"})
        after = after if after.status == 200 else await caller.result(after.request_id)
        assert after.status == 200
        await nothing_waits(servers, function)
        assert house.record.counts("start")[request_id] == 1


async def nothing_waits(servers: Shared, function: Function) -> None:
    """The broker has no message of the version left, delivered or not."""

    async def messages() -> str:
        listed = await asyncio.to_thread(servers.rabbitmq.ctl, "list_queues", "name", "messages", "--no-table-headers")
        return next(line.split()[1] for line in listed.splitlines() if function.version_id in line)

    await eventually(messages, lambda count: count == "0", within_s=30)


async def test_a_front_end_killed_between_create_and_publish_leaves_nothing_that_runs(
    servers: Shared, make_house: Callable[..., House]
) -> None:
    house = await make(make_house, FNQUEUE_REQUEST_DEADLINE_S="4", FNQUEUE_SWEEP_S="0.5")
    async with house.caller() as caller, RedisClient.from_url(servers.redis.url) as redis:
        function = await caller.deploy(RECORDER)
        await caller.invoke(function.id, {"id": "before"})
        known = set(await redis.keys("fnq:*:r"))
        await asyncio.to_thread(servers.rabbitmq.kill)
        posting = asyncio.create_task(caller.invoke(function.id, {"id": "never"}))

        async def created() -> set[bytes | str]:
            return set(await redis.keys("fnq:*:r")) - known

        [record] = await eventually(created, bool)
        await asyncio.to_thread(house.fronts[0].kill)
        with pytest.raises(aiohttp.ClientError):
            await posting
        await asyncio.to_thread(servers.rabbitmq.start)

        async def state() -> bytes | str | None:
            return await redis.hget(record, "s")

        await eventually(state, lambda seen: seen == b"expired", within_s=30)
        assert house.record.counts("start")["never"] == 0


async def test_a_retry_by_key_after_the_front_end_was_killed_joins_the_same_request(
    make_house: Callable[..., House], gate: Gate
) -> None:
    house = await make(make_house, fronts=2)
    async with house.caller(0) as first, house.caller(1) as second:
        function = await first.deploy(RECORDER)
        order, key = {"id": "order-17", "gate": str(gate)}, {"Idempotency-Key": "order-17"}
        posting = asyncio.create_task(first.invoke(function.id, order, headers=key))
        await house.record.saw("start", "order-17")
        await asyncio.to_thread(house.fronts[0].kill)
        with pytest.raises(aiohttp.ClientError):
            await posting
        pending = await second.invoke(function.id, order, wait_s=1, headers=key)
        assert (pending.status, pending.headers["NVCF-STATUS"]) == (202, "in-progress")
        gate.open()
        reply = await second.invoke(function.id, order, headers=key)
        assert (reply.status, reply.request_id) == (200, pending.request_id)
        assert house.record.counts("start")["order-17"] == 1


async def test_a_client_is_answered_though_its_only_front_end_was_killed_and_comes_back(
    make_house: Callable[..., House], gate: Gate
) -> None:
    """One call waits, one listens, one comes back by ID in another client; none of them hears of it."""
    house = await make(make_house)
    url = house.fronts[0].url
    async with house.caller() as caller, AsyncClient(url, house.key) as fnq:
        function = await caller.deploy(RECORDER)
        waiting = asyncio.create_task(fnq.function(function.id).run(id="order-17", gate=str(gate)))
        await house.record.saw("start", "order-17")
        handle = await fnq.function(function.id).spawn(id="order-18")
        listening_ = asyncio.create_task(_all(handle.events()))
        await connected(house.fronts[0].pid, 2)
        await asyncio.to_thread(house.fronts[0].kill)
        await asyncio.to_thread(house.fronts[0].start)
        gate.open()
        assert (await waiting).json()["id"] == "order-17"
        assert (await listening_)[-1] == Done(status="fulfilled", status_code=200)
        async with AsyncClient(url, house.key) as other:
            assert (await other.handle(handle.id).get()).json()["id"] == "order-18"
        assert house.record.counts("start") == {"order-17": 1, "order-18": 1}


async def _all(events: AsyncIterator[T]) -> list[T]:
    return [event async for event in events]


async def test_a_thousand_polls_of_a_killed_front_end_are_answered_by_another(
    make_house: Callable[..., House], gate: Gate
) -> None:
    house = await make(make_house, fronts=2)
    async with house.caller(0) as first, house.caller(1) as second:
        function = await first.deploy(RECORDER, concurrency=32)
        ids = await in_batches(lambda _: first.submit(function.id, {"gate": str(gate)}), range(1000))
        polls = [asyncio.create_task(first.status(request_id, wait_s=60)) for request_id in ids]
        await connected(house.fronts[0].pid, 1000)
        await asyncio.to_thread(house.fronts[0].kill)
        cut = await asyncio.gather(*polls, return_exceptions=True)
        assert all(isinstance(reply, aiohttp.ClientError) for reply in cut)
        gate.open()
        replies = await in_batches(lambda n: second.result(ids[n], within_s=120), range(1000))
        assert [reply.status for reply in replies] == [200] * 1000
        assert [reply.json["id"] for reply in replies] == ids
        assert set(house.record.counts("start").values()) == {1}


async def test_running_jobs_and_long_polls_outlive_a_killed_redis(
    servers: Shared, make_house: Callable[..., House], gate: Gate
) -> None:
    house = await make(make_house)
    async with house.caller() as caller:
        function = await caller.deploy(RECORDER, concurrency=4)
        ids = [await caller.submit(function.id, {"gate": str(gate)}) for _ in range(12)]
        await house.record.saw("start", ids[0])
        poll = asyncio.create_task(caller.status(ids[0], wait_s=60))
        await connected(house.fronts[0].pid, 1)
        await asyncio.to_thread(servers.redis.kill)
        refused = await caller.invoke(function.id)
        assert refused.status == 503
        assert int(refused.headers["Retry-After"]) >= 1
        await asyncio.to_thread(servers.redis.start)
        gate.open()
        assert (await poll).status == 200
        replies = await asyncio.gather(*(caller.result(request_id) for request_id in ids))
        assert [reply.json["id"] for reply in replies] == ids
        assert set(house.record.counts("start").values()) == {1}


async def test_five_hundred_waiting_callers_are_answered_after_hints_were_lost(
    servers: Shared, make_house: Callable[..., House], gate: Gate
) -> None:
    house = await make(make_house)
    async with house.caller() as caller, RedisClient.from_url(servers.redis.url) as redis:
        function = await caller.deploy(RECORDER, concurrency=64)
        ids = await in_batches(lambda _: caller.submit(function.id, {"gate": str(gate)}), range(500))
        polls = [asyncio.create_task(caller.status(request_id, wait_s=60)) for request_id in ids]
        await connected(house.fronts[0].pid, 500)
        await redis.client_kill_filter(_type="pubsub")
        gate.open()
        replies = await asyncio.wait_for(asyncio.gather(*polls), 45)
        assert [reply.status for reply in replies] == [200] * 500


async def test_a_cut_broker_connection_does_not_disturb_the_job_that_runs(
    servers: Shared, make_house: Callable[..., House], gate: Gate
) -> None:
    house = await make(make_house)
    async with house.caller() as caller:
        function = await caller.deploy(RECORDER)
        request_id = await caller.submit(function.id, {"gate": str(gate)})
        await house.record.saw("start", request_id)
        await asyncio.to_thread(servers.rabbitmq.ctl, "close_all_connections", "cut by a test")
        gate.open()
        assert (await caller.result(request_id)).status == 200
        await nothing_waits(servers, function)
        assert house.record.counts("start")[request_id] == 1
        assert house.record.counts("aborted")[request_id] == 0


async def test_a_request_that_kills_its_container_is_dead_after_three_attempts_and_harms_no_other(
    make_house: Callable[..., House],
) -> None:
    house = await make(make_house)
    async with house.caller() as caller:
        function = await caller.deploy(RECORDER)
        poison = await caller.submit(function.id, {"die": True, "id": "poison"})
        neighbours = [await caller.submit(function.id) for _ in range(5)]
        dead = await caller.result(poison, within_s=110)
        assert (dead.status, dead.headers["NVCF-STATUS"]) == (500, "errored")
        assert "3 attempts" in dead.json["detail"]
        assert house.record.counts("start")["poison"] == 3
        replies = await asyncio.gather(*(caller.result(request_id) for request_id in neighbours))
        assert [reply.status for reply in replies] == [200] * 5
        assert (await caller.status(poison)).body == dead.body


async def test_a_request_with_which_two_workers_died_is_not_given_to_a_third(
    make_house: Callable[..., House], gate: Gate
) -> None:
    house = await make(make_house, FNQUEUE_LEASE_S="2")
    async with house.caller() as caller:
        function = await caller.deploy(RECORDER)
        suspect = await caller.submit(function.id, {"gate": str(gate)})
        for attempt in (1, 2):
            await started(house, suspect, times=attempt)
            await kill_sidecar(house)
        dead = await caller.result(suspect, within_s=110)
        assert (dead.status, dead.headers["NVCF-STATUS"]) == (500, "errored")
        assert "worker died in 2 attempts" in dead.json["detail"]
        gate.open()
        assert (await caller.result(await caller.submit(function.id))).status == 200
        assert house.record.counts("start")[suspect] == 2


async def started(house: House, request_id: str, *, times: int) -> None:
    async def starts() -> int:
        return house.record.counts("start")[request_id]

    await eventually(starts, lambda seen: seen == times, within_s=60)


async def test_a_rolling_restart_of_the_workers_costs_no_request_and_no_attempt(
    make_house: Callable[..., House],
) -> None:
    house = await make(make_house)
    async with house.caller() as caller:
        function = await caller.deploy(RECORDER, instances=2, concurrency=2)
        submitting = asyncio.create_task(
            in_batches(lambda _: caller.submit(function.id, {"delay_s": 0.1}), range(150), at_once=4)
        )
        stopped: set[int] = set()
        while len(stopped) < 4:
            sidecar = await eventually(lambda: another(house, stopped), lambda found: found is not None)
            assert sidecar is not None
            stopped.add(sidecar.pid)
            sidecar.send_signal(signal.SIGTERM)
            await gone(sidecar)
        ids = await submitting
        replies = await in_batches(lambda n: caller.result(ids[n]), range(len(ids)))
        assert [reply.status for reply in replies] == [200] * len(ids)
        starts = house.record.counts("start")
        assert {request_id: starts[request_id] for request_id in ids} == dict.fromkeys(ids, 1)
        assert house.record.counts("aborted") == {}


async def test_a_front_end_told_to_stop_answers_everybody_who_waits(
    make_house: Callable[..., House], gate: Gate
) -> None:
    house = await make(make_house, fronts=2)
    async with house.caller(0) as first, house.caller(1) as second:
        function = await second.deploy(RECORDER, concurrency=32)
        posts = [asyncio.create_task(first.invoke(function.id, {"gate": str(gate)}, wait_s=60)) for _ in range(500)]

        async def accepted() -> int:
            depth = (await second.depth(function.id)).json["queues"][0]
            return int(depth["queueDepth"]) + int(depth["inFlight"])

        await eventually(accepted, lambda count: count == 500, within_s=60)
        stopping = asyncio.create_task(asyncio.to_thread(house.fronts[0].stop))
        replies = await asyncio.wait_for(asyncio.gather(*posts), 20)
        await stopping
        assert [reply.status for reply in replies] == [202] * 500
        gate.open()
        ids = [reply.request_id for reply in replies]
        results = await in_batches(lambda n: second.result(ids[n]), range(500))
        assert [reply.status for reply in results] == [200] * 500


async def test_a_message_that_arrives_ten_times_is_run_once(
    servers: Shared, make_house: Callable[..., House], gate: Gate
) -> None:
    house = await make(make_house)
    settings = Settings(
        queue_url=SecretStr(servers.rabbitmq.url),
        store_url=SecretStr(servers.redis.url),
        blobs_url=SecretStr(servers.s3.url),
    )
    async with house.caller() as caller, open_broker(settings) as broker:
        function = await caller.deploy(RECORDER, concurrency=4)
        occupying = [await caller.submit(function.id, {"gate": str(gate)}) for _ in range(4)]
        await house.record.saw("start", occupying[-1])
        request_id = await caller.submit(function.id)
        record = await broker.results.read(request_id)
        assert record is not None
        job = Job(
            id=request_id,
            account=record.account,
            function_id=record.function_id,
            version_id=record.version_id,
            subject="admin",
            created_at=record.created_at,
            deadline_at=record.deadline_at,
            digest="",
            headers=(("Content-Type", "application/json"),),
            body=b"{}",
        )
        await asyncio.gather(*(broker.queue.publish(job, timeout_s=10) for _ in range(10)))
        gate.open()
        assert (await caller.result(request_id)).status == 200
        await nothing_waits(servers, function)
        assert house.record.counts("start")[request_id] == 1


async def test_a_redrive_of_many_that_is_killed_in_the_middle_starts_each_of_them_once(
    servers: Shared, make_house: Callable[..., House], gate: Gate
) -> None:
    letters, count = "/v2/nvcf/dead-letters", 20
    house = await make(make_house, fronts=2)
    settings = Settings(queue_url=SecretStr(servers.rabbitmq.url))
    async with house.caller(0) as first, house.caller(1) as second, open_broker(settings) as broker:
        function = await first.deploy(RECORDER)
        occupying = await first.submit(function.id, {"gate": str(gate)})
        await house.record.saw("start", occupying)
        names = [f"input {number}" for number in range(count)]
        ids = [await first.submit(function.id, {"id": name}) for name in names]
        for _ in ids:
            loan = await eventually(lambda: broker.queue.take(function.version_id), bool)
            assert loan is not None
            await loan.reject()

        async def listed(query: str) -> set[str]:
            found = (await second.call("GET", f"{letters}?limit=200&{query}")).json["deadLetters"]
            return {each["requestId"] for each in found}

        await eventually(lambda: listed("cause=rejected"), lambda seen: seen == set(ids))
        gate.open()
        every = {"select": {"all": True}, "perSecond": 4}
        killing = asyncio.create_task(first.call("POST", f"{letters}/redrive", data=every))
        await eventually(lambda: listed("redriven=true"), lambda seen: len(seen) >= 3)
        await asyncio.to_thread(house.fronts[0].kill)
        with pytest.raises(aiohttp.ClientError):
            await killing
        assert len(await listed("redriven=false")) >= 3
        again = await second.call("POST", f"{letters}/redrive", data={"select": {"all": True}})
        assert (again.status, again.json["left"], again.json.get("stopped")) == (200, [], None)
        receipts = [(await second.call("GET", f"/v2/nvcf/requests/{each}")).json for each in ids]
        made = [receipt["redrivenAs"] for receipt in receipts]
        assert len(set(made)) == count
        replies = [await second.result(each) for each in made]
        assert [reply.json["id"] for reply in replies] == names
        await nothing_waits(servers, function)
        assert [house.record.counts("start")[name] for name in names] == [1] * count


async def in_batches(work: Callable[[int], Awaitable[T]], numbers: range, *, at_once: int = 64) -> list[T]:
    """`work` of every number, `at_once` at a time; in order."""
    free = asyncio.Semaphore(at_once)

    async def one(number: int) -> T:
        async with free:
            return await work(number)

    return list(await asyncio.gather(*(one(number) for number in numbers)))


async def connected(pid: int, count: int) -> None:
    """The process serves at least so many clients."""
    process = psutil.Process(pid)
    ports = {seen.laddr.port for seen in process.net_connections("tcp") if seen.status == psutil.CONN_LISTEN}

    async def clients() -> int:
        return sum(
            seen.status == psutil.CONN_ESTABLISHED and seen.laddr.port in ports
            for seen in process.net_connections("tcp")
        )

    await eventually(clients, lambda seen: seen >= count, within_s=60)


# -- progress and events -----------------------------------------------------------------------


def events_url(caller: Caller, request_id: str) -> str:
    return f"{caller.url}/v2/nvcf/requests/{request_id}/events"


async def test_a_listener_goes_on_at_another_front_end_and_at_one_that_was_restarted(
    make_house: Callable[..., House],
    tmp_path: Path,
) -> None:
    house = await make(make_house, fronts=2)
    gates = [Gate(tmp_path / f"gate-{number}") for number in range(4)]
    steps = [[str(gate), json.dumps({"progress": 10 * number})] for number, gate in enumerate(gates[:3], start=1)]
    seen: list[Listening] = []
    keyed = {"Authorization": f"Bearer {house.key}"}
    async with (
        asyncio.timeout(100),
        house.caller(0) as first,
        house.caller(1) as second,
        aiohttp.ClientSession(headers=keyed) as session,
    ):
        function = await first.deploy(RECORDER)
        request_id = await first.submit(function.id, {"progress": steps, "gate": str(gates[3])})

        async with listening(session, events_url(first, request_id)) as found:
            seen.append(found)
            gates[0].open()
            await found.until("progress")
            await asyncio.to_thread(house.fronts[0].kill)
            with suppress(aiohttp.ClientPayloadError):  # cut off in the middle
                assert await found.next() is None
        gates[1].open()
        async with listening(session, events_url(second, request_id), last_id=seen[-1].last_id) as found:
            seen.append(found)
            await found.until("progress")
            await asyncio.to_thread(house.fronts[0].start)
            await asyncio.to_thread(house.fronts[1].stop)
            assert await found.next() is None
        async with listening(session, events_url(first, request_id), last_id=seen[-1].last_id) as found:
            seen.append(found)
            gates[2].open()
            await found.until("progress")
            gates[3].open()
            await found.until("done")
    told = [event for listened in seen for event in listened.seen if event.name != "queued"]
    assert [event.name for event in told] == ["started", "progress", "progress", "progress", "done"]
    assert [event.data["percentComplete"] for event in told[1:4]] == [10, 20, 30]


async def test_progress_of_an_attempt_whose_worker_died_is_gone_with_it(
    make_house: Callable[..., House],
    tmp_path: Path,
) -> None:
    house = await make(make_house)
    first, second, answer = (Gate(tmp_path / name) for name in ("first", "second", "answer"))
    order = {
        "progress": [[str(first), '{"progress": 80}'], [str(second), '{"progress": 5}']],
        "gate": str(answer),
    }
    keyed = {"Authorization": f"Bearer {house.key}"}
    async with asyncio.timeout(100), house.caller() as caller, aiohttp.ClientSession(headers=keyed) as session:
        function = await caller.deploy(RECORDER)
        request_id = await caller.submit(function.id, order)
        async with listening(session, events_url(caller, request_id)) as found:
            first.open()
            await found.until("progress")
            (tmp_path / "first").unlink()
            await kill_sidecar(house)
            again = await found.until("started")
            assert again.data["attempt"] == 2
            silent = await caller.status(request_id, wait_s=1)
            assert (silent.status, silent.headers.get("NVCF-PERCENT-COMPLETE")) == (202, None)
            second.open()
            first.open()
            told = [(await found.until("progress")).data["percentComplete"]]
            answer.open()
            told += [event.data.get("percentComplete") for event in await found.rest()]
        assert told[-2:] == [5, None]
        assert (await caller.result(request_id)).status == 200


async def test_a_controller_killed_between_taking_a_webhook_and_its_answer_is_replaced_by_another(
    make_house: Callable[..., House],
) -> None:
    """It takes as long as a loan: 12 s, by which nobody but another controller can end it."""
    local = {"networks": "127.0.0.0/8", "ports": "1024-65535", "http": "true", "timeout_s": "2"}
    house = await make(make_house, **{f"FNQUEUE_WEBHOOK_{name.upper()}": value for name, value in local.items()})
    house.add_controller()
    async with house.caller() as caller, receiving() as receiver:
        secret = (await caller.call("POST", "/v2/nvcf/webhooks/secrets", data={})).json["secret"]
        function = await caller.deploy(RECORDER)
        arrived, killed = asyncio.Event(), asyncio.Event()

        async def held(request: web.Request) -> web.StreamResponse:
            arrived.set()
            await asyncio.wait_for(killed.wait(), 60)
            return web.Response(status=204)

        receiver.answers.append(held)
        request_id = await caller.submit(function.id, headers={"NVCF-CALLBACK-URL": receiver.url})
        await asyncio.wait_for(arrived.wait(), 60)
        await asyncio.to_thread(house.controller.kill)
        killed.set()
        await asyncio.to_thread(house.controllers[1].start)
        delivery = await eventually(
            lambda: caller.call("GET", f"/v2/nvcf/webhooks/deliveries/{request_id}"),
            lambda reply: reply.status == 200 and reply.json["state"] == "delivered",
        )
        assert delivery.json["tries"] >= 1
        assert [payload["data"]["requestId"] for payload in receiver.payloads(secret)] == [request_id] * 2
        assert len({came.headers["webhook-id"] for came in receiver.came}) == 1
        assert (await caller.result(request_id)).status == 200
