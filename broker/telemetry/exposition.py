"""What a scrape of a process is answered."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

from broker.telemetry.metrics import CONTENT_TYPE as CONTENT_TYPE  # noqa: PLC0414  that of `Exposition.text`
from broker.telemetry.metrics import Metrics

# Whoever scrapes within this time of another one is given the same page.
FRESH_S = 0.5


class Exposition:
    """The page of one process, written in a thread of its own, one at a time: however many scrape, and whatever there
    is to write, the loop goes on. Opened and closed as a context manager."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="metrics")
        self._page: asyncio.Future[bytes] | None = None
        self._until = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def text(self) -> bytes:
        """All metrics now, or FRESH_S ago, in Prometheus' text format. Takes as long as there is to write, about a
        second for 5,000 histograms."""
        loop = asyncio.get_running_loop()
        if self._page is None or (self._page.done() and loop.time() >= self._until):
            self._until = loop.time() + FRESH_S
            self._page = loop.run_in_executor(self._thread, self._metrics.read().text)
        return await asyncio.shield(self._page)
