"""The client for asyncio. `fnqueue.blocking` is the same for code without it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

from pydantic import ValidationError

from fnqueue import config, downloads, errors, events, mapping, tracing, wire
from fnqueue.errors import (
    Conflict,
    ConnectionFailed,
    FnqueueError,
    Forbidden,
    NotFound,
    Refused,
    RequestDead,
    RequestFailed,
    ServerFailed,
    TimedOut,
    UnknownFunction,
)
from fnqueue.events import Done, Queued, Running, StreamEvent
from fnqueue.inputs import MAX_BODY_BYTES, File, FileLike, Input, Opened, opened
from fnqueue.listening import ACCEPT, listen
from fnqueue.mapping import Mapped, Order
from fnqueue.results import Result, spool
from fnqueue.transport import Answer, Call, Sleep, Transport, limited
from fnqueue.wire.fields import Wire

V = TypeVar("V")
M = TypeVar("M", bound=Wire)

NVCF = "/v2/nvcf"
CALLBACK = "NVCF-CALLBACK-URL"
DAY_S = 86_400.0
# How long a server is asked to hold a call; proxies cut what is silent for a minute.
HOLD_S = 50
MAX_CONNECTIONS = 100
RETRY_FOR_S = 120.0
MAP_CONCURRENCY = 16
# For tidying up behind the caller, who does not wait for it any longer than this.
_TIDY_S = 10.0
_LONGEST_KEY = 255
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)
_CALLABLE = frozenset({"ACTIVE", "DEGRADING", "DEGRADED", "DEPLOYING"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """How much of one file was handed to the connection."""

    name: str
    sent_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """How much of a large answer has come; `size_bytes` is 0 where that is not known."""

    received_bytes: int
    size_bytes: int


Progress = Callable[[Upload], None]
Receiving = Callable[[Download], None]


class FunctionVersion(Wire):
    """What has to be known of a version to call it; `wire.Function` has the rest."""

    id: str
    version_id: str = ""
    name: str = ""
    status: str = ""


class AsyncClient:
    """Calls one server. Open as many requests on one client as wished; close it in the loop where it was used.

    Args:
        url: the server, as `https://host`. Without it FNQUEUE_URL, else the configuration file, else this machine.
        key: the API key. Without it FNQUEUE_API_KEY, else the configuration file (see `fnqueue.config.load`).
        max_connections: how many calls are under way at once, at most; others wait.
        retry_for_s: how long a call is repeated when no server answers, or one says to come again later.
        max_body_bytes: what the server takes in a body. Files that do not fit are uploaded.
        sleep: how a pause is slept.

    Raises: ConfigurationError.
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        max_connections: int = MAX_CONNECTIONS,
        retry_for_s: float = RETRY_FOR_S,
        max_body_bytes: int = MAX_BODY_BYTES,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        found = config.load(url, key)
        self.url = found.url
        self.max_connections = max_connections
        self.max_body_bytes = max_body_bytes
        self._transport = Transport(found, max_connections=max_connections, retry_for_s=retry_for_s, sleep=sleep)
        self._ids: dict[str, str] = {}

    def function(
        self,
        name: str,
        *,
        version: str | None = None,
        queue_timeout_s: float | None = None,
        run_timeout_s: float | None = None,
        callback: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AsyncFunction:
        """A function by name or ID; nothing is asked of the server yet.

        Args:
            version: the ID of a version; otherwise the server picks one that is deployed.
            queue_timeout_s: how long a request may wait for a worker before it is given up.
            run_timeout_s: how long an attempt may run in the container.
            callback: the URL of a webhook that tells how each request ended; `none` where the function's own is not
                wanted (see `fnqueue.signatures.verify`).
            headers: for the function, with every request.
        """
        limits = {"NVCF-QUEUE-TIMEOUT-SECONDS": queue_timeout_s, "NVCF-RUN-TIMEOUT-SECONDS": run_timeout_s}
        told = {header: str(math.ceil(limit)) for header, limit in limits.items() if limit is not None}
        if callback is not None:
            told[CALLBACK] = callback
        return AsyncFunction(self, name, version=version, headers={**(headers or {}), **told})

    def handle(self, request_id: str) -> AsyncHandle:
        """A request that was accepted before, by whatever process."""
        return AsyncHandle(self, request_id)

    async def upload(
        self,
        file: File | FileLike,
        *,
        idempotency_key: str | None = None,
        progress: Progress | None = None,
        timeout_s: float = DAY_S,
    ) -> str:
        """The ID of a new asset with this file, to be named by any number of requests until it is deleted.

        The same key leads to the same asset. Raises: OSError, and as `AsyncFunction.spawn`.
        """
        give_up_at = self._transport.give_up_at(timeout_s)
        with ExitStack() as files:
            named = file if isinstance(file, File) else File(file)
            given = await asyncio.to_thread(files.enter_context, opened(replace(named, upload=True)))
            [found] = given.to_upload.values()
            return await self._upload(found, idempotency_key, progress, give_up_at)

    async def functions(self, *, timeout_s: float = DAY_S) -> list[FunctionVersion]:
        """The account's own, version by version. Needs a scope that lists functions."""
        return await self._listed("private", self._transport.give_up_at(timeout_s))

    async def assets(self, *, timeout_s: float = DAY_S) -> list[wire.Asset]:
        """Those of the account that were uploaded."""
        answer = await self._call("GET", f"{NVCF}/assets", timeout_s)
        return _read(wire.AssetList, answer).assets

    async def delete_asset(self, asset_id: str, *, timeout_s: float = DAY_S) -> None:
        """Requests that name it and have not begun will fail. Raises: NotFound."""
        await self._call("DELETE", f"{NVCF}/assets/{_id(asset_id)}", timeout_s)

    async def ask(
        self,
        gives: type[M],
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = DAY_S,
    ) -> M:
        """Any other call of the API, and its answer as `gives` reads it. `path` is behind `/v2/nvcf`, or begins with
        `/v1/`; `body` is sent as JSON. A POST that may have been heard is not repeated."""
        return _read(gives, await self._managed(method, path, body, timeout_s, headers))

    async def tell(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float = DAY_S
    ) -> None:
        """As `ask`, of a call whose answer says nothing more."""
        await self._managed(method, path, body, timeout_s)

    async def listen(self, gives: type[M], path: str, *, timeout_s: float = DAY_S) -> AsyncGenerator[M, None]:
        """The server-sent events of any other route, up to `done`, each as `gives` reads it. When a connection breaks
        it goes on behind the last one. Raises as `ask`."""
        give_up_at = self._transport.give_up_at(timeout_s)
        async with aclosing(listen(self._transport, NVCF + path, {}, give_up_at=give_up_at, end_tells=False)) as events:
            async for event in events:
                if event.name == "done":
                    return
                yield _read(gives, Answer(status=200, headers={}, content=event.data.encode()))

    async def function_id(self, name: str, *, timeout_s: float = DAY_S) -> str:
        """By name, or by ID, which is not asked for. Raises: UnknownFunction."""
        return await self._function_id(name, self._transport.give_up_at(timeout_s))

    async def tidy(self, asset_ids: Iterable[str]) -> None:
        """Delete assets that nothing needs any more; what cannot be deleted soon stays until somebody does."""
        with suppress(FnqueueError):
            for asset_id in asset_ids:
                await self.delete_asset(asset_id, timeout_s=_TIDY_S)

    async def close(self) -> None:
        """Requests go on. Calls that wait end with an error."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: str, path: str, timeout_s: float) -> Answer:
        return await self._transport.call(
            Call(method=method, path=path), give_up_at=self._transport.give_up_at(timeout_s)
        )

    async def _managed(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        told = {**({} if body is None else {"Content-Type": "application/json"}), **(headers or {})}
        content = None if body is None else json.dumps(body).encode()
        at = path if path.startswith("/v1/") else NVCF + path
        call = Call(method=method, path=at, headers=told, content=content, once=method == "POST")
        return await self._transport.call(call, give_up_at=self._transport.give_up_at(timeout_s))

    async def _function_id(self, name: str, give_up_at: float) -> str:
        if _UUID.fullmatch(name):
            return name
        if name not in self._ids:
            self._ids[name] = await self._looked_up(name, give_up_at)
        return self._ids[name]

    async def _looked_up(self, name: str, give_up_at: float) -> str:
        """The account's own before what others share. Names are not unique: a deployed one is meant before others."""
        for visibility in ("private", "authorized,public"):
            listed = [each for each in await self._listed(visibility, give_up_at) if each.name == name]
            deployed = {each.id for each in listed if each.status in _CALLABLE}
            found = deployed or {each.id for each in listed}
            if len(found) == 1:
                return found.pop()
            if found:
                raise UnknownFunction(
                    f"{len(found)} functions are named {name!r}; use an ID: {', '.join(sorted(found))}"
                )
        raise UnknownFunction(
            f"no function that this key may list is named {name!r}; `functions()` has those there are"
        )

    async def _listed(self, visibility: str, give_up_at: float) -> list[FunctionVersion]:
        call = Call(method="GET", path=f"{NVCF}/functions?visibility={quote(visibility)}")
        return _read(_Functions, await self._transport.call(call, give_up_at=give_up_at)).functions

    def _forget(self, name: str) -> bool:
        """Whether the ID of this name had been looked up before, and may be old."""
        return self._ids.pop(name, None) is not None

    async def _upload(self, file: Opened, key: str | None, progress: Progress | None, give_up_at: float) -> str:
        headers = {"Content-Type": "application/json"}
        asked = wire.CreateAsset(content_type=file.content_type, description=file.description)
        if key is not None:
            digest = await asyncio.to_thread(file.sha256)
            # Other bytes under the same key are another asset: one that is in use never changes.
            words = (key, asked.content_type, asked.description, digest)
            headers["Idempotency-Key"] = hashlib.sha256("\n".join(words).encode()).hexdigest()
        create = Call(method="POST", path=f"{NVCF}/assets", headers=headers, content=asked.to_json())
        answer = await self._transport.call(create, give_up_at=give_up_at)
        made = _read(wire.AssetUpload, answer)
        if key is None or not await self._is_uploaded(made.asset_id, give_up_at):
            await self._put(file, made, progress, give_up_at)
        return made.asset_id

    async def _is_uploaded(self, asset_id: str, give_up_at: float) -> bool:
        try:
            await self._transport.call(Call(method="GET", path=f"{NVCF}/assets/{asset_id}"), give_up_at=give_up_at)
        except NotFound:
            return False
        return True

    async def _put(self, file: Opened, made: wire.AssetUpload, progress: Progress | None, give_up_at: float) -> None:
        def sent(sent_bytes: int) -> None:
            if progress is not None:
                progress(Upload(name=file.name, sent_bytes=sent_bytes, size_bytes=file.size_bytes))

        headers = {
            "Content-Type": made.content_type,
            "x-amz-meta-nvcf-asset-description": made.description,
            "Content-Length": str(file.size_bytes),
        }
        put = Call(method="PUT", path=made.upload_url, headers=headers, content=lambda: file.chunks(sent))
        await self._transport.call(put, give_up_at=give_up_at)


class AsyncFunction:
    """A function that can be called. Make one with `AsyncClient.function`."""

    def __init__(self, client: AsyncClient, name: str, *, version: str | None, headers: Mapping[str, str]) -> None:
        self.name = name
        self.version = version
        self._client = client
        self._transport = client._transport
        self._headers = headers

    async def spawn(
        self,
        value: Any = None,
        /,
        *,
        idempotency_key: str | None = None,
        assets: Sequence[str] = (),
        stream: bool = False,
        callback: str | None = None,
        progress: Progress | None = None,
        timeout_s: float = DAY_S,
        **fields: Any,
    ) -> AsyncHandle:
        """Hand a request in; it is accepted, and will run, when this returns.

        Args:
            value: what the function is given: JSON, with files anywhere in it, or one file (see `fnqueue.inputs`).
                Files are paths, bytes, binary file objects and `File`.
            fields: the same as one object, by name. One that is named like an argument here goes into `value`.
            idempotency_key: 1 to 255 characters of printable ASCII. The same key with the same input leads to the same
                request, also after a crash; without one, each call is a request of its own.
            assets: IDs of assets that the function is given beside.
            callback: of this request, in place of the function's.
            stream: the answer is to be read with `AsyncHandle.stream` while it comes.
            progress: told of files that are uploaded.
            timeout_s: for all of it, uploads included.

        Raises: Refused, ConnectionFailed, TimedOut, UnknownFunction; OSError: a file; TypeError, ValueError: no JSON.
        """
        order = _Order(
            value=_whole(value, fields),
            key=_key(idempotency_key),
            chosen=idempotency_key is not None,
            assets=tuple(assets),
            stream=stream,
            callback=callback,
            progress=progress,
            give_up_at=self._transport.give_up_at(timeout_s),
        )
        with tracing.operation(f"spawn {self.name}"):
            return await self._submit(order)

    async def run(
        self,
        value: Any = None,
        /,
        *,
        idempotency_key: str | None = None,
        assets: Sequence[str] = (),
        progress: Progress | None = None,
        timeout_s: float = DAY_S,
        **fields: Any,
    ) -> Result:
        """`spawn` and `AsyncHandle.get`, in one call where the result comes soon.

        Raises: as both. TimedOut does not cancel the request.
        """
        order = _Order(
            value=_whole(value, fields),
            key=_key(idempotency_key),
            chosen=idempotency_key is not None,
            assets=tuple(assets),
            hold=True,
            progress=progress,
            give_up_at=self._transport.give_up_at(timeout_s),
        )
        with tracing.operation(f"run {self.name}"):
            handle = await self._submit(order)
            return await handle.get(timeout_s=order.give_up_at - self._transport.now())

    async def stream(
        self, value: Any = None, /, *, timeout_s: float = DAY_S, **options: Any
    ) -> AsyncGenerator[StreamEvent, None]:
        """The events of a function that streams, as they come. Arguments as of `spawn`; use that, and
        `AsyncHandle.stream`, where the ID has to be kept."""
        give_up_at = self._transport.give_up_at(timeout_s)
        handle = await self.spawn(value, stream=True, timeout_s=timeout_s, **options)
        async with aclosing(handle.stream(timeout_s=give_up_at - self._transport.now())) as found:
            async for event in found:
                yield event

    def map(
        self,
        values: Iterable[V] | AsyncIterable[V],
        *,
        concurrency: int = MAP_CONCURRENCY,
        ordered: bool = True,
        key: Callable[[V], str] | None = None,
        timeout_s: float = DAY_S,
    ) -> AsyncGenerator[Mapped[V], None]:
        """What becomes of each value, as it comes or in the order of the values; values are taken when there is room.

        One that fails is given as such and leaves the others alone. Ending it early cancels the requests under way.

        Args:
            concurrency: how many requests there are at once, at most.
            key: makes the Idempotency-Key of a value, so that a map that is run again goes on where it was.
            timeout_s: for each value.
        """
        order: Order[V] = self.order(concurrency, ordered)
        return mapping.mapped(values, self.work(key, timeout_s), order)

    async def queues(self, *, timeout_s: float = DAY_S) -> list[wire.QueueDepth]:
        """How long the queue of each deployed version is. Needs the scope `queue_details`."""
        function_id = await self._client._function_id(self.name, self._transport.give_up_at(timeout_s))
        path = f"{NVCF}/queues/functions/{function_id}" + (f"/versions/{_id(self.version)}" if self.version else "")
        answer = await self._client._call("GET", path, timeout_s)
        return _read(wire.Queues, answer).queues

    def order(self, concurrency: int, ordered: bool) -> Order[Any]:
        """Of a map. Raises ValueError: more at once than the client has connections."""
        if not 0 < concurrency <= self._client.max_connections:
            raise ValueError(f"concurrency must be 1 to {self._client.max_connections}, the client's max_connections")
        return Order(concurrency=concurrency, ordered=ordered)

    def work(self, key: Callable[[V], str] | None, timeout_s: float) -> Callable[[V], Awaitable[Result]]:
        """What a map does with one value; cancelled, it cancels its request."""

        async def work(value: V) -> Result:
            give_up_at = self._transport.give_up_at(timeout_s)
            chosen = key(value) if key is not None else None
            handle = await self.spawn(value, idempotency_key=chosen, timeout_s=timeout_s)
            try:
                return await handle.get(timeout_s=give_up_at - self._transport.now())
            except asyncio.CancelledError:
                with suppress(FnqueueError):
                    await handle.cancel(timeout_s=_TIDY_S)
                raise

        return work

    async def _submit(self, order: _Order) -> AsyncHandle:
        with ExitStack() as files:
            limit = self._client.max_body_bytes
            given = await asyncio.to_thread(files.enter_context, opened(order.value, max_body_bytes=limit))
            try:
                return await self._post(order, given)
            except NotFound:
                # Another process may have made the function anew, or have tidied up behind the same request.
                if not (self._client._forget(self.name) or given.to_upload):
                    raise
            return await self._post(order, given)

    async def _post(self, order: _Order, given: Input) -> AsyncHandle:
        path = await self._path(order.give_up_at)
        uploads = await self._uploaded(order, given)
        body, content_type = await asyncio.to_thread(given.body, uploads)
        # Less than the caller waits: whoever gives up shall know which request goes on.
        hold_s = max(0, min(HOLD_S, int(order.give_up_at - self._transport.now()) - 1)) if order.hold else 0
        headers = {
            "Content-Type": content_type,
            "Accept": ACCEPT if order.stream else "*/*",
            **self._headers,
            "Idempotency-Key": order.key,
            **({"NVCF-POLL-SECONDS": str(hold_s)} if hold_s else {"Prefer": "respond-async"}),
        }
        if order.callback is not None:
            headers[CALLBACK] = order.callback
        if referenced := (*order.assets, *uploads.values()):
            headers["NVCF-INPUT-ASSET-REFERENCES"] = ",".join(referenced)
        call = Call(method="POST", path=path, headers=headers, content=body, hold_s=hold_s)
        try:
            return await self._accepted(order, call, list(uploads.values()))
        except Refused as exc:
            # Under a key of the caller's they may be in use by the request that it led to before.
            if not order.chosen and not exc.outcome_unknown:
                await self._client.tidy(uploads.values())
            raise

    async def _accepted(self, order: _Order, call: Call, uploads: list[str]) -> AsyncHandle:
        if order.stream:
            # Of a key that was used before, this may be the stream itself, which is not to be waited for.
            async with self._transport.answered(call, give_up_at=order.give_up_at) as begun:
                answer = Answer(status=begun.status, headers=begun.headers)
            return AsyncHandle(self._client, _request_id(answer), uploads=uploads)
        answer = await self._transport.call(call, give_up_at=order.give_up_at)
        return AsyncHandle(self._client, _request_id(answer), answer=answer, uploads=uploads)

    async def _path(self, give_up_at: float) -> str:
        function_id = await self._client._function_id(self.name, give_up_at)
        version = f"/versions/{_id(self.version)}" if self.version else ""
        return f"{NVCF}/pexec/functions/{function_id}{version}"

    async def _uploaded(self, order: _Order, given: Input) -> dict[int, str]:
        found = {}
        for at, file in given.to_upload.items():
            key = f"{order.key}/{at}" if order.chosen else None
            found[at] = await self._client._upload(file, key, order.progress, order.give_up_at)
        return found


class AsyncHandle:
    """One request that was accepted. `id` is all that another process needs to go on with it."""

    def __init__(
        self, client: AsyncClient, request_id: str, *, answer: Answer | None = None, uploads: Sequence[str] = ()
    ) -> None:
        self.id = _id(request_id)
        self._client = client
        self._transport = client._transport
        self._first = answer
        self._uploads = list(uploads)
        self._context = tracing.context()

    @classmethod
    def from_id(cls, request_id: str, client: AsyncClient | None = None) -> AsyncHandle:
        """As `AsyncClient.handle`. Without a client it is of one of its own, made as `AsyncClient()` is, which lasts as
        long as the program. Raises ValueError: it is no ID. ConfigurationError."""
        return cls(client or AsyncClient(), request_id)

    async def get(self, *, progress: Receiving | None = None, timeout_s: float = DAY_S) -> Result:
        """Wait for the result. It can be asked for again, for as long as the server keeps it (a day).

        `progress` is told of a large answer while it is fetched. Assets that `spawn` made of this request's files are
        deleted when it has ended.

        Raises: RequestFailed: there is none. TimedOut: not yet; the request goes on. ResultExpired, NotFound,
            ConnectionFailed.
        """
        give_up_at = self._transport.give_up_at(timeout_s)
        try:
            with tracing.operation("get", self._context):
                result = await self._result(give_up_at, progress)
        except RequestDead:
            raise  # a dead letter is run again with its files
        except RequestFailed:
            await self._tidy()
            raise
        except TimedOut as exc:
            raise TimedOut(f"request {self.id} has not ended within {timeout_s:g} s", request_id=self.id) from exc
        await self._tidy()
        return result

    async def events(self, *, timeout_s: float = DAY_S) -> AsyncGenerator[Queued | Running | Done, None]:
        """What happens to it, as it happens, up to and including `Done`; broken connections are made anew.

        Raises: TimedOut, ResultExpired, NotFound, ConnectionFailed.
        """
        source = listen(
            self._transport,
            f"{NVCF}/requests/{self.id}/events",
            {},
            give_up_at=self._transport.give_up_at(timeout_s),
            end_tells=False,
        )
        async with aclosing(source):
            async for each in source:
                event = events.parse(each.name, each.data)
                if event is not None:
                    yield event
                if isinstance(event, Done):
                    return

    async def stream(self, *, timeout_s: float = DAY_S) -> AsyncGenerator[StreamEvent, None]:
        """The events of its answer, as they come, each once; broken connections are made anew. An answer that is no
        event stream is one event.

        Raises: RequestFailed: it broke off for good, or there is none. StreamNotKept, TimedOut, ConnectionFailed.
        """
        source = listen(
            self._transport,
            self._status_path,
            {"Accept": ACCEPT, "NVCF-POLL-SECONDS": str(HOLD_S)},
            give_up_at=self._transport.give_up_at(timeout_s),
            end_tells=True,
        )
        async with aclosing(source):
            async for each in source:
                event = StreamEvent(event=each.name, data=each.data, id=each.id)
                if (error := events.end_of_stream(event, self.id)) is not None:
                    raise error
                yield event

    async def status(self, *, timeout_s: float = DAY_S) -> wire.RequestReceipt:
        """Where it stands: its status, every attempt, and where the time went."""
        answer = await self._client._call("GET", f"{NVCF}/requests/{self.id}", timeout_s)
        return _read(wire.RequestReceipt, answer)

    async def position(self, *, timeout_s: float = DAY_S) -> wire.Position:
        """Its place in the queue: 1 for the next, 0 once it runs. Needs the scope `queue_details`."""
        answer = await self._client._call("GET", f"{NVCF}/queues/{self.id}/position", timeout_s)
        return _read(wire.Position, answer)

    async def cancel(self, *, timeout_s: float = DAY_S) -> bool:
        """No attempt starts from now on, and one that runs is cut off; False if it had ended before."""
        try:
            await self._client._call("DELETE", f"{NVCF}/requests/{self.id}", timeout_s)
        except Conflict:
            return False
        return True

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    @property
    def _status_path(self) -> str:
        return f"{NVCF}/pexec/status/{self.id}"

    async def _result(self, give_up_at: float, progress: Receiving | None) -> Result:
        answer = await self._ended(give_up_at)
        if answer.status >= 400:
            raise errors.of_answer(answer.status, answer.headers, answer.content)
        if answer.status != 302 or "location" not in answer.headers:
            return Result(request_id=self.id, status=answer.status, headers=answer.headers, content=answer.content)
        try:
            return await self._downloaded(answer, give_up_at, progress)
        except Forbidden:  # the URL has expired, and there is a new one for asking
            self._first = None
            return await self._downloaded(await self._ended(give_up_at), give_up_at, progress)

    async def _ended(self, give_up_at: float) -> Answer:
        answer, self._first = self._first, None
        while answer is None or answer.status == 202:
            if answer is not None:
                async with limited(give_up_at):
                    await self._pause(errors.retry_after_s(answer.headers) or 0.0)
            hold_s = max(1, min(HOLD_S, int(give_up_at - self._transport.now())))
            headers = {"NVCF-POLL-SECONDS": str(hold_s)}
            call = Call(method="GET", path=self._status_path, headers=headers, hold_s=hold_s)
            answer = await self._transport.call(call, give_up_at=give_up_at)
        return answer

    async def _pause(self, pause_s: float) -> None:
        """Until the server may be asked again: once it tells that the request has ended, at the latest after what it
        asked for. Where it does not tell, all of that."""
        if not pause_s:
            return
        with suppress(TimedOut):
            try:
                async with aclosing(self.events(timeout_s=pause_s)) as found:
                    async for _ in found:
                        pass
            except (Refused, ConnectionFailed):
                await self._transport.sleep(pause_s)

    async def _downloaded(self, answer: Answer, give_up_at: float, progress: Receiving | None) -> Result:
        def received(received_bytes: int, size_bytes: int) -> None:
            if progress is not None:
                progress(Download(received_bytes=received_bytes, size_bytes=size_bytes))

        archive = spool()
        try:
            location = answer.headers["location"]
            headers = await downloads.fetch(
                self._transport, location, archive, give_up_at=give_up_at, received=received
            )
            return Result(request_id=self.id, status=200, headers=headers, archive=archive)
        except BaseException:
            archive.close()
            raise

    async def _tidy(self) -> None:
        uploads, self._uploads = self._uploads, []
        await self._client.tidy(uploads)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """One call of a function. `chosen`: the caller named the key, and may come back with it."""

    value: Any
    key: str
    chosen: bool
    assets: tuple[str, ...]
    progress: Progress | None
    give_up_at: float
    stream: bool = False
    callback: str | None = None
    hold: bool = False


class _Functions(Wire):
    functions: list[FunctionVersion]


def _read(model: type[M], answer: Answer) -> M:
    """Raises ServerFailed: whoever answered is no such server."""
    try:
        return model.model_validate_json(answer.content)
    except ValidationError as exc:
        raise ServerFailed(answer.status, answer.headers, answer.content) from exc


def _request_id(answer: Answer) -> str:
    """Raises ServerFailed: whoever answered is no such server."""
    found = answer.headers.get(errors.REQUEST_ID, "")
    if not _UUID.fullmatch(found):
        raise ServerFailed(answer.status, answer.headers, answer.content)
    return found


def _key(chosen: str | None) -> str:
    """Raises ValueError: an empty one is a mistake, and would make every call a request of its own."""
    if chosen is None:
        return str(uuid.uuid4())
    if not 0 < len(chosen) <= _LONGEST_KEY or not (chosen.isascii() and chosen.isprintable()):
        raise ValueError(f"an idempotency key has 1 to {_LONGEST_KEY} printable ASCII characters")
    return chosen


def _whole(value: Any, fields: Mapping[str, Any]) -> Any:
    """A call without an input gives the function an empty object."""
    if value is not None and fields:
        raise TypeError("give the input as one value, or as named fields, and not as both")
    return fields if value is None else value


def _id(text: str) -> str:
    """Raises ValueError: it would be another path."""
    if not _UUID.fullmatch(text):
        raise ValueError(f"{text[:64]!r} is not an ID: a UUID such as {uuid.UUID(int=0)}")
    return text.lower()
