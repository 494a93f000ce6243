"""Several processes on one port: started, started again when one dies, and stopped together."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from broker.errors import ConfigurationError
from broker.tasks import either, together

logger = logging.getLogger(__name__)

MISCONFIGURED = 2  # the exit status of a process whose settings are no good
# How long one that died is left alone, at first and at most; one that lived for so long begins anew.
PAUSE_S = (0.5, 30.0)
_STEADY_S = 60.0
_LOOK_S = 1.0


async def keep(
    commands: Sequence[Sequence[str]],
    stop: asyncio.Event,
    *,
    grace_s: float,
    pause_s: tuple[float, float] = PAUSE_S,
) -> None:
    """Keep a process of each command running until `stop` is set; then each gets a SIGTERM and has `grace_s` to follow
    it. None of them outlives this.

    Raises:
        ConfigurationError: one of them ended with MISCONFIGURED, so the others were stopped.
    """
    async with together() as tasks:
        for command in commands:
            tasks.create_task(_keep_one(command, stop, grace_s, pause_s))


async def ended(parent: int) -> None:
    """Return once this process's parent is another than `parent`: that one was killed, and stops nobody any more."""
    while os.getppid() == parent:  # noqa: ASYNC110  nobody tells
        await asyncio.sleep(_LOOK_S)


async def _keep_one(command: Sequence[str], stop: asyncio.Event, grace_s: float, pause_s: tuple[float, float]) -> None:
    loop = asyncio.get_running_loop()
    wait_s, longest_s = pause_s
    while not stop.is_set():
        began_at = loop.time()
        async with _running(command, grace_s) as process:
            await either(stop.wait(), process.wait())
            if process.returncode is None or stop.is_set():
                return
        if process.returncode == MISCONFIGURED:
            raise ConfigurationError("a process of several could not begin; it says above why")
        if loop.time() - began_at > _STEADY_S:
            wait_s = pause_s[0]
        died = {"pid": process.pid, "exit_status": process.returncode, "again_in_s": wait_s}
        logger.error("process_died", extra=died)
        await either(stop.wait(), asyncio.sleep(wait_s))
        wait_s = min(wait_s * 2, longest_s)


@asynccontextmanager
async def _running(command: Sequence[str], grace_s: float) -> AsyncIterator[asyncio.subprocess.Process]:
    """Has ended when this does."""
    process = await asyncio.create_subprocess_exec(*command)
    try:
        yield process
    finally:
        if process.returncode is None:
            await asyncio.shield(_end(process, grace_s))


async def _end(process: asyncio.subprocess.Process, grace_s: float) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(grace_s):
            await process.wait()
    except TimeoutError:
        logger.error("process_killed", extra={"pid": process.pid, "after_s": grace_s})
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
