"""Calls whose bytes go through a channel: WebSockets, and bodies that flow in both directions at once.

Such a call is a request with a record as every other, and waits in the queue like one. It cannot be answered later,
though, nor tried again: its other half is the connection that it came on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NoReturn

from aiohttp import ClientError, HttpVersion11, StreamReader, WSMsgType, web
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDict

from api import answers, auth, headers, problems
from api.answers import Speaker
from api.calls import Accepting, Interrupted
from api.channels import FAREWELL_S, STOPPING, Line, Stopped
from api.front import Front
from api.middleware import SERVER
from api.notes import notes_of
from api.problems import TimedOut, WorkerLost
from broker import channels, invocations, tasks
from broker.accounts import INVOKE
from broker.channels import CHUNK_BYTES, Close, CloseCode, Failure, Garbled, Head, Kind
from broker.errors import BadRequest, FnqueueError, Forbidden, Overloaded, PayloadTooLarge, Unauthenticated
from broker.invocations import Submission
from broker.model import Outcome, Record, RequestState, Version

logger = logging.getLogger(__name__)

CLIENT_LEFT = "its client has gone"
STOPPED = "the server that held its connection was stopped"
# Between a claim and the attachment: longer than the sidecar tries (workers.channel).
_ATTACH_S = 7.0
# What proxies log for a request whose client did not wait for its answer.
_CLIENT_CLOSED = 499
_MESSAGES = {
    WSMsgType.TEXT: Kind.TEXT,
    WSMsgType.BINARY: Kind.BINARY,
    WSMsgType.PING: Kind.PING,
    WSMsgType.PONG: Kind.PONG,
}
_OPCODES = {kind: opcode for opcode, kind in _MESSAGES.items()}


class _ClientGone(Exception):
    """The caller broke off; `reason` says how."""

    def __init__(self, reason: str = CLIENT_LEFT) -> None:
        super().__init__(reason)
        self.reason = reason


class _Broken(Exception):
    """The sidecar broke off, and told why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


async def converse(
    front: Front, request: web.Request, submission: Submission, version: Version, *, wait_s: float, speaker: Speaker
) -> web.StreamResponse:
    """Accept the call, hold it for up to `wait_s` seconds until a sidecar attaches to it, then be the connection's
    other end until it is over.

    Raises:
        BadRequest: it cannot be answered in the way that it asks for.
        TimedOut: no sidecar came for it. It has been taken out of the queue.
        Overloaded: too many such calls, or this server is stopping.
        WorkerLost: the worker died before it had said anything.
    """
    websocket = is_websocket(request)
    _check(request, websocket, wait_s, front.settings.max_streamed_body_bytes)
    with front.channels.line() as line:
        channel = line.channel(websocket=websocket, body_bytes=_declared(request, websocket))
        submission = replace(submission, channel=channel, streaming=False, idempotency_key="")
        record = await _attached(front, request, line, submission, version, wait_s)
        if not line.attached:
            return _ended(record)
        notes_of(request).record = record = replace(record, state=RequestState.RUNNING)
        call = _Call(front=front, request=request, line=line, record=record, speaker=speaker)
        try:
            return await (_WebSocket(call) if websocket else _Exchange(call)).run()
        finally:
            call.log()


def is_websocket(request: web.Request) -> bool:
    return "websocket" in request.headers.get("Upgrade", "").lower()


def _check(request: web.Request, websocket: bool, wait_s: float, limit_bytes: int) -> None:
    if websocket and not web.WebSocketResponse().can_prepare(request):
        raise BadRequest("this is not a WebSocket handshake of version 13 (RFC 6455 §4.2.1)", field="Upgrade")
    if wait_s <= 0:
        raise BadRequest("a call that streams both ways cannot be answered later", field=headers.PREFER)
    if (request.content_length or 0) > limit_bytes:
        raise _too_large(limit_bytes)


