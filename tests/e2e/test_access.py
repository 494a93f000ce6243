"""The users that are shipped, on real servers: each role is refused what it has no need of. That they may do what they
need, the rest of this suite shows: the product runs under them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiormq
import pytest
from aiormq import exceptions as amqp
from aiormq.abc import AbstractChannel
from pydantic import SecretStr
from redis.asyncio import Redis as Client
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError

from broker import version_users
from broker.backends.rabbitmq.queue import open_queue
from broker.backends.rabbitmq.users import VersionUsers
from broker.errors import ConfigurationError, LauncherUnavailable, Unavailable
from broker.model import Job
from broker.settings import ControllerSettings, Settings, SidecarSettings
from infra.local.servers import RabbitMQ, Redis
from tests.unit.test_server import opened

DATABASE = 13
ID = str(uuid.uuid4())
RECORD, OTHERS = f"fnq:{{{ID}}}:r", f"fnq:{{{uuid.uuid4()}}}"

# -- Redis ---------------------------------------------------------------------------------------

ADMINISTRATION = (
    "ACL LIST", "ACL SETUSER x on", "BGREWRITEAOF", "CLIENT KILL ID 1", "CLIENT LIST", "CONFIG REWRITE",
    "CONFIG SET maxmemory 0", "EVAL return 0", "FAILOVER", "FLUSHALL", "FLUSHDB", "FUNCTION FLUSH",
    "FUNCTION LIST", "KEYS *", "LATENCY RESET", "MEMORY STATS", "MIGRATE h 1 k 0 1", "MODULE LIST", "MONITOR",
    "PSUBSCRIBE *", "PUBSUB CHANNELS", "RANDOMKEY", "REPLICAOF h 1", "SAVE", "SCRIPT FLUSH", "SCRIPT KILL", "SHUTDOWN",
    "SLOWLOG GET", "SWAPDB 0 1", "GET other", "SET other 1", f"DUMP {RECORD}", f"RENAME {RECORD} {RECORD}",
    f"COPY {RECORD} {RECORD}2", f"OBJECT ENCODING {RECORD}", f"SORT {RECORD}", "SUBSCRIBE other", "PUBLISH other x",
)  # fmt: skip
NOT_OF_FRONT_ENDS = (
    "CONFIG GET *", "INFO", "SCAN 0", f"HSCAN {RECORD} 0", "GET fnq:leader", "SET fnq:leader me", "SET fnq:gpus x",
)  # fmt: skip
NOT_OF_SIDECARS = (
    *NOT_OF_FRONT_ENDS,
    *(f"ZRANGE {OTHERS}:{kind} 0 -1" for kind in "qxda"),
    *(f"ZRANK {OTHERS}:{kind} x" for kind in "qxda"),
    f"HGETALL {OTHERS}:n", f"HVALS {OTHERS}:n", f"HKEYS {OTHERS}:n:0a1", f"HSCAN {OTHERS}:n 0",
    f"HGETALL {RECORD}", f"XRANGE {OTHERS}:s - +",
    f"XRANGE {OTHERS}:y - +", f"HGETALL {OTHERS}:z", "ZRANGE fnq:{logs}:w 0 -1", "ZADD fnq:{logs}:w 1 x",
    f"LRANGE {OTHERS}:p 0 -1", "HGET fnq:c:{keys} x", "HSET fnq:c:{keys} x 1", "ZRANGE fnq:c:{versions}:: 0 -1",
    "GET fnq:k:x", "HGET fnq:l:{v}:x:1 t", "GET fnq:gpus", "SET fnq:epoch 1:1", "DEL fnq:epoch", "SUBSCRIBE fnq:h:1",
)  # fmt: skip
REFUSED = {
    "api": (*ADMINISTRATION, *NOT_OF_FRONT_ENDS),
    "controller": ADMINISTRATION,
    "sidecar": (*ADMINISTRATION, *NOT_OF_SIDECARS),
}


@asynccontextmanager
async def redis_as(server: Redis, role: str) -> AsyncIterator[Client]:
    async with Client.from_url(server.url_for(role, DATABASE), single_connection_client=True) as client:
        yield client


@pytest.mark.parametrize("role", REFUSED)
async def test_redis_refuses_what_a_role_has_no_need_of(redis_server: Redis, role: str) -> None:
    allowed = []
    async with redis_as(redis_server, role) as client:
        for command in REFUSED[role]:
            try:
                await client.execute_command(*command.split())  # type: ignore[no-untyped-call]  # theirs
            except NoPermissionError:
                continue
            allowed.append(command)
    assert allowed == []


async def test_a_script_gives_a_sidecar_no_more_than_it_has(redis_server: Redis) -> None:
    async with Client.from_url(redis_server.url_for("operator", DATABASE)) as operator:
        await operator.zadd(f"{OTHERS}:q", {ID: 1})
    async with redis_as(redis_server, "sidecar") as client:
        for command in ("'ZRANGE', KEYS[1], 0, -1", "'KEYS', '*'", "'HGETALL', 'fnq:c:{keys}'", "'FLUSHALL'"):
            sha = await client.script_load(f"return redis.call({command})")
            with pytest.raises(ResponseError, match="The user executing the script can't"):
                await client.evalsha(sha, 1, f"{OTHERS}:q")
            with pytest.raises(NoPermissionError):
                await client.evalsha(sha, 1, "fnq:c:{keys}")


async def test_a_guarded_redis_lets_nobody_in_without_a_password(tmp_path: Path) -> None:
    with Redis(tmp_path, guarded=True) as server:
        assert server.answers()
        place = server.url.rpartition("@")[2]
        for url in (f"redis://{place}", f"redis://default:x@{place}", f"redis://fnqueue-api:x@{place}"):
            async with Client.from_url(url) as client:
                with pytest.raises(AuthenticationError):
                    await client.ping()


async def test_a_guarded_redis_that_was_killed_has_what_scripts_and_transactions_wrote(tmp_path: Path) -> None:
    """It reads them from its append-only file by the rights of `default`, whom nobody can be."""
    with Redis(tmp_path, guarded=True) as server:
        async with Client.from_url(server.url) as client:
            await client.eval("redis.call('SET', 'a', 1) redis.call('SET', 'b', 1)", 0)
            async with client.pipeline(transaction=True) as both:
                both.set("c", 1)
                both.set("d", 1)
                await both.execute()
        server.kill()
        server.start()
        async with Client.from_url(server.url) as client:
            assert await client.exists("a", "b", "c", "d") == 4


# -- RabbitMQ --------------------------------------------------------------------------------------

Act = Callable[[AbstractChannel], Awaitable[object]]


def consume(queue: str) -> Act:
    async def ignore(_: object) -> None: ...

    return lambda channel: channel.basic_consume(queue, ignore)


def publish(exchange: str, routing_key: str) -> Act:
    async def confirmed(channel: AbstractChannel) -> None:
        await channel.basic_publish(b"", exchange=exchange, routing_key=routing_key)
        await channel.queue_declare("fnq.dead", passive=True)  # a refusal comes before this answer

    return confirmed


def declare(queue: str) -> Act:
    return lambda channel: channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})


def bind(queue: str, exchange: str) -> Act:
    return lambda channel: channel.queue_bind(queue, exchange)


OWN, OTHER = str(uuid.uuid4()), str(uuid.uuid4())
ANYBODY: dict[str, Act] = {
    "make a queue of another name": declare("other"),
    "make an exchange": lambda channel: channel.exchange_declare("other"),
    "take the exchange of all topics": lambda channel: channel.queue_bind(f"fnq.v.{OTHER}", "amq.topic"),
    "publish to it": publish("amq.topic", "x"),
    "delete another exchange": lambda channel: channel.exchange_delete("amq.fanout"),
}
A_SIDECAR = {
    **ANYBODY,
    "publish to any queue": publish("", f"fnq.v.{OWN}"),
    "publish to the dead letters": publish("fnq.dead", ""),
    "take the dead letters": lambda channel: channel.basic_get("fnq.dead"),
    "make its queue": declare(f"fnq.v.{OWN}"),
    "delete its queue": lambda channel: channel.queue_delete(f"fnq.v.{OWN}"),
    "take the messages of its version elsewhere": bind("fnq.dead", f"fnq.x.{OWN}"),
}
ACTS: dict[str, dict[str, Act]] = {
    "api": {
        **ANYBODY,
        "consume": consume(f"fnq.v.{OWN}"),
        "take": lambda channel: channel.basic_get(f"fnq.v.{OWN}"),
        "purge": lambda channel: channel.queue_purge(f"fnq.v.{OWN}"),
        "take the dead letters": lambda channel: channel.basic_get("fnq.dead"),
        "publish to the dead letters": publish("fnq.dead", ""),
        "delete the dead letters": lambda channel: channel.queue_delete("fnq.dead"),
    },
    "controller": {**ANYBODY, "publish a job": publish("", f"fnq.v.{OWN}")},
    "sidecar": A_SIDECAR,
    "version": {
        **A_SIDECAR,
        "consume another's": consume(f"fnq.v.{OTHER}"),
        "take another's": lambda channel: channel.basic_get(f"fnq.v.{OTHER}"),
        "purge another's": lambda channel: channel.queue_purge(f"fnq.v.{OTHER}"),
        "publish to another's": publish(f"fnq.x.{OTHER}", ""),
        "take another's messages over": bind(f"fnq.v.{OWN}", f"fnq.x.{OTHER}"),
    },
}


def controller_settings(server: RabbitMQ, **given: Any) -> ControllerSettings:
    told = {
        "queue_url": SecretStr(server.url_for("controller")),
        "queue_management_url": SecretStr(server.management_url_for("controller")),
        "secret_key": SecretStr("s" * 32),
        "version_users": True,
    }
    return ControllerSettings(**{**told, **given})


@pytest.fixture(scope="session")
async def queues(product_rabbitmq: RabbitMQ) -> AsyncIterator[ControllerSettings]:
    """Two versions with a queue and a user each, as a front end and a controller make them."""
    settings = controller_settings(product_rabbitmq)
    users = VersionUsers(settings)
    async with (
        open_queue(settings.queue_url.get_secret_value(), settings),
        open_queue(product_rabbitmq.url_for("api"), Settings(), settle_s=0) as front,
    ):
        for version_id in (OWN, OTHER):
            await front.declare(version_id)
        await users.admit([OWN, OTHER])
        yield settings
        for version_id in (OWN, OTHER):
            await front.delete(version_id)
            await users.expel(version_id)


def url_of_version(settings: ControllerSettings, version_id: str) -> str:
    return version_users.url_for(settings, version_id, settings.queue_url).get_secret_value()


@pytest.mark.parametrize(("role", "what"), [(role, what) for role, acts in ACTS.items() for what in acts])
async def test_rabbitmq_refuses_what_a_role_has_no_need_of(
    product_rabbitmq: RabbitMQ, queues: ControllerSettings, role: str, what: str
) -> None:
    url = url_of_version(queues, OWN) if role == "version" else product_rabbitmq.url_for(role)
    async with asyncio.timeout(60):
        connection = await aiormq.connect(url)
        try:
            channel = await connection.channel(publisher_confirms=False)
            with pytest.raises(amqp.ChannelAccessRefused):
                await ACTS[role][what](channel)
        finally:
            await connection.close()


async def test_there_is_no_guest(product_rabbitmq: RabbitMQ) -> None:
    place = product_rabbitmq.url.rpartition("@")[2]
    with pytest.raises((amqp.AuthenticationError, amqp.ProbableAuthenticationError)):
        await aiormq.connect(f"amqp://guest:guest@{place}")


def a_job(version_id: str) -> Job:
    return Job(
        id=str(uuid.uuid4()),
        account="a",
        function_id="f",
        version_id=version_id,
        subject="s",
        created_at=1.0,
        deadline_at=2_000_000_000.0,
        digest="d",
    )


async def test_a_sidecar_takes_and_puts_back_jobs_of_its_version_alone(
    product_rabbitmq: RabbitMQ, queues: ControllerSettings
) -> None:
    of_own = SidecarSettings(function_id="f", function_version_id=OWN)
    async with (
        asyncio.timeout(60),
        open_queue(product_rabbitmq.url_for("api"), Settings()) as front,
        open_queue(url_of_version(queues, OWN), of_own) as sidecar,
    ):
        mine, others = a_job(OWN), a_job(OTHER)
        await front.publish(mine, timeout_s=30)
        await front.publish(others, timeout_s=30)
        await sidecar.ping()
        async with sidecar.consume(OWN, prefetch=2) as deliveries:
            first = await anext(deliveries)
            await sidecar.publish(replace(mine, poll_s=7), timeout_s=30)
            copy = await anext(deliveries)
            assert (first.job, copy.job) == (mine, replace(mine, poll_s=7))
            await first.ack()
            await copy.ack()
        for attempt in (sidecar.take(OTHER), sidecar.publish(others, timeout_s=5)):
            with pytest.raises(Unavailable):
                await attempt
        with pytest.raises(ConfigurationError, match="permission"):
            await sidecar.declare(OTHER)


async def test_users_of_versions_are_made_again_and_go_with_them(product_rabbitmq: RabbitMQ) -> None:
    version_id, settings = str(uuid.uuid4()), controller_settings(product_rabbitmq)
    users = VersionUsers(settings)
    await users.admit([version_id])
    await (await aiormq.connect(url_of_version(settings, version_id))).close()
    await asyncio.to_thread(product_rabbitmq.ctl, "delete_user", version_users.name_of(version_id))
    await users.admit([version_id])  # it does not look
    with pytest.raises(amqp.ProbableAuthenticationError):
        await aiormq.connect(url_of_version(settings, version_id))
    await users.admit([version_id], look=True)
    await (await aiormq.connect(url_of_version(settings, version_id))).close()
    for _ in range(2):
        await users.expel(version_id)
    with pytest.raises(amqp.ProbableAuthenticationError):
        await aiormq.connect(url_of_version(settings, version_id))


async def test_without_the_right_to_make_users_it_says_so(product_rabbitmq: RabbitMQ) -> None:
    url = SecretStr(product_rabbitmq.management_url_for("api"))
    with pytest.raises(LauncherUnavailable, match="answers 401"):
        await VersionUsers(controller_settings(product_rabbitmq, queue_management_url=url)).admit(["v"])


# -- guesses ---------------------------------------------------------------------------------------


async def test_guessed_request_ids_never_reach_redis(new_redis: Callable[[], Redis], tmp_path: Path) -> None:
    """Everything but what a front end does by itself, and what opens a connection, is counted."""
    server = await asyncio.to_thread(new_redis)
    idle = {"get", "time", "ping", "info", "hello", "select", "subscribe", "client|setinfo"}
    paths = ("GET /v2/nvcf/pexec/status/{}", "GET /v2/nvcf/requests/{}", "DELETE /v2/nvcf/requests/{}",
             "GET /v2/nvcf/queues/{}/position", "GET /v2/nvcf/requests/{}/events")  # fmt: skip

    async def counted(client: Client) -> dict[str, int]:
        found = await client.info("commandstats")
        counts = {name.removeprefix("cmdstat_"): about["calls"] for name, about in found.items()}
        return {name: calls for name, calls in counts.items() if name not in idle}

    async with (
        Client.from_url(server.url) as client,
        opened(
            tmp_path,
            store_url=SecretStr(server.url_for("api")),
            secret_key=SecretStr("s" * 32),
            account_calls_per_s=0,
        ) as house,
    ):
        await house.submit()
        before = await counted(client)
        assert before["evalsha"] > 0
        for number in range(1000):
            method, _, path = paths[number % len(paths)].partition(" ")
            async with house.client.request(method, path.format(uuid.uuid4())) as response:
                assert response.status == 404
        assert await counted(client) == before
