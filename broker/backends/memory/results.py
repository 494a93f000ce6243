"""Records and results in one process: the reference reading of the Results port.

No method awaits between its check and its change, so each is one compare-and-set.
"""

from __future__ import annotations

import bisect
import heapq
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from broker.activity import Minute
from broker.backends.admission import limit_met
from broker.backends.hints import Hints, RecordWatch
from broker.backends.memory.activity import MemoryActivity
from broker.errors import IdempotencyKeyReused
from broker.model import (
    MOST_ATTEMPTS_KEPT,
    NO_TIMINGS,
    STREAM_CUT,
    Attempt,
    AttemptEnd,
    Callback,
    Chunk,
    Claim,
    DeadCause,
    Draft,
    Epoch,
    Interest,
    Job,
    Lease,
    Line,
    Load,
    Outcome,
    Position,
    Progress,
    Record,
    RequestFilter,
    RequestPage,
    RequestState,
    Timings,
    Verdict,
)
from broker.ports import LANDMARKS, MOST_UPDATES, PAGE_SCAN
from broker.settings import Settings

OVERDUE = "not finished before its deadline"
OVERSLEPT = "no worker took it before its queue timeout"
# As long as whoever listens may take to come back for the last updates.
FADING_S = 300.0


@dataclass(slots=True)
class Log:
    """A request's stream. `until` is when its readers mean to leave, or since when nobody has come; 0: not said."""

    head: Outcome | None = None
    chunks: deque[Chunk] = field(default_factory=deque)
    written: int = 0
    read: int = 0
    until: float = 0.0


@dataclass(slots=True, kw_only=True)
class Entry:
    """One request. `order` is its place in the queue; `submitters` counts the calls that rely on it; `deaths` the
    attempts whose worker died; `worker` is set from a claim until the attempt comes to nothing, and `past` holds
    those that did; `aside` keeps a queued one out of the order; `lettered` tells that a dead one's letter was made."""

    id: str
    account: str
    function_id: str
    version_id: str
    order: int
    created_at: float
    deadline_at: float
    queue_deadline_at: float = 0.0
    run_timeout_s: float = 0.0
    state: RequestState = RequestState.QUEUED
    submitters: int = 1
    attempt: int = 0
    deaths: frozenset[int] = frozenset()
    token: str = ""
    worker: str = ""
    lease_until: float = 0.0
    not_before: float = 0.0
    started_at: float = 0.0
    finished_at: float = 0.0
    reason: str = ""
    cause: str = ""
    lettered: bool = False
    redriven_as: str = ""
    outcome: Outcome | None = None
    timings: Timings | None = None
    past: tuple[Attempt, ...] = ()
    hidden: bool = False
    log: Log = field(default_factory=Log)
    updates: deque[Progress] = field(default_factory=deque)
    sequence: int = 0
    numbered: int = 0
    given: int = 0
    aside: bool = False
    size_bytes: int = 0
    callback: Callback | None = None

    def lost(self) -> Attempt | None:
        """The attempt of a worker that fell silent, if one runs at all by the books."""
        if self.state is not RequestState.RUNNING:
            return None
        return Attempt(
            number=self.attempt,
            worker=self.worker,
            started_at=self.started_at,
            ended_at=self.lease_until,
            end=AttemptEnd.LOST,
        )

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
        """The outcome of a request that is not terminal is nobody's to read."""
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
            outcome=self.outcome if self.state.terminal else None,
            status_code=self.outcome.status if self.outcome and self.state.terminal else 0,
            queue_deadline_at=self.queue_deadline_at,
            run_timeout_s=self.run_timeout_s,
            attempts=self.past + ((self.turn(AttemptEnd(self.state), self.finished_at),) if self.worker else ()),
            timings=self.timings,
            head=None if self.state.terminal else self.log.head,
            cause=self.cause,
            redriven_as=self.redriven_as,
        )

    def turn(self, end: AttemptEnd, ended_at: float, reason: str = "") -> Attempt:
        return Attempt(
            number=self.attempt,
            worker=self.worker,
            started_at=self.started_at,
            ended_at=ended_at,
            end=end,
            reason=reason,
        )

    def close(self, end: AttemptEnd, ended_at: float, reason: str = "") -> None:
        if self.worker:
            self.past = (*self.past, self.turn(end, ended_at, reason))[-MOST_ATTEMPTS_KEPT:]
            self.worker = ""