def _too_large(limit_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than {limit_bytes} bytes", limit_bytes=limit_bytes)


def _declared(request: web.Request, websocket: bool) -> int:
    if websocket or not request.can_read_body:
        return 0
    return -1 if request.content_length is None else request.content_length


# -- until a sidecar is there -------------------------------------------------------------------


async def _attached(
    front: Front, request: web.Request, line: Line, submission: Submission, version: Version, wait_s: float
) -> Record:
    """The record once a sidecar has attached to its call, or once it has ended without."""
    accepting = Accepting(front.calls, done=lambda: None)
    try:
        with front.calls.waiting():
            record = await _first(front, line, submission, version, wait_s, accepting)
    except Interrupted:
        line.revoke()
        line.release(STOPPED)
        if accepting.begun:
            notes_of(request).record = record = await accepting.record()
            await invocations.withdraw(front.broker, record, reason=STOPPED)
        raise Overloaded(STOPPING) from None
    except asyncio.CancelledError:
        line.revoke()
        line.release(CLIENT_LEFT)
        if accepting.begun:
            front.calls.spawn(_call_off(front, accepting))
        raise
    notes_of(request).record = record
    if line.attached or record.state.terminal:
        return record
    line.revoke()
    record = await invocations.withdraw(front.broker, record)
    if record.state is RequestState.CANCELLED:
        raise TimedOut(f"no worker was free for it within {wait_s:g} s")
    return record


async def _first(
    front: Front, line: Line, submission: Submission, version: Version, wait_s: float, accepting: Accepting
) -> Record:
    """The record when a sidecar has attached, or at the end of the wait for one."""
    invoking = asyncio.ensure_future(
        invocations.invoke(front.broker, submission, version, wait_s=wait_s, spawn=accepting.spawn)
    )
    attaching = asyncio.ensure_future(line.attachment())
    try:
        await asyncio.wait({invoking, attaching}, return_when=asyncio.FIRST_COMPLETED)
        if line.attached:
            return await accepting.record()
        record = invoking.result()
        if record.state is RequestState.RUNNING:
            await asyncio.wait({attaching}, timeout=_ATTACH_S)
        return record
    finally:
        for task in (invoking, attaching):
            task.cancel()
        await asyncio.gather(invoking, attaching, return_exceptions=True)


async def _call_off(front: Front, accepting: Accepting) -> Record:
    return await invocations.withdraw(front.broker, await accepting.record(), reason=CLIENT_LEFT)


def _ended(record: Record) -> web.Response:
    """A call that was over before a sidecar had attached: cancelled, overdue, or nobody could run it."""
    if record.state is RequestState.ERRORED:
        # Its caller is still here, so it is not this process that has gone.
        logger.warning("never_attached", extra={"request_id": record.id, "version_id": record.version_id})
    answer = answers.answer(record, status_url="", download_url=lambda *_: "")
    return web.Response(status=answer.status, headers=answer.headers, body=answer.body)


# -- while it is there --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """A call that a sidecar has attached to."""

    front: Front
    request: web.Request
    line: Line
    record: Record
    speaker: Speaker
    since: float = field(default_factory=time.monotonic)

    def headers(self, head: Head) -> CIMultiDict[str]:
        """All of the answer's: what is sent at once, no middleware can add to."""
        found = answers.begun(self.record, Outcome(status=head.status, headers=head.headers), self.speaker).headers
        for name, value in head.headers:
            if name.lower() == "content-length" and value.isascii() and value.isdigit():
                found["Content-Length"] = value
        found["Server"] = SERVER
        if (taken := notes_of(self.request).taken) is not None:
            found.update(headers.rate_limit(taken.quotas))
        return found

    def problem(self, failure: Failure) -> web.Response:
        """The sidecar's own, where the container has not answered yet."""
        marked = answers.begun(self.record, Outcome(status=failure.status), self.speaker).headers
        return problems.respond(failure.status, failure.problem, extra=marked)

    async def permitted(self) -> NoReturn:
        """Raises _ClientGone once its client is not let in any more."""
        try:
            await auth.watched(self.front, self.request, INVOKE)
        except (Unauthenticated, Forbidden):
            raise _ClientGone("its client is not let in any more") from None

    def abort(self, reason: str) -> None:
        """End the request as cancelled, and have its container let go; the store tells the sidecar, too, where the
        channel is blocked."""
        self.line.release(reason)
        self.front.calls.spawn(invocations.withdraw(self.front.broker, self.record, reason=reason))

    def cut(self) -> None:
        """Break the connection off, so that nobody takes what came for the whole."""
        transport = self.request.transport
        if transport is None:
            return
        if self.request.version < HttpVersion11:
            transport.abort()  # an older client reads up to the end, whatever the end is
        else:
            transport.close()

    def log(self) -> None:
        facts = {
            "request_id": self.record.id,
            "function_id": self.record.function_id,
            "version_id": self.record.version_id,
            "account": self.record.account,
            "duration_ms": round((time.monotonic() - self.since) * 1000, 1),
            "received_bytes": self.line.received_bytes,
            "sent_bytes": self.line.sent_bytes,
        }
        logger.info("channel", extra=facts)


async def _head(line: Line) -> Head:
    """Raises _Broken, WorkerLost."""
    kind, payload = await line.receive()
    if kind is not Kind.HEAD:
        _unexpected(kind, payload)
    try:
        return channels.unpack_head(payload)
    except Garbled as exc:
        raise WorkerLost("the worker that ran this call cannot be understood") from exc


def _unexpected(kind: Kind, payload: bytes) -> NoReturn:
    """Raises _Broken, WorkerLost."""
    try:
        if kind is Kind.FAIL:
            raise _Broken(channels.unpack_failure(payload))
        raise Garbled(kind.name)
    except Garbled as exc:
        raise WorkerLost("the worker that ran this call cannot be understood") from exc


class _Exchange:
    """An HTTP request and its answer, each as it comes."""

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._line = call.line
        self._response: web.StreamResponse | None = None
        self._whole = False

    async def run(self) -> web.StreamResponse:
        """Raises what is to be answered in place of an answer."""
        call = self._call
        try:
            async with tasks.beside(self._upload(), self._line.watch(), call.permitted()):
                return await self._download()
        except asyncio.CancelledError:
            if not self._whole:
                call.abort(CLIENT_LEFT)
            raise
        except _ClientGone as gone:
            call.abort(gone.reason)
            call.cut()
            return self._response or web.Response(status=_CLIENT_CLOSED)
        except _Broken as broken:
            return self._cut(broken) if self._response else call.problem(broken.failure)
        except Stopped as stopped:
            call.abort(str(stopped))
            return self._cut(stopped.error)
        except BadRequest as bad:
            call.abort(str(bad))
            return self._cut(bad)
        except WorkerLost as lost:
            return self._cut(lost)

    def _cut(self, error: Exception) -> web.StreamResponse:
        if self._response is None:
            raise error
        self._call.cut()
        return self._response

    async def _upload(self) -> None:
        """The caller's body to the sidecar."""
        content, sent_bytes = self._call.request.content, 0
        limit_bytes = self._call.front.settings.max_streamed_body_bytes
        while chunk := await self._read(content):
            sent_bytes += len(chunk)
            if sent_bytes > limit_bytes:
                raise _too_large(limit_bytes)
            await self._line.send(Kind.DATA, chunk)
        await self._line.send(Kind.END)

    async def _read(self, content: StreamReader) -> bytes:
        try:
            return await content.read(CHUNK_BYTES)
        except (ClientError, HttpProcessingError, web.RequestPayloadError, ConnectionError) as exc:
            if self._call.request.transport is None:
                raise _ClientGone from exc
            raise BadRequest("failed to read request body: it ended early or is not well-formed") from exc

    async def _download(self) -> web.StreamResponse:
        """The container's answer to the caller."""
        head = await _head(self._line)
        self._response = response = web.StreamResponse(status=head.status, headers=self._call.headers(head))
        try:
            await response.prepare(self._call.request)
            while not self._whole:
                kind, payload = await self._line.receive()
                if kind is Kind.DATA:
                    await response.write(payload)
                    self._line.touch()
                elif kind is Kind.END:
                    self._whole = True
                else:
                    _unexpected(kind, payload)
            await response.write_eof()
        except ConnectionError as exc:
            raise _ClientGone from exc
        return response


class _WebSocket:
    """Messages in both directions, and the handshake as the container answers it."""

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._line = call.line
        self._client: web.WebSocketResponse[bool] | None = None
        self._close = Close()

    async def run(self) -> web.StreamResponse:
        """Raises what is to be answered where the handshake was not."""
        call = self._call
        try:
            async with tasks.beside(self._line.watch(), call.permitted()):
                head = await _head(self._line)
                if head.status != 101:
                    return web.Response(status=head.status, headers=call.headers(head))
                self._client = await self._open(head)
                await tasks.either(self._up(self._client), self._down(self._client))
        except asyncio.CancelledError:
            call.abort(CLIENT_LEFT)
            raise
        except _ClientGone as gone:
            call.abort(gone.reason)
            if self._client is None:
                return web.Response(status=_CLIENT_CLOSED)
            self._close = channels.closing(CloseCode.GOING_AWAY, gone.reason)
        except _Broken as broken:
            if self._client is None:
                return call.problem(broken.failure)
            self._close = channels.closing(broken.failure.code, broken.failure.detail)
        except Stopped as stopped:
            call.abort(str(stopped))
            self._unless_open(stopped.error)
            self._close = channels.closing(stopped.code, str(stopped))
        except WorkerLost as lost:
            self._unless_open(lost)
            self._close = channels.closing(CloseCode.INTERNAL_ERROR, str(lost))
        return await self._say_goodbye()

    def _unless_open(self, error: FnqueueError) -> None:
        if self._client is None:
            raise error

    async def _open(self, head: Head) -> web.WebSocketResponse[bool]:
        """No extension is agreed on: messages cross unchanged, and none can unfold to more than its size."""
        client = web.WebSocketResponse(
            timeout=FAREWELL_S,
            autoclose=False,
            autoping=False,
            compress=False,
            protocols=(head.protocol,) if head.protocol else (),
            max_msg_size=self._call.front.settings.max_message_bytes + 1,
            decode_text=False,
        )
        client.headers.update(self._call.headers(head))
        try:
            await client.prepare(self._call.request)
        except ConnectionError as exc:
            raise _ClientGone from exc
        return client

    async def _up(self, client: web.WebSocketResponse[bool]) -> None:
        """From the caller, until it closes."""
        while True:
            got = await client.receive()
            self._line.touch()
            if (kind := _MESSAGES.get(got.type)) is not None:
                await self._line.send(kind, got.data)
            elif got.type is WSMsgType.CLOSE:
                self._close = channels.closing(got.data, got.extra or "")
                return await self._line.send(Kind.CLOSE, channels.pack_close(self._close))
            elif got.type is WSMsgType.ERROR:
                raise _ClientGone(f"its client was closed with {client.close_code}: {got.data}")
            else:
                raise _ClientGone

    async def _down(self, client: web.WebSocketResponse[bool]) -> None:
        """From the container, until it closes."""
        while True:
            kind, payload = await self._line.receive()
            if (opcode := _OPCODES.get(kind)) is not None:
                with suppress(ConnectionError):  # what the caller has sent before tells more
                    await client.send_frame(payload, opcode)
                self._line.touch()
            elif kind is Kind.CLOSE:
                self._close = _close_of(payload)
                return
            else:
                _unexpected(kind, payload)

    async def _say_goodbye(self) -> web.StreamResponse:
        assert self._client is not None, "only what was opened is closed"
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(FAREWELL_S):
                await self._client.close(code=self._close.code, message=self._close.reason)
        self._call.cut()
        return self._client


def _close_of(payload: bytes) -> Close:
    try:
        return channels.unpack_close(payload)
    except Garbled as exc:
        raise WorkerLost("the worker that ran this call cannot be understood") from exc
