"""An event loop in a thread of its own, for code that has none."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from typing import Any, TypeVar

from fnqueue.errors import ClientClosed
from fnqueue.mapping import ended

T = TypeVar("T")

# For what tidies up behind cancelled calls.
_STOP_S = 30.0


class Portal:
    """Any thread but its own may call. The thread starts with the first call, belongs to the process of that call, and
    does not keep it alive. `on_close` runs in the loop, as the last thing there."""

    def __init__(self, on_close: Callable[[], Awaitable[None]]) -> None:
        self._on_close = on_close
        self._lock = threading.Lock()
        self._closed = False
        self._pid = 0
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._finishing: set[concurrent.futures.Future[None]] = set()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Raises ClientClosed."""
        loop = None
        try:
            with self._lock:
                loop = self._running()
                return asyncio.run_coroutine_threadsafe(coroutine, loop)
        except BaseException:
            if loop is None:  # else Ctrl-C came while it was handed over: it may run there, and only there it may end
                coroutine.close()
            raise

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What it returns. Interrupted, by Ctrl-C for one, it is cancelled.

        Raises ClientClosed, and RuntimeError from the portal's own thread, which would wait for itself.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("a callback cannot call the client that calls it")
        future = self.submit(coroutine)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ClientClosed("the client was closed before the call was answered") from None
        except BaseException:
            future.cancel()
            raise

    def each(self, source: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        """What it yields, one by one. Ending early ends it."""

        # An interrupted step takes a moment to end, and what is running cannot be closed.
        one_by_one = asyncio.Lock()
        step: asyncio.Task[Any] | None = None

        async def following() -> T | _End:
            nonlocal step
            step = asyncio.current_task()
            async with one_by_one:
                return await anext(source, _End())

        async def closing() -> None:
            # One that was interrupted as it was handed over has nobody who would cancel it.
            if step is not None and not step.cancelling():
                step.cancel()
            async with one_by_one:
                await source.aclose()

        try:
            while not isinstance(found := self.call(following()), _End):
                yield found
        finally:
            self.finish(closing())

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs what frees something; from the portal's own thread, where an abandoned iterator may be collected, later.
        Without effect once closed: then it was freed."""
        with suppress(ClientClosed):
            if threading.current_thread() is not self._thread:
                self.call(work)
                return
            future = self.submit(work)
            self._finishing.add(future)
            future.add_done_callback(self._finishing.discard)

    def close(self) -> None:
        """What still runs is cancelled. Closing twice is no error."""
        with self._lock:
            self._closed = True
            mine = self._pid == os.getpid()
        if mine and self._thread is not None and self._loop is not None and self._stop is not None:
            with suppress(RuntimeError):  # the loop is closed already
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(_STOP_S)

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._closed:
            raise ClientClosed("this client was closed")
        if self._pid and self._pid != os.getpid():
            raise ClientClosed("this client was used before the process was forked: make one in each process")
        if self._loop is None:
            started = threading.Event()
            self._pid = os.getpid()
            self._thread = threading.Thread(target=self._run, args=(started,), name="fnqueue", daemon=True)
            self._thread.start()
            started.wait()
        assert self._loop is not None
        return self._loop

    def _run(self, started: threading.Event) -> None:
        with asyncio.Runner() as runner:
            runner.run(self._serve(started))

    async def _serve(self, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        started.set()
        await self._stop.wait()
        await ended(asyncio.all_tasks() - {asyncio.current_task()})
        await self._on_close()


class _End:
    """There is nothing more."""
