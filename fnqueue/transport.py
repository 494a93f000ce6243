"""HTTP for the client: the only module that knows the HTTP library.

One connection pool for the server, which is sent the key, and one for signed URLs, which never see it: S3 refuses a
request that is signed twice, and another host has no business with a key.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urlsplit

import httpx2

from fnqueue import __version__, errors, retries, tracing
from fnqueue.config import Config
from fnqueue.errors import ClientClosed, ConnectionFailed, FnqueueError, Refused, TimedOut
from fnqueue.retries import Failures

logger = logging.getLogger(__name__)

CONNECT_S = 10.0
# Of a server that says nothing although nobody asked it to wait. An event stream has a comment every 25 s at most.
SILENCE_S = 60.0
MAX_EVENT_BYTES = 64 * 1024 * 1024
_KEPT_ALIVE = 20
# Shorter than a server keeps a connection, so that few are used that it is just closing.
_IDLE_S = 15.0
# A proxy of the environment cannot reach this machine's loopback.
_LOOPBACK = ("all://127.0.0.1", "all://localhost", "all://[::1]")

T = TypeVar("T")
Sleep = Callable[[float], Awaitable[None]]
Body = bytes | Callable[[], AsyncIterator[bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`headers` are found by any spelling of their names."""

    status: int
    headers: Mapping[str, str]
    content: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call: `path` is of the server, or a signed URL as a whole. `hold_s` is how long the server is asked to
    hold it. `content` as a function is made anew for each attempt. One that is made `once` has an effect each time: it
    is repeated only where the server said that it had none."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    content: Body | None = None
    hold_s: float = 0.0
    once: bool = False

    @property
    def signed(self) -> bool:
        return not self.path.startswith("/")


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event."""

    name: str
    data: str
    id: str
    retry_s: float | None


class Stream:
    """An answer whose body has not been read. Its methods raise ConnectionFailed when it breaks off."""

    def __init__(self, response: httpx2.Response) -> None:
        self._response = response
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers

    @property
    def is_events(self) -> bool:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower() == "text/event-stream"

    async def read(self) -> bytes:
        with _translated(self._response.request):
            return await self._response.aread()

    async def close(self) -> None:
        await self._response.aclose()

    async def chunks(self) -> AsyncIterator[bytes]:
        """As they come, so that nothing of them is lost when the connection breaks."""
        with _translated(self._response.request):
            async for chunk in self._response.aiter_raw():
                yield chunk

    async def events(self) -> AsyncGenerator[Event, None]:
        self._response.encoding = "utf-8"
        with _translated(self._response.request):
            async for each in httpx2.EventSource(self._response, MAX_EVENT_BYTES):
                retry_s = None if each.retry is None else each.retry / 1000
                yield Event(each.event, each.data, each.id, retry_s)


class Transport:
    """Calls with time limits, repeated where that is safe (`fnqueue.retries`). Close it where it was used."""

    def __init__(
        self, config: Config, *, max_connections: int, retry_for_s: float, sleep: Sleep = asyncio.sleep
    ) -> None:
        self.url = config.url
        self._place = urlsplit(config.url)
        self.sleep = sleep
        self._retry_for_s = retry_for_s
        agent = {"User-Agent": f"fnqueue-python/{__version__}", "Accept-Encoding": "identity"}
        limits = httpx2.Limits(
            max_connections=max_connections, max_keepalive_connections=_KEPT_ALIVE, keepalive_expiry=_IDLE_S
        )
        mounts: dict[str, httpx2.AsyncBaseTransport | None] = dict.fromkeys(_LOOPBACK)
        key = {"Authorization": f"Bearer {config.key}"}
        trust = httpx2.create_ssl_context()  # once: reading this machine's certificates takes a while
        self._server = httpx2.AsyncClient(
            base_url=config.url, headers=agent | key, limits=limits, mounts=mounts, verify=trust
        )
        self._storage = httpx2.AsyncClient(headers=agent, limits=limits, mounts=mounts, verify=trust)

    async def close(self) -> None:
        await self._server.aclose()
        await self._storage.aclose()

    def give_up_at(self, timeout_s: float) -> float:
        return self.now() + timeout_s

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def call(self, call: Call, *, give_up_at: float) -> Answer:
        """The answer, with its body. One that is an error is raised, unless it tells how a request ended.

        Raises: Refused, ConnectionFailed, TimedOut, ClientClosed.
        """

        async def once() -> Answer:
            stream = await self._sent(call)
            try:
                answer = Answer(status=stream.status, headers=stream.headers, content=await stream.read())
            finally:
                await stream.close()
            return _accepted(answer)

        return await self._repeated(once, give_up_at, careful=call.once)

    @asynccontextmanager
    async def answered(self, call: Call, *, give_up_at: float) -> AsyncIterator[Stream]:
        """As `call`, before the body of a good answer is read: one that breaks off is the caller's to go on with."""

        async def once() -> Stream:
            stream = await self._sent(call)
            if stream.status < 400:
                return stream
            try:
                _accepted(Answer(status=stream.status, headers=stream.headers, content=await stream.read()))
            except BaseException:
                await stream.close()
                raise
            return stream

        stream = await self._repeated(once, give_up_at)
        try:
            yield stream
        finally:
            await stream.close()

    async def wait_after(
        self, error: FnqueueError, failures: Failures, *, give_up_at: float, least_s: float = 0.0
    ) -> None:
        """Until the call may be made again. Raises the error when it may not."""
        wait = retries.wait_s(error, failures, self.now(), retry_for_s=self._retry_for_s, give_up_at=give_up_at)
        if wait is None:
            raise error
        logger.info("call_repeated", extra={"error": str(error), "failures": failures.count})
        await self.sleep(max(wait, least_s))

    async def _repeated(self, once: Callable[[], Awaitable[T]], give_up_at: float, *, careful: bool = False) -> T:
        failures = Failures()
        while True:
            try:
                async with limited(give_up_at):
                    return await once()
            except FnqueueError as exc:
                if careful and not _without_effect(exc):
                    raise
                failures = failures.one_more(self.now())
                await self.wait_after(exc, failures, give_up_at=give_up_at)

    async def _sent(self, call: Call) -> Stream:
        client = self._storage if call.signed else self._server
        if client.is_closed:
            raise ClientClosed("this client was closed")
        # Waiting for a free connection has no limit of its own: `limited` is around it.
        patience = httpx2.Timeout(SILENCE_S + call.hold_s, connect=CONNECT_S, pool=None)
        content = call.content() if callable(call.content) else call.content
        headers = dict(call.headers)
        if call.signed:  # nobody there is of this trace
            return await self._exchanged(client, call, headers, content, patience)
        with tracing.call(call.method, self._place.hostname or "", self._place.port, headers) as called:
            stream = await self._exchanged(client, call, headers, content, patience)
            called.answered(stream.status)
            return stream

    async def _exchanged(
        self,
        client: httpx2.AsyncClient,
        call: Call,
        headers: Mapping[str, str],
        content: bytes | AsyncIterator[bytes] | None,
        patience: httpx2.Timeout,
    ) -> Stream:
        request = client.build_request(call.method, call.path, headers=dict(headers), content=content, timeout=patience)
        with _translated(request, errors.NO_BLOBS if call.signed else errors.NO_SERVER):
            return Stream(await client.send(request, stream=True))


