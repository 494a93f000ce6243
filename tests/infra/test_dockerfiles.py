"""Images, without an engine: what a linter would say of their files, and what a host expects of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGE = REPOSITORY / "infra" / "docker" / "Dockerfile"
FILES = pytest.mark.parametrize(
    "file",
    [IMAGE, *sorted((REPOSITORY / "examples").glob("*/Dockerfile"))],
    ids=lambda file: file.relative_to(REPOSITORY).as_posix(),
)


def instructions(file: Path) -> list[tuple[str, str]]:
    """Instruction and arguments, continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


@FILES
def test_bases_have_a_version(file: Path) -> None:
    found = instructions(file)
    defaults = dict(rest.partition("=")[::2] for word, rest in found if word == "ARG")
    bases = [
        re.sub(r"\$\{(\w+)\}", lambda name: defaults[name[1]], rest.split()[0])
        for word, rest in found
        if word == "FROM"
    ]
    assert bases
    assert [base for base in bases if not re.fullmatch(r"[\w./-]+:\d+\.\d+[\w.-]*(@sha256:\w{64})?", base)] == []


@FILES
def test_what_runs_is_not_root_by_number(file: Path) -> None:
    users = [rest for word, rest in instructions(file) if word == "USER"]
    assert users, "root"
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])


@FILES
def test_signals_reach_the_command(file: Path) -> None:
    """A shell as the first process swallows SIGTERM."""
    commands = [rest for word, rest in instructions(file) if word in ("CMD", "ENTRYPOINT")]
    assert commands
    assert [command for command in commands if not command.startswith("[")] == []


@FILES
def test_a_layer_holds_no_more_than_it_must(file: Path) -> None:
    text = file.read_text()
    words = [word for word, _ in instructions(file)]
    assert "ADD" not in words
    assert not re.search(r"^COPY (--\S+ )*\. ", text, re.MULTILINE), "all of a folder, whatever lies in it"
    assert "PIP_NO_CACHE_DIR=1" in text or all("--no-cache-dir" in line for line in re.findall(r"pip install.*", text))
    assert not re.search(r"\b(sudo|apt-get upgrade|chmod 777|curl .*\| *sh)\b", text)


def test_the_image_is_made_in_stages_and_says_what_it_is() -> None:
    found = instructions(IMAGE)
    assert [word for word, _ in found].count("FROM") == 2
    last = found[max(at for at, (word, _) in enumerate(found) if word == "FROM") :]
    assert not any("pip install" in rest for word, rest in last if word == "RUN")
    labels = " ".join(rest for word, rest in last if word == "LABEL")
    for name in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{name}=" in labels
    assert any(word == "HEALTHCHECK" for word, _ in last)
