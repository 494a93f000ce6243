"""The leases of this sidecar's attempts: kept while they run, and what ends an attempt from outside.

One timer for all, because a task, a timer and a subscription for each cost more than what most attempts take else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Protocol

from broker.errors import StoreUnavailable
from broker.model import Job, Lease, RequestState
from broker.ports import Results
from broker.settings import SidecarSettings
from workers import loops
from workers.inference import RunTimedOut
from workers.streams import LeaseLost

Spawn = Callable[[Coroutine[Any, Any, None]], object]


class Attempt(Protocol):
    """`leased_until` is by the monotonic clock."""

    leased_until: float

    @property
    def job(self) -> Job: ...

    def left_s(self) -> float: ...


class Leases:
    """Renews leases in time. `spawn` makes the tasks that do it, and owns them."""

    def __init__(self, results: Results, settings: SidecarSettings, *, spawn: Spawn) -> None:
        self._results = results
        self._renew_s = settings.renew_every_s
        self._lease_s = settings.lease_s
        self._spawn = spawn
        self._kept: set[Kept] = set()
        self._timer: asyncio.TimerHandle | None = None

    def keep(self, attempt: Attempt, lease: Lease) -> Kept:
        """While the body runs, the lease is renewed.

        Raises:
            LeaseLost: it is another worker's, or the request is over; the body was cancelled.
            RunTimedOut: nothing is left of the attempt's time; the body was cancelled.
        """
        return Kept(self, self._results, attempt, lease)

    def enter(self, kept: Kept) -> None:
        self._kept.add(kept)
        self._due(kept)

    def leave(self, kept: Kept) -> None:
        self._kept.discard(kept)
        if not self._kept and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self, kept: Kept) -> None:
        kept.due_at = asyncio.get_running_loop().time() + min(self._renew_s, kept.attempt.left_s())
        if self._timer is None or kept.due_at < self._timer.when():
            self._arm(kept.due_at)

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(at, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for kept in [kept for kept in self._kept if kept.due_at <= now]:
            self.look_at(kept)
        if self._kept and self._timer is None:
            self._arm(min(kept.due_at for kept in self._kept))

    def look_at(self, kept: Kept) -> None:
        """A renewal tells what happened to the request."""
        if not kept.attempt.left_s():
            kept.end(RunTimedOut(kept.attempt.job))
            return
        self._due(kept)
        if kept.renewing:
            kept.again = True
        else:
            kept.renewing = True
            self._spawn(self._renew(kept))

    async def _renew(self, kept: Kept) -> None:
        """A store that does not answer ends nothing: the attempt may still be settled when it is back."""
        try:
            await loops.guard(self._ask(kept), expected=(StoreUnavailable,), request_id=kept.attempt.job.id)
        except StoreUnavailable:
            pass
        except loops.Fault as fault:
            kept.end(fault)
        finally:
            kept.renewing = False
        if kept.again:
            kept.again = False
            self.look_at(kept)

    async def _ask(self, kept: Kept) -> None:
        asked_at = time.monotonic()
        state = await self._results.renew(kept.lease, lease_s=self._lease_s)
        if state is not RequestState.RUNNING:
            kept.end(LeaseLost(state))
        else:
            kept.attempt.leased_until = asked_at + self._lease_s


class Kept:
    """One attempt, as a context manager of its task."""

    __slots__ = ("_ended", "_leases", "_listening", "_task", "again", "attempt", "due_at", "lease", "renewing")

    def __init__(self, leases: Leases, results: Results, attempt: Attempt, lease: Lease) -> None:
        self.attempt = attempt
        self.lease = lease
        self.due_at = 0.0
        self.renewing = self.again = False
        self._leases = leases
        self._task: asyncio.Task[Any] | None = None
        self._listening = results.listen(lease.request_id, self._told)
        self._ended: Exception | None = None

    def end(self, error: Exception) -> None:
        """Cancel the body, and raise this in its place."""
        if self._task is not None and self._ended is None:
            self._ended = error
            self._task.cancel()

    def _told(self) -> None:
        self._leases.look_at(self)

    def __enter__(self) -> Kept:
        self._task = asyncio.current_task()
        self._listening.__enter__()
        self._leases.enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        # What knows this one is not kept here: a cycle holds the job, with its body, until garbage is looked for.
        ended, self._ended = self._ended, None
        self._leases.leave(self)
        self._listening.__exit__(None, None, None)
        del self._listening
        # Who is cancelled for another reason too must go.
        if ended is not None and task is not None and task.uncancel() == 0 and kind is asyncio.CancelledError:
            try:
                raise ended from None
            finally:
                del ended