@asynccontextmanager
async def limited(give_up_at: float, request_id: str | None = None) -> AsyncIterator[None]:
    """Raises TimedOut once `give_up_at`, by the loop's clock, has come."""
    try:
        async with asyncio.timeout_at(give_up_at):
            yield
    except TimedOut:
        raise
    except TimeoutError as exc:
        raise TimedOut("not done within the time that the caller gave", request_id=request_id) from exc


@contextmanager
def _translated(request: httpx2.Request, remedy: str = "") -> Iterator[None]:
    """`remedy`: what to do where nothing is connected to."""
    try:
        yield
    except (httpx2.LocalProtocolError, httpx2.UnsupportedProtocol) as exc:
        raise ValueError(f"this cannot be sent: {exc}") from exc
    except (httpx2.TransportError, httpx2.DecodingError, httpx2.StreamError) as exc:
        # The query of a signed URL is as good as a key.
        where = f"{request.url.scheme}://{request.url.netloc.decode()}"
        connected = not isinstance(exc, httpx2.ConnectError | httpx2.ConnectTimeout)
        raise ConnectionFailed(f"{where}: {str(exc) or type(exc).__name__}{'' if connected else remedy}") from exc


def _without_effect(error: FnqueueError) -> bool:
    return isinstance(error, Refused) and error.status in (429, 503) and not error.outcome_unknown


def _accepted(answer: Answer) -> Answer:
    if answer.status >= 400 and errors.STATUS not in answer.headers:
        raise errors.of_answer(answer.status, answer.headers, answer.content)
    return answer
