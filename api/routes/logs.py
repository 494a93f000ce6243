"""What the instances of a version write. Upstream sends it to telemetry endpoints, and has no route for it."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import replace

from aiohttp import web

from api import auth, headers, payloads, queries
from api import events as sse
from api.definitions import instant
from api.front import Front
from api.routes import functions
from broker import instance_logs
from broker.accounts import ADMIN
from broker.instance_logs import Asked, Recent
from broker.model import EVENT_STREAM, LogBatch, Principal
from broker.visibility import find_version
from fnqueue import wire

SCOPE = "deploy_function"
TAIL_DEFAULT, MOST_TAIL = 100, 1000
LINES, DONE = "lines", "done"

_CHUNK = 200
_ID = re.compile(r"\d{1,15}-\d{1,15}", re.ASCII)


async def get(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """The last lines of the version's instances, or of one: what their containers wrote, and what their sidecars say
    about them. Of those that were stopped or died in the last hour, too, as far as their machine still has them: up to
    200 lines of 64 KiB of each of the newest 5; their last one says how it ended. On Kubernetes the platform
    has them.

    Nothing is copied while nobody asks, so that the first answer may take some seconds."""
    asked = await _asked(front, request, principal)
    asked = replace(asked, previous=queries.boolean(request.query, "previous", absent=False))
    found = await instance_logs.recent(front.broker, asked)
    ended = [
        wire.EndedInstance(instance_id=each.instance_id, ended_at=instant(each.at), cause=each.cause)
        for each in found.ended
    ]
    told = wire.InstanceLogs(lines=_lines(found.batches), unanswered=list(found.unanswered), ended=ended)
    return payloads.answer(told)


async def follow(front: Front, request: web.Request, principal: Principal) -> web.StreamResponse:
    """Server-sent events `lines`: first the last lines, then what is written, about a second later. `done`, without
    lines, when nothing of the version is deployed any more, and the stream ends.

    Who writes more than is copied, 1,000 lines or 128 KiB a second, loses lines, and a line says so. A stream that
    ends without `done` is to be opened again, with the last ID in `Last-Event-ID`, at any front end.
    """
    asked = await _asked(front, request, principal)
    after = request.headers.get(headers.LAST_EVENT_ID, "")
    if request.method == "HEAD":
        return web.Response(content_type=EVENT_STREAM)
    with front.listeners.one_more():
        resumed = _ID.fullmatch(after) is not None
        found = Recent(last_id=after) if resumed else await instance_logs.recent(front.broker, asked)
        return await sse.serve(front, request, web.StreamResponse(), _events(front, request, asked, found))


async def _events(front: Front, request: web.Request, asked: Asked, found: Recent) -> AsyncGenerator[bytes, None]:
    scope = ADMIN + SCOPE if "for_account" in request.match_info else SCOPE
    lines, after = _lines(found.batches), found.last_id
    for at in range(0, len(lines), _CHUNK):
        # Whoever comes back before the last of them gets them all again.
        yield _encoded(lines[at : at + _CHUNK], after if at + _CHUNK >= len(lines) else "")
    async with aclosing(instance_logs.follow(front.broker, asked, after=after)) as batches:
        async for batch in batches:
            await auth.still(front, request, scope)
            yield sse.KEEP_ALIVE if batch is None else _encoded(_lines([batch]), batch.id)
    yield sse.encode(DONE, wire.LogLines(lines=[]).to_json())


async def _asked(front: Front, request: web.Request, principal: Principal) -> Asked:
    """Raises NotFound: it is not there, or another account's; Forbidden; or BadRequest."""
    instance_id = request.query.get("instanceId", "")
    return Asked(
        version=await find_version(front.broker, principal, *functions.ids(request), changing=False),
        instance_id=headers.uuid(instance_id, field="instanceId") if instance_id else "",
        tail=queries.integer(request.query, "tail", absent=TAIL_DEFAULT, least=0, most=MOST_TAIL),
        since_at=queries.instant(request.query, "since"),
    )


def _lines(batches: Iterable[LogBatch]) -> list[wire.LogLine]:
    return [
        wire.LogLine(at=instant(line.at), instance_id=batch.instance_id, part=batch.part, text=line.text)
        for batch in batches
        for line in batch.lines
    ]


def _encoded(lines: list[wire.LogLine], event_id: str = "") -> bytes:
    return sse.encode(LINES, wire.LogLines(lines=lines).to_json(), event_id=event_id)
