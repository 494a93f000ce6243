"""Webhooks in one process: the reference reading of the Webhooks port."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from itertools import count

from broker.backends.memory.results import Entry, MemoryResults
from broker.model import (
    DeliveryState,
    WebhookBacklog,
    WebhookDelivery,
    WebhookFilter,
    WebhookLoan,
    WebhookPage,
    WebhookTry,
)
from broker.ports import MOST_TRIES, PAGE_SCAN
from broker.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class _Kept:
    """`place` is its own in its account, 0 until it was taken; `look_at` None: there is nothing to do for it."""

    delivery: WebhookDelivery
    until: float
    look_at: float | None
    lease: int = 0
    place: int = 0


class MemoryWebhooks:
    """Over the records of a MemoryResults."""

    def __init__(self, results: MemoryResults, settings: Settings) -> None:
        self._results = results
        self._settings = settings
        self._kept: dict[str, _Kept] = {}
        self._leases = count(1)
        self._places = count(1)

    async def take(self, *, limit: int, lease_s: float) -> tuple[list[WebhookLoan], bool]:
        self._collect()
        now = self._results.now()
        due = sorted(
            (kept for kept in self._kept.values() if kept.look_at is not None and kept.look_at <= now),
            key=lambda kept: kept.look_at or 0.0,
        )
        loans = []
        for kept in due[:limit]:
            kept.lease, kept.look_at = next(self._leases), now + lease_s
            loans.append(WebhookLoan(delivery=kept.delivery, lease=kept.lease))
            if not kept.place:
                kept.place = next(self._places)
        for account in {loan.delivery.account for loan in loans}:
            self._make_room(account)
        return loans, len(due) > limit

    async def note(self, loan: WebhookLoan, tried: WebhookTry, *, state: DeliveryState, wait_s: float = 0.0) -> bool:
        kept, now = self._find(loan.delivery.request_id), self._results.now()
        if kept is None:
            return False
        before = kept.delivery
        if noted := before.state is DeliveryState.PENDING and before.tried == loan.delivery.tried:
            last = replace(tried, number=before.tried + 1, at=now - tried.took_s)
            kept.delivery = replace(
                before,
                state=state,
                next_at=now + wait_s,
                tried=before.tried + 1,
                series=before.series + 1,
                tries=(*before.tries, last)[-MOST_TRIES:],
            )
        if kept.lease == loan.lease:
            kept.lease, kept.look_at = 0, now + wait_s if state is DeliveryState.PENDING else None
        return noted

    async def put_back(self, loan: WebhookLoan, *, wait_s: float) -> None:
        kept = self._find(loan.delivery.request_id)
        if kept is not None and kept.lease == loan.lease:
            kept.lease, kept.look_at = 0, self._results.now() + wait_s

    async def backlog(self) -> WebhookBacklog:
        self._collect()
        now = self._results.now()
        due = [kept.look_at for kept in self._kept.values() if kept.look_at is not None and kept.look_at <= now]
        return WebhookBacklog(count=len(due), late_s=now - min(due, default=now))

    async def read(self, request_id: str) -> WebhookDelivery | None:
        kept = self._find(request_id)
        return kept.delivery if kept else None

    async def page(self, account: str, wanted: WebhookFilter, *, limit: int, after: int = 0) -> WebhookPage:
        listed = [kept for kept in self._of(account) if not after or kept.place < after]
        found: list[WebhookDelivery] = []
        for looked, kept in enumerate(listed, start=1):
            if wanted.keeps(kept.delivery):
                found.append(kept.delivery)
            if len(found) == limit or looked == PAGE_SCAN:
                return WebhookPage(deliveries=tuple(found), after=kept.place)
        return WebhookPage(deliveries=tuple(found))

    async def again(self, request_id: str) -> WebhookDelivery | None:
        kept = self._find(request_id)
        if kept is None:
            return None
        now = self._results.now()
        kept.lease, kept.look_at = 0, now
        kept.delivery = replace(kept.delivery, state=DeliveryState.PENDING, series=0, next_at=now)
        return kept.delivery

    def _collect(self) -> None:
        """What ended since the last look, and not what is too old."""
        now = self._results.now()
        while self._results.announced:
            delivery = _delivery(self._results.announced.popleft())
            until = delivery.finished_at + self._settings.webhook_ttl_s
            self._kept[delivery.request_id] = _Kept(delivery=delivery, until=until, look_at=delivery.next_at)
        self._kept = {key: kept for key, kept in self._kept.items() if kept.until > now}

    def _make_room(self, account: str) -> None:
        dropped = self._of(account)[self._settings.webhooks_kept :]
        for kept in dropped:
            del self._kept[kept.delivery.request_id]
        pending = sum(kept.delivery.state is DeliveryState.PENDING for kept in dropped)
        if pending:
            logger.warning("webhooks_dropped", extra={"account": account, "count": pending})

    def _find(self, request_id: str) -> _Kept | None:
        self._collect()
        return self._kept.get(request_id)

    def _of(self, account: str) -> list[_Kept]:
        """Those that were taken, the latest first."""
        self._collect()
        of_it = [kept for kept in self._kept.values() if kept.place and kept.delivery.account == account]
        return sorted(of_it, key=lambda kept: -kept.place)


def _delivery(entry: Entry) -> WebhookDelivery:
    assert entry.callback is not None, "only what has one is announced"
    return WebhookDelivery(
        request_id=entry.id,
        account=entry.account,
        function_id=entry.function_id,
        version_id=entry.version_id,
        callback=entry.callback,
        request_state=entry.state,
        created_at=entry.created_at,
        started_at=entry.started_at,
        finished_at=entry.finished_at,
        attempts=entry.attempt,
        reason=entry.reason,
        status_code=entry.outcome.status if entry.outcome else 0,
        timings=entry.timings,
        next_at=entry.finished_at,
    )
