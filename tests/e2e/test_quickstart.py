"""docs/quickstart.md, as somebody who has nothing follows it: with the wheel, in an empty environment."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from infra import release
from tests.e2e import dev
from tests.pages import DOCS, assert_told, blocks, script

PAGE = DOCS / "quickstart.md"
# Installing takes what the network and the disk take.
TIMEOUT_S = 540.0


@pytest.mark.timeout(600)
async def test_the_page_leads_from_nothing_to_a_function_that_survives(tmp_path: Path) -> None:
    wheel = await asyncio.to_thread(release.wheel, tmp_path / "dist")
    release.check_wheel(wheel)
    shown = blocks(PAGE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    folder = tmp_path / "reader"
    folder.mkdir()
    environment = dev.environment(
        FNQUEUE_PORT=port, PIP_FIND_LINKS=str(wheel.parent), PIP_NO_COMPILE="1", XDG_CONFIG_HOME=str(folder)
    )
    environment = {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-c",
        script(shown).replace("127.0.0.1:8080", f"127.0.0.1:{port}"),
        cwd=folder,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            output, _ = await process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output.decode()
    assert_told(shown, output.decode())
