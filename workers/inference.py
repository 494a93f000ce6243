"""The inference container: whether it is healthy, and one request per attempt, never followed and never repeated.

Everything that the container sends is untrusted (field/security.md): its status line, its headers, its body.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Self

import aiohttp
import orjson
from aiohttp import http_parser
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from broker.errors import ConfigurationError
from broker.model import Job, Outcome, RequestState
from broker.settings import SidecarSettings
from workers import loops
from workers.connections import Connections, Exchange, NotReached, Plain
from workers.probes import GrpcProbe, HttpProbe, Probe, url_of
from workers.retry_after import retry_after_s

CONNECT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 2.0
# Shorter than any server's own limit that we know of (gunicorn's 2 s), so that it is seldom first to close.
KEPT_S = 1.0
MAX_PARSED_ERROR_BYTES = 256 * 1024
SPILL_CHUNK_BYTES = 1024 * 1024
# Upstream's (contract/invocation.md §5, "Sizes").
MAX_ANSWER_HEADERS = 64
MAX_ANSWER_HEADER_BYTES = 400 * 1024

HOP_BY_HOP = frozenset(
    {
        "connection",
        "proxy-connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# They speak for the connection to the client and the server at its end.
_OURS = frozenset({"alt-svc", "clear-site-data", "date", "server", "strict-transport-security"})
# They speak for the origin, which is ours unless the container was asked in its own name, or are set by whoever sends
# the answer on.
_NOT_THE_CONTAINERS = _OURS | {
    "access-control-allow-credentials",
    "access-control-allow-origin",
    "content-length",
    "location",
    "refresh",
    "set-cookie",
    "set-cookie2",
}
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
# Where Python's phrase changed between releases: `type` must not change with the interpreter.
_PHRASES = {
    413: "Request Entity Too Large",
    416: "Requested Range Not Satisfiable",
    418: "I'm a teapot",
    422: "Unprocessable Entity",
}

CONNECTION_FAULT = "Inference connection error while making inference request"
INFERENCE_FAULT = "Internal error while making inference request"
OVERDUE = "The request was not finished before its deadline"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the container said. A body above the inline limit is in the file `spilled`, and `body` is empty."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    spilled: Path | None = None

    @property
    def failed(self) -> bool:
        return self.status >= 400

    @property
    def size_bytes(self) -> int:
        return self.spilled.stat().st_size if self.spilled else len(self.body)

    def outcome(self) -> Outcome:
        return Outcome(status=self.status, headers=self.headers, body=self.body)


class Response:
    """The head of the container's answer, and its body while it comes. Valid until `Inference.exchange` ends.

    `chunks` ends with the body; it raises what `Inference.exchange` says.
    """

    def __init__(self, job: Job, response: aiohttp.ClientResponse | Exchange) -> None:
        """Raises AttemptFailed: it is nothing that HTTP has for an answer."""
        if not 200 <= response.status <= 599:
            raise AttemptFailed(connection_fault(job))
        self._job = job
        self._response = response
        self.status = response.status
        self.length = response.content_length
        """How long the body will be, None if the container did not say."""
        self.headers = _presentable(job, response.headers.items(), response.url)

    @property
    def whole(self) -> bool:
        """Whether all of the body has arrived already."""
        return self._response.content.is_eof()

    def arrived(self) -> bytes:
        """What of the body is here already, without waiting; `chunks` goes on behind it."""
        with Translated(self._job):
            return self._response.content.read_nowait()

    async def read(self) -> bytes:
        """All of it. Raises as `chunks`."""
        return b"".join([self.arrived(), *[chunk async for chunk in self.chunks()]])

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes, in pieces of any size; who does not ask for the next one makes the container wait."""
        with Translated(self._job):
            async for chunk in self._response.content.iter_any():
                yield chunk


