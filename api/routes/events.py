"""What happens to a request, as it happens."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import orjson
from aiohttp import web

from api import answers, auth, headers
from api import events as sse
from api.definitions import eta
from api.front import Front
from api.routes.invocations import status_url
from broker import events, invocations
from broker.accounts import INVOKE
from broker.estimates import Estimate
from broker.events import Event, Kind, Seen
from broker.model import EVENT_STREAM, Principal, Progress, Record
from broker.ports import FURTHEST
from fnqueue import wire


async def follow(front: Front, request: web.Request, principal: Principal) -> web.StreamResponse:
    """Server-sent events of one request: `queued` with its place, and again whenever that changes, `started` with the
    number of the attempt, `progress` for each update of its container, and `done`, after which the stream ends.

    A stream that ends without `done` is to be opened again, with the last ID in `Last-Event-ID`, at any front end.
    """
    request_id = headers.uuid(request.match_info["request_id"], field="requestId")
    seen = Seen.parse(request.headers.get(headers.LAST_EVENT_ID, ""))
    record = await invocations.find(front.broker, principal, request_id)
    response = web.StreamResponse(headers={headers.REQUEST_ID: record.id})
    if seen.done:
        # Browsers take this for the end; they would come back after any other answer.
        return web.Response(status=204, headers=response.headers)
    if request.method == "HEAD":
        return web.Response(content_type=EVENT_STREAM, headers=response.headers)
    with front.listeners.one_more():
        return await sse.serve(front, request, response, _events(front, request, record, seen))


async def _events(front: Front, request: web.Request, record: Record, seen: Seen) -> AsyncGenerator[bytes, None]:
    async with aclosing(events.follow(front.broker.results, front.places, record, seen)) as found:
        async for event in found:
            await auth.still(front, request, INVOKE)
            yield await encoded(front, request, event) if event is not None else sse.KEEP_ALIVE


async def encoded(front: Front, request: web.Request, event: Event) -> bytes:
    """A place in the queue has no ID: it is told anew to whoever comes back."""
    event_id = "" if event.kind is Kind.QUEUED else str(event.seen)
    estimate = None
    if event.kind in (Kind.QUEUED, Kind.STARTED):
        estimate = await front.outlooks.estimate(
            replace(event.record, rank=event.position.rank if event.position else 0)
        )
    return sse.encode(event.kind, _data(front, request, event, estimate).to_json(), event_id=event_id)


def _data(front: Front, request: web.Request, event: Event, estimate: Estimate | None) -> wire.RequestEvent:
    record, place = event.record, event.position
    progress, done = event.progress or Progress(percent=0), event.kind is Kind.DONE
    location = status_url(front, request, record.id)
    answer = answers.answer(record, status_url=location, download_url=lambda *_: location)
    return wire.RequestEvent(
        request_id=record.id,
        status=answer.headers[headers.STATUS],
        position_in_queue=min(place.rank, FURTHEST) if place else None,
        queue_length=place.length if place else None,
        eta=eta(estimate),
        attempt=record.attempt if event.kind in (Kind.STARTED, Kind.PROGRESS) else None,
        percent_complete=progress.percent if event.progress else None,
        partial_response=orjson.loads(progress.partial),
        status_code=answer.status if done else None,
        location=location if done else None,
        detail=record.reason or None if done else None,
    )
