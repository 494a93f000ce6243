"""The sidecar's end of a channel: it calls the front end that holds the caller's connection, then the container, and
passes on what each of them sends (broker.channels).

Nothing is read from one side before the other has taken what was read before, so that a slow reader slows the writer
down and memory stays flat.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp import AddrInfoType, ClientWSTimeout, WSMsgType

from broker import channels
from broker.channels import Close, CloseCode, Failure, Garbled, Head, Kind, Message
from broker.model import Channel, Job, Outcome
from broker.settings import SidecarSettings
from workers import loops
from workers.inference import (
    CLOSE_TIMEOUT_S,
    AttemptFailed,
    ContainerLost,
    Inference,
    Refused,
    Response,
    Translated,
    connection_fault,
    problem,
    stay,
)

logger = logging.getLogger(__name__)

GONE = "The front end that held the caller's connection has gone, and the connection with it"
UNREACHABLE = "The front end that held the caller's connection has gone, or the worker cannot reach it"
ENDED = "The request was ended before its function had answered"
STOPPED = "The worker was stopped before its function had answered"
UNCLOSED = "The function's container closed the WebSocket without a word"

DIAL_S = 5.0
_FAREWELL_S = 1.0
_LAST_WORDS_S = 1.0
_MESSAGES = {
    WSMsgType.TEXT: Kind.TEXT,
    WSMsgType.BINARY: Kind.BINARY,
    WSMsgType.PING: Kind.PING,
    WSMsgType.PONG: Kind.PONG,
}
_OPCODES = {kind: opcode for opcode, kind in _MESSAGES.items()}


class ClientLeft(Exception):
    """The front end ends the call, and says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class FrontEndGone(AttemptFailed):
    """Nobody is left who could be given an answer."""

    def __init__(self, job: Job, detail: str = GONE) -> None:
        super().__init__(problem(job, 500, detail))


def stopped(job: Job) -> Outcome:
    """For a call that this sidecar could not finish before it had to stop."""
    return problem(job, 503, STOPPED)


