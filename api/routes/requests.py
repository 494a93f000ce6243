"""What can be asked of a request beside waiting for it: the list, a receipt, and its cancelling."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from api import answers, cursors, headers, payloads, queries
from api.definitions import eta, instant
from api.front import Front
from broker import invocations
from broker.model import Attempt, AttemptEnd, Principal, Record, RequestFilter, RequestState
from fnqueue import wire

PAGE_DEFAULT = 50
PAGE_MAX = 200
SILENT = "its worker fell silent"
STATUSES = tuple(state.value for state in RequestState if state is not RequestState.ABANDONED)


async def list_requests(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """Those of the caller's account that are kept still. A page looks at a bounded number of them, so that one with
    filters may be short, or empty, and have a next one."""
    query = request.query
    wanted = RequestFilter(
        function_id=headers.uuid(query["functionId"], field="functionId") if "functionId" in query else "",
        version_id=(
            headers.uuid(query["functionVersionId"], field="functionVersionId") if "functionVersionId" in query else ""
        ),
        states=frozenset(RequestState(word) for word in queries.choices(query, "status", STATUSES)),
        since=queries.instant(query, "createdAfter"),
        until=queries.instant(query, "createdBefore"),
    )
    limit = queries.integer(query, "limit", absent=PAGE_DEFAULT, least=1, most=PAGE_MAX)
    after = cursors.place(query.get("cursor", ""))
    found = await invocations.page(front.broker, principal, wanted, limit=limit, after=after)
    return payloads.answer(
        wire.RequestList(
            requests=[wire.RequestSummary(**_summary(record)) for record in found.records],
            cursor=cursors.cursor(found.after) if found.after else None,
        )
    )


async def get(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """How it went: every attempt, and where the time went."""
    request_id = headers.uuid(request.match_info["request_id"], field="requestId")
    record = await invocations.receipt(front.broker, principal, request_id)
    answer = payloads.answer(
        wire.RequestReceipt(
            **_summary(record),
            deadline_at=instant(record.deadline_at),
            queue_deadline_at=instant(record.queue_deadline_at) if record.queue_deadline_at else None,
            run_timeout_seconds=record.run_timeout_s or None,
            attempts=[_attempt(each) for each in record.attempts],
            timings=_timings(record),
            eta=eta(await front.outlooks.estimate(record)),
        )
    )
    answer.headers[headers.REQUEST_ID] = record.id
    return answer


async def cancel(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """202 as often as it is asked: from now on no attempt starts, and one that runs is told to stop."""
    request_id = headers.uuid(request.match_info["request_id"], field="requestId")
    record = await invocations.cancel(front.broker, principal, request_id)
    answer = payloads.answer(wire.Cancelled(request_id=record.id, status=record.state.value), status=202)
    answer.headers[headers.REQUEST_ID] = record.id
    return answer


def _summary(record: Record) -> dict[str, Any]:
    return {
        "request_id": record.id,
        "function_id": record.function_id or None,
        "function_version_id": record.version_id or None,
        "status": record.state.value,
        "status_code": record.status_code or None,
        "reason": record.reason or None,
        "cause": record.cause or None,
        "redriven_as": record.redriven_as or None,
        "created_at": instant(record.created_at),
        "started_at": instant(record.started_at) if record.started_at else None,
        "finished_at": instant(record.finished_at) if record.finished_at else None,
    }


def _attempt(attempt: Attempt) -> wire.RequestAttempt:
    return wire.RequestAttempt(
        number=attempt.number,
        instance_id=attempt.worker,
        outcome=attempt.end.value,
        reason=attempt.reason or (SILENT if attempt.end is AttemptEnd.LOST else None),
        started_at=instant(attempt.started_at),
        ended_at=instant(attempt.ended_at) if attempt.ended_at else None,
    )


def _timings(record: Record) -> wire.RequestTimings | None:
    phases = {name: round(seconds, 3) for name, seconds in answers.phases(record).items()}
    if not phases:
        return None
    return wire.RequestTimings(
        queue_seconds=phases["queue"],
        cold_start_seconds=phases.get("coldstart"),
        retries_seconds=phases.get("retries"),
        input_seconds=phases.get("input"),
        container_seconds=phases.get("container"),
        upload_seconds=phases.get("upload"),
        total_seconds=phases["total"],
    )