class ContainerLost(Exception):
    """The container refused the connection or died on us; the attempt may be repeated. `sent` tells whether
    it may have seen the request."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class ContainerBusy(Exception):
    """The container wants the request again in `wait_s`. `outcome` is what it answered."""

    def __init__(self, outcome: Outcome, wait_s: float) -> None:
        super().__init__(f"answered {outcome.status}, to be tried again in {wait_s:g} s")
        self.outcome = outcome
        self.wait_s = wait_s


class Refused(Exception):
    """The container answers, and does not open a WebSocket."""

    def __init__(self, status: int, headers: tuple[tuple[str, str], ...]) -> None:
        super().__init__(f"answered {status}")
        self.status = status
        self.headers = headers


class AttemptFailed(Exception):
    """The attempt ended without an answer of the container; `outcome` is answered in its place."""

    state = RequestState.ERRORED

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(f"answered {outcome.status}")
        self.outcome = outcome


class RunTimedOut(AttemptFailed):
    """The deadline or `run_timeout_s` came first."""

    state = RequestState.EXPIRED

    def __init__(self, job: Job) -> None:
        super().__init__(problem(job, 504, OVERDUE))


class Inference:
    """The container's HTTP client, opened and closed as an async context manager.

    The connection of a POST may be kept for the next one, as `keep_connections` says: to open one costs CPU here, and
    more in the container. The container may close it at the very moment when a job is sent. Nobody can tell then
    whether it has seen the job, and a POST must not be repeated (field/pitfalls.md §3.4): an attempt is lost. Therefore
    only a first attempt goes over a kept connection, and only where it is not the last.
    """

    def __init__(self, settings: SidecarSettings) -> None:
        self._settings = settings
        self._job_url = url_of(settings, settings.inference_port, settings.inference_url)
        grpc = settings.health_protocol == "gRPC"
        self._probe: Probe = GrpcProbe(settings) if grpc else HttpProbe(settings, self._probing)
        self._connections = Connections(
            settings.inference_host,
            settings.inference_port,
            kept_s=KEPT_S,
            connect_s=CONNECT_TIMEOUT_S,
            briefly=settings.keep_connections == "auto",
        )
        self._session: aiohttp.ClientSession | None = None
        self._sockets: aiohttp.ClientSession | None = None
        self.fault = f"{self._probe.subject} was not answered yet"
        """Why the last health check failed, '' if it did not."""
        self.silent = False
        """Whether the last health check got no answer in time, rather than a bad one or a refusal."""

    async def __aenter__(self) -> Self:
        """Raises ConfigurationError: aiohttp's parser is the one in Python, too lax for what containers send."""
        if http_parser.HttpResponseParser is http_parser.HttpResponseParserPy:
            raise ConfigurationError("aiohttp came without its HTTP parser in C; `fnqueue doctor` says how to mend it")
        self._session = _client(aiohttp.TCPConnector(force_close=True, limit=0))
        self._sockets = _client(aiohttp.TCPConnector(force_close=True, limit=0), middlewares=(stay,))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connections.close()
        for session in (self._session, self._sockets):
            if session is not None:
                await session.close()

    async def healthy(self) -> bool:
        """Whether the health check finds the container well, within `health_timeout_s`."""
        self._connections.make_way()
        found = await self._probe.check()
        self.fault, self.silent = found.fault, found.silent
        return not found.fault

    async def infer(
        self,
        job: Job,
        headers: Iterable[tuple[str, str]],
        *,
        body: bytes | Path,
        spill: Callable[[], Path],
        attempt: int = 1,
    ) -> Answer:
        """Send the job once and read the answer. A body above `max_response_bytes` is written to what `spill` names, in
        a folder that is made if need be. `attempt` decides whether a kept connection will do. Who keeps the attempt's
        lease bounds it, by cancelling.

        Outside passthrough, an answer of 400 and above comes back as a problem (contract/invocation.md §3.2).

        Raises:
            ContainerLost.
            ContainerBusy: 429 or 503 with `Retry-After`, outside passthrough, where the caller is told instead.
            AttemptFailed: what came back was not HTTP, or more than `max_artifact_bytes` of it, or too many headers.
        """
        if body and isinstance(body, bytes) and job.method == "POST":  # as `exchange`, for nearly every job
            url, plain_bytes = self._url_of(job), self._settings.max_response_bytes
            with Translated(job):
                keep = self.keeps(attempt)
                sent = await self._connections.post(url, headers, body, keep=keep, plain_bytes=plain_bytes)
            if isinstance(sent, Plain):
                shown = _presentable(job, sent.headers, url)
                answer = Answer(status=sent.status, headers=shown, body=sent.body)
            else:
                try:
                    answer = await self._read(job, Response(job, sent), spill)
                finally:
                    sent.release()
        else:
            async with self._exchange(job, headers, body, attempt) as response:
                answer = await self._read(job, response, spill)
        if answer.status < 400 or job.passthrough:
            return answer
        mapped = _mapped(job, answer)
        longest_s = self._settings.max_retry_after_s
        if wait_s := retry_after_s(answer.status, answer.headers, longest_s=longest_s):
            raise ContainerBusy(mapped.outcome(), wait_s)
        return mapped

    @asynccontextmanager
    async def exchange(
        self,
        job: Job,
        headers: Iterable[tuple[str, str]],
        *,
        body: bytes | Path | AsyncIterable[bytes] | None,
        budget_s: float,
        attempt: int = 1,
    ) -> AsyncIterator[Response]:
        """Send the job once; the head of the answer is there when the body of this context begins, which may be
        before all of a `body` that comes piece by piece was sent. `budget_s` bounds it all, and `attempt` decides
        whether a kept connection will do.

        Raises:
            ContainerLost, RunTimedOut.
            AttemptFailed: what came back was not HTTP.
        """
        budget = asyncio.timeout(budget_s)
        try:
            async with budget, self._exchange(job, headers, body, attempt) as response:
                yield response
        except TimeoutError as exc:
            if not budget.expired():
                raise
            raise RunTimedOut(job) from exc

    @asynccontextmanager
    async def _exchange(
        self,
        job: Job,
        headers: Iterable[tuple[str, str]],
        body: bytes | Path | AsyncIterable[bytes] | None,
        attempt: int,
    ) -> AsyncIterator[Response]:
        """As `exchange`, for as long as it takes."""
        file: BinaryIO | None = None
        response: aiohttp.ClientResponse | Exchange
        try:
            if job.method == "POST" and isinstance(body, bytes) and body:
                with Translated(job):
                    sent = await self._connections.post(self._url_of(job), headers, body, keep=self.keeps(attempt))
                assert isinstance(sent, Exchange), "nothing was asked for as a whole"
                response = sent
            else:
                content: bytes | BinaryIO | AsyncIterable[bytes] | None
                if isinstance(body, Path):
                    content = file = await loops.in_thread(_opened, body, "rb")
                else:
                    content = body or None  # a GET without a body has no length either
                self._connections.make_way()
                with Translated(job):
                    response = await self._client().request(
                        job.method, self._url_of(job), data=content, headers=list(headers), allow_redirects=False
                    )
            try:
                yield Response(job, response)
            finally:
                await _let_go(response)
        finally:
            if file is not None:
                file.close()

    async def connect(
        self, job: Job, headers: Iterable[tuple[str, str]], *, protocols: Sequence[str], largest_bytes: int
    ) -> aiohttp.ClientWebSocketResponse[bool]:
        """A WebSocket to where the job is for, without extensions, that answers neither ping nor close by itself and
        leaves text encoded. The caller closes it, and translates its errors (`Translated`).

        Raises:
            ContainerLost, Refused.
            AttemptFailed: what came back was not a handshake.
        """
        assert self._sockets is not None, "Inference is used outside of its context"
        self._connections.make_way()
        with Translated(job):
            try:
                return await self._sockets.ws_connect(
                    self._url_of(job),
                    method=job.method,
                    protocols=protocols,
                    headers=list(headers),
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT_S),
                    autoclose=False,
                    autoping=False,
                    max_msg_size=largest_bytes + 1,
                    decode_text=False,
                )
            except aiohttp.WSServerHandshakeError as exc:
                if not 200 <= exc.status <= 599:
                    raise
                raise Refused(exc.status, _presentable(job, (exc.headers or {}).items(), exc.request_info.url)) from exc

    def keeps(self, attempt: int) -> bool:
        """Whether it goes over a kept connection: one that is cut then says nothing about the container."""
        return self._settings.keep_connections != "never" and attempt == 1 < self._settings.max_attempts

    def _client(self) -> aiohttp.ClientSession:
        assert self._session is not None, "Inference is used outside of its context"
        return self._session

    def _probing(self) -> aiohttp.ClientSession:
        """A container that serves one connection at a time could not answer beside one that is kept."""
        self._connections.close()
        return self._client()

    def _url_of(self, job: Job) -> URL:
        if not job.target:
            return self._job_url
        return URL(f"{self._job_url.origin()}/{job.target.removeprefix('/')}", encoded=True)

    async def _read(self, job: Job, response: Response, spill: Callable[[], Path]) -> Answer:
        """With the body, or the file it went to. Of a failed answer, a body that is too large is dropped."""
        limit_bytes = self._settings.max_response_bytes
        status, headers, arrived = response.status, response.headers, response.arrived()
        if response.whole and len(arrived) <= limit_bytes:
            return Answer(status=status, headers=headers, body=arrived)
        content, chunks = bytearray(arrived), response.chunks()
        if len(content) <= limit_bytes:
            async for chunk in chunks:
                content += chunk
                if len(content) > limit_bytes:
                    break
            else:
                return Answer(status=status, headers=headers, body=bytes(content))
        if status >= 400 and not job.passthrough:
            return Answer(status=status, headers=headers)
        path = spill()
        await self._spill(job, chunks, bytes(content), path)
        return Answer(status=status, headers=headers, spilled=path)

    async def _spill(self, job: Job, chunks: AsyncIterator[bytes], head: bytes, path: Path) -> None:
        """Write `head` and the rest of the body to `path`; memory stays flat and the loop free."""
        try:
            await loops.in_thread(prepare_scratch, path)
            file = await loops.in_thread(_opened, path, "xb")
        except OSError as exc:
            raise AttemptFailed(problem(job, 500, INFERENCE_FAULT)) from exc
        with file:
            size_bytes, pending = 0, bytearray(head)
            async for chunk in chunks:
                pending += chunk
                if len(pending) >= SPILL_CHUNK_BYTES:
                    size_bytes += await self._write(job, file, pending, size_bytes)
                    pending = bytearray()
            await self._write(job, file, pending, size_bytes)

    async def _write(self, job: Job, file: BinaryIO, content: bytearray, size_bytes: int) -> int:
        limit_bytes = self._settings.max_artifact_bytes
        if size_bytes + len(content) > limit_bytes:
            raise AttemptFailed(problem(job, 500, f"The answer is larger than {limit_bytes} bytes"))
        try:
            return await loops.in_thread(file.write, content)
        except OSError as exc:
            raise AttemptFailed(problem(job, 500, INFERENCE_FAULT)) from exc


