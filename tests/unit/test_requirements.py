"""What is installed is named with its hash, and follows from pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "requirements"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
_PIN = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>[^\s;\\]+)[^\\\n]*(?:\\\n +--hash=sha256:\w{64} ?)+$", re.MULTILINE)


def pins(name: str) -> dict[str, set[str]]:
    """Versions by package: several where Pythons differ."""
    found: dict[str, set[str]] = {}
    for pin in _PIN.finditer((FOLDER / f"{name}.txt").read_text()):
        found.setdefault(canonicalize_name(pin["name"]), set()).add(pin["version"])
    return found


def wanted(*extras: str) -> list[Requirement]:
    project = PROJECT["project"]
    texts = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    return [each for each in map(Requirement, texts) if each.name != project["name"]]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.name)
def test_all_that_is_installed_has_a_version_and_hashes(path: Path) -> None:
    text = path.read_text()
    left = re.sub(r"^#.*\n", "", _PIN.sub("", text), flags=re.M).split()
    assert left == []
    assert pins(path.stem)


@pytest.mark.parametrize(
    ("name", "requirements"),
    [
        ("run", wanted("grpc", "tracing")),
        ("ocr", wanted("grpc", "tracing", "ocr")),
        ("dev", wanted("grpc", "tracing", "ocr", "dev")),
        ("docs", wanted("grpc", "tracing", "docs")),
        ("build", [Requirement(text) for text in PROJECT["build-system"]["requires"]]),
    ],
)
def test_the_lock_is_in_step_with_what_asks_for_it(name: str, requirements: list[Requirement]) -> None:
    locked = pins(name)
    assert requirements
    for each in requirements:
        versions = locked.get(canonicalize_name(each.name), set())
        assert versions, f"{each} is not in requirements/{name}.txt: make lock"
        assert all(each.specifier.contains(version) for version in versions), f"{each}: make lock"


def test_what_is_tested_is_what_runs() -> None:
    for name, wider in (("run", "ocr"), ("ocr", "dev"), ("run", "docs")):
        assert pins(name).items() <= pins(wider).items()


def test_everything_is_installed_by_hash() -> None:
    for file in ("Makefile", "infra/docker/Dockerfile"):
        lines = (REPOSITORY / file).read_text().splitlines()
        installing = [line for line in lines if re.search(r"pip install|\(PIP\)", line)]
        assert installing
        assert [line for line in installing if not re.search("^PIP :=|--require-hashes|--no-deps", line)] == []
