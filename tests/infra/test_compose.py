"""docker-compose.yml and what it is made of, without an engine: what the files name exists, and holds no secret."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
    assert [image for image in images if not re.search(r":(\d+\.\d+|local)$", image)] == []