class Translated:
    """While the body runs, the client's errors become ours. A class, because this is done for every job."""

    __slots__ = ("_job",)

    def __init__(self, job: Job) -> None:
        self._job = job

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        match error:
            case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError() | NotReached():
                raise ContainerLost("the container refused the connection", sent=False) from error
            case aiohttp.ClientConnectionError() | aiohttp.ClientPayloadError() | ConnectionError():
                raise ContainerLost("the container closed the connection", sent=True) from error
            case aiohttp.ClientError() | HttpProcessingError() | ValueError():
                raise AttemptFailed(connection_fault(self._job)) from error


async def _let_go(response: aiohttp.ClientResponse | Exchange) -> None:
    """A container may answer, and close, before it has all of the body: what is left to send does not matter then."""
    response.release()
    if isinstance(response, Exchange):
        return
    with suppress(aiohttp.ClientError, ConnectionError):
        await response.wait_for_close()


async def stay(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """For sessions that open WebSockets: `ws_connect` follows redirects, wherever they lead, and cannot be told not to.

    Raises aiohttp.WSServerHandshakeError: the answer is one.
    """
    response = await handler(request)
    if 300 <= response.status < 400:
        response.close()
        raise aiohttp.WSServerHandshakeError(
            response.request_info, (), message="a redirect", status=response.status, headers=response.headers
        )
    return response


def _client(
    connector: aiohttp.TCPConnector, *, middlewares: Sequence[aiohttp.ClientMiddlewareType] = ()
) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=connector,
        middlewares=middlewares,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        auto_decompress=False,
        # The container sees what the client sent, not what this library would add.
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
    )


