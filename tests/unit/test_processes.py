"""Several processes of one command: kept, started again, stopped together."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from api.processes import MISCONFIGURED, ended, keep
from broker.errors import ConfigurationError
from tests.eventually import eventually

# Writes its ID down, and again when it is told to stop.
_CHILD = """
import os, signal, sys, time
folder = sys.argv[1]
def stop(*_):
    open(f"{folder}/stopped-{os.getpid()}", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
open(f"{folder}/began-{os.getpid()}", "w").close()
while True:
    time.sleep(60)
"""
_DEAF = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"{sys.argv[1]}/began-{os.getpid()}", "w").close()
while True:
    time.sleep(60)
"""


def pids(folder: Path, event: str) -> set[int]:
    return {int(path.name.partition("-")[2]) for path in folder.glob(f"{event}-*")}


async def began(folder: Path, count: int) -> set[int]:
    async def look() -> set[int]:
        return pids(folder, "began")

    return await eventually(look, lambda seen: len(seen) >= count, within_s=30)


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


@asynccontextmanager
async def kept(folder: Path, script: str, count: int, *, grace_s: float = 30) -> AsyncIterator[asyncio.Event]:
    stop = asyncio.Event()
    command = [sys.executable, "-c", script, str(folder)]
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(keep([command] * count, stop, grace_s=grace_s, pause_s=(0.01, 0.01)))
        try:
            yield stop
        finally:
            stop.set()


async def test_all_are_told_to_stop_and_waited_for(tmp_path: Path) -> None:
    async with kept(tmp_path, _CHILD, 3):
        running = await began(tmp_path, 3)
    assert pids(tmp_path, "stopped") == running


async def test_one_that_dies_is_started_again_and_the_others_are_left_alone(tmp_path: Path) -> None:
    async with kept(tmp_path, _CHILD, 2):
        first, second = sorted(await began(tmp_path, 2))
        os.kill(first, signal.SIGKILL)
        [third] = await began(tmp_path, 3) - {first, second}
    assert pids(tmp_path, "stopped") == {second, third}


async def test_one_that_does_not_stop_in_time_is_killed(tmp_path: Path) -> None:
    async with kept(tmp_path, _DEAF, 1, grace_s=0.1):
        [pid] = await began(tmp_path, 1)
    assert not alive(pid)


async def test_settings_that_are_no_good_stop_them_all(tmp_path: Path) -> None:
    script = f"import sys, os\nif os.path.exists(sys.argv[1] + '/no'): sys.exit({MISCONFIGURED})\n{_CHILD}"

    async def spoil() -> None:
        first, _ = sorted(await began(tmp_path, 2))
        (tmp_path / "no").touch()
        os.kill(first, signal.SIGKILL)

    command = [sys.executable, "-c", script, str(tmp_path)]
    keeping = keep([command] * 2, asyncio.Event(), grace_s=30, pause_s=(0.01, 0.01))
    with pytest.raises(ConfigurationError, match="it says above why"):
        await asyncio.gather(keeping, spoil())
    assert not any(alive(pid) for pid in pids(tmp_path, "began"))


async def test_a_process_notices_that_its_parent_is_gone() -> None:
    await ended(parent=os.getppid() + 1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await ended(parent=os.getppid())
