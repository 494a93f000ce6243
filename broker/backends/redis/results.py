"""Results on Redis: each method is one exchange, most of them one script."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
import re
import secrets
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache
from typing import Any, TypeVar

import orjson

from broker.activity import Minute
from broker.backends.admission import limit_met
from broker.backends.breaker import Breaker
from broker.backends.codec import Unreadable, pack_outcome, unpack_outcome
from broker.backends.hints import Hints, RecordWatch
from broker.backends.redis import activity, scripts
from broker.backends.redis.connection import Connection, TooFewReplicas
from broker.backends.redis.forms import OPEN, filled, form
from broker.backends.redis.keys import WEBHOOKS, packed, unpacked
from broker.backends.redis.keys import account as _account
from broker.backends.redis.keys import body as _body
from broker.backends.redis.keys import due as _due
from broker.backends.redis.keys import ledger as _ledger
from broker.backends.redis.keys import ledger_page as _ledger_page
from broker.backends.redis.keys import record as _record
from broker.backends.redis.keys import running as _running
from broker.backends.redis.keys import stream as _stream
from broker.backends.redis.keys import updates as _updates
from broker.backends.redis.keys import waiting as _waiting
from broker.backends.redis.wire import Command
from broker.errors import IdempotencyKeyReused, RecordDamaged, StoreUnavailable, Unavailable
from broker.model import (
    NO_TIMINGS,
    Attempt,
    AttemptEnd,
    Callback,
    Claim,
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
from broker.ports import FURTHEST, LANDMARKS, MOST_UPDATES, PAGE_SCAN
from broker.settings import Settings, SidecarSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")
# The further arguments of LEAVE.
End = tuple[str | int | bytes, ...]
_NO_TIMES = b"0 0 0 0 0"

_EPOCH_REFRESH_S = 2.0
_EPOCH = re.compile(rb"(\d{1,3}):(\d{1,15})")
_STRAY_AFTER_S = 60.0
# Its record is there by then: one exchange makes both.
_FIRST_LOOK_S = 60.0
_PAGE_BATCH = 250
# A record is made some time before its entry in the account's list, and unfinished it lives this much longer than
# its deadline and retention.
_INDEXED_WITHIN_S = 1.0
_FINISHED_LIVES_MS = 180_000
# What is behind the id in a hint; of what a newer process may say, everybody is told.
_HINTS = {"1": Interest.PROGRESS, "2": Interest.STEPS}
_MEMBER_BYTES = 16
# Of a ledger.
_SUMS = (b"*", b"#")
_PAGES_LOOKED_AT = 256
_QUEUED = RequestState.QUEUED.encode()
# One of the dead has a cause, and may have been started again.
_OVER = frozenset(state.value.encode() for state in RequestState if state.terminal and state is not RequestState.DEAD)
# What of another is of use to who waited for its end.
_END_OF = form(("HMGET", OPEN, *"safvcdnbewmQUGIx"))
_BODY_OF = form(("GET", OPEN))
_ENDS = {end.value: end for end in AttemptEnd}
_STATES = {state.value.encode(): state for state in RequestState}
_VERDICTS = {verdict.value.encode(): verdict for verdict in Verdict}
# A kilobyte each, by what callers, functions and versions differ in.
_MOST_FORMS = 2048
# From here on, one answer with the whole front of the queue costs less than a command each.
_MANY = 32


class RedisResults:
    """Opened by `broker.backends.redis.store`; `run` must be going for hints and epoch to stay fresh."""

    def __init__(self, connection: Connection, settings: Settings) -> None:
        self._connection = connection
        self._settings = settings
        self._retention_ms = int(settings.result_ttl_s * 1000)
        # On a front end's one hears of requests of every version: a sidecar may only listen on those of its own kind.
        kind = "w" if isinstance(settings, SidecarSettings) else "h"
        self.channel = f"fnq:{kind}:{secrets.token_hex(6)}"
        of_account = (settings.account_requests, settings.account_bytes)
        self._account_most = of_account if any(of_account) else ()
        self.hints = Hints()
        self._epoch: Epoch | None = None
        self.subscribed = asyncio.Event()
        self._cursors: dict[str, int] = {}
        self._create_form = lru_cache(_MOST_FORMS)(self._make_create_form)
        self._claim_form = lru_cache(_MOST_FORMS)(self._make_claim_form)
        self._settle_form = lru_cache(_MOST_FORMS)(self._make_settle_form)

    @property
    def circuit(self) -> Breaker:
        return self._connection.breaker

    # -- submitters -------------------------------------------------------------------------------

    async def remember_key(self, account: str, key: str, *, request_id: str, digest: str) -> str:
        ttl_ms = int(self._settings.idempotency_ttl_s * 1000)
        [bound] = await self._connection.run(
            scripts.REMEMBER_KEY.call((_idempotency(account, key),), request_id, digest, ttl_ms), durable=True
        )
        if not bound:
            raise IdempotencyKeyReused("this Idempotency-Key was used with another request")
        with reading("the Idempotency-Key's request"):
            return str(uuid.UUID(_text(bound)))

    async def forget_key(self, account: str, key: str, *, request_id: str) -> None:
        await self._connection.run(scripts.FORGET_KEY.call((_idempotency(account, key),), request_id))

    async def create(self, draft: Draft, *, queue_limit: int, watch: bool) -> Record:
        nonce = f"{random.getrandbits(32):08x}"  # tells two calls for one request apart, guards nothing
        command = self._creating(draft, nonce, queue_limit, self.channel if watch else "")
        try:
            if draft.callback is None:
                [made] = await self._connection.run(command, durable=True)
            else:  # first what looks at it, so that there is no record with a callback that nobody looks at
                _, made = await self._connection.run(_expecting(draft.id), command, durable=True)
        except TooFewReplicas:
            with suppress(StoreUnavailable):
                await self._discard(draft, nonce)
            raise
        try:
            if int(made[0]) < 0:
                raise limit_met(_text(made[2]), _text(made[1]), self._settings, queue_limit)
            _, state, created, deadline, function_id, version_id, queue_deadline, run_ms, rank = made
            return Record(
                id=draft.id,
                account=draft.account,
                function_id=unpacked(function_id),
                version_id=unpacked(version_id),
                state=_STATES[state],
                created_at=int(created) / 1000,
                deadline_at=int(deadline) / 1000,
                queue_deadline_at=int(queue_deadline) / 1000,
                run_timeout_s=int(run_ms) / 1000,
                rank=int(rank),
            )
        except _UNREADABLE as exc:
            raise _damaged(draft.id) from exc

    def _creating(self, draft: Draft, nonce: str, queue_limit: int, channel: str) -> Command:
        shape = self._create_form(
            draft.account,
            draft.function_id,
            draft.version_id,
            draft.deadline_s,
            queue_limit,
            channel,
        )
        request_id = draft.id.encode()
        return shape % filled(
            _record_of(request_id),
            request_id,
            _member(draft.id),
            nonce.encode(),
            b"%d" % int(draft.queue_timeout_s * 1000),
            b"%d" % int(draft.run_timeout_s * 1000),
            b"%d" % draft.size_bytes,
            pack_callback(draft.callback, self._settings).encode(),
        )

    def _make_create_form(
        self,
        account: str,
        function_id: str,
        version: str,
        deadline_s: float,
        queue_limit: int,
        channel: str,
    ) -> bytes:
        """Open: record id member nonce queue_ms run_ms bytes callback."""
        settings, deadline_ms = self._settings, int(deadline_s * 1000)
        keys = (OPEN, _waiting(version), _due(version), _ledger(version), _account(account), _ledger(account))
        return form(
            scripts.CREATE.call(
                keys,
                OPEN,
                OPEN,
                OPEN,
                channel,
                account,
                packed(function_id),
                packed(version),
                deadline_ms,
                deadline_ms + self._retention_ms,
                OPEN,
                OPEN,
                OPEN,
                queue_limit,
                settings.listed_requests,
                deadline_ms + self._retention_ms + _FINISHED_LIVES_MS,
                settings.version_requests,
                settings.version_bytes,
                OPEN,
                *self._account_most,
            )
        )

    async def _discard(self, draft: Draft, nonce: str) -> None:
        [gone] = await self._connection.run(scripts.DISCARD.call((_record(draft.id),), nonce))
        if gone:
            await self._connection.run(
                ("ZREM", _account(draft.account), _member(draft.id)),
                *leaving(draft.account, draft.version_id, draft.id),
            )

    async def abandon(self, request_id: str, version_id: str, *, reason: str) -> bool:
        retention_ms = int(self._settings.request_deadline_s * 1000) + self._retention_ms
        abandoned, account = await self._connection.run(
            scripts.ABANDON.call((_record(request_id), _body(request_id)), reason, retention_ms),
            ("HGET", _record(request_id), "a"),
            durable=True,
        )
        if abandoned:
            await self._leave(account, version_id, request_id, None)
        return bool(abandoned)

    async def cancel(self, request_id: str, *, reason: str) -> RequestState | None:
        before, [version_id, account, attempts, callback] = await self._connection.run(
            scripts.CANCEL.call((_record(request_id), _body(request_id)), reason, self._retention_ms),
            ("HMGET", _record(request_id), "v", "a", "n", "C"),
            durable=True,
        )
        if before is None:
            return None
        with reading(request_id):
            stood, version = RequestState(_text(before)), unpacked(version_id)
            state, announced = stood if stood.terminal else RequestState.CANCELLED, callback is not None
            await self._leave(account, version, request_id, state, attempts=int(attempts or 0), announced=announced)
            return stood

    # -- readers ----------------------------------------------------------------------------------

    def watch(self, request_id: str, interest: Interest = Interest.END) -> RecordWatch:
        # Of what is over, too, the last progress is of interest to who wants every step.
        read_end = self._read_end if interest is not Interest.STEPS else None
        return RecordWatch(self.hints, request_id, interest, self._read_watching, read_end)

    def listen(self, request_id: str, told: Callable[[], None]) -> AbstractContextManager[None]:
        return self.hints.listening(request_id, told)

    async def read(self, request_id: str) -> Record | None:
        return await self._read(request_id, "")

    async def glance(self, request_id: str) -> Record | None:
        return await self._read(request_id, "", whole=False)

    async def glances(self, request_ids: Sequence[str]) -> list[Record | None]:
        """As `glance`, in one exchange; None for those that cannot be read, too."""
        records = await self._read_all(request_ids, "", whole=False)
        return [record if isinstance(record, Record) else None for record in records]

    async def page(self, account: str, wanted: RequestFilter, *, limit: int, after: int = 0) -> RequestPage:
        found: list[Record] = []
        strays: list[bytes] = []
        looked, batch = 0, limit
        while looked < PAGE_SCAN:
            batch = min(batch, PAGE_SCAN - looked)
            entries = await self._listed(account, wanted, after, batch)
            strays += [member for member, _ in entries if not _is_member(member)]
            listed = [entry for entry in entries if _is_member(entry[0])]
            records = await self._read_all([str(uuid.UUID(bytes=member)) for member, _ in listed], "", whole=False)
            for (member, order), record in zip(listed, records, strict=True):
                after = order
                if isinstance(record, RecordDamaged):
                    continue
                if record is None or record.state is RequestState.ABANDONED:
                    strays.append(member)
                elif wanted.keeps(record):
                    found.append(record)
                    if len(found) == limit:
                        break
            if len(found) == limit:
                break
            if len(entries) < batch:
                after = 0
                break
            looked, batch = looked + batch, _PAGE_BATCH
        if strays:
            await self._connection.run(("ZREM", _account(account), *strays))
        return RequestPage(records=tuple(found), after=after)

    async def _listed(self, account: str, wanted: RequestFilter, after: int, limit: int) -> Sequence[tuple[bytes, int]]:
        """The next entries of the account's list, with their places in it."""
        upper = [bound for bound in (after, _order(wanted.until + _INDEXED_WITHIN_S) if wanted.until else 0) if bound]
        highest = f"({min(upper)}" if upper else "+inf"
        lowest = _order(wanted.since) if wanted.since else "-inf"
        key = _account(account)
        _, reply = await self._connection.run(
            ("ZREMRANGEBYRANK", key, 0, -self._settings.listed_requests - 1),
            ("ZRANGE", key, highest, lowest, "BYSCORE", "REV", "LIMIT", 0, limit, "WITHSCORES"),
        )
        return [(member, int(score)) for member, score in _pairs(reply)]

    async def updates(self, request_id: str, *, after: int, limit: int) -> list[Progress]:
        [found] = await self._connection.run(scripts.UPDATES.call((_updates(request_id),), after, limit))
        with reading(request_id):
            return [_progress(update) for update in found]

    async def forget(self, request_id: str) -> None:
        await self._connection.run(scripts.FORGET.call((_record(request_id), _body(request_id))))

    async def position(self, record: Record) -> Position:
        state, rank, length = await self._connection.run(
            ("HGET", _record(record.id), "s"),
            ("ZRANK", _waiting(record.version_id), record.id),
            ("ZCARD", _waiting(record.version_id)),
        )
        if state != _QUEUED:
            return Position(rank=0, length=int(length))
        # A request that a wiped store has not seen again yet is somewhere behind those it has.
        return Position(rank=int(rank) + 1 if rank is not None else int(length) + 1, length=int(length))

    async def places(self, version_id: str, request_ids: Sequence[str]) -> list[Position]:
        waiting = _waiting(version_id)
        if len(request_ids) < _MANY:
            *found, length = await self._connection.run(
                *(("ZRANK", waiting, request_id) for request_id in request_ids), ("ZCARD", waiting)
            )
            ranks = [0 if rank is None else int(rank) + 1 for rank in found]
        else:
            first, length = await self._connection.run(("ZRANGE", waiting, 0, FURTHEST - 2), ("ZCARD", waiting))
            ahead = {_id(request_id): rank for rank, request_id in enumerate(first, start=1)}
            further = FURTHEST if length >= FURTHEST else 0
            ranks = [ahead.get(request_id, further) for request_id in request_ids]
        return [Position(rank=rank, length=int(length)) for rank in ranks]

    async def load(self, version_ids: Sequence[str]) -> list[Load]:
        if not version_ids:
            return []
        replies = await self._connection.run(
            *(scripts.LOAD.call((_waiting(version_id), _running(version_id))) for version_id in version_ids)
        )
        return [
            Load(queued=int(queued), running=int(running), oldest_age_s=int(age) / 1000)
            for queued, running, age in replies
        ]

    async def line(self, version_id: str) -> Line:
        places = (_waiting(version_id), _running(version_id))
        [[now, queued, running, *landmarks]] = await self._connection.run(scripts.LINE.call(places, LANDMARKS))
        with reading("who waits"):
            return Line(
                at=int(now) / 1000,
                queued=int(queued),
                running=int(running),
                landmarks=tuple(
                    (int(rank), float(score) / 1_000_000)
                    for rank, score in zip(landmarks[::2], landmarks[1::2], strict=True)
                ),
            )

    async def activity(self, version_ids: Sequence[str], *, minutes: int) -> list[tuple[Minute, ...]]:
        if not version_ids:
            return []
        replies = await self._connection.run(*(activity.asking(version_id, minutes) for version_id in version_ids))
        with reading("what versions did"):
            return [activity.parse(reply, minutes) for reply in replies]

    async def epoch(self, *, fresh: bool = False) -> Epoch:
        if fresh or self._epoch is None:
            known, (seconds, micros) = await self._connection.run(("GET", "fnq:epoch"), ("TIME",))
            now_ms = int(seconds) * 1000 + int(micros) // 1000
            found = _epoch(known, now_ms)
            if found is None:  # a sidecar may not begin one
                [known] = await self._connection.run(scripts.EPOCH.call(("fnq:epoch",), secrets.randbelow(256)))
                found = _epoch(known, now_ms)
            assert found is not None, "EPOCH replaces what is none"
            self._epoch = found
        return self._epoch

    async def ping(self) -> None:
        await self._connection.run(("PING",))

    # -- workers ----------------------------------------------------------------------------------

    async def claim(self, job: Job, *, worker: str, lease_s: float, max_attempts: int, token: str = "") -> Claim:
        token = token or secrets.token_hex(16)
        try:
            return await self._claim(job, worker, lease_s, max_attempts, token)
        except RecordDamaged as damaged:
            return await self._healing(job.id, damaged, lambda: self._claim(job, worker, lease_s, max_attempts, token))

    async def _claim(self, job: Job, worker: str, lease_s: float, max_attempts: int, token: str) -> Claim:
        shape = self._claim_form(job.version_id, worker, lease_s, max_attempts)
        request_id = job.id.encode()
        command = shape % filled(
            _record_of(request_id), _body_of(request_id), token.encode(), told(job, self._settings)
        )
        [claimed] = await self._connection.run(command, durable=True)
        try:
            verdict, state = _VERDICTS[claimed[0]], _STATES[claimed[1]]
            attempt, wait_s, lost = int(claimed[2]), int(claimed[3]) / 1000, _lost(claimed)
            granted = verdict is Verdict.GRANTED
            started_at, remaining_s = (int(claimed[9]) / 1000, int(claimed[4]) / 1000) if granted else (0.0, 0.0)
            misplaced = granted and int(claimed[5]) > 0  # lost, or set aside
        except _UNREADABLE as exc:
            raise _damaged(job.id) from exc
        if verdict is Verdict.SETTLED:
            announced = job.callback is not None
            await self._leave(job.account, job.version_id, job.id, state, attempts=attempt, announced=announced)
        elif state is RequestState.QUEUED:
            await self._back_in_line(job.version_id, job.id)
        elif misplaced:
            with suppress(StoreUnavailable):
                await self._connection.run(*self.entering(job))
        lease = Lease(request_id=job.id, version_id=job.version_id, attempt=attempt, token=token, started_at=started_at)
        return Claim(
            verdict=verdict,
            state=state,
            lease=lease if granted else None,
            remaining_s=remaining_s,
            wait_s=wait_s,
            lost=lost,
        )

    def _make_claim_form(self, version: str, worker: str, lease_s: float, max_attempts: int) -> bytes:
        """Open: record body token told."""
        return form(
            scripts.CLAIM.call(
                (OPEN, OPEN, _waiting(version), _running(version)),
                worker,
                OPEN,
                self.channel,
                int(lease_s * 1000),
                max_attempts,
                self._retention_ms,
                OPEN,
                self._settings.max_worker_deaths,
            )
        )

    async def healing(self, request_id: str, verb: Callable[[], Awaitable[T]]) -> T:
        """What `verb` returns, for somebody who has the request's message and so can do without its record. A damaged
        one is put right if it tells how the request ended, and is else, or if that was not enough, as good as lost."""
        try:
            return await verb()
        except RecordDamaged as damaged:
            return await self._healing(request_id, damaged, verb)

    async def _healing(self, request_id: str, damaged: RecordDamaged, verb: Callable[[], Awaitable[T]]) -> T:
        """As `healing`, of a verb that failed once."""
        await self._put_right(request_id, "", damaged)
        try:
            return await verb()
        except RecordDamaged as still:
            await self._put_right(request_id, "all", still)
        return await verb()

    async def _put_right(self, request_id: str, how_much: str, damaged: RecordDamaged) -> None:
        logger.error("record_healed", extra={"request_id": request_id, "cause": repr(damaged.__cause__)[:200]})
        await self._heal(request_id, how_much)

    async def _heal(self, request_id: str, how_much: str) -> bool:
        family = (_record(request_id), _body(request_id), _updates(request_id), _stream(request_id))
        [righted] = await self._connection.run(scripts.HEAL.call(family, how_much))
        return bool(righted)

    def entering(self, job: Job) -> tuple[Command, ...]:
        """Puts an accepted request back on its ledgers, among those of its account and, if it has a callback, those
        that are looked at, whatever the limits."""
        member, size_bytes = _member(job.id), job.size_bytes
        ttl_ms = int((job.deadline_at - job.created_at) * 1000) + self._retention_ms + _FINISHED_LIVES_MS
        return (
            scripts.ENTER.call((_ledger(job.version_id),), member, size_bytes, job.account),
            scripts.INDEX.call(
                (_account(job.account), _ledger(job.account)),
                member,
                _order(job.created_at),
                self._settings.listed_requests,
                ttl_ms,
                size_bytes,
            ),
            *([("ZADD", WEBHOOKS, "NX", 0, member)] if job.callback else ()),
        )

    async def renew(self, lease: Lease, *, lease_s: float) -> RequestState:
        """A damaged record says as much as a lost one: the worker goes on, and settling makes it anew. So do the other
        verbs of a lease."""
        with suppress(RecordDamaged):
            [state] = await self._connection.run(
                scripts.RENEW.call((_record(lease.request_id),), lease.token, int(lease_s * 1000))
            )
            with reading(lease.request_id):
                return RequestState(_text(state))
        return RequestState.RUNNING

    async def release(self, lease: Lease, *, refund: bool, reason: str = "") -> RequestState:
        state, account, callback = RequestState.QUEUED, "", None
        with suppress(RecordDamaged):
            reply, [raw, callback] = await self._connection.run(
                scripts.RELEASE.call(
                    (_record(lease.request_id), _body(lease.request_id)),
                    lease.token,
                    int(refund),
                    self._retention_ms,
                    lease.attempt,
                    reason,
                ),
                ("HMGET", _record(lease.request_id), "a", "C"),
            )
            with reading(lease.request_id):
                state, account = RequestState(_text(reply)), _text(raw or "")
        if state.terminal:
            version_id, request_id, attempts = lease.version_id, lease.request_id, lease.attempt
            announced = callback is not None
            await self._leave(account, version_id, request_id, state, attempts=attempts, announced=announced)
        if state is RequestState.QUEUED:
            await self._back_in_line(lease.version_id, lease.request_id)
        return state

    async def postpone(self, lease: Lease, outcome: Outcome, *, wait_s: float) -> RequestState:
        state = RequestState.QUEUED
        with suppress(RecordDamaged):
            [reply] = await self._connection.run(
                scripts.POSTPONE.call(
                    (_record(lease.request_id), _body(lease.request_id)),
                    lease.token,
                    int(wait_s * 1000),
                    pack_outcome(outcome),
                    self._retention_ms,
                )
            )
            with reading(lease.request_id):
                state = RequestState(_text(reply))
        if state is RequestState.QUEUED:
            await self._back_in_line(lease.version_id, lease.request_id)
        return state

    async def settle(
        self, lease: Lease, job: Job, state: RequestState, outcome: Outcome, timings: Timings = NO_TIMINGS
    ) -> RequestState:
        try:
            return await self._settle(lease, job, state, outcome, timings)
        except RecordDamaged as damaged:
            return await self._healing(job.id, damaged, lambda: self._settle(lease, job, state, outcome, timings))

    async def _settle(
        self, lease: Lease, job: Job, state: RequestState, outcome: Outcome, timings: Timings
    ) -> RequestState:
        shape = self._settle_form(job.account, job.version_id, lease.attempt, state)
        request_id = job.id.encode()
        command = shape % filled(
            _record_of(request_id),
            _body_of(request_id),
            lease.token.encode(),
            pack_outcome(outcome),
            _numbers(outcome, timings),
            told(job, self._settings),
            request_id,
            _member(job.id),
            _times_ms(lease, job, timings),
        )
        if job.callback is None:
            [reply] = await self._connection.run(command, durable=True)
        else:
            reply, _ = await self._connection.run(command, _due_now(job.id), durable=True)
        try:
            return _STATES[reply]
        except _UNREADABLE as exc:
            raise _damaged(job.id) from exc

    def _make_settle_form(self, account: str, version: str, attempt: int, state: RequestState) -> bytes:
        """Open: record body token outcome numbers told id member times."""
        orders = (_waiting(version), _running(version), _due(version))
        return form(
            scripts.SETTLE.call(
                (OPEN, OPEN, _ledger(account), _ledger(version), *orders),
                OPEN,
                attempt,
                state,
                OPEN,
                OPEN,
                self._retention_ms,
                *(OPEN,) * 4,
            )
        )

    async def report(self, lease: Lease, progress: Progress, *, sequence: int) -> RequestState:
        with suppress(RecordDamaged):
            [state] = await self._connection.run(
                scripts.REPORT.call(
                    (_record(lease.request_id), _updates(lease.request_id)),
                    lease.token,
                    sequence,
                    progress.percent,
                    progress.partial,
                    MOST_UPDATES,
                    self._settings.progress_kept_bytes,
                )
            )
            with reading(lease.request_id):
                return RequestState(_text(state))
        return RequestState.RUNNING

    async def end(self, job: Job, state: RequestState, *, reason: str, cause: str = "") -> Claim:
        return await self.healing(job.id, lambda: self._end(job, state, reason=reason, cause=cause))

    async def _end(self, job: Job, state: RequestState, *, reason: str, cause: str) -> Claim:
        keys = (_record(job.id), _body(job.id))
        [ended] = await self._connection.run(
            scripts.END.call(keys, state, reason, self._retention_ms, told(job, self._settings), cause),
            durable=True,
        )
        with reading(job.id):
            claim = Claim(
                verdict=Verdict(_text(ended[0])), state=RequestState(_text(ended[1])), wait_s=int(ended[2]) / 1000
            )
        if claim.verdict is Verdict.SETTLED:
            attempts, announced = int(ended[3]), job.callback is not None
            await self._leave(job.account, job.version_id, job.id, claim.state, attempts=attempts, announced=announced)
        return claim

    async def sweep(self, version_id: str, *, limit: int) -> int:
        epoch = await self.epoch(fresh=True)
        before = (epoch.now - _STRAY_AFTER_S) * 1_000_000
        places = (_waiting(version_id), RequestState.QUEUED), (_running(version_id), RequestState.RUNNING)
        changed = sum([await self._sweep(place, belongs, before, limit) for place, belongs in places])
        changed += await self._sweep_due(version_id, epoch.now, limit)
        return changed + await self._sweep_ledger(version_id, limit)

    async def _sweep_ledger(self, version_id: str, limit: int) -> int:
        """What a crash left on the ledgers. It goes on where the last sweep stopped."""
        found = await self._scan(version_id, limit)
        strange = [member for member, _ in found if member not in _SUMS and not _is_member(member)]
        if strange:
            await self._connection.run(("HDEL", _ledger(version_id), *strange))
        entries = {
            str(uuid.UUID(bytes=member)): entry.decode(errors="replace")
            for member, entry in found
            if _is_member(member)
        }
        if not entries:
            return 0
        places = await self._connection.run(
            *(("ZSCORE", place, each) for each in entries for place in (_waiting(version_id), _running(version_id)))
        )
        strays = [
            each
            for each, queued, running in zip(entries, places[::2], places[1::2], strict=True)
            if queued is None and running is None
        ]
        records = await self._read_all(strays, "", whole=False)
        gone = [
            (each, record)
            for each, record in zip(strays, records, strict=True)
            if not isinstance(record, RecordDamaged) and (record is None or record.state.terminal)
        ]
        for each, record in gone:
            state, attempts = (record.state, record.attempt) if record else (None, 0)
            await self._leave(entries[each].partition(" ")[2], version_id, each, state, attempts=attempts)
        return len(gone)

    async def _scan(self, version_id: str, limit: int) -> list[tuple[bytes, bytes]]:
        """The next entries of the ledger itself, or of the next pages that have any. The cursor of HSCAN is never
        negative: what is stands for a page."""
        cursor = self._cursors.get(version_id, 0)
        if cursor < 0:
            return await self._scan_pages(version_id, -1 - cursor, limit)
        (after, flat), pages = await self._connection.run(
            ("HSCAN", _ledger(version_id), cursor, "COUNT", limit), ("HEXISTS", _ledger(version_id), "#")
        )
        self._cursors[version_id] = int(after) or (-1 if pages else 0)
        return _entries(flat)

    async def _scan_pages(self, version_id: str, first: int, limit: int) -> list[tuple[bytes, bytes]]:
        numbers = range(first, min(first + _PAGES_LOOKED_AT, scripts.LEDGER_PAGES))
        lengths = await self._connection.run(*(("HLEN", _ledger_page(version_id, number)) for number in numbers))
        wanted: list[str] = []
        total, after = 0, first
        for number, length in zip(numbers, lengths, strict=True):
            after = number + 1
            if length:
                wanted.append(_ledger_page(version_id, number))
                total += int(length)
            if total >= limit:
                break
        self._cursors[version_id] = -1 - after if after < scripts.LEDGER_PAGES else 0
        replies = await self._connection.run(*(("HGETALL", page) for page in wanted)) if wanted else []
        return [entry for reply in replies for entry in _entries(reply)]

    async def _sweep_due(self, version_id: str, now: float, limit: int) -> int:
        """Queue timeouts end in another order than that of the queue, and far behind what a sweep looks at there; what
        was set aside is in no other place."""
        [ids] = await self._connection.run(
            ("ZRANGE", _due(version_id), "-inf", int(now * 1000), "BYSCORE", "LIMIT", 0, limit)
        )
        if not ids:
            return 0
        records = await self._read_all([_id(request_id) for request_id in ids], "", whole=False)
        await self._connection.run(("ZREM", _due(version_id), *ids))
        return sum(isinstance(record, Record) and record.state is RequestState.EXPIRED for record in records)

    async def _sweep(self, place: str, belongs: RequestState, before: float, limit: int) -> int:
        """Reading expires what is overdue; an entry without a record may be one that is being created."""
        [ids] = await self._connection.run(("ZRANGE", place, 0, limit - 1, "WITHSCORES"))
        entries = _pairs(ids)
        records = await self._read_all([_id(member) for member, _ in entries], "", whole=False)
        strays = [
            member
            for (member, score), record in zip(entries, records, strict=True)
            if (score < before if not isinstance(record, Record) else record.state is not belongs)
        ]
        if strays:
            await self._connection.run(("ZREM", place, *strays))
        return len(strays)

    # -- the process's own subscription -----------------------------------------------------------

    async def run(self) -> None:
        """Listen for hints and keep the epoch fresh, across reconnects, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._connection.listen(self.channel, self._heard, gap=self._missed))
            tasks.create_task(self._keep_epoch())

    def _heard(self, message: bytes) -> None:
        head, _, news = message.partition(b"\n")
        subject, _, of = head.decode(errors="replace").partition(" ")
        self.hints.tell(subject, _HINTS.get(of, Interest.END), news)

    def _missed(self) -> None:
        self.hints.tell_all()
        self.subscribed.set()

    async def _keep_epoch(self) -> None:
        while True:
            try:
                await self.epoch(fresh=True)
            except Unavailable:
                logger.debug("epoch_unknown")
            await self._connection.look_for_replicas()
            await asyncio.sleep(_EPOCH_REFRESH_S)

    # -- pieces -----------------------------------------------------------------------------------

    async def _read_watching(self, request_id: str, interest: Interest) -> Record | None:
        return await self._read(request_id, self.channel, interest)

    async def _read_end(self, request_id: str, news: bytes) -> Record | None:
        """The record if it is over. What is over never changes, and may have come with the hint; not where a replica
        has to have it, which only an exchange can tell. What is over has no deadline to see to and takes no listeners,
        either, so that two plain commands do for it, at a third of what the script costs. None also for what is
        damaged."""
        if news and not self._connection.replication.needed and (shown := _shown(request_id, news)) is not None:
            return shown
        known = request_id.encode()
        fields, packed = await self._connection.each(
            _END_OF % filled(_record_of(known)), _BODY_OF % filled(_body_of(known)), durable=True
        )
        if isinstance(fields, RecordDamaged) or isinstance(packed, RecordDamaged):
            return None
        state, account, function_id, version_id, created, deadline, attempt, started, ended, worker, reason = fields[
            :11
        ]
        queue_deadline, run_ms, past, numbers, hidden = fields[11:]
        if state not in _OVER or hidden is not None:
            return None
        reply = (
            state,
            account or b"",
            function_id or b"",
            version_id or b"",
            created or 0,
            deadline or 0,
            attempt or 0,
            started or 0,
            ended or 0,
            worker or b"",
            reason or b"",
            packed or b"",
            0,
            queue_deadline or 0,
            run_ms or 0,
            past or b"",
            numbers or b"",
            b"",
            b"",
            0,
            b"",
            b"",
        )
        try:
            return _read_record(request_id, reply)
        except _UNREADABLE:
            return None

    async def _read(
        self, request_id: str, channel: str, interest: Interest = Interest.END, *, whole: bool = True
    ) -> Record | None:
        """Of an ended request whose record is damaged, what can be read."""
        [record] = await self._read_all([request_id], channel, whole=whole, interest=interest)
        if isinstance(record, RecordDamaged) and await self._heal(request_id, "end"):
            [record] = await self._read_all([request_id], channel, whole=whole, interest=interest)
        return _sound(record)

    async def _read_all(
        self, request_ids: Sequence[str], channel: str, *, whole: bool, interest: Interest = Interest.END
    ) -> list[Record | RecordDamaged | None]:
        """In one exchange; `whole` records have their outcomes. Nothing is shown that a replica does not have: not only
        an end could be gone again, also what is not over yet may be over for others, by a primary that was replaced."""
        if not request_ids:
            return []
        commands = [
            scripts.READ.call(
                (_record(each), _body(each)),
                self._retention_ms,
                channel,
                int(whole),
                secrets.token_hex(4) if interest is Interest.PROGRESS else "",
                int(interest is Interest.STEPS),
            )
            for each in request_ids
        ]
        replies = await self._connection.each(*commands, durable=True)
        records = [_parse(each, reply) for each, reply in zip(request_ids, replies, strict=True)]
        left = [
            command
            for record, reply in zip(records, replies, strict=True)
            if isinstance(record, Record) and int(reply[12])
            for command in leaving(
                record.account,
                record.version_id,
                record.id,
                noted(record.state, record.attempt),
                announced=int(reply[12]) > 1,
            )
        ]
        if left:
            await self._connection.run(*left)
        return records

    async def _back_in_line(self, version_id: str, request_id: str) -> None:
        await self._connection.run(scripts.MOVE.call((_running(version_id), _waiting(version_id)), request_id))

    async def _leave(
        self,
        account: bytes | str | None,
        version_id: str,
        request_id: str,
        state: RequestState | None,
        *,
        attempts: int = 0,
        announced: bool = False,
    ) -> None:
        """`state` is how it ended; None where that cannot be known, or is no end."""
        end = noted(state, attempts) if state is not None else ()
        await self._connection.run(*leaving(_text(account or ""), version_id, request_id, end, announced=announced))


# What reading such a reply raises.
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, OverflowError)


@contextmanager
def reading(subject: str) -> Iterator[None]:
    """Raises RecordDamaged for what cannot be read of a reply."""
    try:
        yield
    except _UNREADABLE as exc:
        raise _damaged(subject) from exc


def _damaged(subject: str) -> RecordDamaged:
    return RecordDamaged(f"what is stored of {subject} cannot be read")


def _sound(record: Record | RecordDamaged | None) -> Record | None:
    if isinstance(record, RecordDamaged):
        logger.error("record_damaged", extra={"cause": str(record), "fault": repr(record.__cause__)[:200]})
        raise record
    return record


def _parse(request_id: str, reply: Sequence[Any] | RecordDamaged | None) -> Record | RecordDamaged | None:
    if reply is None or isinstance(reply, RecordDamaged):
        return reply
    try:
        return _read_record(request_id, reply)
    except _UNREADABLE as exc:
        damaged = _damaged(request_id)
        damaged.__cause__ = exc
        return damaged


def _read_record(request_id: str, reply: Sequence[Any]) -> Record:
    """Of what READ returns."""
    state, account, function_id, version_id, created, deadline, attempt, started, ended, worker, reason = reply[:11]
    packed_outcome, _, queue_deadline, run_ms, past, numbers, head, progress, unread, cause, redriven_as = reply[11:]
    stands, number, at, started_s, ended_s = (
        _STATES[state],
        int(attempt),
        worker.decode(),
        int(started) / 1000,
        int(ended) / 1000,
    )
    attempts = tuple([_attempt(*each) for each in orjson.loads(past)]) if past else ()
    if at:
        end = _ENDS[stands.value]
        attempts += (Attempt(number=number, worker=at, started_at=started_s, ended_at=ended_s, end=end),)
    status_code, timings = parse_numbers(numbers)
    return Record(
        id=request_id,
        account=account.decode(),
        function_id=unpacked(function_id),
        version_id=unpacked(version_id),
        state=stands,
        created_at=int(created) / 1000,
        deadline_at=int(deadline) / 1000,
        attempt=number,
        started_at=started_s,
        finished_at=ended_s,
        worker=at,
        reason=reason.decode(),
        outcome=_outcome(request_id, packed_outcome) if packed_outcome else None,
        head=_outcome(request_id, head) if head else None,
        status_code=status_code,
        queue_deadline_at=int(queue_deadline) / 1000,
        run_timeout_s=int(run_ms) / 1000,
        attempts=attempts,
        timings=timings,
        progress=_progress(progress) if progress else None,
        unread=bool(unread),
        cause=cause.decode(),
        redriven_as=redriven_as.decode(),
    )


def _shown(request_id: str, news: bytes) -> Record | None:
    """What a hint that a request was settled says of it, as `scripts` has it: no past attempts, so only its last."""
    try:
        line, worker, story, packed_outcome = _texts(news, 3)
        state, attempt, started, ended, numbers = line.split(b" ", 4)
        if state not in _OVER:
            return None
        names_bytes = _length(story, 3)
        account, function_id, version_id = _names_told(story[:names_bytes])
        times, _ = _texts(story[names_bytes:], 1)
        created, deadline, queue_deadline, run_ms = map(int, times.split())
        stands, last = _STATES[state], _attempt(int(attempt), worker.decode(), int(started), int(ended), state.decode())
        status_code, timings = parse_numbers(numbers)
        return Record(
            id=request_id,
            account=account,
            function_id=function_id,
            version_id=version_id,
            state=stands,
            created_at=created / 1000,
            deadline_at=deadline / 1000,
            attempt=last.number,
            started_at=last.started_at,
            finished_at=last.ended_at,
            worker=last.worker,
            outcome=_outcome(request_id, packed_outcome) if packed_outcome else None,
            status_code=status_code,
            queue_deadline_at=queue_deadline / 1000,
            run_timeout_s=run_ms / 1000,
            attempts=(last,) if last.worker else (),
            timings=timings,
        )
    except _UNREADABLE:
        return None


def _texts(raw: bytes, count: int) -> list[bytes]:
    """`count` texts, each behind its length, and what follows them. Raises ValueError, IndexError."""
    found, at = [], 0
    for _ in range(count):
        begin = at + 2
        at = begin + (raw[at] << 8 | raw[at + 1])
        found.append(raw[begin:at])
    if at > len(raw):
        raise ValueError("cut off")
    found.append(raw[at:])
    return found


def _length(raw: bytes, count: int) -> int:
    """Of the first `count` texts, each behind its length. Raises IndexError."""
    at = 0
    for _ in range(count):
        at += 2 + (raw[at] << 8 | raw[at + 1])
    return at


def _attempt(number: int, worker: str, started: int, ended: int, end: str, reason: str = "") -> Attempt:
    return Attempt(
        number=number,
        worker=worker,
        started_at=started / 1000,
        ended_at=ended / 1000,
        end=_ENDS[end],
        reason=reason,
    )


def _numbers(outcome: Outcome, timings: Timings) -> bytes:
    # Rounded up: 0 is what did not happen.
    return b"%d %d %d %d %d" % (
        outcome.status,
        math.ceil(timings.cold_start_s * 1000),
        math.ceil(timings.inputs_s * 1000),
        math.ceil(timings.container_s * 1000),
        math.ceil(timings.upload_s * 1000),
    )


def parse_numbers(raw: bytes) -> tuple[int, Timings | None]:
    if not raw:
        return 0, None
    status, cold_start, inputs, container, upload = map(int, raw.split())
    return status, Timings(
        cold_start_s=cold_start / 1000,
        inputs_s=inputs / 1000,
        container_s=container / 1000,
        upload_s=upload / 1000,
    )


def _outcome(request_id: str, packed: bytes) -> Outcome | None:
    try:
        return unpack_outcome(packed)
    except Unreadable:
        logger.error("outcome_unreadable", extra={"request_id": request_id})
        return None


def _progress(packed: bytes) -> Progress:
    number, percent, partial = packed.split(b" ", 2)
    return Progress(number=int(number), percent=int(percent), partial=partial)


def told(job: Job, settings: Settings) -> bytes:
    """What scripts rebuild a lost record from, as `scripts` has it."""
    times = b"%d %d %d %d" % (
        int(job.created_at * 1000),
        int(job.deadline_at * 1000),
        round(job.queue_deadline_at * 1000),
        round(job.run_timeout_s * 1000),
    )
    names = _told_names(job.account, job.function_id, job.version_id)
    return b"%b%b%b%b" % (names, len(times).to_bytes(2), times, pack_callback(job.callback, settings).encode())


@lru_cache(_MOST_FORMS)
def _told_names(account: str, function_id: str, version_id: str) -> bytes:
    names = (account, packed(function_id), packed(version_id))
    raw = [name.encode() if isinstance(name, str) else name for name in names]
    return b"".join([len(name).to_bytes(2) + name for name in raw])


@lru_cache(_MOST_FORMS)
def _names_told(raw: bytes) -> tuple[str, str, str]:
    """What `_told_names` made it of. Raises ValueError, IndexError."""
    account, function_id, version_id, _ = _texts(raw, 3)
    return account.decode(), unpacked(function_id), unpacked(version_id)


def pack_callback(callback: Callback | None, settings: Settings) -> str:
    """As `scripts` has it in the field C."""
    if callback is None:
        return ""
    return f"{int(settings.webhook_ttl_s * 1000)} {','.join(callback.events) or '*'} {callback.url}"


def _expecting(request_id: str) -> Command:
    return scripts.WEBHOOK_EXPECT.call((WEBHOOKS,), _member(request_id), int(_FIRST_LOOK_S * 1000))


def _member(request_id: str) -> bytes:
    """A third shorter in memory than its text."""
    return bytes.fromhex(request_id.replace("-", ""))


def _record_of(request_id: bytes) -> bytes:
    return b"fnq:{%b}:r" % request_id


def _body_of(request_id: bytes) -> bytes:
    return b"fnq:{%b}:b" % request_id


def _is_member(raw: bytes) -> bool:
    return len(raw) == _MEMBER_BYTES


def _id(raw: bytes) -> str:
    """Of an order's entry; nobody's, where that is no text."""
    return raw.decode(errors="replace")


def _order(seconds: float) -> int:
    """A place in an account's list."""
    return int(seconds * 1_000_000)


def noted(state: RequestState, attempts: int) -> End:
    """What there is to note of an end; nothing of a request that was never accepted."""
    return (state.value, attempts, _NO_TIMES) if state.terminal and state is not RequestState.ABANDONED else ()


def _times_ms(lease: Lease, job: Job, timings: Timings) -> bytes:
    """Of an attempt, what there is to note of a request that was settled."""
    if not lease.started_at:
        return _NO_TIMES
    return b"%d %d %d %d %d" % (
        round(job.created_at * 1000),
        round(lease.started_at * 1000),
        round(timings.cold_start_s * 1000),
        round(timings.start_s * 1000),
        round(timings.lead_s * 1000),
    )


def _due_now(request_id: str) -> Command:
    """Its delivery."""
    return scripts.WEBHOOK_DUE.call((WEBHOOKS,), _member(request_id))


def leaving(
    account: str,
    version_id: str,
    request_id: str,
    end: End = (),
    *,
    places: bool = True,
    announced: bool = False,
) -> tuple[Command, ...]:
    """Takes a request off its ledgers and, with `places`, out of the orders of its version, whose activity it adds
    `end` to. The account's ledger first: what a crash leaves behind, the sweep finds in the version's. If its end was
    `announced`, the delivery is due; a crash before that makes it late, for it is looked at anyway."""
    member = _member(request_id)
    orders = (_waiting(version_id), _running(version_id), _due(version_id)) if places else ()
    return (
        scripts.LEAVE.call((_ledger(account),), member, request_id),
        scripts.LEAVE.call((_ledger(version_id), *orders), member, request_id, *end),
        *([_due_now(request_id)] if announced else ()),
    )


def _entries(reply: Any) -> list[tuple[bytes, bytes]]:
    """Of a hash: RESP3 answers a dict, and HSCAN a flat list."""
    if isinstance(reply, dict):
        return list(reply.items())
    return list(zip(reply[::2], reply[1::2], strict=True))


def _idempotency(account: str, key: str) -> str:
    return f"fnq:k:{hashlib.sha256(f'{account} {key}'.encode()).hexdigest()}"


def _pairs(reply: Sequence[Any]) -> list[tuple[bytes, float]]:
    """RESP3 answers pairs, RESP2 a flat list."""
    if reply and isinstance(reply[0], list | tuple):
        return [(member, float(score)) for member, score in reply]
    return [(reply[at], float(reply[at + 1])) for at in range(0, len(reply), 2)]


def _lost(claimed: Sequence[Any]) -> Attempt | None:
    worker, started, until = claimed[6:9] if len(claimed) > 6 else (b"", 0, 0)
    if not worker:
        return None
    return Attempt(
        number=int(claimed[2]) - (_text(claimed[0]) == Verdict.GRANTED),
        worker=_text(worker),
        started_at=int(started) / 1000,
        ended_at=int(until) / 1000,
        end=AttemptEnd.LOST,
    )


def _epoch(raw: bytes | None, now_ms: int) -> Epoch | None:
    """None for what EPOCH would replace."""
    found = _EPOCH.fullmatch(raw or b"")
    if found is None or int(found[1]) > 255 or int(found[2]) > now_ms + 86_400_000:
        return None
    return Epoch(number=int(found[1]), born_at=int(found[2]) / 1000, now=now_ms / 1000)


def _text(raw: bytes | str) -> str:
    return raw.decode() if isinstance(raw, bytes) else raw
