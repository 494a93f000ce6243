"""Records and results in one process: the reference reading of the Results port.

No method awaits between its check and its change, so each is one compare-and-set.
"""

from __future__ import annotations

import bisect
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from broker.backends.hints import Hints, Watch
from broker.errors import IdempotencyKeyReused, QueueFull
from broker.model import (
    Claim,
    Draft,
    Epoch,
    Interest,
    Job,
    Lease,
    Load,
    Outcome,
    Position,
    Progress,
    Record,
    RequestState,
    Verdict,
)
from broker.ports import MOST_UPDATES
from broker.settings import Settings

OVERDUE = "not finished before its deadline"
# As long as whoever listens may take to come back for the last updates.
FADING_S = 300.0


@dataclass(slots=True, kw_only=True)
class _Entry:
    """One request. `order` is its place in the queue; `submitters` counts the calls that rely on it."""

    id: str
    account: str
    function_id: str
    version_id: str
    order: int
    created_at: float
    deadline_at: float
    state: RequestState = RequestState.QUEUED
    submitters: int = 1
    attempt: int = 0
    token: str = ""
    worker: str = ""
    lease_until: float = 0.0
    started_at: float = 0.0
    finished_at: float = 0.0
    reason: str = ""
    outcome: Outcome | None = None
    hidden: bool = False
    updates: deque[Progress] = field(default_factory=deque)
    sequence: int = 0
    numbered: int = 0
    given: int = 0

    def take(self) -> tuple[Progress | None, bool]:
        """The next update that no poll has been given, and true; or the last one again."""
        for progress in self.updates:
            if progress.number > self.given:
                self.given = progress.number
                return progress, True
        return self.last(), False

    def last(self) -> Progress | None:
        return self.updates[-1] if self.updates else None

    def record(self) -> Record:
        return Record(
            id=self.id,
            account=self.account,
            function_id=self.function_id,
            version_id=self.version_id,
            state=self.state,
            created_at=self.created_at,
            deadline_at=self.deadline_at,
            attempt=self.attempt,
            started_at=self.started_at,
            finished_at=self.finished_at,
            worker=self.worker,
            reason=self.reason,
            outcome=self.outcome,
        )


