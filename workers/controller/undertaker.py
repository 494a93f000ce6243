"""No request dies silently (PROTOCOL §2.4, P4): every dead letter becomes a terminal record with a reason, whose input
is kept if it is `dead`, and what no message stands for any more is expired by the sweep."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from broker import dead_letters
from broker.errors import RecordDamaged, StoreUnavailable, Unavailable
from broker.model import Claim, DeadCause, Job, Record, RequestState, Verdict
from broker.ports import Broker, Delivery
from broker.telemetry.metrics import DEAD_LETTERS, ENDED
from workers.loops import insist

logger = logging.getLogger(__name__)

PREFETCH = 32
SWEEP_LIMIT = 1000
UNDEPLOYED = "function version was undeployed"

# A request that a live worker holds is looked at again this often, and its message given back after a while: a
# message must not stay on loan for longer than the broker allows.
_LOOK_AGAIN_S = 5.0
_LOOK_AT_LEAST_S = 0.05
HOLD_S = 300.0


@dataclass(frozen=True, slots=True)
class End:
    """What becomes of a request that is not terminal yet; `cause` is set for one that becomes dead."""

    state: RequestState
    reason: str
    cause: str = ""


_ENDS: Mapping[str, End] = {
    "expired": End(RequestState.EXPIRED, "its deadline passed while it was queued"),
    "delivery_limit": End(
        RequestState.DEAD, "it was handed to workers too often without ending", DeadCause.DELIVERY_LIMIT
    ),
    "rejected": End(RequestState.DEAD, "a worker refused it", DeadCause.REJECTED),
    "maxlen": End(RequestState.DEAD, "the queue was full", DeadCause.QUEUE_FULL),
}


async def serve(broker: Broker) -> None:
    """Bury the dead letters as they come, PREFETCH at once, until cancelled."""
    async with broker.queue.dead_letters(prefetch=PREFETCH) as deliveries, asyncio.TaskGroup() as graves:
        async for delivery in deliveries:
            if delivery.fault:
                graves.create_task(disown(broker, delivery))
                continue
            end = _ENDS.get(delivery.death)
            if end is None:
                end = End(RequestState.DEAD, f"dead-lettered: {delivery.death}", DeadCause.OTHER)
            graves.create_task(bury(broker, delivery, end))


async def bury(broker: Broker, delivery: Delivery, end: End, *, hold_s: float = HOLD_S) -> bool:
    """End the delivery's request, keep its input if it is dead, and acknowledge it. A worker that runs it may finish
    first, and then its result stands; False when that was not done within `hold_s`: the message was given back."""
    try:
        async with asyncio.timeout(hold_s):
            claim = await _end(broker, delivery, end)
            if claim.state is RequestState.DEAD:
                await _keep(broker, delivery)
    except TimeoutError:
        await delivery.requeue()
        return False
    except asyncio.CancelledError:
        await delivery.requeue()
        raise
    await delivery.ack()
    labels = delivery.job.function_id, delivery.job.version_id
    broker.metrics.count(ENDED, *labels, claim.state.value)
    if claim.state is RequestState.DEAD:
        broker.metrics.count(DEAD_LETTERS, *labels, await _cause(broker, delivery.job, end))
    logger.info(
        "request_buried",
        extra={"request_id": delivery.job.id, "version_id": delivery.job.version_id, "state": claim.state.value},
    )
    return True


async def disown(broker: Broker, delivery: Delivery) -> None:
    """End the request that a message with a fault stood for, if it waits, from what its record says of it: nothing of
    the message is believed, nor kept as a dead letter. One that runs has another message, and a request that has no
    record is made none."""
    request_id, fault = delivery.job.id, delivery.fault

    async def look() -> Record | None:
        with suppress(RecordDamaged):
            return await broker.results.glance(request_id)
        return None

    async def end(job: Job) -> Claim:
        reason = f"its message was refused: {fault}"
        return await broker.results.end(job, RequestState.DEAD, reason=reason, cause=DeadCause.REJECTED)

    try:
        record = await insist(look, on=StoreUnavailable, name="disown")
        if record is not None and record.state is RequestState.QUEUED:
            await insist(partial(end, _of(record)), on=StoreUnavailable, name="disown")
    except asyncio.CancelledError:
        await delivery.requeue()
        raise
    await delivery.ack()
    logger.error("message_disowned", extra={"request_id": request_id, "cause": fault, "known": record is not None})


async def clear(broker: Broker, version_id: str) -> bool:
    """Cancel every request that is queued for an undeployed version. False when one could not be ended."""
    while delivery := await broker.queue.take(version_id):
        if not await bury(broker, delivery, End(RequestState.CANCELLED, UNDEPLOYED)):
            return False
    return True


async def sweep(broker: Broker) -> None:
    """Expire what is overdue in every version."""
    for row in await broker.catalog.versions.list():
        changed = await broker.results.sweep(row.item.id, limit=SWEEP_LIMIT)
        if changed:
            logger.info("requests_swept", extra={"version_id": row.item.id, "changed": changed})


def _of(record: Record) -> Job:
    """What the store needs to end the record's request."""
    return Job(
        id=record.id,
        account=record.account,
        function_id=record.function_id,
        version_id=record.version_id,
        subject="",
        created_at=record.created_at,
        deadline_at=record.deadline_at,
        queue_deadline_at=record.queue_deadline_at,
        digest="",
    )


async def _end(broker: Broker, delivery: Delivery, what: End) -> Claim:
    async def end() -> Claim:
        return await broker.results.end(delivery.job, what.state, reason=what.reason, cause=what.cause)

    while True:
        claim = await insist(end, on=StoreUnavailable, name="bury")
        if claim.verdict is not Verdict.HELD:
            return claim
        await asyncio.sleep(min(max(claim.wait_s, _LOOK_AT_LEAST_S), _LOOK_AGAIN_S))


async def _cause(broker: Broker, job: Job, end: End) -> str:
    """The record's, which whoever ended it before has written; that of the queue where nothing tells."""
    with suppress(Unavailable):
        if (record := await broker.results.glance(job.id)) is not None and record.cause:
            return record.cause
    return end.cause


async def _keep(broker: Broker, delivery: Delivery) -> None:
    async def keep() -> None:
        try:
            await dead_letters.keep(broker, delivery.job)
        except RecordDamaged:
            logger.exception("dead_letter_not_kept", extra={"request_id": delivery.job.id})

    await insist(keep, on=Unavailable, name="keep")
