"""What a container writes reaches whoever reads its logs, on both families: in production over the Redis users of a
front end and of a controller."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.e2e import dev
from tests.e2e.conftest import Site, idle
from tests.e2e.test_client_commands import Shell
from tests.eventually import eventually
from tests.house import Caller, Function

LIMIT_S = 60.0


@pytest.fixture
def shell(site: Site, tmp_path: Path) -> Shell:
    return Shell(site, tmp_path)


@asynccontextmanager
async def following(site: Site, function: Function, home: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """`fnqueue logs --follow`, as a process of its own, since only Ctrl-C ends it."""
    settings = {"FNQUEUE_URL": site.url, "FNQUEUE_API_KEY": site.key, "XDG_CONFIG_HOME": str(home)}
    words = ("-P", "-m", "fnqueue", "logs", function.id, "--follow", "--tail", "1")
    process = await asyncio.create_subprocess_exec(
        sys.executable, *words, env=dev.environment(**settings), stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def heard(process: asyncio.subprocess.Process, text: str) -> str:
    """The line with this text, once it is printed."""
    assert process.stdout is not None
    async with asyncio.timeout(LIMIT_S):
        while line := (await process.stdout.readline()).decode():
            if text in line:
                return line
    pytest.fail("it ended")


async def test_what_a_container_writes_is_shown_and_followed(
    site: Site, shell: Shell, caller: Caller, recorder: Function, tmp_path: Path
) -> None:
    first, second = f"first {uuid.uuid4()}", f"second {uuid.uuid4()}"
    assert (await caller.invoke(recorder.id, {"say": first})).status == 200
    shown = await eventually(lambda: shell.fnqueue("logs", recorder.id), lambda done: first in done.stdout)
    assert (shown.exit_code, shown.stderr) == (0, "")
    told = await shell.told("logs", recorder.id)
    [line] = [line for line in told["lines"] if line["text"] == first]
    assert (line["part"], told["unanswered"]) == ("container", [])
    assert f"[{line['instanceId'][:8]}] {first}\n" in shown.stdout

    async with following(site, recorder, tmp_path) as process:
        await heard(process, first)
        assert (await caller.invoke(recorder.id, {"say": second})).status == 200
        assert await heard(process, second) == f"[{line['instanceId'][:8]}] {second}\n"
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(LIMIT_S):
            assert await process.wait() == 130
    await idle(caller, recorder)


async def test_the_last_lines_of_an_instance_that_was_killed_are_shown(
    site: Site, shell: Shell, caller: Caller, recorder: Function
) -> None:
    last = f"last {uuid.uuid4()}"
    answer = await caller.invoke(recorder.id, {"say": last})
    os.kill(json.loads(answer.body)["pid"], signal.SIGKILL)
    shown = await eventually(
        lambda: shell.fnqueue("logs", recorder.id, "--previous"), lambda done: last in done.stdout, within_s=LIMIT_S
    )
    assert "instance_ended cause=container was killed by signal 9" in shown.stdout
    told = await shell.told("logs", recorder.id, "--tail", "1000")
    [line] = [line for line in told["lines"] if line["text"] == last]
    [ended] = [each for each in told["ended"] if each["instanceId"] == line["instanceId"]]
    assert ended["cause"] == "container was killed by signal 9"
    alone = await shell.told("logs", recorder.id, "--instance", line["instanceId"][:8])
    assert last in [each["text"] for each in alone["lines"]]
    assert (await caller.invoke(recorder.id, {})).status == 200
    await idle(caller, recorder)
