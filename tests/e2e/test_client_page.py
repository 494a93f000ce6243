"""docs/client.md on both families: its blocks are run as they stand, as one program, and say what it says. Those of the
README run behind them."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.e2e import dev
from tests.e2e.conftest import Site
from tests.e2e.test_function_authors import NEXT, assert_shows
from tests.house import Caller

PAGE = Path(__file__).parents[2] / "docs" / "client.md"
SAMPLES = ("inputs", "files", "progress", "streaming")
# A bound for what hangs: a command takes seconds to start where many tests run.
TIMEOUT_S = 180.0
README = PAGE.parents[1] / "README.md"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [
    (code, said if kind == "" else "")
    for (language, code), (kind, said) in pairwise([*_BLOCK.findall(PAGE.read_text()), ("end", "")])
    if language == "python"
]


@pytest.fixture(scope="module")
async def samples(site: Site, caller: Caller) -> AsyncIterator[None]:
    """Deployed under the names that the page calls them by; `fnqueue dev` has an echo."""
    made = [await caller.deploy(f"fnqueue/{name}:latest", inference_url="/run", name=name) for name in SAMPLES]
    if site.family != "embedded":
        made.append(await caller.deploy("fnqueue/echo:latest", inference_url="/echo", name="echo"))
    yield
    for function in made:
        await function.undeploy()


async def test_the_page_tells_what_happens(site: Site, samples: None, tmp_path: Path) -> None:
    readme = [code for language, code in _BLOCK.findall(README.read_text()) if language == "python"]
    shown = [f"{code}\nprint({NEXT!r}, flush=True)" for code, _ in BLOCKS]
    output = await said_by(site, tmp_path, sys.executable, "-c", "\n".join([*shown, "fnq.close()", *readme]))
    *printed, last = output.split(f"{NEXT}\n")
    assert last.endswith("{'echo': 'hello'}\n")
    for (code, said), found in zip(BLOCKS, printed, strict=True):
        assert said, f"the page does not say what this prints:\n{code}"
        assert_shows(found.replace(" \n", "\n"), said)
    assert (tmp_path / "report" / "pages" / "2.txt").read_text() == "page 2\n"


# The commands are the client's: one family is enough for them as processes.
@pytest.mark.parametrize("site", ["embedded"], indirect=True, scope="session")
async def test_its_commands_can_be_typed(site: Site, samples: None, tmp_path: Path) -> None:
    [block] = [code for language, code in _BLOCK.findall(PAGE.read_text()) if language == "sh"]
    command = f'fnqueue() {{ "{sys.executable}" -P -m fnqueue "$@"; }}\n'
    output = await said_by(site, tmp_path, "bash", "-euc", command + block)
    assert output.startswith('{"echo":"hello"}')
    assert '{"word": "upon"}' in output
    assert "  cancelled\n" in output
    assert "video.mp4" in output
    assert sorted(os.listdir(tmp_path)) == ["answer.json", "report-2", "video.mp4"]


async def said_by(site: Site, folder: Path, *words: str) -> str:
    """What a program writes that ends well."""
    (folder / "video.mp4").write_bytes(bytes(6 * 1024 * 1024))
    repository = str(PAGE.parents[1])
    settings = {"FNQUEUE_URL": site.url, "FNQUEUE_API_KEY": site.key, "XDG_CONFIG_HOME": str(folder)}
    process = await asyncio.create_subprocess_exec(
        *words,
        cwd=folder,
        env=dev.environment(PYTHONPATH=repository, **settings),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(TIMEOUT_S):
        output, complaints = await process.communicate()
    assert process.returncode == 0, complaints.decode()
    return output.decode()