def problem(job: Job, status: int, detail: str, *, source: str = "nvcf-worker-service") -> Outcome:
    """A problem+json answer in the container's place (contract/invocation.md §3.1, family 2).

    `source` is `inference-service`, `inference-connection` or `nvcf-worker-service`.
    """
    title = _PHRASES.get(status) or next((known.phrase for known in HTTPStatus if known == status), "")
    slug = title.lower().replace(" ", "-")
    members = {"type": f"urn:{source}:problem-details:{slug}", "title": title, "status": status, "detail": detail}
    content = orjson.dumps({name: value for name, value in (members | {"requestId": job.id}).items() if value})
    return Outcome(status=status, headers=(("Content-Type", "application/problem+json"),), body=content)


def connection_fault(job: Job) -> Outcome:
    """For a container that could not be talked to."""
    return problem(job, 500, CONNECTION_FAULT, source="inference-connection")


@functools.lru_cache(maxsize=512)
def _is_for_the_hop(name: str) -> bool:
    return name.lower() in HOP_BY_HOP


@functools.lru_cache(maxsize=512)
def key_of(name: str) -> str:
    """By which a header is known: to some servers `nvcf_sub` and `nvcf-sub` are one name."""
    return name.lower().replace("_", "-")


def end_to_end(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """`headers` without the hop-by-hop ones and without those that `Connection` names (RFC 9110 §7.6.1)."""
    pairs = list(headers)
    kept = [pair for pair in pairs if not _is_for_the_hop(pair[0])]
    if len(kept) < len(pairs):  # `Connection` may be among those
        named = ",".join(value for name, value in pairs if name.lower() == "connection").lower().split(",")
        dropped = {name.strip() for name in named}
        kept = [pair for pair in kept if pair[0].lower() not in dropped]
    return kept


def prepare_scratch(file: Path) -> None:
    """Make the folder of `file`, ours alone, if it is not there yet."""
    file.parent.mkdir(mode=0o700, exist_ok=True)


def _opened(path: Path, mode: Literal["rb", "xb"]) -> BinaryIO:
    return path.open(mode)


def _mapped(job: Job, answer: Answer) -> Answer:
    """Of a failed answer only the status and the JSON member `error` survive."""
    outcome = problem(job, answer.status, _stated_error(answer.body) or "Inference error", source="inference-service")
    return Answer(status=outcome.status, headers=outcome.headers, body=outcome.body)


def _stated_error(body: bytes) -> str:
    if len(body) > MAX_PARSED_ERROR_BYTES:
        return ""
    try:
        stated = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ""
    error = stated.get("error") if isinstance(stated, dict) else None
    return error if isinstance(error, str) else ""


def _presentable(job: Job, headers: Iterable[tuple[str, str]], url: URL) -> tuple[tuple[str, str], ...]:
    """The container's headers that may reach a client, in our name unless it was asked in its own (`job.target`);
    `Content-Encoding` among them, because the body was not decoded. Raises AttemptFailed."""
    dropped = _OURS if job.target else _NOT_THE_CONTAINERS
    kept, size_bytes = [], 0
    for name, value in end_to_end(headers):
        key = key_of(name)
        if key in dropped or key.startswith("nvcf-"):
            continue
        told = _from_outside(value, url) if key == "location" else value
        if _is_text(name) and _is_text(told):
            kept.append((name, told))
            size_bytes += len(name) + len(told)
    if len(kept) > MAX_ANSWER_HEADERS or size_bytes > MAX_ANSWER_HEADER_BYTES:
        limits = f"{MAX_ANSWER_HEADERS} headers or {MAX_ANSWER_HEADER_BYTES} bytes of them"
        raise AttemptFailed(problem(job, 500, f"The answer has more than {limits}"))
    return tuple(kept)


def _from_outside(location: str, url: URL) -> str:
    """A redirect to the address under which only we know the container, as one that leads there from outside."""
    origin = str(url.origin())
    path = location[len(origin) :]
    if not location.lower().startswith(origin) or path[:1] not in ("", "/", "?") or path.startswith("//"):
        return location
    return path if path.startswith("/") else f"/{path}"


def _is_text(value: str) -> bool:
    """Bytes that are not UTF-8 arrive as lone surrogates, which no codec of ours can store. And what is no text for
    RFC 9110 §5.5 would be sent on in our name: this library reads it, others break off."""
    if value.isascii() and value.isprintable():
        return True
    if _CONTROL.search(value):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
