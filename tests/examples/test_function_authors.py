"""docs/function-authors.md: its commands are run as they stand, section by section, and say what it says."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from tests.e2e import dev
from tests.e2e.dev import Dev
from tests.eventually import eventually
from tests.examples.conftest import Sample, StartSample

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
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    with dev.running(tmp_path_factory.mktemp("authors")) as running:
        yield running


def test_every_example_is_on_the_page() -> None:
    page = PAGE.read_text()
    for example in sorted(PAGE.parents[1].joinpath("examples", "authors").glob("*.py")):
        image = f"fnqueue/{example.stem.replace('_', '-')}:latest"
        assert f"deploy {image}" in page, image
        assert f"examples/authors/{example.name}" in page, example.name


@pytest.mark.parametrize("topic", TOPICS)
async def test_the_page_tells_what_happens(topic: str, server: Dev, tmp_path: Path) -> None:
    commands = SECTIONS[topic]
    preparation = [command.text for command in SECTIONS[PREPARATION]]
    script = "\n".join([*preparation, *(f"{command.text}\necho; echo '{NEXT}'" for command in commands)])
    output = await shell(script, server, tmp_path)
    for command, said in zip(commands, output.split(f"{NEXT}\n"), strict=False):
        assert_shows(said, command.said)


async def test_a_thread_is_finished_after_sigterm(start_sample: StartSample) -> None:
    async def running(sample: Sample) -> int:
        return int((await (await sample.http.get("/stats")).json())["running"])

    async with start_sample("authors/cancel.py") as sample:
        request = asyncio.create_task(sample.http.post("/run", json={"steps": 10}))
        await eventually(lambda: running(sample), lambda seen: seen == 1)
        assert await sample.terminate() == 0
        assert await (await request).json() == {"steps": 10}


async def test_plain_python_finishes_after_sigterm_what_runs(start_sample: StartSample) -> None:
    async with start_sample("authors/plain.py") as sample:
        request = asyncio.create_task(sample.http.post("/run", json={"steps": 10}, headers={"NVCF-REQID": "r1"}))
        assert await next_line(sample) == "r1: 10 steps"
        assert await sample.terminate() == 0
        assert await (await request).json() == {"steps": 10}


async def test_plain_python_notices_that_its_caller_has_left(start_sample: StartSample) -> None:
    async with start_sample("authors/plain.py") as sample:
        request = asyncio.create_task(sample.http.post("/run", json={"steps": 6000}, headers={"NVCF-REQID": "r1"}))
        assert await next_line(sample) == "r1: 6000 steps"
        request.cancel()
        assert (await next_line(sample)).startswith("r1: nobody wants it any more")


async def next_line(sample: Sample) -> str:
    assert sample.process.stdout is not None
    async with asyncio.timeout(TIMEOUT_S):
        return (await sample.process.stdout.readline()).decode().rstrip()


async def shell(script: str, server: Dev, folder: Path) -> str:
    """What it writes. Fails when it says that something went wrong."""
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-u",
        env=os.environ | {"URL": server.url, "KEY": server.key},
        cwd=folder,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(TIMEOUT_S):
        output, errors = await process.communicate(script.encode())
    assert (process.returncode, errors.decode()) == (0, "")
    return output.decode().replace("\r\n", "\n")


def assert_shows(output: str, page: str) -> None:
    """The page's lines are in the output, in their order; `…` stands for anything."""
    lines = iter(output.splitlines())
    for shown in page.splitlines():
        pattern = re.compile(".*".join(re.escape(part) for part in shown.split("…")))
        assert any(pattern.fullmatch(line) for line in lines), f"{shown!r} is not, or not there, in:\n{output}"
