"""Processes that do not call themselves durable over servers that are not, and the doctor, on real servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aio_pika
import click
import pytest
import redis
from click.testing import CliRunner, Result

from api.commands import api
from api.doctor import doctor
from broker.errors import ConfigurationError
from broker.examination import examine, profile_kept
from broker.settings import DoctorSettings, Settings, SidecarSettings, load
from infra.local.servers import S3, RabbitMQ, Redis
from tests.e2e import dev as processes
from tests.eventually import eventually
from tests.unit.container import FUNCTION_ID, VERSION_ID
from workers.commands import sidecar
from workers.controller.command import controller

NOBODY = {
    "FNQUEUE_QUEUE_URL": "amqp://user:hush-hush@127.0.0.1:1/",
    "FNQUEUE_STORE_URL": "redis://:hush-hush@127.0.0.1:1/0",
    "FNQUEUE_BLOBS_URL": "s3://access:hush-hush@127.0.0.1:1/bucket?tls=false",
    "FNQUEUE_SECRET_KEY": "s" * 32,
    "FNQUEUE_FUNCTION_ID": FUNCTION_ID,
    "FNQUEUE_FUNCTION_VERSION_ID": VERSION_ID,
}


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command sets up the logging of its process, which here is the tests' own."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="module")
def managed_rabbitmq(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    server = RabbitMQ(tmp_path_factory.mktemp("managed-rabbitmq"), management=True)
    with contextlib.ExitStack() as running:
        running.callback(server.kill)
        server.start()
        yield server


@pytest.fixture
def environment(managed_rabbitmq: RabbitMQ, redis_server: Redis, s3: S3) -> dict[str, str]:
    return {
        "FNQUEUE_QUEUE_URL": managed_rabbitmq.url,
        "FNQUEUE_QUEUE_MANAGEMENT_URL": managed_rabbitmq.management_url,
        "FNQUEUE_STORE_URL": redis_server.url,
        "FNQUEUE_BLOBS_URL": s3.url,
    }


def run_doctor(environment: dict[str, str], *words: str, **more: str) -> Result:
    return CliRunner().invoke(doctor, list(words), env=environment | more)


def findings(result: Result) -> dict[str, dict[str, Any]]:
    shown = json.loads(result.stdout)["findings"]
    return {f"{each['server']} {each['name']}": each for each in shown}


# -- the doctor --------------------------------------------------------------------------------


async def test_the_doctor_finds_nothing_wrong_with_our_own_servers(environment: dict[str, str]) -> None:
    result = await asyncio.to_thread(run_doctor, environment, "--json", FNQUEUE_PROFILE="B")
    assert result.exit_code == 0, result.output
    found = findings(result)
    assert "fail" not in {each["level"] for each in found.values()}
    for name, value in {
        "redis appendfsync": "always",
        "redis maxmemory-policy": "noeviction",
        "redis user default": "~* &* +@all",
        "rabbitmq nodes": "1",
        "rabbitmq alarms": "none",
        "rabbitmq queue policy": "fnqueue-versions",
        "s3 signed URLs": "upload and download work",
    }.items():
        assert (found[name]["level"], found[name]["value"]) == ("ok", value)
    assert found["rabbitmq consumer time-out"]["unknown"] is True


async def test_a_queue_that_was_just_declared_is_not_blamed(
    environment: dict[str, str], managed_rabbitmq: RabbitMQ
) -> None:
    """The management API tells of its policy with its first statistics, up to 10 s later."""
    async with await aio_pika.connect(managed_rabbitmq.url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue("fnq.v.young", durable=True, arguments={"x-queue-type": "quorum"})
        try:
            result = await asyncio.to_thread(run_doctor, environment, "--json", FNQUEUE_PROFILE="B")
        finally:
            await queue.delete(if_unused=False, if_empty=False)
    assert result.exit_code == 0, result.output
    assert findings(result)["rabbitmq queue policy"]["value"] == "fnqueue-versions"


async def test_the_doctor_says_what_keeps_the_servers_from_a_profile(environment: dict[str, str]) -> None:
    result = await asyncio.to_thread(run_doctor, environment, FNQUEUE_PROFILE="C")
    assert result.exit_code == 1
    lines = result.output.splitlines()
    at = next(number for number, line in enumerate(lines) if "min-replicas-to-write" in line)
    assert lines[at].startswith("fail")
    assert "CONFIG SET min-replicas-to-write 1" in lines[at + 2]


async def test_as_the_controllers_user_the_doctor_sees_the_same(
    environment: dict[str, str], managed_rabbitmq: RabbitMQ
) -> None:
    """It may not publish, which the doctor does to be told of an alarm."""
    own = {
        "FNQUEUE_QUEUE_URL": managed_rabbitmq.url_for("controller"),
        "FNQUEUE_QUEUE_MANAGEMENT_URL": managed_rabbitmq.management_url_for("controller"),
    }
    result = await asyncio.to_thread(run_doctor, environment | own, "--json", FNQUEUE_PROFILE="B")
    assert result.exit_code == 0, result.output
    assert findings(result)["rabbitmq alarms"]["value"] == "none"
    blind = await asyncio.to_thread(run_doctor, environment | own, "--json", FNQUEUE_QUEUE_MANAGEMENT_URL="")
    assert findings(blind)["rabbitmq alarms"]["unknown"] is True
    assert blind.exit_code == 0


async def test_the_doctor_sees_a_powerless_default_user_where_it_may(
    environment: dict[str, str], redis_server: Redis
) -> None:
    def asked(role: str) -> dict[str, Any]:
        own = {"FNQUEUE_STORE_URL": redis_server.url_for(role)}
        return findings(run_doctor(environment | own, "--json", FNQUEUE_PROFILE="B"))["redis user default"]

    hidden = await asyncio.to_thread(asked, "controller")
    assert (hidden["level"], hidden["unknown"]) == ("warn", True)
    assert hidden["mend"].endswith("ACL GETUSER default")
    with redis.Redis.from_url(redis_server.url_for("operator")) as client:
        client.execute_command("ACL SETUSER default -@all")
        try:
            found = await asyncio.to_thread(asked, "operator")
        finally:
            client.execute_command("ACL SETUSER default +@all")
    assert (found["level"], found["unknown"], found["value"]) == ("fail", False, "~* &* -@all")


async def test_what_amqp_does_not_tell_is_called_unknown(environment: dict[str, str]) -> None:
    result = await asyncio.to_thread(run_doctor, environment, "--json", FNQUEUE_QUEUE_MANAGEMENT_URL="")
    found = findings(result)
    for name in ("nodes", "partition strategy", "queue policy", "queues", "consumer time-out"):
        assert (found[f"rabbitmq {name}"]["level"], found[f"rabbitmq {name}"]["value"]) == ("warn", "unknown")
    assert found["rabbitmq alarms"]["value"] == "none"  # which publishing tells
    assert result.exit_code == 0
    strict = await asyncio.to_thread(run_doctor, environment, "--strict", FNQUEUE_QUEUE_MANAGEMENT_URL="")
    assert strict.exit_code == 1


@pytest.mark.parametrize("management", [True, False])
async def test_an_alarm_is_seen(environment: dict[str, str], managed_rabbitmq: RabbitMQ, management: bool) -> None:
    url = managed_rabbitmq.management_url if management else ""
    await asyncio.to_thread(managed_rabbitmq.ctl, "set_vm_memory_high_watermark", "0.0000001")
    try:

        async def alarm() -> tuple[int, str]:
            result = await asyncio.to_thread(run_doctor, environment, "--json", FNQUEUE_QUEUE_MANAGEMENT_URL=url)
            # Before it blocks, it may be too busy to answer at all.
            return result.exit_code, findings(result).get("rabbitmq alarms", {}).get("level", "")

        await eventually(alarm, lambda seen: seen == (1, "fail"), within_s=60)
    finally:
        await asyncio.to_thread(managed_rabbitmq.ctl, "set_vm_memory_high_watermark", "0.4")


async def test_a_policy_that_was_taken_away_is_missed_and_the_command_brings_it_back(
    environment: dict[str, str], managed_rabbitmq: RabbitMQ
) -> None:
    await asyncio.to_thread(managed_rabbitmq.ctl, "clear_policy", "fnqueue-versions")

    async def policy() -> dict[str, Any]:
        result = await asyncio.to_thread(run_doctor, environment, "--json", FNQUEUE_PROFILE="B")
        return findings(result)["rabbitmq queue policy"]

    missed = await eventually(policy, lambda seen: seen["level"] == "fail", within_s=30)
    # As a shell would take it apart.
    words = missed["mend"].replace("'", "").split(" ", 6)
    await asyncio.to_thread(managed_rabbitmq.ctl, *words[1:])
    await eventually(policy, lambda seen: seen["level"] == "ok", within_s=30)


async def test_servers_that_are_away_are_faults_and_no_secret_is_shown() -> None:
    text, result = [await asyncio.to_thread(run_doctor, NOBODY, *words) for words in ((), ("--json",))]
    assert (text.exit_code, result.exit_code) == (1, 1)
    assert "hush" not in text.output + result.output
    assert {each["name"] for each in findings(result).values() if each["level"] == "fail"} == {"reachable"}


async def test_the_doctor_asks_whichever_node_of_a_cluster_answers(
    environment: dict[str, str], managed_rabbitmq: RabbitMQ
) -> None:
    place = f"127.0.0.1:{managed_rabbitmq.port}"
    url = managed_rabbitmq.url.replace(place, f"127.0.0.1:1,{place},127.0.0.1:2")
    # The management API tells of an alarm for some seconds after its end.
    result = await eventually(
        lambda: asyncio.to_thread(run_doctor, environment, "--json", FNQUEUE_QUEUE_URL=url),
        lambda seen: seen.exit_code == 0,
        within_s=60,
    )
    assert findings(result)["rabbitmq queue policy"]["value"] == "fnqueue-versions"


async def test_the_doctor_makes_no_bucket(environment: dict[str, str], s3: S3) -> None:
    elsewhere = s3.url.replace(f"/{s3.bucket}?", "/nobodys-bucket?")
    for _ in range(2):
        result = await asyncio.to_thread(run_doctor, environment, "--json", FNQUEUE_BLOBS_URL=elsewhere)
        assert findings(result)["s3 bucket"]["value"] == "missing"


async def test_refused_credentials_are_told_from_a_server_that_is_away(
    managed_rabbitmq: RabbitMQ, new_redis: Callable[[], Redis]
) -> None:
    server = await asyncio.to_thread(new_redis)
    with redis.Redis.from_url(server.url) as client:
        client.acl_setuser("some", enabled=True, passwords=["+hush-hush"], keys=["*"], categories=["+@all"])
    wrong = {
        **NOBODY,
        "FNQUEUE_STORE_URL": server.url.replace("redis://", "redis://some:wrong-hush@"),
        "FNQUEUE_QUEUE_URL": managed_rabbitmq.url.replace(":", ":wrong-hush", 2).replace("amqp:wrong-hush", "amqp:"),
    }
    result = await asyncio.to_thread(run_doctor, wrong, "--json")
    found = findings(result)
    for name in ("redis", "rabbitmq"):
        assert "refuses the URL's user or password" in found[f"{name} reachable"]["advice"]
    assert "hush" not in result.output


async def test_settings_that_are_no_settings_are_status_2() -> None:
    result = await asyncio.to_thread(run_doctor, NOBODY, FNQUEUE_PROFILE="E")
    assert result.exit_code == 2
    result = await asyncio.to_thread(run_doctor, NOBODY, FNQUEUE_QUEUE_MANAGEMENT_URL="rabbit:15672")
    assert result.exit_code == 2


async def test_a_redis_that_forbids_config_is_asked_for_the_rest(new_redis: Callable[[], Redis]) -> None:
    server = await asyncio.to_thread(new_redis)
    with redis.Redis.from_url(server.url) as client:
        client.acl_setuser(
            "some", enabled=True, passwords=["+p"], keys=["*"], channels=["*"], commands=["+@all", "-config"]
        )
    url = server.url.replace("redis://", "redis://some:p@")
    facts = await examine(load(DoctorSettings, store_url=url), probe=False)
    assert facts.store.config is None
    assert facts.store.version
    stop = asyncio.Event()
    given = {"store_url": url, "profile": "B", "function_id": FUNCTION_ID, "function_version_id": VERSION_ID}
    with pytest.raises(ConfigurationError, match="FNQUEUE_PROFILE_ASSERTED"):
        async with profile_kept(load(SidecarSettings, **given), stop):
            pass
    async with profile_kept(load(SidecarSettings, **given, profile_asserted=True), stop):
        assert not stop.is_set()


# -- start-up ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [api, controller, sidecar])
def test_no_process_calls_itself_b_over_a_redis_that_flushes_every_second(
    command: click.Command, new_redis: Callable[[], Redis], tmp_path: Path
) -> None:
    server = new_redis()
    with redis.Redis.from_url(server.url) as client:
        client.config_set("appendfsync", "everysec")
    environment = {
        **NOBODY,
        "FNQUEUE_STORE_URL": server.url,
        "FNQUEUE_PROFILE": "B",
        "FNQUEUE_DATA_DIR": str(tmp_path),
    }
    result = CliRunner().invoke(command, [], env=environment)
    assert result.exit_code == 2
    [line] = [line for line in result.output.splitlines() if not line.startswith("{")]
    assert "not profile B: redis appendfsync is everysec, must be always" in line
    assert "CONFIG SET appendfsync always" in line


def test_a_process_of_one_calls_itself_nothing_but_a(tmp_path: Path) -> None:
    """In a process of its own: at its end it kills its children, and those of the tests are the servers."""
    environment = processes.environment(FNQUEUE_PROFILE="B", FNQUEUE_DATA_DIR=str(tmp_path))
    done = processes.fnqueue("dev", "--port", "0", env=environment)
    assert done.returncode == 2
    assert "not profile B: store place is memory://" in done.stderr


def settings_over(server: Redis, profile: str) -> Settings:
    return load(
        SidecarSettings,
        store_url=server.url,
        profile=profile,
        function_id=FUNCTION_ID,
        function_version_id=VERSION_ID,
        store_timeout_s=1,
    )


async def test_a_server_that_is_away_is_looked_at_when_it_is_back(
    programs: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, stop = Redis(tmp_path), asyncio.Event()
    caplog.set_level(logging.INFO)
    try:
        async with profile_kept(settings_over(server, "B"), stop, again_s=0.05):
            assert "profile_unverified" in caplog.messages
            await asyncio.to_thread(server.start)
            await eventually(lambda: asyncio.sleep(0, caplog.messages), lambda seen: "profile_verified" in seen)
        assert not stop.is_set()
    finally:
        await asyncio.to_thread(server.kill)


async def test_a_process_stops_in_good_order_when_a_server_comes_back_otherwise(programs: None, tmp_path: Path) -> None:
    server, stop = Redis(tmp_path), asyncio.Event()

    async def live_until_stopped() -> None:
        async with profile_kept(settings_over(server, "C"), stop, again_s=0.05), asyncio.timeout(30):
            await asyncio.to_thread(server.start)
            await stop.wait()

    try:
        with pytest.raises(ConfigurationError, match="not profile C: redis min-replicas-to-write is 0"):
            await live_until_stopped()
    finally:
        await asyncio.to_thread(server.kill)


async def test_profile_a_asks_nobody() -> None:
    settings = load(Settings, store_url="redis://127.0.0.1:1/0")
    async with profile_kept(settings, asyncio.Event()):
        pass
