"""The calls in flight of this process: work that outlives its caller, and callers that wait.

A front end that is told to stop answers all who wait at once (PROTOCOL P11), and lets nobody in behind them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar

from broker.errors import TooManyRequests
from broker.model import Record

T = TypeVar("T")


class Interrupted(Exception):
    """This server is stopping: answer with what is known."""


class Calls:
    """Of one account `most_per_account` may wait at once, 0 for any number."""

    def __init__(self, *, most_per_account: int = 0) -> None:
        self._most_per_account = most_per_account
        self._per_account: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._waiting: set[asyncio.Task[Any]] = set()
        self._interrupted: set[asyncio.Task[Any]] = set()
        self._stopping = False

    @property
    def stopping(self) -> bool:
        return self._stopping

    @property
    def waiters(self) -> int:
        """How many wait now."""
        return len(self._waiting)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run `work` to its end, whatever becomes of the caller; `finish` waits for it. Its error is the
        caller's to see; without a caller, there is nobody to tell."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def waiting(self, account: str = "") -> AbstractContextManager[None]:
        """While the body runs, the current task can be told to stop waiting. With `account` "" nobody counts it.

        Raises:
            Interrupted: the body was cut short by `interrupt`.
            TooManyRequests: as many of the account's calls wait as may.
        """
        return _Waiting(self, account)

    def enter(self, task: asyncio.Task[Any], account: str) -> None:
        if self._stopping:
            raise Interrupted
        if self._most_per_account and account:
            if self._per_account[account] >= self._most_per_account:
                raise TooManyRequests(f"{self._most_per_account} calls of this account wait here already")
            self._per_account[account] += 1
        self._waiting.add(task)

    def leave(self, task: asyncio.Task[Any], account: str) -> bool:
        """Whether it was interrupted."""
        if self._most_per_account and account:
            self._per_account[account] -= 1
            if not self._per_account[account]:
                del self._per_account[account]
        self._waiting.discard(task)
        interrupted = task in self._interrupted
        self._interrupted.discard(task)
        return interrupted

    def interrupt(self) -> None:
        """End every wait, now and from now on."""
        self._stopping = True
        for task in list(self._waiting):
            self._interrupted.add(task)
            task.cancel()

    async def finish(self, *, grace_s: float) -> None:
        """Return when all that was spawned has ended, or after `grace_s`; what is left then is cancelled."""
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=grace_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen, so that asyncio does not report it as lost


class _Waiting:
    """A class, since a generator keeps half a kilobyte for as long as somebody waits."""

    __slots__ = ("_account", "_calls", "_task")

    def __init__(self, calls: Calls, account: str) -> None:
        task = asyncio.current_task()
        assert task is not None, "only tasks wait"
        self._calls = calls
        self._task = task
        self._account = account

    def __enter__(self) -> None:
        self._calls.enter(self._task, self._account)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = self._calls.leave(self._task, self._account)
        # Who is cancelled for another reason too, as a client that has left, must go.
        if isinstance(exc, asyncio.CancelledError) and interrupted and self._task.uncancel() == 0:
            raise Interrupted from None


class Accepting:
    """The submission of one call: remembers its task, and says when the body is no longer needed."""

    def __init__(self, calls: Calls, *, done: Callable[[], None]) -> None:
        self._calls = calls
        self._done = done
        self._task: asyncio.Task[Record] | None = None

    def spawn(self, work: Coroutine[Any, Any, Record]) -> asyncio.Task[Record]:
        self._task = self._calls.spawn(work)
        self._task.add_done_callback(lambda _: self._done())
        return self._task

    @property
    def begun(self) -> bool:
        return self._task is not None

    async def record(self) -> Record:
        """What the submission comes to, or raises."""
        assert self._task is not None, "nothing was submitted"
        return await asyncio.shield(self._task)
