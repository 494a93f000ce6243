"""The way of plain invocations and polls past aiohttp's server, the router and the middlewares: most of what a front
end is asked.

It leads through the same functions in the same order, and leaves out what only other requests need: finding the route
among two hundred, CORS, functions that are addressed by host or header, `Expect`, responses of any kind. Whatever is
not plain goes through the application. docs/decisions/0035-short-way.md and 0051-one-task-for-a-request.md say what
for.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from email.utils import formatdate
from functools import lru_cache, partial
from http import HTTPStatus

from aiohttp import ClientConnectionResetError, HttpVersion11, hdrs, web
from aiohttp.http_parser import RawRequestMessage
from aiohttp.http_writer import _serialize_headers

from api.answers import Answer
from api.connections import Connection, Serve
from api.front import Front
from api.headers import Head
from api.middleware import close_after, complete, failed, note_gone, tell
from api.notes import NOTES, Notes
from api.routes import invocations, transparent

Told = Answer | web.StreamResponse
Take = Callable[[Front, web.Request, Mapping[str, str]], Awaitable[Told]]

_ID = "[0-9a-fA-F-]{36}"
_INVOKED = re.compile(rf"/v2/nvcf/pexec/functions/({_ID})(?:/versions/({_ID}))?")
_POLLED = re.compile(rf"/v2/nvcf/pexec/status/({_ID})")
_INVOKE, _POLL = "/v2/nvcf/pexec/functions/{function_id}", "/v2/nvcf/pexec/status/{request_id}"
_INVOKE_VERSION = f"{_INVOKE}/versions/{{version_id}}"
_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}"
    for status in HTTPStatus
    if status.value >= 200 and status not in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)
}


def of(front: Front) -> Callable[[Connection, RawRequestMessage], Serve | None]:
    """What serves a request that is plain, None for another."""

    def choose(connection: Connection, message: RawRequestMessage) -> Serve | None:
        if message.method == hdrs.METH_POST:
            route, named = _invoked(message.path)
            take: Take = invocations.accept
        elif message.method == hdrs.METH_GET and (found := _POLLED.fullmatch(message.path)):
            route, named = _POLL, {"request_id": found[1]}
            take = invocations.look_up
        else:
            return None
        if not route:
            return None
        head = front.heads.of(message.headers, message.raw_headers)
        if not _plain(front, connection, message, head):
            return None
        return partial(_serve, front, head, take, route, named)

    return choose


@lru_cache(maxsize=1024)
def _invoked(path: str) -> tuple[str, Mapping[str, str]]:
    """The route of an invocation, and what the path names; "" for another path."""
    found = _INVOKED.fullmatch(path)
    if found is None:
        return "", {}
    function_id, version_id = found.groups()
    if not version_id:
        return _INVOKE, {"function_id": function_id}
    return _INVOKE_VERSION, {"function_id": function_id, "version_id": version_id}


def _plain(front: Front, connection: Connection, message: RawRequestMessage, head: Head) -> bool:
    return not (
        head.survey.apart
        or message.version != HttpVersion11
        or transparent.is_own_host(message.headers.get("Host", ""))
        or front.connections.met(connection) is not None
    )


async def _serve(
    front: Front, head: Head, take: Take, route: str, named: Mapping[str, str], request: web.Request
) -> bool:
    """Answer; returns whether the connection may be kept."""
    started_at = time.perf_counter()
    notes = request[NOTES] = Notes()
    notes.route, notes.head, notes.task = route, head, asyncio.current_task()
    try:
        try:
            found = await take(front, request, named)
        except Exception as error:  # noqa: BLE001  the outermost: nothing of it may reach the client
            found = failed(request, error)
    except BaseException:
        note_gone(front, request, started_at)
        raise
    if isinstance(found, Answer):
        line = _LINES.get(found.status)
        if line is not None:
            return await _answer(front, request, notes, found, line, started_at)
        found = invocations.respond(found)
    complete(front, request, found, started_at)
    _, lost = await request.protocol.finish_response(request, found, None)
    return not lost and bool(found.keep_alive)


async def _answer(
    front: Front, request: web.Request, notes: Notes, answer: Answer, line: str, started_at: float
) -> bool:
    """As aiohttp's response with a body does, in a fifth of the time that it needs for any kind: this one cannot be
    compressed, chunked or empty by its status, and nobody listens to its beginning."""
    closes = close_after(front, notes, answer.headers) or not request.keep_alive
    tell(front.metrics, request, notes, answer.status, started_at)
    found, content = answer.headers, answer.body
    found[hdrs.CONTENT_LENGTH] = str(len(content))
    if content:
        found.setdefault(hdrs.CONTENT_TYPE, "application/octet-stream")
    found[hdrs.DATE] = _date(int(time.time()))
    if closes:
        found[hdrs.CONNECTION] = "close"
    transport = request.transport
    if transport is None or transport.is_closing():
        raise ClientConnectionResetError("the client has gone")
    transport.write(_serialize_headers(line, found) + content)
    if request.protocol.writing_paused:
        await request.writer.drain()
    return not closes


@lru_cache(maxsize=1)
def _date(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)
