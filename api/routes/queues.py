"""How long a queue is, and where in it a request stands (contract/invocation.md §7)."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from api import headers, payloads, queries
from api.definitions import instant
from api.front import Front
from api.routes import functions as function_routes
from broker import invocations
from broker.activity import KEPT_MINUTES, Histogram, Minute
from broker.errors import NotFound
from broker.model import FunctionStatus, Principal, Version
from broker.ports import FURTHEST
from broker.visibility import Family, find_family, refuse_public, select
from fnqueue import wire

# Upstream stops at the first two; a function that has lost instances is when its queue matters most.
_WITH_QUEUE = frozenset(
    {FunctionStatus.ACTIVE, FunctionStatus.DEPLOYING, FunctionStatus.DEGRADING, FunctionStatus.DEGRADED}
)

MINUTES_DEFAULT = 60


async def of_function(front: Front, request: web.Request, principal: Principal) -> web.Response:
    function_id = headers.uuid(request.match_info["function_id"], field="functionId")
    versions = await _readable(front, principal, function_id)
    return await _depths(front, function_id, versions)


async def of_version(front: Front, request: web.Request, principal: Principal) -> web.Response:
    function_id, version_id = function_routes.ids(request)
    versions = await _readable(front, principal, function_id, version_id)
    return await _depths(front, function_id, versions)


async def position(front: Front, request: web.Request, principal: Principal) -> web.Response:
    request_id = headers.uuid(request.match_info["request_id"], field="requestId")
    record, found = await invocations.position(front.broker, principal, request_id)
    if not record.version_id:  # lost with a wiped store, and not yet run again: its place is not known
        raise NotFound(invocations.UNKNOWN)
    return payloads.answer(
        wire.Position(
            function_id=record.function_id,
            function_version_id=record.version_id,
            position_in_queue=min(found.rank, FURTHEST),
            queue_length=found.length,
        )
    )


async def activity(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """Of any version that is visible, deployed or not."""
    function_id, version_id = function_routes.ids(request)
    minutes = queries.integer(request.query, "minutes", absent=MINUTES_DEFAULT, least=1, most=KEPT_MINUTES)
    [version] = await _readable(front, principal, function_id, version_id)
    [found] = await front.broker.results.activity([version.id], minutes=minutes)
    return payloads.answer(
        wire.Activity(
            function_id=function_id,
            function_version_id=version_id,
            until=instant(found[-1].at + 60),
            minutes=[_minute(minute) for minute in found if minute.ends],
        )
    )


def _minute(minute: Minute) -> wire.ActivityMinute:
    return wire.ActivityMinute(
        starts_at=instant(minute.at),
        ends={state.value: count for state, count in minute.ends.items()},
        attempts=minute.attempts,
        wait=_times(minute.waits),
        run=_times(minute.runs),
        cold_start=_times(minute.cold_starts),
    )


def _times(times: Histogram) -> wire.Times | None:
    if not times.count:
        return None
    p50_s, p90_s, p99_s = (round(times.quantile(share), 3) for share in (0.5, 0.9, 0.99))
    return wire.Times(
        count=times.count,
        mean_seconds=round(times.sum_s / times.count, 3),
        p50_seconds=p50_s,
        p90_seconds=p90_s,
        p99_seconds=p99_s,
    )


async def _readable(front: Front, principal: Principal, function_id: str, version_id: str = "") -> Sequence[Version]:
    """Also for those it is shared with. Raises NotFound, Forbidden, and StateConflict when it is public."""
    family = await find_family(front.broker, function_id)
    versions = select(principal, family, version_id)
    refuse_public(principal, Family(versions=versions, sharing=family.sharing))
    return versions


async def _depths(front: Front, function_id: str, versions: Sequence[Version]) -> web.Response:
    queued = [version for version in versions if version.status in _WITH_QUEUE]
    if not queued:
        raise NotFound("the function has no queue: it is not deployed")
    loads = await front.broker.results.load([version.id for version in queued])
    queues = [
        wire.QueueDepth(
            function_version_id=version.id,
            function_name=version.name,
            function_status=version.status.value,
            queue_depth=load.queued,
            in_flight=load.running,
            oldest_age_seconds=round(load.oldest_age_s, 3),
        )
        for version, load in zip(queued, loads, strict=True)
    ]
    return payloads.answer(wire.Queues(function_id=function_id, queues=queues))