class Dialer:
    """Opens channels to front ends; opened and closed as an async context manager."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(force_close=True, limit=0, socket_factory=_kept_alive)
        self._session = aiohttp.ClientSession(
            connector=connector, cookie_jar=aiohttp.DummyCookieJar(), middlewares=(stay,)
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    @asynccontextmanager
    async def line(self, job: Job) -> AsyncIterator[Line]:
        """The channel of `job`, not opened yet. What ends the body early is told to the front end.

        Raises:
            AttemptFailed: in place of ContainerLost, too, for there will be no other attempt.
        """
        assert self._session is not None, "Dialer is used outside of its context"
        line = Line(job, self._session)
        try:
            yield line
        except AttemptFailed as failed:
            await line.fail(failed.outcome)
            raise
        except ContainerLost as lost:
            outcome = connection_fault(job)
            await line.fail(outcome)
            raise AttemptFailed(outcome) from lost
        except asyncio.CancelledError:
            await line.fail(stopped(job), code=CloseCode.SERVICE_RESTART)
            raise
        finally:
            await line.close()


class Line:
    """One end of a channel."""

    def __init__(self, job: Job, session: aiohttp.ClientSession) -> None:
        self.job = job
        self._session = session
        self._socket: aiohttp.ClientWebSocketResponse[bool] | None = None
        self._said_all = False
        self.answered_bytes = 0
        """Of the container's body or messages, as far as they were handed on."""

    @property
    def channel(self) -> Channel:
        assert self.job.channel is not None, "a line is for a job with a channel"
        return self.job.channel

    async def open(self) -> None:
        """Call the front end, once: the token is good for one call. Raises FrontEndGone."""
        channel = self.channel
        try:
            async with asyncio.timeout(DIAL_S):
                self._socket = await self._session.ws_connect(
                    channel.url,
                    headers={"Authorization": f"Bearer {channel.token}"},
                    timeout=ClientWSTimeout(ws_close=CLOSE_TIMEOUT_S),
                    autoclose=False,
                    max_msg_size=channels.MESSAGE_MAX_BYTES + 1,
                )
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as exc:
            facts = {"request_id": self.job.id, "url": channel.url, "cause": type(exc).__name__}
            logger.warning("front_end_gone", extra=facts)
            raise FrontEndGone(self.job, UNREACHABLE) from None  # the cause shows the token to whoever prints it

    async def receive(self) -> Message:
        """Raises FrontEndGone, ClientLeft."""
        assert self._socket is not None, "the line is not open"
        got = await self._socket.receive()
        if got.type is not WSMsgType.BINARY:
            self._said_all = True
            raise FrontEndGone(self.job)
        try:
            found = channels.parse(got.data)
        except Garbled as exc:
            raise FrontEndGone(self.job) from exc
        if found.kind is Kind.ABORT:
            self._said_all = True
            raise ClientLeft(found.payload.decode(errors="replace"))
        return found

    async def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Returns when there is room for more. Raises FrontEndGone."""
        assert self._socket is not None, "the line is not open"
        try:
            await self._socket.send_bytes(channels.message(kind, payload))
        except ConnectionError as exc:
            await asyncio.sleep(_LAST_WORDS_S)  # who receives is told more: what was sent before, why it ended
            raise FrontEndGone(self.job) from exc
        self._said_all = kind in (Kind.END, Kind.CLOSE, Kind.FAIL)
        if kind in (Kind.DATA, Kind.TEXT, Kind.BINARY):
            self.answered_bytes += len(payload)

    async def fail(self, outcome: Outcome, *, code: CloseCode = CloseCode.INTERNAL_ERROR) -> None:
        """Tell the front end, if it can be told, that there is nothing but this."""
        if self._socket is None or self._said_all:
            return
        failure = Failure(status=outcome.status, problem=outcome.body, code=code)
        with suppress(FrontEndGone, TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                await self.send(Kind.FAIL, channels.pack_failure(failure))

    async def close(self) -> None:
        if self._socket is None:
            return
        await self.fail(problem(self.job, 410, ENDED))
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._socket.close()


async def converse(
    line: Line,
    inference: Inference,
    settings: SidecarSettings,
    headers: Sequence[tuple[str, str]],
    *,
    budget_s: float,
) -> Outcome:
    """Pass on what the caller and the container send, over an open line, until either is done.

    What there is to keep of it: a status, 204 where all went well, because the bytes are with the caller already.

    Raises:
        ClientLeft, ContainerLost, RunTimedOut.
        AttemptFailed: the front end has gone, or the container does not speak HTTP.
    """
    kind = _WebSocket if line.channel.websocket else _Exchange
    status = await kind(line, inference, headers).run(settings, budget_s=budget_s)
    return Outcome(status=status if status >= 400 else 204)


class _Exchange:
    """A request whose body comes over the line, and its answer."""

    def __init__(self, line: Line, inference: Inference, headers: Sequence[tuple[str, str]]) -> None:
        self._line = line
        self._inference = inference
        self._headers = headers
        self._chunks: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1)

    async def run(self, settings: SidecarSettings, *, budget_s: float) -> int:
        """The container's status."""
        length = self._line.channel.body_bytes
        async with (
            loops.beside(self._up()),
            self._inference.exchange(
                self._line.job,
                [*self._headers, ("Content-Length", str(length))] if length > 0 else self._headers,
                body=self._body() if length else None,
                budget_s=budget_s,
                attempt=settings.max_attempts,
            ) as response,
        ):
            await self._line.send(Kind.HEAD, channels.pack_head(_head(response)))
            async for chunk in response.chunks():
                await self._line.send(Kind.DATA, chunk)
        await self._line.send(Kind.END)
        return response.status

    async def _up(self) -> None:
        """Takes the caller's body, and sees when the line ends before its time."""
        while True:
            kind, payload = await self._line.receive()
            if kind is Kind.DATA and payload:
                await self._chunks.put(payload)
            elif kind is Kind.END:
                await self._chunks.put(b"")
            else:
                raise FrontEndGone(self._line.job)

    async def _body(self) -> AsyncIterator[bytes]:
        yield b""  # or the head would wait for the first piece, and a container may want to speak first
        while chunk := await self._chunks.get():
            yield chunk


