"""The few ways in which tasks run side by side: errors come out as they are, and nothing outlives its block."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any


@asynccontextmanager
async def together() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that raises the first error itself, not a group of errors."""
    error: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as found:
        error = found.exceptions[0]
    # Raised out here, because inside the clause above its own cause would be lost.
    if error is not None:
        raise error


@asynccontextmanager
async def beside(*works: Coroutine[Any, Any, object]) -> AsyncIterator[None]:
    """Run `works` in the background of the body; they end with it. An error on either side ends both sides and
    is raised as it is."""
    async with together() as group:
        tasks = [group.create_task(work) for work in works]
        yield
        for task in tasks:
            task.cancel()


async def either(*waits: Coroutine[Any, Any, object]) -> None:
    """Return when the first of `waits` ends, or raise what it raised; the others are cancelled."""
    async with together() as group:
        tasks = [group.create_task(wait) for wait in waits]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
