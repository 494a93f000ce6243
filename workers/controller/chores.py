"""Work that a reconcile pass begins and does not wait for: stopping an instance, removing a deployment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from broker.errors import FnqueueError
from workers.loops import Fault, guard

logger = logging.getLogger(__name__)


class Chores:
    """Background tasks of one group by name, at most one of each name at a time.

    A chore that fails is over; the pass that sees its work undone begins it again. The first failure of a streak
    is logged.
    """

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failing: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tasks

    def begin(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Does nothing while a chore of that name goes on."""
        if name in self._tasks:
            return
        task = self._group.create_task(self._run(name, work), name=name)
        self._tasks[name] = task
        task.add_done_callback(lambda _: self._tasks.pop(name, None))

    def cancel(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()

    async def finished(self) -> None:
        """Return when no chore goes on."""
        while self._tasks:
            await asyncio.wait(list(self._tasks.values()))

    async def _run(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await guard(work(), expected=(FnqueueError, OSError), chore=name)
        except (FnqueueError, OSError) as exc:
            if name not in self._failing:
                logger.warning("chore_failed", extra={"chore": name, "cause": str(exc)})
            self._failing.add(name)
        except Fault:
            return  # logged by `guard`
        else:
            self._failing.discard(name)
