"""docs/function-authors.md on both families: its commands are run as they stand, and say what it says."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from tests.e2e.conftest import Mirror, Site

PAGE = Path(__file__).parents[2] / "docs" / "function-authors.md"
TIMEOUT_S = 60.0
NEXT = "--- next block ---"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Command:
    """`said` is what the page shows below it, '' if nothing."""

    text: str
    said: str


def sections(page: str) -> dict[str, list[Command]]:
    """Commands by heading. What is above the first heading is needed by all others; what would start a server is
    left out."""
    found: dict[str, list[Command]] = {}
    for part in re.split(r"^#{2,} ", page, flags=re.MULTILINE):
        heading, _, text = part.partition("\n")
        blocks = [*_BLOCK.findall(text), ("sh", "")]
        commands = [
            Command(block, after if kind == "" else "")
            for (language, block), (kind, after) in pairwise(blocks)
            if language == "sh" and "make " not in block
        ]
        if commands:
            found[heading] = commands
    return found


SECTIONS = sections(PAGE.read_text())
PREPARATION, *TOPICS = SECTIONS


@pytest.fixture(scope="module")
async def outputs(
    site: Site, mirror: Mirror, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[str, asyncio.Task[str]]]:
    """What the commands of each topic say; side by side, because they mostly wait. `mirror` shows that this site can
    deploy, as the welcome does that a reader of the page has seen."""
    async with asyncio.TaskGroup() as running:

        def start(topic: str) -> asyncio.Task[str]:
            preparation = [command.text for command in SECTIONS[PREPARATION]]
            commands = [f"{command.text}\necho; echo '{NEXT}'" for command in SECTIONS[topic]]
            folder = tmp_path_factory.mktemp("authors")
            script = "\n".join([*preparation, *commands, "undeploy"])
            return running.create_task(shell(script, site, folder))

        yield {topic: start(topic) for topic in TOPICS}


def test_every_example_is_on_the_page() -> None:
    page = PAGE.read_text()
    for example in sorted(PAGE.parents[1].joinpath("examples", "authors").glob("*.py")):
        image = f"fnqueue/{example.stem.replace('_', '-')}:latest"
        assert f"deploy {image}" in page, image
        assert f"examples/authors/{example.name}" in page, example.name


@pytest.mark.parametrize("topic", TOPICS)
async def test_the_page_tells_what_happens(topic: str, outputs: dict[str, asyncio.Task[str]]) -> None:
    for command, said in zip(SECTIONS[topic], (await outputs[topic]).split(f"{NEXT}\n"), strict=False):
        assert_shows(said, command.said)


async def shell(script: str, site: Site, folder: Path) -> str:
    """What it writes, and complains of."""
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-u",
        env=os.environ | {"URL": site.url, "KEY": site.key},
        cwd=folder,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(TIMEOUT_S):
        output, _ = await process.communicate(script.encode())
    return output.decode().replace("\r\n", "\n")


def assert_shows(output: str, page: str) -> None:
    """The page's lines are in the output, in their order; `…` stands for anything."""
    lines = iter(output.splitlines())
    for shown in page.splitlines():
        pattern = re.compile(".*".join(re.escape(part) for part in shown.split("…")))
        assert any(pattern.fullmatch(line) for line in lines), f"{shown!r} is not, or not there, in:\n{output}"
