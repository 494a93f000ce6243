"""Starts a sample as what it is: a process that listens on a port."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A running sample, and a client of it."""

    process: asyncio.subprocess.Process
    url: str
    http: aiohttp.ClientSession

    async def terminate(self) -> int:
        """Asks it to stop; returns its exit status once it has."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_TIMEOUT_S):
            return await self.process.wait()


StartSample = Callable[[str], AbstractAsyncContextManager[Sample]]


@asynccontextmanager
async def running(name: str) -> AsyncIterator[Sample]:
    """The sample on a free port of the loopback, told by the environment as the launcher does. `name` is its folder,
    or its file where that is not called server.py."""
    environment = os.environ | {"HOST": "127.0.0.1", "PORT": "0", "PYTHONUNBUFFERED": "1"}
    server = str(EXAMPLES / name if name.endswith(".py") else EXAMPLES / name / "server.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable, server, env=environment, stdout=asyncio.subprocess.PIPE
    )
    try:
        url = await listening_url(process)
        async with aiohttp.ClientSession(url) as http:
            yield Sample(process=process, url=url, http=http)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def listening_url(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(START_TIMEOUT_S):
        async for line in process.stdout:
            if found := re.search(rb"Running on (http://\S+)", line):
                return found[1].decode()
    raise AssertionError(f"the sample ended with {await process.wait()} and never listened")


@pytest.fixture(scope="session")
def start_sample() -> StartSample:
    return running