class MemoryResults:
    """`now` is the store's clock; tests hand in their own."""

    def __init__(self, settings: Settings, *, now: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._now = now
        self._epoch = Epoch(number=secrets.randbelow(256), born_at=now(), now=now())
        self.hints = Hints()
        self._entries: dict[str, Entry] = {}
        self._finished: deque[tuple[float, str]] = deque()
        self._fading: deque[tuple[float, str]] = deque()
        self._waiting: dict[str, list[tuple[int, str]]] = {}
        self._running: dict[str, set[str]] = {}
        self._due: dict[str, list[tuple[float, str]]] = {}
        self._accounts: dict[str, list[tuple[int, str]]] = {}
        self._keys: dict[tuple[str, str], tuple[str, str, float]] = {}
        # What is queued and running, as size by ID, of a version or an account.
        self._ledgers: dict[tuple[str, str], dict[str, int]] = {}
        self._held_bytes: dict[tuple[str, str], int] = {}
        self._orders = 0
        self._activity = MemoryActivity(now)
        # Those that ended and are to be told to their callbacks, until MemoryWebhooks takes them.
        self.announced: deque[Entry] = deque()

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

    def entry(self, request_id: str) -> Entry | None:
        return self._entries.get(request_id)

    def now(self) -> float:
        return self._now()

    async def create(self, draft: Draft, *, queue_limit: int, watch: bool) -> Record:
        self._drop_old()
        entry = self._entries.get(draft.id)
        if entry is not None:
            entry.submitters += 1
            self._line_up(entry)
            return entry.record()
        if len(self._waiting.get(draft.version_id, ())) >= queue_limit:
            raise limit_met("version", "queued", self._settings, queue_limit)
        for of, whose in (("version", draft.version_id), ("account", draft.account)):
            if met := self._met(of, whose, draft.size_bytes):
                raise limit_met(of, met, self._settings, queue_limit)
        now = int(self._now() * 1000) / 1000  # what is told in milliseconds can be asked for again
        made = self._add(draft, created_at=now, deadline_at=now + draft.deadline_s).record()
        return replace(made, rank=len(self._waiting[draft.version_id]))

    def _met(self, of: str, whose: str, size_bytes: int) -> str:
        """The limit that one more would exceed, "" if there is room."""
        ledger = self._ledgers.get((of, whose), {})
        most, most_bytes = (getattr(self._settings, f"{of}_{what}") for what in ("requests", "bytes"))
        if most and len(ledger) >= most:
            return "requests"
        return "bytes" if most_bytes and self._held_bytes.get((of, whose), 0) + size_bytes > most_bytes else ""

    async def abandon(self, request_id: str, version_id: str, *, reason: str) -> bool:
        entry = self._entries.get(request_id)
        if entry is None or entry.state is RequestState.ABANDONED:
            return True
        if entry.state is not RequestState.QUEUED or entry.attempt > 0:
            return False
        if entry.submitters > 1:
            entry.submitters -= 1
            return False
        self.finish(entry, RequestState.ABANDONED, reason=reason)
        return True

    def watch(self, request_id: str, interest: Interest = Interest.END) -> RecordWatch:
        return RecordWatch(self.hints, request_id, interest, self._read)

    def listen(self, request_id: str, told: Callable[[], None]) -> AbstractContextManager[None]:
        return self.hints.listening(request_id, told)

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

    async def glance(self, request_id: str) -> Record | None:
        record = await self.read(request_id)
        return replace(record, outcome=None) if record else None

    async def page(self, account: str, wanted: RequestFilter, *, limit: int, after: int = 0) -> RequestPage:
        listed = self._accounts.get(account, [])
        if len(listed) > self._settings.listed_requests:
            del listed[: -self._settings.listed_requests]
        bounds = [bound for bound in (after, _order(wanted.until)) if bound]
        end = bisect.bisect_left(listed, (min(bounds), "")) if bounds else len(listed)
        lowest = bisect.bisect_left(listed, (_order(wanted.since), ""))
        begin = max(end - PAGE_SCAN, lowest)
        found: list[Record] = []
        for order, request_id in reversed(looked := listed[begin:end]):
            record = await self.glance(request_id)
            if record is None or record.state is RequestState.ABANDONED:
                listed.remove((order, request_id))
            elif wanted.keeps(record):
                found.append(record)
                if len(found) == limit:
                    return RequestPage(records=tuple(found), after=order)
        return RequestPage(records=tuple(found), after=looked[0][0] if begin > lowest else 0)

    async def claim(self, job: Job, *, worker: str, lease_s: float, max_attempts: int, token: str = "") -> Claim:
        entry = self._entries.get(job.id) or self._rebuild(job)
        now = self._now()
        self._expire(entry)
        if entry.state.terminal:
            return Claim(verdict=Verdict.SETTLED, state=entry.state)
        if entry.state is RequestState.RUNNING and token and entry.token == token:
            entry.lease_until = now + lease_s
            return self._granted(entry)
        held_until = entry.lease_until if entry.state is RequestState.RUNNING else entry.not_before
        if held_until > now:
            return Claim(verdict=Verdict.HELD, state=entry.state, wait_s=held_until - now)
        entry.not_before, entry.outcome = 0.0, None
        if entry.log.written:
            self.finish(entry, RequestState.ERRORED, reason=STREAM_CUT)
            return Claim(verdict=Verdict.SETTLED, state=entry.state)
        lost = entry.lost()
        deaths = entry.deaths | ({entry.attempt} if lost else set())
        if hopeless := self._hopeless(entry, len(deaths), max_attempts):
            reason, entry.cause = hopeless
            self.finish(entry, RequestState.DEAD, reason=reason)
            return Claim(verdict=Verdict.SETTLED, state=entry.state, lost=lost)
        entry.deaths = deaths
        entry.close(AttemptEnd.LOST, entry.lease_until)
        self._move(entry, RequestState.RUNNING)
        entry.attempt += 1
        entry.token = token or secrets.token_hex(16)
        entry.worker, entry.started_at, entry.lease_until = worker, now, now + lease_s
        entry.updates.clear()
        entry.sequence = 0
        self.hints.tell(job.id, Interest.STEPS)
        return replace(self._granted(entry), lost=lost)

    def _granted(self, entry: Entry) -> Claim:
        lease = Lease(
            request_id=entry.id,
            version_id=entry.version_id,
            attempt=entry.attempt,
            token=entry.token,
            started_at=entry.started_at,
        )
        remaining_s = entry.deadline_at - self._now()
        return Claim(verdict=Verdict.GRANTED, state=entry.state, lease=lease, remaining_s=remaining_s)

    def _hopeless(self, entry: Entry, deaths: int, max_attempts: int) -> tuple[str, DeadCause] | None:
        """Why it gets no further attempt, None if it does."""
        if deaths >= self._settings.max_worker_deaths:
            return f"the worker died in {deaths} attempts: it may be what kills them", DeadCause.WORKER_DEATHS
        if entry.attempt >= max_attempts:
            return f"the worker or its container died in {entry.attempt} attempts", DeadCause.ATTEMPTS
        return None

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

    async def release(self, lease: Lease, *, refund: bool, reason: str = "") -> RequestState:
        entry = self._entries.get(lease.request_id)
        if entry is None:
            return RequestState.QUEUED
        if entry.token != lease.token:
            entry.deaths -= {lease.attempt}
        if entry.state is RequestState.RUNNING and entry.token == lease.token:
            if entry.log.written:
                self.finish(entry, RequestState.ERRORED, reason=STREAM_CUT)
                return entry.state
            entry.close(AttemptEnd.RETURNED if refund else AttemptEnd.FAILED, self._now(), reason)
            entry.attempt -= refund
            entry.token, entry.lease_until = "", 0.0
            self._move(entry, RequestState.QUEUED)
            self.hints.tell(entry.id, Interest.STEPS)
        return entry.state

    async def postpone(self, lease: Lease, outcome: Outcome, *, wait_s: float) -> RequestState:
        entry = self._entries.get(lease.request_id)
        if entry is None:
            return RequestState.QUEUED
        not_before = self._now() + wait_s
        ours = entry.state is RequestState.RUNNING and entry.token == lease.token
        if ours and not_before < entry.deadline_at:
            entry.not_before, entry.outcome = not_before, outcome
            return await self.release(lease, refund=True)
        return entry.state

    async def settle(
        self, lease: Lease, job: Job, state: RequestState, outcome: Outcome, timings: Timings = NO_TIMINGS
    ) -> RequestState:
        entry = self._entries.get(job.id)
        if entry is None:
            entry = self._rebuild(job)
            entry.state, entry.attempt, entry.token = RequestState.RUNNING, lease.attempt, lease.token
        if entry.state is RequestState.RUNNING and entry.token == lease.token:
            entry.timings = replace(timings, start_s=0.0, lead_s=0.0)
            now = self._now()
            times_s = {"waits": entry.started_at - entry.created_at, "runs": now - entry.started_at}
            told = {"cold_starts": timings.cold_start_s, "starts": timings.start_s, "leads": timings.lead_s}
            times_s |= {name: seconds for name, seconds in told.items() if seconds}
            self.finish(entry, state, outcome=outcome, times_s=times_s if entry.started_at else {})
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
            self.hints.tell(entry.id, Interest.PROGRESS)
        return RequestState.RUNNING

    def _drop_updates(self, updates: deque[Progress]) -> None:
        size_bytes = sum(len(update.partial) for update in updates)
        while len(updates) > MOST_UPDATES or (len(updates) > 1 and size_bytes > self._settings.progress_kept_bytes):
            size_bytes -= len(updates.popleft().partial)

    async def updates(self, request_id: str, *, after: int, limit: int) -> list[Progress]:
        entry = self._entries.get(request_id)
        kept = entry.updates if entry is not None else ()
        return [update for update in kept if update.number > after][:limit]

    async def end(self, job: Job, state: RequestState, *, reason: str, cause: str = "") -> Claim:
        entry = self._entries.get(job.id) or self._rebuild(job)
        wait_s = entry.lease_until - self._now()
        if entry.state is RequestState.RUNNING and wait_s > 0:
            return Claim(verdict=Verdict.HELD, state=entry.state, wait_s=wait_s)
        if not entry.state.terminal:
            entry.cause = cause
            self.finish(entry, state, reason=reason)
        return Claim(verdict=Verdict.SETTLED, state=entry.state)

    async def cancel(self, request_id: str, *, reason: str) -> RequestState | None:
        entry = self._entries.get(request_id)
        if entry is None:
            return None
        self._expire(entry)
        before = entry.state
        if not before.terminal:
            self.finish(entry, RequestState.CANCELLED, reason=reason)
        return before

    async def forget(self, request_id: str) -> None:
        entry = self._entries.get(request_id)
        if entry is not None and entry.state.terminal:
            entry.hidden, entry.outcome, entry.log = True, None, Log()

    async def position(self, record: Record) -> Position:
        waiting = self._waiting.get(record.version_id, [])
        entry = self._entries.get(record.id)
        if entry is None or entry.state is not RequestState.QUEUED:
            return Position(rank=0, length=len(waiting))
        if entry.aside:
            return Position(rank=len(waiting) + 1, length=len(waiting))
        return Position(rank=bisect.bisect_left(waiting, (entry.order, entry.id)) + 1, length=len(waiting))

    async def places(self, version_id: str, request_ids: Sequence[str]) -> list[Position]:
        waiting = self._waiting.get(version_id, [])
        ranks = {request_id: rank for rank, (_, request_id) in enumerate(waiting, start=1)}
        return [Position(rank=ranks.get(request_id, 0), length=len(waiting)) for request_id in request_ids]

    async def load(self, version_ids: Sequence[str]) -> list[Load]:
        return [self._load(version_id) for version_id in version_ids]

    async def line(self, version_id: str) -> Line:
        waiting = self._waiting.get(version_id, [])
        marks = min(len(waiting), LANDMARKS)
        ranks = [(len(waiting) - 1) * mark // max(1, marks - 1) for mark in range(marks)]
        return Line(
            at=self._now(),
            queued=len(waiting),
            running=len(self._running.get(version_id, ())),
            landmarks=tuple((rank + 1, self._entries[waiting[rank][1]].created_at) for rank in ranks),
        )

    async def activity(self, version_ids: Sequence[str], *, minutes: int) -> list[tuple[Minute, ...]]:
        return [self._activity.minutes(version_id, minutes) for version_id in version_ids]

    async def sweep(self, version_id: str, *, limit: int) -> int:
        ids = [request_id for _, request_id in self._waiting.get(version_id, ())][:limit]
        ids += list(self._running.get(version_id, ()))[: limit - len(ids)]
        due = self._due.get(version_id, [])
        while due and due[0][0] <= self._now():
            ids.append(heapq.heappop(due)[1])
        ids = [request_id for request_id in dict.fromkeys(ids) if request_id in self._entries]
        return sum(self._expire(self._entries[request_id]) for request_id in ids)

    async def epoch(self, *, fresh: bool = False) -> Epoch:
        return replace(self._epoch, now=self._now())

    async def ping(self) -> None:
        return None

    # -- for upkeep -------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        return list(self._entries.values())

    def waiting(self, version_id: str) -> list[Entry]:
        """Oldest first."""
        return [self._entries[request_id] for _, request_id in self._waiting.get(version_id, ())]

    def expire(self, entry: Entry) -> bool:
        return self._expire(entry)

    def put_back(self, job: Job) -> Entry:
        """The request's record, made again if it is lost, and among those that wait if it waits."""
        entry = self._entries.get(job.id) or self._rebuild(job)
        self._line_up(entry)
        return entry

    def set_aside(self, entry: Entry) -> None:
        """Out of the order, and to be looked at when it is due."""
        waiting = self._waiting[entry.version_id]
        del waiting[bisect.bisect_left(waiting, (entry.order, entry.id))]
        entry.aside = True
        self._let_go(entry)
        heapq.heappush(self._due.setdefault(entry.version_id, []), (entry.record().due_at, entry.id))

    # -- pieces -----------------------------------------------------------------------------------

    def _line_up(self, entry: Entry) -> None:
        """Back to its place, if it was set aside."""
        if entry.aside:
            entry.aside = False
            self._hold(entry)
            bisect.insort(self._waiting.setdefault(entry.version_id, []), (entry.order, entry.id))

    def _load(self, version_id: str) -> Load:
        waiting = self._waiting.get(version_id, [])
        oldest_age_s = self._now() - self._entries[waiting[0][1]].created_at if waiting else 0.0
        return Load(
            queued=len(waiting), running=len(self._running.get(version_id, ())), oldest_age_s=max(0.0, oldest_age_s)
        )

    def _add(self, draft: Draft, *, created_at: float, deadline_at: float) -> Entry:
        self._orders += 1
        entry = Entry(
            id=draft.id,
            account=draft.account,
            function_id=draft.function_id,
            version_id=draft.version_id,
            order=self._orders,
            created_at=created_at,
            deadline_at=deadline_at,
            queue_deadline_at=created_at + draft.queue_timeout_s if draft.queue_timeout_s else 0.0,
            run_timeout_s=draft.run_timeout_s,
            size_bytes=draft.size_bytes,
            callback=draft.callback,
        )
        self._entries[entry.id] = entry
        self._waiting.setdefault(entry.version_id, []).append((entry.order, entry.id))
        if entry.queue_deadline_at:
            heapq.heappush(self._due.setdefault(entry.version_id, []), (entry.queue_deadline_at, entry.id))
        self._list(entry)
        self._hold(entry)
        return entry

    def _list(self, entry: Entry) -> None:
        """As the newest of its account, or where a rebuilt one was before."""
        listed = self._accounts.setdefault(entry.account, [])
        order = _order(entry.created_at)
        while (at := bisect.bisect_left(listed, (order, ""))) < len(listed) and listed[at][0] == order:
            order += 1
        listed.insert(at, (order, entry.id))
        if len(listed) > 2 * self._settings.listed_requests:
            del listed[: -self._settings.listed_requests]

    def _rebuild(self, job: Job) -> Entry:
        draft = Draft(
            id=job.id,
            account=job.account,
            function_id=job.function_id,
            version_id=job.version_id,
            digest=job.digest,
            deadline_s=job.deadline_at - job.created_at,
            queue_timeout_s=max(0.0, job.queue_deadline_at - job.created_at),
            run_timeout_s=job.run_timeout_s,
            size_bytes=job.size_bytes,
            callback=job.callback,
        )
        return self._add(draft, created_at=job.created_at, deadline_at=job.deadline_at)

    def _expire(self, entry: Entry) -> bool:
        """PROTOCOL R3: whoever looks at an overdue request that nobody runs ends it."""
        now = self._now()
        held = entry.state is RequestState.RUNNING and entry.lease_until > now
        if entry.state.terminal or held:
            return False
        due_at = entry.deadline_at if entry.not_before else entry.record().due_at
        if now < due_at:
            return False
        if entry.outcome is not None:  # of the attempt that was postponed last
            self.finish(entry, RequestState.ERRORED, outcome=entry.outcome)
        else:
            self.finish(entry, RequestState.EXPIRED, reason=OVERDUE if due_at == entry.deadline_at else OVERSLEPT)
        return True

    def finish(
        self,
        entry: Entry,
        state: RequestState,
        *,
        reason: str = "",
        outcome: Outcome | None = None,
        times_s: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        if entry.state is RequestState.RUNNING and outcome is None and entry.lease_until <= self._now():
            entry.close(AttemptEnd.LOST, entry.lease_until)
        self._move(entry, state)
        self._let_go(entry)
        if state is not RequestState.ABANDONED:
            self._activity.ended(entry.version_id, state, attempts=entry.attempt, **times_s)
        entry.reason, entry.outcome, entry.finished_at = reason, outcome, self._now()
        self._finished.append((entry.finished_at, entry.id))
        called_back = entry.callback is not None and (not entry.callback.events or state in entry.callback.events)
        if called_back and state is not RequestState.ABANDONED:
            self.announced.append(entry)
        if entry.updates:
            self._fading.append((entry.finished_at, entry.id))
        self.hints.tell(entry.id)
        self.hints.tell(f"{entry.id}/r")

    def _hold(self, entry: Entry) -> None:
        for whose in (("version", entry.version_id), ("account", entry.account)):
            self._ledgers.setdefault(whose, {})[entry.id] = entry.size_bytes
            self._held_bytes[whose] = self._held_bytes.get(whose, 0) + entry.size_bytes

    def _let_go(self, entry: Entry) -> None:
        """Also of one that was set aside, which has left before."""
        for whose in (("version", entry.version_id), ("account", entry.account)):
            ledger = self._ledgers.get(whose, {})
            if entry.id not in ledger:
                continue
            self._held_bytes[whose] -= ledger.pop(entry.id)
            if not ledger:
                del self._ledgers[whose], self._held_bytes[whose]

    def _move(self, entry: Entry, state: RequestState) -> None:
        """The one place where a state changes, with the order and the running set beside it."""
        if entry.state is RequestState.QUEUED and not entry.aside:
            waiting = self._waiting[entry.version_id]
            del waiting[bisect.bisect_left(waiting, (entry.order, entry.id))]
        if entry.aside:
            entry.aside = False
            self._hold(entry)
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


def _order(seconds: float) -> int:
    """A place in an account's list: microseconds, so that whole milliseconds leave room between them."""
    return int(seconds * 1_000_000)
