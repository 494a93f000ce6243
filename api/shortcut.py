"""The way of plain invocations and polls past the router and the middlewares: most of what a front end is asked.

It leads through the same functions in the same order, and leaves out what only other requests need: finding the route
among two hundred, CORS, functions that are addressed by host or header, `Expect`. Whatever is not plain goes through
the application. docs/decisions/0035-short-way.md says what for.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Mapping
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.abc import AbstractStreamWriter

from api.answers import Answer
from api.figures import ROUTE
from api.front import Front
from api.middleware import complete, failed, note_gone
from api.routes import invocations, transparent

Serve = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Told = Answer | web.StreamResponse
Take = Callable[[Front, web.Request, Mapping[str, str]], Awaitable[Told]]

_ID = "[0-9a-fA-F-]{36}"
_INVOKED = re.compile(rf"/v2/nvcf/pexec/functions/({_ID})(?:/versions/({_ID}))?")
_POLLED = re.compile(rf"/v2/nvcf/pexec/status/({_ID})")
_INVOKE, _POLL = "/v2/nvcf/pexec/functions/{function_id}", "/v2/nvcf/pexec/status/{request_id}"
_INVOKE_VERSION = f"{_INVOKE}/versions/{{version_id}}"
_REASONS = {status.value: status.phrase for status in HTTPStatus}


def past(front: Front, application: Serve) -> Serve:
    """Serves what is plain, and has `application` serve the rest."""

    def serve(request: web.BaseRequest) -> Awaitable[web.StreamResponse]:
        assert isinstance(request, web.Request), "it was made by an application"
        path = request.raw_path
        if request.method == hdrs.METH_POST and (found := _INVOKED.fullmatch(path)):
            function_id, version_id = found.groups()
            named = (
                {"function_id": function_id, "version_id": version_id} if version_id else {"function_id": function_id}
            )
            if _plain(front, request):
                request[ROUTE] = _INVOKE_VERSION if version_id else _INVOKE
                return _serve(front, request, invocations.accept, named)
        elif request.method == hdrs.METH_GET and (found := _POLLED.fullmatch(path)) and _plain(front, request):
            request[ROUTE] = _POLL
            return _serve(front, request, invocations.look_up, {"request_id": found[1]})
        return application(request)

    return serve


def _plain(front: Front, request: web.Request) -> bool:
    arrived = request.headers
    return not (
        hdrs.ORIGIN in arrived
        or hdrs.EXPECT in arrived
        or hdrs.TRANSFER_ENCODING in arrived
        or hdrs.UPGRADE in arrived
        or request.version != HttpVersion11
        or transparent.is_addressed(request)
        or front.connections.met(request.protocol) is not None
    )


async def _serve(front: Front, request: web.Request, take: Take, named: Mapping[str, str]) -> web.StreamResponse:
    started_at = time.perf_counter()
    try:
        try:
            found = await take(front, request, named)
        except Exception as error:  # noqa: BLE001  the outermost: nothing of it may reach the client
            found = failed(request, error)
    except BaseException:
        note_gone(front, request, started_at)
        raise
    response = _response(found) if isinstance(found, Answer) else found
    complete(front, request, response, started_at)
    return response


def _response(answer: Answer) -> web.StreamResponse:
    status = answer.status
    if status < 200 or status in (204, 304) or status not in _REASONS:
        return invocations.respond(answer)
    return _Whole(answer)


class _Whole(web.StreamResponse):
    """A response with a body, which aiohttp's has in a fifth of the time that it needs for any kind: it cannot be
    compressed, chunked or empty by its status, and nobody listens to its beginning."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(status=answer.status, reason=_REASONS[answer.status], headers=answer.headers)
        self._content = answer.body
        self._closes = False

    @property
    def keep_alive(self) -> bool:
        return not self._closes

    def force_close(self) -> None:
        self._closes = True

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        self._closes = self._closes or not request.keep_alive
        found, writer = self.headers, request.writer
        found[hdrs.CONTENT_LENGTH] = str(len(self._content))
        if self._content:
            found.setdefault(hdrs.CONTENT_TYPE, "application/octet-stream")
        found[hdrs.DATE] = _date(int(time.time()))
        if self._closes:
            found[hdrs.CONNECTION] = "close"
        await writer.write_headers(f"HTTP/1.1 {self.status} {self.reason}", found)
        await writer.write_eof(self._content)
        return writer

    async def write_eof(self, data: bytes = b"") -> None:
        """It went out with the headers."""


@lru_cache(maxsize=1)
def _date(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)
