"""The client for code without asyncio: the same calls, each of which blocks its thread.

Everything happens in one thread with an event loop, which `Client` owns, so any number of threads may share a client.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from fnqueue import mapping, wire
from fnqueue.client import (
    DAY_S,
    MAP_CONCURRENCY,
    MAX_CONNECTIONS,
    RETRY_FOR_S,
    AsyncClient,
    AsyncFunction,
    AsyncHandle,
    FunctionVersion,
    Progress,
    Receiving,
)
from fnqueue.events import Done, Queued, Running, StreamEvent
from fnqueue.inputs import MAX_BODY_BYTES, File, FileLike
from fnqueue.mapping import Mapped
from fnqueue.portal import Portal
from fnqueue.results import Result
from fnqueue.wire.fields import Wire

T = TypeVar("T")
V = TypeVar("V")
M = TypeVar("M", bound=Wire)


class Client:
    """Calls one server. Any number of threads may use it; close it, or use it as a context manager.

    Arguments as of `fnqueue.AsyncClient`. Raises: ConfigurationError.
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        max_connections: int = MAX_CONNECTIONS,
        retry_for_s: float = RETRY_FOR_S,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self._client = AsyncClient(
            url, key, max_connections=max_connections, retry_for_s=retry_for_s, max_body_bytes=max_body_bytes
        )
        self.url = self._client.url
        self._portal = Portal(on_close=self._client.close)

    def function(
        self,
        name: str,
        *,
        version: str | None = None,
        queue_timeout_s: float | None = None,
        run_timeout_s: float | None = None,
        callback: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Function:
        """A function by name or ID. As `AsyncClient.function`."""
        found = self._client.function(
            name,
            version=version,
            queue_timeout_s=queue_timeout_s,
            run_timeout_s=run_timeout_s,
            callback=callback,
            headers=headers,
        )
        return Function(self._portal, found)

    def handle(self, request_id: str) -> Handle:
        """A request that was accepted before, by whatever process."""
        return Handle(self._portal, self._client.handle(request_id))

    def upload(
        self,
        file: File | FileLike,
        *,
        idempotency_key: str | None = None,
        progress: Progress | None = None,
        timeout_s: float = DAY_S,
    ) -> str:
        """The ID of a new asset with this file. As `AsyncClient.upload`."""
        return self._portal.call(
            self._client.upload(file, idempotency_key=idempotency_key, progress=progress, timeout_s=timeout_s)
        )

    def functions(self, *, timeout_s: float = DAY_S) -> list[FunctionVersion]:
        """The account's own, version by version. As `AsyncClient.functions`."""
        return self._portal.call(self._client.functions(timeout_s=timeout_s))

    def assets(self, *, timeout_s: float = DAY_S) -> list[wire.Asset]:
        """Those of the account that were uploaded."""
        return self._portal.call(self._client.assets(timeout_s=timeout_s))

    def delete_asset(self, asset_id: str, *, timeout_s: float = DAY_S) -> None:
        """As `AsyncClient.delete_asset`."""
        self._portal.call(self._client.delete_asset(asset_id, timeout_s=timeout_s))

    def ask(
        self,
        gives: type[M],
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = DAY_S,
    ) -> M:
        """Any other call of the API, and its answer as `gives` reads it. As `AsyncClient.ask`."""
        return self._portal.call(self._client.ask(gives, method, path, body, headers=headers, timeout_s=timeout_s))

    def tell(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float = DAY_S) -> None:
        """As `AsyncClient.tell`."""
        self._portal.call(self._client.tell(method, path, body, timeout_s=timeout_s))

    def listen(self, gives: type[M], path: str, *, timeout_s: float = DAY_S) -> Iterator[M]:
        """The events of any other route. As `AsyncClient.listen`."""
        return self._portal.each(self._client.listen(gives, path, timeout_s=timeout_s))

    def function_id(self, name: str, *, timeout_s: float = DAY_S) -> str:
        """By name, or by ID. As `AsyncClient.function_id`."""
        return self._portal.call(self._client.function_id(name, timeout_s=timeout_s))

    def close(self) -> None:
        """Requests go on. Calls that other threads wait for end with ClientClosed."""
        self._portal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Function:
    """A function that can be called. Make one with `Client.function`."""

    def __init__(self, portal: Portal, function: AsyncFunction) -> None:
        self._portal = portal
        self._function = function

    @property
    def name(self) -> str:
        return self._function.name

    def spawn(
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
    ) -> Handle:
        """Hand a request in; it is accepted, and will run, when this returns. As `AsyncFunction.spawn`; `progress` is
        called in another thread."""
        handle = self._portal.call(
            self._function.spawn(
                value,
                idempotency_key=idempotency_key,
                assets=assets,
                stream=stream,
                callback=callback,
                progress=progress,
                timeout_s=timeout_s,
                **fields,
            )
        )
        return Handle(self._portal, handle)

    def run(
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
        """`spawn` and `Handle.get` in one call where the result comes soon. As `AsyncFunction.run`."""
        return self._portal.call(
            self._function.run(
                value,
                idempotency_key=idempotency_key,
                assets=assets,
                progress=progress,
                timeout_s=timeout_s,
                **fields,
            )
        )

    def stream(self, value: Any = None, /, *, timeout_s: float = DAY_S, **options: Any) -> Iterator[StreamEvent]:
        """The events of a function that streams, as they come. As `AsyncFunction.stream`."""
        return self._portal.each(self._function.stream(value, timeout_s=timeout_s, **options))

    def map(
        self,
        values: Iterable[V],
        *,
        concurrency: int = MAP_CONCURRENCY,
        ordered: bool = True,
        key: Callable[[V], str] | None = None,
        timeout_s: float = DAY_S,
    ) -> Generator[Mapped[V], None, None]:
        """What becomes of each value. As `AsyncFunction.map`; values are taken in the caller's own thread."""
        order: mapping.Order[V] = self._function.order(concurrency, ordered)
        work = self._function.work(key, timeout_s)
        source, exhausted = iter(values), False
        tasks: set[asyncio.Task[Any]] = set()
        running: set[concurrent.futures.Future[Mapped[V]]] = set()
        try:
            while True:
                while order.room and not exhausted:
                    for value in source:
                        running.add(self._portal.submit(_noted(tasks, mapping.one(order.take(), value, work))))
                        break
                    else:
                        exhausted = True
                while (found := order.ready()) is not None:
                    yield found
                if not running and exhausted:
                    return
                done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    order.ended(future.result())
        finally:
            if running:
                self._portal.finish(mapping.ended(list(tasks)))

    def queues(self, *, timeout_s: float = DAY_S) -> list[wire.QueueDepth]:
        """How long the queue of each deployed version is. As `AsyncFunction.queues`."""
        return self._portal.call(self._function.queues(timeout_s=timeout_s))


class Handle:
    """One request that was accepted. `id` is all that another process needs to go on with it."""

    def __init__(self, portal: Portal, handle: AsyncHandle) -> None:
        self.id = handle.id
        self._portal = portal
        self._handle = handle

    @classmethod
    def from_id(cls, request_id: str, client: Client | None = None) -> Handle:
        """As `Client.handle`. Without a client it is of one of its own, made as `Client()` is, which lasts as long as
        the program. Raises ValueError: it is no ID. ConfigurationError."""
        return (client or Client()).handle(request_id)

    def get(self, *, progress: Receiving | None = None, timeout_s: float = DAY_S) -> Result:
        """Wait for the result. As `AsyncHandle.get`; `progress` is called in another thread."""
        return self._portal.call(self._handle.get(progress=progress, timeout_s=timeout_s))

    def events(self, *, timeout_s: float = DAY_S) -> Iterator[Queued | Running | Done]:
        """What happens to it, as it happens, up to and including `Done`. As `AsyncHandle.events`."""
        return self._portal.each(self._handle.events(timeout_s=timeout_s))

    def stream(self, *, timeout_s: float = DAY_S) -> Iterator[StreamEvent]:
        """The events of its answer, as they come, each once. As `AsyncHandle.stream`."""
        return self._portal.each(self._handle.stream(timeout_s=timeout_s))

    def status(self, *, timeout_s: float = DAY_S) -> wire.RequestReceipt:
        """Where it stands: its status, every attempt, and where the time went."""
        return self._portal.call(self._handle.status(timeout_s=timeout_s))

    def position(self, *, timeout_s: float = DAY_S) -> wire.Position:
        """Its place in the queue. As `AsyncHandle.position`."""
        return self._portal.call(self._handle.position(timeout_s=timeout_s))

    def cancel(self, *, timeout_s: float = DAY_S) -> bool:
        """No attempt starts from now on; False if it had ended before. As `AsyncHandle.cancel`."""
        return self._portal.call(self._handle.cancel(timeout_s=timeout_s))

    def __repr__(self) -> str:
        return f"<Handle {self.id}>"


async def _noted(tasks: set[asyncio.Task[Any]], coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs it, and keeps its task among `tasks` meanwhile."""
    task = asyncio.current_task()
    assert task is not None
    tasks.add(task)
    try:
        return await coroutine
    finally:
        tasks.discard(task)