def _head(response: Response) -> Head:
    length = (("Content-Length", str(response.length)),) if response.length is not None else ()
    return Head(status=response.status, headers=(*response.headers, *length))


class _WebSocket:
    """Messages in both directions. No extension is agreed on with the container, so they cross unchanged."""

    def __init__(self, line: Line, inference: Inference, headers: Sequence[tuple[str, str]]) -> None:
        self._line = line
        self._inference = inference
        offered = [value for name, value in headers if name.lower() == "sec-websocket-protocol"]
        self._protocols = [name.strip() for value in offered for name in value.split(",") if name.strip()]
        self._headers = [pair for pair in headers if not pair[0].lower().startswith("sec-websocket-")]
        self._opened: asyncio.Future[aiohttp.ClientWebSocketResponse[bool]] = asyncio.Future()
        self._close = Close(code=CloseCode.GOING_AWAY)
        self._last_words: list[tuple[Kind, bytes]] = []
        self._status = 101

    async def run(self, settings: SidecarSettings, *, budget_s: float) -> int:
        """The status of the container's answer to the handshake."""
        try:
            with Translated(self._line.job):
                await loops.either(self._up(), self._down(settings.max_message_bytes))
            for word in self._last_words:
                # Only now, when nobody takes the front end's closing of the line for its loss.
                await self._line.send(*word)
        finally:
            if self._opened.done():
                with suppress(TimeoutError, ConnectionError):
                    async with asyncio.timeout(CLOSE_TIMEOUT_S):
                        await self._opened.result().close(code=self._close.code, message=self._close.reason)
        return self._status

    async def _up(self) -> None:
        """From the caller, until it closes; and sees when the line ends before its time."""
        while True:
            kind, payload = await self._line.receive()
            if (opcode := _OPCODES.get(kind)) is not None:
                with suppress(ConnectionError):  # what the container has sent before tells more
                    await self._opened.result().send_frame(payload, opcode)
            elif kind is Kind.CLOSE:
                self._close = channels.unpack_close(payload)
                return
            else:
                raise FrontEndGone(self._line.job)

    async def _down(self, largest_bytes: int) -> None:
        """The handshake, then from the container, until it closes."""
        line = self._line
        try:
            container = await self._inference.connect(
                line.job, self._headers, protocols=self._protocols, largest_bytes=largest_bytes
            )
        except Refused as refused:
            self._status = refused.status
            head = Head(status=refused.status, headers=tuple(pair for pair in refused.headers if _about_no_body(pair)))
            self._last_words = [(Kind.HEAD, channels.pack_head(head)), (Kind.END, b"")]
            return
        self._opened.set_result(container)
        await line.send(Kind.HEAD, channels.pack_head(Head(status=101, protocol=container.protocol or "")))
        while True:
            got = await container.receive()
            if (kind := _MESSAGES.get(got.type)) is not None:
                await line.send(kind, got.data)
            elif got.type is WSMsgType.CLOSE:
                self._close = channels.closing(got.data, got.extra or "")
                self._last_words = [(Kind.CLOSE, channels.pack_close(self._close))]
                return
            else:
                raise AttemptFailed(problem(line.job, 500, UNCLOSED, source="inference-connection"))


def _about_no_body(header: tuple[str, str]) -> bool:
    return not header[0].lower().startswith("content-")


def _kept_alive(address: AddrInfoType) -> socket.socket:
    family, kind, protocol, _, _ = address
    made = socket.socket(family=family, type=kind, proto=protocol)
    channels.keep_alive(made)
    return made
