"""What `make stack` starts, and where it refuses to."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from infra.access import ROLES
from infra.local.process import ServerFailed, free_port
from infra.local.servers import RabbitMQ, Redis
from infra.local.stack import Address, Stack

NAMES = ("FNQUEUE_QUEUE_URL", "FNQUEUE_STORE_URL", "FNQUEUE_BLOBS_URL")
SECRET_FILES = ["admin.key", "secret.key", "secret", *(f"*/{role}.password" for role in ROLES)]


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    for name in (*NAMES, "FNQUEUE_HOST", "FNQUEUE_PORT", "ENGINE"):
        monkeypatch.delenv(name, raising=False)
    return Stack(tmp_path / "stack")


def test_servers_come_before_the_programs_that_use_them(stack: Stack) -> None:
    children = stack.children(Address.from_environment())
    assert [child.name for child in children] == ["rabbitmq", "redis", "s3", "api", "controller"]


def test_programs_are_told_where_the_servers_are(stack: Stack) -> None:
    rabbitmq, redis, s3, api, controller = stack.children(Address.from_environment())
    assert isinstance(rabbitmq, RabbitMQ)
    assert isinstance(redis, Redis)
    for program in (api, controller):
        told = program.environment()
        urls = [rabbitmq.url_for(program.name), redis.url_for(program.name), s3.url]
        assert [told[name] for name in NAMES] == urls
        assert told["FNQUEUE_LAUNCHER_URL"] == "process://"


def test_each_program_is_told_its_own_users_and_nobody_the_operators(stack: Stack) -> None:
    rabbitmq, redis, _, api, controller = stack.children(Address.from_environment())
    told = controller.environment()
    assert "fnqueue-sidecar:" in told["FNQUEUE_SIDECAR_STORE_URL"]
    assert told["FNQUEUE_VERSION_USERS"] == "true"
    passwords = {
        role: {(server.folder / f"{role}.password").read_text() for server in (rabbitmq, redis)} for role in ROLES
    }
    for program, strangers in ((api, ("operator", "controller", "sidecar")), (controller, ("operator", "api"))):
        values = " ".join(program.environment().values())
        assert not [role for role in strangers for password in passwords[role] if password in values]


def test_a_controller_may_be_given_another_user_of_a_server_that_is_named(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FNQUEUE_STORE_URL", "redis://api@elsewhere")
    monkeypatch.setenv("FNQUEUE_CONTROLLER_STORE_URL", "redis://controller@elsewhere")
    *_, api, controller = stack.children(Address.from_environment())
    assert api.environment()["FNQUEUE_STORE_URL"] == "redis://api@elsewhere"
    assert controller.environment()["FNQUEUE_STORE_URL"] == "redis://controller@elsewhere"


@pytest.mark.parametrize(("name", "server"), [*zip(NAMES, ("rabbitmq", "redis", "s3"), strict=True)])
def test_a_server_that_is_named_is_used_and_not_started(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, name: str, server: str
) -> None:
    monkeypatch.setenv(name, "scheme://elsewhere")
    children = stack.children(Address.from_environment())
    assert server not in [child.name for child in children]
    assert children[-1].environment()[name] == "scheme://elsewhere"


def test_with_podman_functions_run_as_containers(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE", "podman")
    children = stack.children(Address.from_environment())
    assert [child.name for child in children] == ["rabbitmq", "redis", "s3", "podman", "api", "controller"]
    told = children[-1].environment()
    assert told["FNQUEUE_LAUNCHER_URL"] == children[3].url
    assert told["FNQUEUE_DOCKER_SIDECAR_IMAGE"] == "fnqueue/fnqueue:local"
    assert told["FNQUEUE_DOCKER_KEEP_INSTANCES"] == "false"


def test_another_engine_is_refused_with_what_to_do(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE", "docker")
    with pytest.raises(ServerFailed, match=r"FNQUEUE_LAUNCHER_URL, such as docker://"):
        stack.children(Address.from_environment())


def test_secrets_are_kept_for_the_next_start_and_for_the_owner_only(stack: Stack) -> None:
    first, second = (stack.children(Address.from_environment())[-2].environment() for _ in range(2))
    for name in ("FNQUEUE_ADMIN_KEY", "FNQUEUE_SECRET_KEY"):
        assert first[name] == second[name]
        assert len(first[name]) == 64
    for file in ("admin.key", "secret.key"):
        assert stat.S_IMODE((stack.folder / file).stat().st_mode) == 0o600


def test_no_command_line_carries_a_secret(stack: Stack) -> None:
    children = stack.children(Address.from_environment())
    secrets = {path.read_text() for name in SECRET_FILES for path in stack.folder.rglob(name)}
    assert len(secrets) == 3 + 2 * len(ROLES)  # RabbitMQ's and Redis' are not the same
    for child in children:
        assert not [secret for secret in secrets if secret in " ".join(child.command())]


def test_a_taken_port_is_refused_with_a_way_out() -> None:
    with socket.socket() as other:
        port = free_port()
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(ServerFailed, match="FNQUEUE_PORT=8081 make stack"):
            Address(host="127.0.0.1", port=port).refuse_if_taken()


@pytest.mark.parametrize("port", ["", "0", "65536", "http"])
def test_a_port_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("FNQUEUE_PORT", port)
    with pytest.raises(ServerFailed, match="FNQUEUE_PORT"):
        Address.from_environment()
