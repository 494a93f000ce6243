"""Loops that outlive their failures, and the few ways in which this package runs things side by side.

The only place that catches every exception: what runs here must go on, whatever happened to one step of it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, NoReturn, Self, TypeVar, cast

from broker.errors import FnqueueError
from broker.tasks import beside as beside  # noqa: PLC0414  spoken of as loops.beside throughout this package
from broker.tasks import either as either  # noqa: PLC0414
from broker.tasks import together as together  # noqa: PLC0414

logger = logging.getLogger(__name__)

T = TypeVar("T")

_JITTER = 0.1
LATER_S = 0.05
# File work that took longer has held the loop up. Once that is more than HELD_S beyond a share of all time, it is the
# disk, which is left to the clerk for so long; on a busy machine any work now and then waits for its turn.
QUICK_S, PATIENT_S = 0.002, 10.0
HELD_S, HELD_SHARE = 0.05, 0.25
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0


class Fault(Exception):
    """Our own code failed; the cause is chained and already logged."""


async def every(seconds: float | Callable[[], float], step: Callable[[], Awaitable[object]], *, name: str) -> NoReturn:
    """Run `step` now and then about every `seconds`, until cancelled. It logs when a streak of failures begins
    and when it ends; `name` tells whose."""
    streak = _Streak(name)
    while True:
        try:
            await step()
        except Exception as exc:  # noqa: BLE001  one bad step must not end the loop
            streak.failed(exc)
        else:
            streak.over()
        pause_s = seconds() if callable(seconds) else seconds
        await asyncio.sleep(pause_s * random.uniform(1 - _JITTER, 1 + _JITTER))  # noqa: S311  spreads load


async def insist(step: Callable[[], Awaitable[T]], *, on: type[Exception], name: str) -> T:
    """What `step` returns, after repeating it, less and less often, for as long as it raises `on`. The caller
    bounds the wait by cancelling it."""
    try:
        return await step()
    except on as exc:
        streak = _Streak(name)
        streak.failed(exc)
    pause_s = _FIRST_PAUSE_S
    while True:
        await asyncio.sleep(random.uniform(pause_s / 2, pause_s))  # noqa: S311  spreads load
        pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
        try:
            result = await step()
        except on as exc:
            streak.failed(exc)
        else:
            streak.over()
            return result


async def guard(work: Coroutine[Any, Any, T], *, expected: tuple[type[Exception], ...] = (), **facts: object) -> T:
    """What `work` returns. Any error but the `expected` ones is logged with `facts` and its traceback.

    Raises:
        Fault: in place of the unexpected error.
    """
    try:
        return await work
    except expected:
        raise
    except Exception as exc:
        logger.exception("fault", extra=facts)
        raise Fault(type(exc).__name__) from exc


async def in_thread(function: Callable[..., T], *args: object, stop: Callable[[], None] | None = None) -> T:
    """Run `function` in a thread. A cancelled wait calls `stop` and ends only after the thread did, so that what
    cleans up next does not meet it at work."""
    return await _finished(asyncio.get_running_loop().run_in_executor(None, functools.partial(function, *args)), stop)


class Clerk:
    """Does short file work for many tasks in one thread of its own, opened and closed as a context manager.

    What is asked for while it is at work is done together in its next turn. A thread and back costs 130 µs of CPU,
    twice what it costs to make a directory and remove it; but a disk that is being flushed holds these up for
    milliseconds, too long for the loop. So what somebody waits for is done here and now (`soon`, `now`) until a disk
    was seen to be slow (`patient`). One thread is no loss: the kernel makes and removes the entries of one directory
    one by one, too. Long work belongs `in_thread`.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="clerk")
        self._asked: list[_Asked[Any]] = []
        self._at_work = False
        self._timer: asyncio.TimerHandle | None = None
        self._patient_until = 0.0
        self._held_s = self._held_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._asked:
            self._thread.submit(_work_through, self._asked)
        self._thread.shutdown()

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """What `function` returns. A cancelled wait ends only after the work did, as `in_thread`."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self._asked.append(_Asked(functools.partial(function, *args), done))
        if not self._at_work:
            self._at_work = True
            loop.call_soon(self._turn, loop)  # what the rest of this turn of the loop asks for comes along
        return await _finished(done)

    async def soon(self, function: Callable[..., T], *args: object) -> T:
        """As `run`; on the loop while that takes no time worth speaking of."""
        return await self.run(function, *args) if self.patient else self.now(function, *args)

    @property
    def patient(self) -> bool:
        """Whether a disk was seen to be slow of late, so that nothing that may wait for it belongs on the loop."""
        return time.monotonic() < self._patient_until

    def now(self, function: Callable[..., T], *args: object) -> T:
        """What `function` returns, here and now."""
        began_at = time.monotonic()
        try:
            return function(*args)
        finally:
            ended_at = time.monotonic()
            if ended_at - began_at > QUICK_S:
                self._held_up(ended_at - began_at, ended_at)

    def later(self, function: Callable[..., object], *args: object) -> None:
        """Have it done, behind what was asked for before, with the next work or by `LATER_S`, and before the clerk is
        closed. It must raise nothing."""
        loop = asyncio.get_running_loop()
        self._asked.append(_Asked(functools.partial(function, *args), None))
        if not self._at_work and self._timer is None:
            self._timer = loop.call_later(LATER_S, self._turn, loop)

    def _held_up(self, took_s: float, now: float) -> None:
        self._held_s = max(0.0, self._held_s - (now - self._held_at) * HELD_SHARE) + took_s
        self._held_at = now
        if self._held_s > HELD_S:
            self._patient_until = now + PATIENT_S

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch, self._asked = self._asked, []
        self._at_work = bool(batch)
        if batch:
            working = loop.run_in_executor(self._thread, _work_through, batch)
            working.add_done_callback(lambda _: self._tell(batch, loop))

    def _tell(self, batch: list[_Asked[Any]], loop: asyncio.AbstractEventLoop) -> None:
        for asked in batch:
            asked.tell()
        self._turn(loop)


@dataclass(slots=True, eq=False)
class _Asked(Generic[T]):
    """One piece of work and who waits for it, if anybody; `result` or `error` is set by the thread."""

    work: Callable[[], T]
    done: asyncio.Future[T] | None
    result: T | None = None
    error: Exception | None = None

    def do(self) -> None:
        try:
            self.result = self.work()
        except Exception as exc:  # noqa: BLE001  it is raised where it was asked for
            self.error = exc

    def tell(self) -> None:
        if self.done is None:
            return
        if self.error is not None:
            self.done.set_exception(self.error)
        else:
            self.done.set_result(cast("T", self.result))


def _work_through(batch: list[_Asked[Any]]) -> None:
    for asked in batch:
        asked.do()


async def _finished(done: asyncio.Future[T], stop: Callable[[], None] | None = None) -> T:
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        if stop is not None:
            stop()
        await asyncio.wait([done])
        done.exception()  # seen, so that asyncio does not report it as lost
        raise
    finally:
        del done  # it holds the error, which holds this frame and those of its callers


class _Streak:
    """Failures in a row of one loop: a line for the first, and one when they are over."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._failures = 0

    def failed(self, exc: Exception) -> None:
        self._failures += 1
        if self._failures > 1:
            return
        ours = isinstance(exc, FnqueueError)
        cause = str(exc) if ours else type(exc).__name__
        logger.warning("loop_failing", extra={"loop": self._name, "cause": cause}, exc_info=None if ours else exc)

    def over(self) -> None:
        if self._failures:
            logger.info("loop_recovered", extra={"loop": self._name, "failures": self._failures})
        self._failures = 0
