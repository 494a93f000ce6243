"""The calls in flight of this process: work that outlives its caller, and callers that wait.

A front end that is told to stop answers all who wait at once (PROTOCOL P11), and lets nobody in behind them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from functools import partial
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
        # By their tasks, of callers whose tasks submit by themselves.
        self._accepting: dict[asyncio.Task[Any], Accepting] = {}
        self._stopping = False

    @property
    def stopping(self) -> bool:
        return self._stopping

    @property
    def waiters(self) -> int:
        """How many wait now."""
        return len(self._waiting)

    def spawn(
        self, work: Coroutine[Any, Any, T], told: Callable[[asyncio.Task[T]], None] | None = None
    ) -> asyncio.Task[T]:
        """Run `work` to its end, whatever becomes of the caller; `finish` waits for it. Its error is the
        caller's to see; without a caller, there is nobody to tell. `told` is called at its end."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, told) if told is not None else self._over)
        return task

    def waiting(self, account: str = "", task: asyncio.Task[Any] | None = None) -> AbstractContextManager[None]:
        """While the body runs, the current task, which need not be given, can be told to stop waiting. With `account`
        "" nobody counts it.

        Raises:
            Interrupted: the body was cut short by `interrupt`.
            TooManyRequests: as many of the account's calls wait as may.
        """
        return _Waiting(self, account, task or _current_task())

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
        for task in self._waiting - self._accepting.keys():  # those look for themselves when they are through
            self._interrupted.add(task)
            task.cancel()

    def abandon(self, task: asyncio.Task[Any]) -> None:
        """Nobody waits for what `task` does: it ends, but not before what it submits is accepted or refused."""
        accepting = self._accepting.get(task)
        if accepting is None:
            task.cancel()
        else:
            accepting.abandoned = True

    def begin(self, task: asyncio.Task[Any], accepting: Accepting) -> None:
        """What is being submitted is not to be interrupted, until `end`."""
        self._accepting[task] = accepting

    def end(self, task: asyncio.Task[Any]) -> None:
        del self._accepting[task]

    async def finish(self, *, grace_s: float) -> None:
        """Return when all that was spawned or is being submitted has ended, or after `grace_s`; what is left then is
        cancelled."""
        loop = asyncio.get_running_loop()
        until = loop.time() + grace_s
        while tasks := self._tasks | self._accepting.keys():  # the last thing that these do may be to spawn another
            _, late = await asyncio.wait(tasks, timeout=max(0.0, until - loop.time()))
            if late:
                for task in late:
                    task.cancel()
                await asyncio.gather(*late, return_exceptions=True)
                return

    def _ended(self, told: Callable[[asyncio.Task[T]], None], task: asyncio.Task[T]) -> None:
        self._over(task)
        told(task)

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen, so that asyncio does not report it as lost


class _Waiting:
    """A class, since a generator keeps half a kilobyte for as long as somebody waits."""

    __slots__ = ("_account", "_calls", "_task")

    def __init__(self, calls: Calls, account: str, task: asyncio.Task[Any]) -> None:
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
    """The submission of one call: remembers what comes of it, and says when the body is no longer needed. `task` is
    that of `run`, if it is known."""

    def __init__(self, calls: Calls, *, done: Callable[[], None], task: asyncio.Task[Any] | None = None) -> None:
        self._calls = calls
        self._own_task = task
        self._done = done
        self._record: Record | None = None
        self._task: asyncio.Task[Record] | None = None
        self._told: asyncio.Future[Record] | None = None
        self.begun = False
        self.abandoned = False

    def spawn(self, work: Coroutine[Any, Any, Record]) -> asyncio.Future[Record]:
        """Once, or `run`. What is returned can be cancelled, and the work goes on: a shield, without its two callbacks
        more."""
        self.begun = True
        self._told = asyncio.get_running_loop().create_future()
        self._task = self._calls.spawn(work, self._ended)
        return self._told

    async def run(self, work: Coroutine[Any, Any, Record]) -> Record:
        """As `spawn`, in the current task: for one that nobody cancels but by `Calls.abandon`.

        Raises CancelledError if it was abandoned meanwhile, Interrupted if the server is stopping.
        """
        self.begun = True
        task = self._own_task or _current_task()
        self._calls.begin(task, self)
        try:
            self._record = await work
        finally:
            self._calls.end(task)
            self._done()
        if self.abandoned:
            raise asyncio.CancelledError
        if self._calls.stopping:
            raise Interrupted
        return self._record

    async def record(self) -> Record:
        """What the submission comes to, or raises."""
        if self._task is not None:
            return await asyncio.shield(self._task)
        if self._record is None:
            raise asyncio.CancelledError
        return self._record

    def _ended(self, task: asyncio.Task[Record]) -> None:
        self._done()
        told = self._told
        if told is None or told.done():  # nobody waits for it any more
            return
        if task.cancelled():
            told.cancel()
        elif (error := task.exception()) is not None:
            told.set_exception(error)
            told.exception()  # whoever waits is told; by now it may be nobody
        else:
            told.set_result(task.result())


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None, "only tasks wait"
    return task
