"""Webhooks on Redis: a hash beside each record that ended, one sorted set of when to look at which request, and one per
account to find them by."""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from broker.backends.redis import keys, scripts
from broker.backends.redis.connection import Connection
from broker.backends.redis.results import RedisResults, parse_numbers, reading
from broker.errors import RecordDamaged
from broker.model import (
    Callback,
    DeliveryState,
    Record,
    RequestState,
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

_BATCH = 250
# Of one account, made room for at once.
_MOST_DROPPED = 100
_MEMBER_BYTES = 16
# What has not ended is looked at again after a quarter of its age, within these, and when it is due.
_LOOK_AT_LEAST_S = 60.0
_LOOK_AT_MOST_S = 300.0
_DUE_AGAIN_S = 5.0
# Of a request that is over, and of which there is nothing more to tell.
_DONE = ""


class RedisWebhooks:
    """Opened by `broker.backends.redis.store`."""

    def __init__(self, connection: Connection, settings: Settings, results: RedisResults) -> None:
        self._connection = connection
        self._results = results
        self._ttl_ms = int(settings.webhook_ttl_s * 1000)
        self._kept = settings.webhooks_kept

    async def take(self, *, limit: int, lease_s: float) -> tuple[list[WebhookLoan], bool]:
        [[now_ms, lease, *members]] = await self._connection.run(
            scripts.WEBHOOK_TAKE.call((keys.WEBHOOKS,), limit, int(lease_s * 1000))
        )
        if not members:
            return [], False
        now = int(now_ms) / 1000
        ids = {_id(member): member for member in members if len(member) == _MEMBER_BYTES}
        found = await self._read_all(list(ids))
        unknown = [each for each, delivery in found.items() if delivery is None]
        found, waits = await self._look(found, unknown, now)
        loans = []
        for each, delivery in found.items():
            if delivery is None:
                continue
            if isinstance(delivery, RecordDamaged) or delivery.state is not DeliveryState.PENDING:
                waits[each] = _DONE
            elif delivery.next_at > now:
                waits[each] = int((delivery.next_at - now) * 1000)
            else:
                loans.append(WebhookLoan(delivery=delivery, lease=int(lease)))
        strange = [member for member in members if len(member) != _MEMBER_BYTES]
        returned = [*((ids[each], wait) for each, wait in waits.items()), *((member, _DONE) for member in strange)]
        if returned:
            parts = (part for pair in returned for part in pair)
            await self._connection.run(scripts.WEBHOOK_RETURN.call((keys.WEBHOOKS,), int(lease), *parts))
        await self._file([loan.delivery for loan in loans if loan.delivery.tried == 0])
        return loans, len(members) == limit

    async def note(self, loan: WebhookLoan, tried: WebhookTry, *, state: DeliveryState, wait_s: float = 0.0) -> bool:
        delivery, wait_ms = loan.delivery, int(wait_s * 1000)
        noted, _ = await self._connection.run(
            scripts.WEBHOOK_NOTE.call(
                (keys.delivery(delivery.request_id),),
                delivery.tried,
                int(tried.took_s * 1000),
                tried.status,
                tried.error,
                state,
                wait_ms,
                MOST_TRIES,
            ),
            scripts.WEBHOOK_RETURN.call(
                (keys.WEBHOOKS,),
                loan.lease,
                _member(delivery.request_id),
                wait_ms if state is DeliveryState.PENDING else _DONE,
            ),
            durable=True,
        )
        return bool(noted)

    async def put_back(self, loan: WebhookLoan, *, wait_s: float) -> None:
        await self._connection.run(
            scripts.WEBHOOK_RETURN.call(
                (keys.WEBHOOKS,), loan.lease, _member(loan.delivery.request_id), int(wait_s * 1000)
            )
        )

    async def backlog(self) -> WebhookBacklog:
        [[count, late_ms]] = await self._connection.run(scripts.WEBHOOK_BACKLOG.call((keys.WEBHOOKS,)))
        return WebhookBacklog(count=int(count), late_s=int(late_ms) / 1000)

    async def read(self, request_id: str) -> WebhookDelivery | None:
        found = (await self._read_all([request_id]))[request_id]
        if isinstance(found, RecordDamaged):
            raise found
        return found

    async def page(self, account: str, wanted: WebhookFilter, *, limit: int, after: int = 0) -> WebhookPage:
        found: list[WebhookDelivery] = []
        looked, batch = 0, limit
        while looked < PAGE_SCAN:
            batch = min(batch, PAGE_SCAN - looked)
            highest = f"({after}" if after else "+inf"
            place = keys.deliveries(account)
            [entries] = await self._connection.run(
                ("ZRANGE", place, highest, "-inf", "BYSCORE", "REV", "LIMIT", 0, batch, "WITHSCORES")
            )
            ids = {_id(member): int(score) for member, score in entries}
            gone = []
            for each, delivery in (await self._read_all(list(ids))).items():
                after = ids[each]
                if delivery is None:
                    gone.append(_member(each))
                elif not isinstance(delivery, RecordDamaged) and wanted.keeps(delivery):
                    found.append(delivery)
                    if len(found) == limit:
                        break
            if gone:
                await self._connection.run(("ZREM", place, *gone))
            if len(found) == limit:
                break
            if len(entries) < batch:
                after = 0
                break
            looked, batch = looked + batch, _BATCH
        return WebhookPage(deliveries=tuple(found), after=after)

    async def again(self, request_id: str) -> WebhookDelivery | None:
        # The first is what counts; if that is all that happens, the auditor sees to the second.
        there, _ = await self._connection.run(
            scripts.WEBHOOK_AGAIN.call((keys.delivery(request_id),)),
            scripts.WEBHOOK_DUE.call((keys.WEBHOOKS,), _member(request_id)),
            durable=True,
        )
        return await self.read(request_id) if there else None

    async def _look(
        self, found: Mapping[str, WebhookDelivery | RecordDamaged | None], unknown: Sequence[str], now: float
    ) -> tuple[dict[str, WebhookDelivery | RecordDamaged | None], dict[str, int | str]]:
        """Those of which there is nothing to tell yet: what there is by now, and when to look again. A look ends a
        request that is overdue."""
        waits: dict[str, int | str] = {}
        records = dict(zip(unknown, await self._results.glances(unknown), strict=True))
        over = [each for each, record in records.items() if record is None or record.state.terminal]
        # Once more: one that ended between the two looks has one now.
        told = await self._read_all(over)
        for each, record in records.items():
            if told.get(each) is None:
                waits[each] = _DONE if record is None or record.state.terminal else _wait_ms(record, now)
        return {**found, **told}, waits

    async def _file(self, fresh: Sequence[WebhookDelivery]) -> None:
        """Among those of their accounts, which drop their oldest."""
        if not fresh:
            return
        accounts = {delivery.account: 0 for delivery in fresh}
        await self._connection.run(
            *(
                # Trimmed below instead, where the deliveries go too.
                scripts.FILE.call(
                    (keys.deliveries(delivery.account),), _member(delivery.request_id), 0, 2**31, self._ttl_ms
                )
                for delivery in fresh
            )
        )
        counts = await self._connection.run(*(("ZCARD", keys.deliveries(account)) for account in accounts))
        for account, count in zip(accounts, counts, strict=True):
            if (excess := int(count) - self._kept) > 0:
                await self._drop(account, min(excess, _MOST_DROPPED))

    async def _drop(self, account: str, count: int) -> None:
        place = keys.deliveries(account)
        [oldest] = await self._connection.run(("ZRANGE", place, 0, count - 1))
        ids = [_id(member) for member in oldest]
        states = await self._connection.each(*(("HMGET", keys.delivery(each), "d") for each in ids))
        told = Counter(state[0] for state in states if not isinstance(state, RecordDamaged))
        await self._connection.run(*(("DEL", keys.delivery(each)) for each in ids), ("ZREM", place, *oldest))
        if told[DeliveryState.PENDING.encode()]:
            logger.warning(
                "webhooks_dropped", extra={"account": account, "count": told[DeliveryState.PENDING.encode()]}
            )

    async def _read_all(self, request_ids: Sequence[str]) -> dict[str, WebhookDelivery | RecordDamaged | None]:
        if not request_ids:
            return {}
        replies = await self._connection.each(
            *(("HMGET", keys.delivery(each), *_FIELDS) for each in request_ids), durable=True
        )
        return {each: _parse(each, reply) for each, reply in zip(request_ids, replies, strict=True)}


_FIELDS = ("C", "a", "f", "v", "s", "c", "b", "e", "m", "I", "u", "d", "x", "k", "j", "L")


def _parse(request_id: str, reply: Sequence[Any] | RecordDamaged) -> WebhookDelivery | RecordDamaged | None:
    if isinstance(reply, RecordDamaged) or reply[0] is None:
        return None if not isinstance(reply, RecordDamaged) else reply
    try:
        with reading(request_id):
            return _read(request_id, reply)
    except RecordDamaged as damaged:
        logger.error("webhook_unreadable", extra={"request_id": request_id})
        return damaged


def _read(request_id: str, reply: Sequence[bytes]) -> WebhookDelivery:
    callback, account, request_state = (reply[at].decode() for at in (0, 1, 4))
    accepted, started, ended = (int(part) / 1000 for part in reply[5:8])
    _, states, url = callback.split(" ")
    status_code, timings = parse_numbers(reply[9])
    return WebhookDelivery(
        request_id=request_id,
        account=account,
        function_id=keys.unpacked(reply[2]),
        version_id=keys.unpacked(reply[3]),
        callback=Callback(url=url, events=() if states == "*" else tuple(states.split(","))),
        request_state=RequestState(request_state),
        created_at=accepted,
        started_at=started,
        finished_at=ended,
        attempts=int(reply[10]),
        reason=reply[8].decode(),
        status_code=status_code,
        timings=timings,
        state=DeliveryState(reply[11].decode()),
        next_at=int(reply[12]) / 1000,
        tried=int(reply[13] or 0),
        series=int(reply[14] or 0),
        tries=tuple([_try(*each) for each in orjson.loads(reply[15] or b"[]")]),
    )


def _try(number: int, at_ms: int, took_ms: int, status: int, error: str) -> WebhookTry:
    return WebhookTry(number=number, at=at_ms / 1000, took_s=took_ms / 1000, status=status, error=error)


def _wait_ms(record: Record, now: float) -> int:
    """At most until it is due; one that is held past that ends whenever its lease does."""
    wait_s = min(max(_LOOK_AT_LEAST_S, (now - record.created_at) / 4), _LOOK_AT_MOST_S)
    left_s = record.due_at - now
    return int(min(wait_s, left_s if left_s > 0 else _DUE_AGAIN_S) * 1000) + 1


def _member(request_id: str) -> bytes:
    return uuid.UUID(request_id).bytes


def _id(member: bytes) -> str:
    return str(uuid.UUID(bytes=member))
