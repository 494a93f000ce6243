"""docker-compose.yml and what it is made of, without an engine: what the files name exists, and holds no secret."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from infra.access import ROLES
from infra.docs import SECTIONS

REPOSITORY = Path(__file__).resolve().parents[2]
COMPOSE = (REPOSITORY / "docker-compose.yml").read_text()
DOCKERFILE = (REPOSITORY / "infra/docker/Dockerfile").read_text()
EXAMPLE = (REPOSITORY / "infra/docker/env.example").read_text()

VARIABLE = re.compile(r"(?<!\$)\$\{(?P<name>\w+)(?P<otherwise>:[-?][^}]*)?\}")
SECRET = re.compile(r"PASSWORD|SECRET|KEY")


@pytest.mark.parametrize(
    "text", [COMPOSE, DOCKERFILE, EXAMPLE], ids=["docker-compose.yml", "Dockerfile", "env.example"]
)
def test_every_setting_that_is_named_is_one(text: str) -> None:
    known = {f"FNQUEUE_{name.upper()}" for _, settings in SECTIONS for name in settings.model_fields}
    assert set(re.findall(r"FNQUEUE_[A-Z_]+", text)) <= known


def test_every_file_that_is_mounted_is_there() -> None:
    mounted = re.findall(r"^ *- \./([^:]+):", COMPOSE, re.MULTILINE)
    assert mounted
    assert [path for path in mounted if not (REPOSITORY / path).is_file()] == []


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    kept = re.findall(r"^!(.+)$", (REPOSITORY / ".dockerignore").read_text(), re.MULTILINE)
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    copied = {path for line in lines for path in line.split()}
    assert copied
    assert sorted(path for path in copied if not (REPOSITORY / path).exists()) == []
    assert sorted(copied - set(kept)) == []


def test_every_variable_is_in_the_example_of_the_environment() -> None:
    named = {found["name"] for found in VARIABLE.finditer(COMPOSE)}
    offered = set(re.findall(r"^(\w+)=", EXAMPLE, re.MULTILINE))
    assert named
    assert named - offered == set()


def test_no_secret_has_a_default() -> None:
    defaults = {
        found["name"]: found["otherwise"]
        for found in VARIABLE.finditer(COMPOSE)
        if SECRET.search(found["name"]) and (found["otherwise"] or "").startswith(":-")
    }
    assert {name for name, default in defaults.items() if default != ":-"} == set()
    values = dict(re.findall(r"^(\w+)=(.*)$", EXAMPLE, re.MULTILINE))
    given = {name for name, value in values.items() if SECRET.search(name) and not value.endswith("GENERATE")}
    assert given == {"S3_ACCESS_KEY"}, "the one that is a user's name"


def test_ports_are_open_on_loopback_only() -> None:
    ports = re.findall(r'^ *ports: \["\$\{\w+:-([^}]*)\}:\d+"\]$', COMPOSE, re.MULTILINE)
    assert len(ports) == len(re.findall(r"^ *ports:", COMPOSE, re.MULTILINE))
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_image_is_pinned_to_a_series() -> None:
    images = re.findall(r"^ *image: (\S+)$", COMPOSE, re.MULTILINE)
    assert images
    assert [image for image in images if not re.search(r":(v?\d+\.\d+(\.\d+)?|local)$", image)] == []


@pytest.mark.parametrize(
    ("script", "template", "written"),
    [
        ("redis.sh", "redis/users.acl", "usr/local/etc/users.acl"),
        ("rabbitmq.sh", "rabbitmq/users.json", "etc/rabbitmq/definitions.d/20-users.json"),
    ],
)
def test_servers_start_with_our_users_and_the_passwords_of_the_environment(
    tmp_path: Path, script: str, template: str, written: str
) -> None:
    """As the image's shell runs it, with a root of its own and stand-ins for what only the image has."""
    for folder in ("bin", "usr/local/etc", "etc/rabbitmq/definitions.d", "etc/rabbitmq/conf.d"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("chown", "docker-entrypoint.sh", "rabbitmq-plugins"):
        stand_in = tmp_path / "bin" / name
        stand_in.write_text('#!/bin/sh\nprintf "%s " "$0" "$@"\nenv\n')
        stand_in.chmod(0o755)
    source = (REPOSITORY / "infra" / template).read_text()
    (tmp_path / "usr/local/etc" / f"fnqueue-users{Path(template).suffix}").write_text(source)
    text = (REPOSITORY / "infra/docker" / script).read_text()
    text = re.sub(r"(?<=[ >])/(?=usr/local/etc|etc/)", f"{tmp_path}/", text)
    passwords = {role: f"Hush-.{role}_~" for role in ROLES}
    environment = {f"{role.upper()}_PASSWORD": password for role, password in passwords.items()}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def run(**given: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-c", text],
            env={"PATH": path, **environment, **given},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    done = run()

    assert done.returncode == 0, done.stderr
    found = (tmp_path / written).read_text()
    assert (tmp_path / written).stat().st_mode & 0o077 == 0
    assert found == re.sub(r"([A-Z]+)_PASSWORD", lambda name: passwords[name[1].lower()], source)
    assert "docker-entrypoint.sh" in done.stdout
    assert "Hush" not in done.stdout.rpartition("docker-entrypoint.sh")[2]
    assert run(API_PASSWORD="a/b").returncode == 1
    assert run(API_PASSWORD="").returncode != 0