class MemoryResults:
    """`now` is the store's clock; tests hand in their own."""

    def __init__(self, settings: Settings, *, now: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._now = now
        self._epoch = Epoch(number=secrets.randbelow(256), born_at=now(), now=now())
        self._hints = Hints()
        self._entries: dict[str, _Entry] = {}
        self._finished: deque[tuple[float, str]] = deque()
        self._fading: deque[tuple[float, str]] = deque()
        self._waiting: dict[str, list[tuple[int, str]]] = {}
        self._running: dict[str, set[str]] = {}
        self._keys: dict[tuple[str, str], tuple[str, str, float]] = {}
        self._orders = 0

    async def remember_key(self, account: str, key: str, *, request_id: str, digest: str) -> str:
        bound_id, bound_digest, until = self._keys.get((account, key), ("", "", 0.0))
        if until <= self._now():
            self._keys[account, key] = (request_id, digest, self._now() + self._settings.idempotency_ttl_s)
            return request_id
        if bound_digest != digest:
            raise IdempotencyKeyReused("this Idempotency-Key was used with another request")
        return bound_id

    async def forget_key(self, account: str, key: str, *, request_id: str) -> None:
        if self._keys.get((account, key), ("",))[0] == request_id:
            del self._keys[account, key]

    async def create(self, draft: Draft, *, queue_limit: int, watch: bool) -> Record:
        self._drop_old()
        entry = self._entries.get(draft.id)
        if entry is not None:
            entry.submitters += 1
            return entry.record()
        if len(self._waiting.get(draft.version_id, ())) >= queue_limit:
            raise QueueFull(f"{queue_limit} requests already wait for this function version")
        now = self._now()
        return self._add(draft, created_at=now, deadline_at=now + draft.deadline_s).record()

    async def abandon(self, request_id: str, version_id: str, *, reason: str) -> bool:
        entry = self._entries.get(request_id)
        if entry is None or entry.state is RequestState.ABANDONED:
            return True
        if entry.state is not RequestState.QUEUED or entry.attempt > 0:
            return False
        if entry.submitters > 1:
            entry.submitters -= 1
            return False
        self._finish(entry, RequestState.ABANDONED, reason=reason)
        return True

    @asynccontextmanager
    async def watch(self, request_id: str, interest: Interest = Interest.END) -> AsyncIterator[Watch]:
        with self._hints.watching(request_id, Watch(lambda: self._read(request_id, interest), interest)) as watch:
            yield watch

    async def read(self, request_id: str) -> Record | None:
        return await self._read(request_id, Interest.END)

    async def _read(self, request_id: str, interest: Interest) -> Record | None:
        entry = self._entries.get(request_id)
        if entry is None or entry.hidden:
            return None
        self._expire(entry)
        running = entry.state is RequestState.RUNNING
        if running and interest is Interest.PROGRESS:
            progress, unread = entry.take()
            return replace(entry.record(), progress=progress, unread=unread)
        return replace(entry.record(), progress=entry.last() if running or interest is Interest.STEPS else None)

    async def claim(self, job: Job, *, worker: str, lease_s: float, max_attempts: int) -> Claim:
        entry = self._entries.get(job.id) or self._rebuild(job)
        now = self._now()
        self._expire(entry)
        if entry.state.terminal:
            return Claim(verdict=Verdict.SETTLED, state=entry.state)
        if entry.state is RequestState.RUNNING and entry.lease_until > now:
            return Claim(verdict=Verdict.HELD, state=entry.state, wait_s=entry.lease_until - now)
        if entry.attempt >= max_attempts:
            self._finish(
                entry, RequestState.DEAD, reason=f"the worker or its container died in {entry.attempt} attempts"
            )
            return Claim(verdict=Verdict.SETTLED, state=entry.state)
        self._move(entry, RequestState.RUNNING)
        entry.attempt += 1
        entry.token = secrets.token_hex(16)
        entry.worker, entry.started_at, entry.lease_until = worker, now, now + lease_s
        entry.updates.clear()
        entry.sequence = 0
        self._hints.tell(job.id, Interest.STEPS)
        lease = Lease(request_id=job.id, version_id=job.version_id, attempt=entry.attempt, token=entry.token)
        return Claim(verdict=Verdict.GRANTED, state=entry.state, lease=lease, remaining_s=entry.deadline_at - now)

    async def renew(self, lease: Lease, *, lease_s: float) -> RequestState:
        entry = self._entries.get(lease.request_id)
        if entry is None:
            return RequestState.RUNNING
        if entry.state is not RequestState.RUNNING:
            return entry.state
        if entry.token != lease.token:
            return RequestState.QUEUED
        entry.lease_until = self._now() + lease_s
        return RequestState.RUNNING

    async def release(self, lease: Lease, *, refund: bool) -> RequestState:
        entry = self._entries.get(lease.request_id)
        if entry is None:
            return RequestState.QUEUED
        if entry.state is RequestState.RUNNING and entry.token == lease.token:
            entry.attempt -= refund
            entry.token, entry.worker, entry.lease_until = "", "", 0.0
            self._move(entry, RequestState.QUEUED)
            self._hints.tell(entry.id, Interest.STEPS)
        return entry.state

    async def settle(self, lease: Lease, job: Job, state: RequestState, outcome: Outcome) -> RequestState:
        entry = self._entries.get(job.id)
        if entry is None:
            entry = self._rebuild(job)
            entry.state, entry.attempt, entry.token = RequestState.RUNNING, lease.attempt, lease.token
        if entry.state is RequestState.RUNNING and entry.token == lease.token:
            self._finish(entry, state, outcome=outcome)
        return entry.state

    async def report(self, lease: Lease, progress: Progress, *, sequence: int) -> RequestState:
        entry = self._entries.get(lease.request_id)
        if entry is None:
            return RequestState.RUNNING
        if entry.state is not RequestState.RUNNING:
            return entry.state
        if entry.token != lease.token:
            return RequestState.QUEUED
        if sequence > entry.sequence:
            entry.sequence = sequence
            entry.numbered += 1
            entry.updates.append(replace(progress, number=entry.numbered))
            self._drop_updates(entry.updates)
            self._hints.tell(entry.id, Interest.PROGRESS)
        return RequestState.RUNNING

    def _drop_updates(self, updates: deque[Progress]) -> None:
        size_bytes = sum(len(update.partial) for update in updates)
        while len(updates) > MOST_UPDATES or (len(updates) > 1 and size_bytes > self._settings.progress_kept_bytes):
            size_bytes -= len(updates.popleft().partial)

    async def updates(self, request_id: str, *, after: int, limit: int) -> list[Progress]:
        entry = self._entries.get(request_id)
        kept = entry.updates if entry is not None else ()
        return [update for update in kept if update.number > after][:limit]

    async def end(self, job: Job, state: RequestState, *, reason: str) -> Claim:
        entry = self._entries.get(job.id) or self._rebuild(job)
        wait_s = entry.lease_until - self._now()
        if entry.state is RequestState.RUNNING and wait_s > 0:
            return Claim(verdict=Verdict.HELD, state=entry.state, wait_s=wait_s)
        if not entry.state.terminal:
            self._finish(entry, state, reason=reason)
        return Claim(verdict=Verdict.SETTLED, state=entry.state)

    async def cancel(self, request_id: str, *, reason: str) -> RequestState | None:
        entry = self._entries.get(request_id)
        if entry is None:
            return None
        self._expire(entry)
        before = entry.state
        if not before.terminal:
            self._finish(entry, RequestState.CANCELLED, reason=reason)
        return before

    async def forget(self, request_id: str) -> None:
        entry = self._entries.get(request_id)
        if entry is not None and entry.state.terminal:
            entry.hidden, entry.outcome = True, None

    async def position(self, record: Record) -> Position:
        waiting = self._waiting.get(record.version_id, [])
        entry = self._entries.get(record.id)
        if entry is None or entry.state is not RequestState.QUEUED:
            return Position(rank=0, length=len(waiting))
        return Position(rank=bisect.bisect_left(waiting, (entry.order, entry.id)) + 1, length=len(waiting))

    async def places(self, version_id: str, request_ids: Sequence[str]) -> list[Position]:
        waiting = self._waiting.get(version_id, [])
        ranks = {request_id: rank for rank, (_, request_id) in enumerate(waiting, start=1)}
        return [Position(rank=ranks.get(request_id, 0), length=len(waiting)) for request_id in request_ids]

    async def load(self, version_ids: Sequence[str]) -> list[Load]:
        return [self._load(version_id) for version_id in version_ids]

    async def sweep(self, version_id: str, *, limit: int) -> int:
        ids = [request_id for _, request_id in self._waiting.get(version_id, ())][:limit]
        ids += list(self._running.get(version_id, ()))[: limit - len(ids)]
        return sum(self._expire(self._entries[request_id]) for request_id in ids)

    async def epoch(self, *, fresh: bool = False) -> Epoch:
        return replace(self._epoch, now=self._now())

    async def ping(self) -> None:
        return None

    def _load(self, version_id: str) -> Load:
        waiting = self._waiting.get(version_id, [])
        oldest_age_s = self._now() - self._entries[waiting[0][1]].created_at if waiting else 0.0
        return Load(
            queued=len(waiting), running=len(self._running.get(version_id, ())), oldest_age_s=max(0.0, oldest_age_s)
        )

    def _add(self, draft: Draft, *, created_at: float, deadline_at: float) -> _Entry:
        self._orders += 1
        entry = _Entry(
            id=draft.id,
            account=draft.account,
            function_id=draft.function_id,
            version_id=draft.version_id,
            order=self._orders,
            created_at=created_at,
            deadline_at=deadline_at,
        )
        self._entries[entry.id] = entry
        self._waiting.setdefault(entry.version_id, []).append((entry.order, entry.id))
        return entry

    def _rebuild(self, job: Job) -> _Entry:
        draft = Draft(
            id=job.id,
            account=job.account,
            function_id=job.function_id,
            version_id=job.version_id,
            digest=job.digest,
            deadline_s=job.deadline_at - job.created_at,
        )
        return self._add(draft, created_at=job.created_at, deadline_at=job.deadline_at)

    def _expire(self, entry: _Entry) -> bool:
        """PROTOCOL R3: whoever looks at an overdue request that nobody runs ends it."""
        now = self._now()
        held = entry.state is RequestState.RUNNING and entry.lease_until > now
        if entry.state.terminal or held or now < entry.deadline_at:
            return False
        self._finish(entry, RequestState.EXPIRED, reason=OVERDUE)
        return True

    def _finish(self, entry: _Entry, state: RequestState, *, reason: str = "", outcome: Outcome | None = None) -> None:
        self._move(entry, state)
        entry.reason, entry.outcome, entry.finished_at = reason, outcome, self._now()
        self._finished.append((entry.finished_at, entry.id))
        if entry.updates:
            self._fading.append((entry.finished_at, entry.id))
        self._hints.tell(entry.id)

    def _move(self, entry: _Entry, state: RequestState) -> None:
        """The one place where a state changes, with the order and the running set beside it."""
        if entry.state is RequestState.QUEUED:
            waiting = self._waiting[entry.version_id]
            del waiting[bisect.bisect_left(waiting, (entry.order, entry.id))]
        self._running.setdefault(entry.version_id, set()).discard(entry.id)
        entry.state = state
        if state is RequestState.QUEUED:
            bisect.insort(self._waiting.setdefault(entry.version_id, []), (entry.order, entry.id))
        elif state is RequestState.RUNNING:
            self._running[entry.version_id].add(entry.id)

    def _drop_old(self) -> None:
        while self._fading and self._fading[0][0] + FADING_S < self._now():
            self._entries[self._fading.popleft()[1]].updates.clear()
        while self._finished and self._finished[0][0] + self._settings.result_ttl_s < self._now():
            self._entries.pop(self._finished.popleft()[1], None)
