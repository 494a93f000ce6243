"""The servers under our tests and under `make stack`: they answer, and a crash costs no data."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import aio_pika
import boto3
import psutil
import pytest
from botocore.client import Config
from botocore.exceptions import ClientError
from redis.asyncio import Redis as RedisClient

from infra.local.process import PORTS, Server, ServerFailed, free_port
from infra.local.servers import S3, RabbitMQ, Redis
from workers.launchers.process import INSTANCE_PORTS

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

VERSION_QUEUE = "fnq.v.5f2c"


async def test_a_confirmed_message_survives_a_killed_rabbitmq(new_rabbitmq: Callable[[], RabbitMQ]) -> None:
    server = new_rabbitmq()
    async with await aio_pika.connect(server.url) as connection:
        channel = await connection.channel()
        await _declare(channel)
        await asyncio.to_thread(server.flush)
        message = aio_pika.Message(b"job", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, routing_key=VERSION_QUEUE)
        await asyncio.to_thread(server.kill)

    await asyncio.to_thread(server.start)

    async with await aio_pika.connect(server.url) as connection:
        queue = await _declare(await connection.channel())
        kept = await queue.get(timeout=10)
        assert kept.body == b"job"


async def test_a_killed_rabbitmq_leaves_no_process(new_rabbitmq: Callable[[], RabbitMQ]) -> None:
    server = new_rabbitmq()
    node = psutil.Process(server.pid)
    family = [node, *node.children(recursive=True)]
    assert any(process.name() == "epmd" for process in family)

    await asyncio.to_thread(server.kill)

    _, alive = psutil.wait_procs(family, timeout=5)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert not server.alive()


async def test_queues_of_versions_get_their_limits_by_policy(rabbitmq: RabbitMQ) -> None:
    async with await aio_pika.connect(rabbitmq.url) as connection:
        await _declare(await connection.channel())

    queues = await asyncio.to_thread(rabbitmq.ctl, "list_queues", "--formatter=json", "name", "policy")
    policies = await asyncio.to_thread(rabbitmq.ctl, "list_policies", "--formatter=json")

    assert {"name": VERSION_QUEUE, "policy": "fnqueue-versions"} in json.loads(queues)
    (policy,) = [policy for policy in json.loads(policies) if policy["name"] == "fnqueue-versions"]
    assert json.loads(policy["definition"]) == {
        "overflow": "reject-publish",
        "max-length": 125_000,
        "max-length-bytes": 1_342_177_280,
        "delivery-limit": 20,
        "dead-letter-exchange": "fnq.dead",
        "dead-letter-strategy": "at-least-once",
    }


async def test_a_rejected_job_reaches_the_dead_letters(rabbitmq: RabbitMQ) -> None:
    """`at-least-once` needs the `stream_queue` feature flag; without it the message would wait for ever."""
    async with await aio_pika.connect(rabbitmq.url) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange("fnq.dead", aio_pika.ExchangeType.FANOUT, durable=True)
        dead = await channel.declare_queue("servers-test-dead", durable=True, arguments={"x-queue-type": "quorum"})
        await dead.bind(exchange)
        queue = await channel.declare_queue("fnq.v.rejects", durable=True, arguments={"x-queue-type": "quorum"})
        await channel.default_exchange.publish(aio_pika.Message(b"poison"), routing_key="fnq.v.rejects")

        await (await queue.get(timeout=10)).reject()

        async with dead.iterator(timeout=10) as letters:
            letter = await anext(letters)
            await letter.ack()
        for used in (queue, dead):
            await used.delete(if_unused=False, if_empty=False)
        assert letter.body == b"poison"
        assert letter.headers["x-first-death-reason"] == "rejected"


async def test_a_delivery_may_stay_open_for_a_day(rabbitmq: RabbitMQ) -> None:
    asked = await asyncio.to_thread(rabbitmq.ctl, "eval", "application:get_env(rabbit, consumer_timeout).")
    assert asked.strip() == "{ok,90000000}"


async def test_redis_keeps_an_answered_write_when_killed(new_redis: Callable[[], Redis]) -> None:
    server = new_redis()
    async with RedisClient.from_url(server.url) as client:
        await client.set("answered", "yes")
    server.kill()

    server.start()

    async with RedisClient.from_url(server.url) as client:
        assert await client.get("answered") == b"yes"


async def test_redis_runs_with_the_durable_settings(redis_server: Redis) -> None:
    async with RedisClient.from_url(redis_server.url) as client:
        settings = await client.config_get(
            "appendonly", "appendfsync", "maxmemory-policy", "save", "rdbcompression", "bind"
        )
    assert settings == {
        "appendonly": "yes",
        "appendfsync": "always",
        "maxmemory-policy": "noeviction",
        "save": "",
        "rdbcompression": "no",
        "bind": "127.0.0.1",
    }


def test_s3_keeps_an_object_when_killed(new_s3: Callable[[], S3]) -> None:
    server = new_s3()
    _client(server).put_object(Bucket=server.bucket, Key="results/1", Body=b"pixels")
    server.kill()

    server.start()

    kept = _client(server).get_object(Bucket=server.bucket, Key="results/1")
    assert kept["Body"].read() == b"pixels"


def test_s3_makes_a_bucket(s3: S3) -> None:
    client = _client(s3)
    client.create_bucket(Bucket="another")
    assert "another" in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]


def test_s3_refuses_a_wrong_signature(s3: S3) -> None:
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        _client(s3, secret_key="0" * 64).list_objects_v2(Bucket=s3.bucket)


def test_s3_refuses_an_unsigned_request(s3: S3) -> None:
    with pytest.raises(HTTPError) as refusal:
        urlopen(f"{s3.endpoint}/{s3.bucket}/anything", timeout=10)
    assert refusal.value.code in (400, 403)


def test_s3_refuses_an_expired_url(s3: S3) -> None:
    client = _client(s3)
    client.put_object(Bucket=s3.bucket, Key="brief", Body=b"x")
    address = {"Bucket": s3.bucket, "Key": "brief"}
    fresh = client.generate_presigned_url("get_object", Params=address, ExpiresIn=60)
    expired = client.generate_presigned_url("get_object", Params=address, ExpiresIn=-60)

    with urlopen(fresh, timeout=10) as answer:
        assert answer.read() == b"x"
    with pytest.raises(HTTPError):
        urlopen(expired, timeout=10)


def test_s3_holds_an_upload_to_the_signed_content_type(s3: S3) -> None:
    url = _client(s3).generate_presigned_url(
        "put_object", Params={"Bucket": s3.bucket, "Key": "typed", "ContentType": "image/png"}, ExpiresIn=60
    )
    with pytest.raises(HTTPError) as refusal:
        urlopen(Request(url, data=b"x", method="PUT", headers={"Content-Type": "text/html"}), timeout=10)
    assert refusal.value.code == 403


def test_a_restart_keeps_the_address(new_redis: Callable[[], Redis]) -> None:
    server = new_redis()
    url, pid = server.url, server.pid

    server.restart()

    assert server.url == url
    assert server.pid != pid
    assert server.answers()


def test_a_server_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    server = Redis(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", server.port))
        taken.listen()
        with pytest.raises(ServerFailed, match="Address already in use"):
            server.start()
    assert not server.alive()
    server.stop()


def test_no_command_line_carries_a_secret(tmp_path: Path) -> None:
    redis = Redis(tmp_path / "redis", guarded=True)
    servers: list[Server] = [RabbitMQ(tmp_path / "rabbitmq"), redis, S3(tmp_path / "s3")]
    for server in servers:
        secret = urlsplit(server.url).password
        assert secret
        assert secret not in " ".join(server.command())


def test_a_free_port_is_outside_the_range_of_outgoing_connections() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert free_port() < first or first < PORTS.stop


def test_servers_and_instances_are_given_ports_of_their_own() -> None:
    """Either finds a port free that the other was given and has not bound yet."""
    assert not set(PORTS) & set(INSTANCE_PORTS)


async def _declare(channel: aio_pika.abc.AbstractChannel) -> aio_pika.abc.AbstractQueue:
    return await channel.declare_queue(VERSION_QUEUE, durable=True, arguments={"x-queue-type": "quorum"})


def _client(server: S3, *, secret_key: str | None = None) -> S3Client:
    return boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        region_name=server.region,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=secret_key or server.secret_key,
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )
