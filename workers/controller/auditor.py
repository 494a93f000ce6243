"""The auditor: looks at everything, again and again and a little at a time, and mends what does not agree.

RabbitMQ says what was accepted, Redis where it stands, S3 holds what is large. Each can forget, and a process can die
between two of them. What follows from that is mended here, by one controller, with what is safe to do twice:

- overdue records that are in no order any more are expired, and places without a request are taken away;
- of messages whose records are all lost, the first are restored, so that an instance is started to claim them;
- requests that were written down and never published are set aside: nothing is kept running for them, and they expire
  when they are due. Only their submitter may abandon them, or still publish them (PROTOCOL §2.4);
- objects in the blob store that no request will ask for any more are deleted.

Dead letters are the undertaker's.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from broker.errors import RecordDamaged
from broker.model import Blob, Record, RequestState
from broker.ports import Broker, Delivery
from broker.settings import ControllerSettings

logger = logging.getLogger(__name__)

# 2,000 keys a second at most.
RECORDS_AT_ONCE = 200
PAUSE_S = 0.1
# A front end may take this many accept timeouts between record and message, until nobody waits for it any more.
SUBMITTED_WITHIN = 6
STRAY_AT_LEAST_S = 60.0
ASIDE_AT_ONCE = 1000
# Of messages that nobody knows: enough to bring an instance, which finds the others. Each is up to 16 MiB.
RESTORED_AT_ONCE = 8
OBJECTS_AT_ONCE = 100
OBJECTS_PAUSE_S = 1.0
# Between an object and the record or message that names it, and for clocks that differ.
OBJECT_MARGIN_S = 3600.0
UNFINISHED_S = 86_400.0

_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_BODY = re.compile(rf"inputs/.+/({_UUID})")
_RESULT = re.compile(rf"results/.+/({_UUID})/{_UUID}\.zip")
_PROBE = re.compile(rf"doctor/({_UUID})")
# A dead request may be started once more, with its body.
_BODY_SPENT = (
    RequestState.FULFILLED,
    RequestState.ERRORED,
    RequestState.EXPIRED,
    RequestState.TIMED_OUT,
    RequestState.CANCELLED,
    RequestState.ABANDONED,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conservation:
    """What became of every request whose record is there: accepted = queued + running + done + dead.

    `accepted` counts all records but the tombstones of refused ones; one that cannot be read is in none of the other
    figures, and then they do not add up. `waiting`, `taken`, `messages` and `dead_letters` were counted apart from the
    records: the places of the deployed versions in Redis, and what is ready in their queues. While requests come and
    go the figures are of slightly different moments.
    """

    counted_at: float
    accepted: int
    queued: int
    running: int
    done: int
    dead: int
    waiting: int
    taken: int
    messages: int
    dead_letters: int

    @property
    def balanced(self) -> bool:
        return self.accepted == self.queued + self.running + self.done + self.dead


@dataclass(slots=True, kw_only=True)
class Mended:
    """What this controller mended since it leads."""

    expired: int = 0
    placed: int = 0
    straightened: int = 0
    restored: int = 0
    set_aside: int = 0
    objects_deleted: int = 0
    uploads_discarded: int = 0


class Auditor:
    """Three walks, each a `step` for a loop and the pause after it. What it remembers it can do without: another leader
    begins anew. `leads` says whether this controller may still act; `stray_s` is after how long nobody publishes a
    request any more that was written down, None: as follows from the settings."""

    def __init__(
        self, broker: Broker, settings: ControllerSettings, *, leads: Callable[[], bool], stray_s: float | None = None
    ) -> None:
        if stray_s is None:
            stray_s = max(STRAY_AT_LEAST_S, SUBMITTED_WITHIN * settings.accept_timeout_s)
        self.mended = Mended()
        self.conservation: Conservation | None = None
        self.versions = Versions(broker, self.mended, leads, rest_s=settings.audit_s, stray_s=stray_s)
        self.records = Records(broker, self.mended, self._balance, rest_s=settings.audit_s)
        self.objects = Objects(broker, self.mended, leads, rest_s=settings.audit_objects_s)

    def _balance(self, states: Counter[RequestState], unreadable: int) -> None:
        """Of one pass through all records."""
        alive_or_dead = (RequestState.QUEUED, RequestState.RUNNING, RequestState.DEAD, RequestState.ABANDONED)
        done = sum(count for state, count in states.items() if state not in alive_or_dead)
        looks = self.versions.looks.values()
        self.conservation = Conservation(
            counted_at=time.time(),
            accepted=states.total() - states[RequestState.ABANDONED] + unreadable,
            queued=states[RequestState.QUEUED],
            running=states[RequestState.RUNNING],
            done=done,
            dead=states[RequestState.DEAD],
            waiting=sum(look.waiting for look in looks),
            taken=sum(look.taken for look in looks),
            messages=sum(look.messages for look in looks),
            dead_letters=self.versions.dead_letters,
        )
        level = logging.DEBUG if self.conservation.balanced else logging.ERROR
        logger.log(level, "audited", extra=asdict(self.conservation) | asdict(self.mended))


class Walk(ABC):
    """A pass of short steps, and a rest after it."""

    def __init__(self, *, pause_s: float, rest_s: float) -> None:
        self._pause_s = min(pause_s, rest_s)
        self._rest_s = rest_s
        self._resting = False

    @abstractmethod
    async def step(self) -> None:
        """The next part. Raises Unavailable."""

    def pause_s(self) -> float:
        """Until the next step."""
        return self._rest_s if self._resting else self._pause_s


class Records(Walk):
    """Counts the records, and expires those that are overdue; `counted` is told of each whole pass."""

    def __init__(
        self, broker: Broker, mended: Mended, counted: Callable[[Counter[RequestState], int], None], *, rest_s: float
    ) -> None:
        super().__init__(pause_s=PAUSE_S, rest_s=rest_s)
        self._upkeep = broker.upkeep
        self._mended = mended
        self._counted = counted
        self._cursor = 0
        self._states: Counter[RequestState] = Counter()
        self._unreadable = 0

    async def step(self) -> None:
        """The next part. Raises StoreUnavailable; then the pass begins anew, since the cursor of a store that was
        started again leads anywhere."""
        at, self._cursor = self._cursor, 0
        if at == 0:
            self._states, self._unreadable = Counter(), 0
        seen = await self._upkeep.survey(at, limit=RECORDS_AT_ONCE)
        self._cursor = seen.cursor
        self._states.update(seen.states)
        self._unreadable += seen.unreadable
        self._mended.expired += seen.expired
        self._mended.placed += seen.placed
        self._resting = seen.cursor == 0
        if self._resting:
            self._counted(self._states, self._unreadable)


@dataclass(slots=True, kw_only=True)
class Look:
    """What the last look at a version found. `unknown`: messages wait, and no request is on the books. `unpublished`:
    requests wait on the books, and no message."""

    waiting: int
    taken: int
    messages: int

    @property
    def unknown(self) -> bool:
        return self.messages > 0 and self.waiting + self.taken == 0

    @property
    def unpublished(self) -> bool:
        return self.messages == 0 and self.waiting > 0


class Versions(Walk):
    """Compares the queue of each deployed version with its books. What does not agree may only be on its way, so that
    it has to be seen twice, a pass apart, before anything is done about it."""

    def __init__(
        self, broker: Broker, mended: Mended, leads: Callable[[], bool], *, rest_s: float, stray_s: float
    ) -> None:
        super().__init__(pause_s=PAUSE_S, rest_s=rest_s)
        self._broker = broker
        self._mended = mended
        self._leads = leads
        self._stray_s = stray_s
        self._todo: list[str] = []
        self.looks: dict[str, Look] = {}
        self.dead_letters = 0

    async def step(self) -> None:
        """The next version. Raises Unavailable; then the next pass looks at it again."""
        if not self._todo:
            await self._begin()
        if self._todo:
            version_id = self._todo.pop()
            self._resting = not self._todo
            await self._audit(version_id)
        else:
            self._resting = True

    async def _begin(self) -> None:
        rows = await self._broker.catalog.deployments.list()
        # Of an undeployed version nothing is to be kept: what its queue holds is cancelled, and must not be on loan.
        self._todo = [row.item.version_id for row in rows if not row.item.undeployed]
        known = set(self._todo)
        self.looks = {version_id: look for version_id, look in self.looks.items() if version_id in known}
        dead = await self._broker.queue.depth("")
        self.dead_letters = dead or 0

    async def _audit(self, version_id: str) -> None:
        before, now = self.looks.pop(version_id, None), await self._look(version_id)
        if now is None:
            return
        if now.unknown and before and before.unknown:
            await self._restore(version_id)
        elif now.unpublished and before and before.unpublished:
            await self._set_aside(version_id)
        self.looks[version_id] = now
        await self._straighten(version_id)

    async def _look(self, version_id: str) -> Look | None:
        """None without a queue, which is made again elsewhere."""
        depth = await self._broker.queue.depth(version_id)
        if depth is None:
            return None
        # After the messages: what was published meanwhile is on the books already.
        (load,) = await self._broker.results.load([version_id])
        return Look(waiting=load.queued, taken=load.running, messages=depth)

    async def _restore(self, version_id: str) -> None:
        """Borrow the first messages and put their requests on the books, so that somebody comes for them. What is over
        is acknowledged, as a worker would."""
        borrowed: list[Delivery] = []
        try:
            while len(borrowed) < RESTORED_AT_ONCE and self._leads():
                delivery = await self._broker.queue.take(version_id)
                if delivery is None:
                    break
                borrowed.append(delivery)
                state = await self._broker.upkeep.restore(delivery.job)
                if state is RequestState.DEAD:
                    await borrowed.pop().reject()
                elif state.terminal:
                    await borrowed.pop().ack()
        finally:
            for delivery in borrowed:
                await delivery.requeue()
        if borrowed:
            self._mended.restored += len(borrowed)
            logger.warning("requests_restored", extra={"version_id": version_id, "count": len(borrowed)})

    async def _set_aside(self, version_id: str) -> None:
        if not self._leads():
            return
        count = await self._broker.upkeep.set_aside(version_id, older_than_s=self._stray_s, limit=ASIDE_AT_ONCE)
        if count:
            self._mended.set_aside += count
            logger.warning("requests_set_aside", extra={"version_id": version_id, "count": count})

    async def _straighten(self, version_id: str) -> None:
        skip, more = 0, True
        while more and self._leads():
            changed, more = await self._broker.upkeep.straighten(version_id, skip=skip, limit=RECORDS_AT_ONCE)
            self._mended.straightened += changed
            skip += max(0, RECORDS_AT_ONCE - changed)  # what was taken away has made room
            if more:
                await asyncio.sleep(PAUSE_S)


class Objects(Walk):
    """Deletes bodies and results that no request will ask for any more. Assets are their owners' to delete."""

    def __init__(self, broker: Broker, mended: Mended, leads: Callable[[], bool], *, rest_s: float) -> None:
        super().__init__(pause_s=OBJECTS_PAUSE_S, rest_s=rest_s)
        self._broker = broker
        self._mended = mended
        self._leads = leads
        # Past these ages no message is left that could bring back a lost record, and no URL of a result works any more.
        bodies_s = broker.settings.request_deadline_s + OBJECT_MARGIN_S
        self._kinds = (
            Kind("inputs/", _BODY, bodies_s, self._body_is_spent),
            Kind("results/", _RESULT, bodies_s + broker.settings.result_ttl_s, self._result_is_spent),
            Kind("doctor/", _PROBE, OBJECT_MARGIN_S, self._body_is_spent),
        )
        self._at = 0
        self._after = ""

    async def step(self) -> None:
        """The next part of one kind. Raises Unavailable."""
        kind = self._kinds[self._at]
        blobs = await self._broker.blobs.page(kind.prefix, after=self._after, limit=OBJECTS_AT_ONCE)
        self._resting = False
        if blobs:
            await self._clear(kind, blobs)
            self._after = blobs[-1].key
            return
        self._at, self._after = (self._at + 1) % len(self._kinds), ""
        if self._at == 0:
            self._resting = True
            self._mended.uploads_discarded += await self._broker.blobs.discard_unfinished(older_than_s=UNFINISHED_S)

    async def _clear(self, kind: Kind, blobs: Sequence[Blob]) -> None:
        named = [(blob, match[1]) for blob in blobs if (match := kind.pattern.fullmatch(blob.key))]
        now = (await self._broker.results.epoch(fresh=True)).now
        records = await asyncio.gather(*(self._glance(request_id) for _, request_id in named))
        for (blob, request_id), record in zip(named, records, strict=True):
            if isinstance(record, RecordDamaged):
                continue
            spent = False
            if record is not None:
                with suppress(RecordDamaged):
                    spent = await kind.is_spent(blob, record)
            else:
                spent = now - blob.modified_at > kind.kept_s and not await self._kept_for(request_id, kind)
            if spent and self._leads():
                await self._broker.blobs.discard(blob.key)
                self._mended.objects_deleted += 1
                logger.info("object_deleted", extra={"request_id": request_id, "key": blob.key})

    async def _kept_for(self, request_id: str, kind: Kind) -> bool:
        """Whether a dead letter, which outlives its record, has the object as its input."""
        try:
            return kind.pattern is _BODY and await self._broker.dead_letters.glance(request_id) is not None
        except RecordDamaged:
            return True

    async def _glance(self, request_id: str) -> Record | RecordDamaged | None:
        try:
            return await self._broker.results.glance(request_id)
        except RecordDamaged as damaged:
            return damaged

    async def _body_is_spent(self, blob: Blob, record: Record) -> bool:
        return record.state in _BODY_SPENT

    async def _result_is_spent(self, blob: Blob, record: Record) -> bool:
        """Of an attempt whose result came too late: the first terminal record stands."""
        if not record.state.terminal:
            return False
        whole = await self._broker.results.read(record.id) if record.status_code else record
        return whole is not None and (whole.outcome is None or whole.outcome.blob_key != blob.key)


@dataclass(frozen=True, slots=True)
class Kind:
    """Objects under `prefix`, whose keys name a request. Without a record they are kept until they are so old; with
    one, `is_spent` tells."""

    prefix: str
    pattern: re.Pattern[str]
    kept_s: float
    is_spent: Callable[[Blob, Record], Awaitable[bool]]
