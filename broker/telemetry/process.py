"""What every process says of itself, whatever it does."""

from __future__ import annotations

import asyncio
import logging
import platform
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib.metadata import version

from broker.errors import Unavailable
from broker.ports import Broker
from broker.tasks import beside
from broker.telemetry.metrics import (
    BREAKER_OPEN,
    BREAKER_OPENED,
    BUILD_INFO,
    LOOP_LAG,
    SERVER_CONNECTIONS,
    Metrics,
    Reading,
)

logger = logging.getLogger(__name__)

_LAG_EVERY_S = 0.5
FORGET_EVERY_S = 600.0


@asynccontextmanager
async def observed(broker: Broker, *, forgets: bool = True) -> AsyncIterator[None]:
    """While the body runs, the metrics that every process has are kept. Once in a process. `forgets`: that series of
    deleted versions go, for which the catalog is read now and then."""
    build = Reading(BUILD_INFO, 1.0, (version("fnqueue"), platform.python_version()))

    def read() -> Iterable[Reading]:
        yield build
        for circuit in broker.circuits:
            yield Reading(BREAKER_OPEN, float(circuit.open), (circuit.server,))
            yield Reading(BREAKER_OPENED, float(circuit.opened), (circuit.server,))
            if circuit.connections:
                yield Reading(SERVER_CONNECTIONS, float(circuit.connections), (circuit.server,))

    with broker.metrics.reading(read), _lag_watched(broker.metrics):
        async with beside(*([_forget_deleted(broker)] if forgets else [])):
            yield


@contextmanager
def _lag_watched(metrics: Metrics) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle

    def look(due_at: float) -> None:
        nonlocal timer
        now = loop.time()
        metrics.observe(LOOP_LAG, max(0.0, now - due_at))
        timer = loop.call_at(now + _LAG_EVERY_S, look, now + _LAG_EVERY_S)

    first = loop.time() + _LAG_EVERY_S
    timer = loop.call_at(first, look, first)
    try:
        yield
    finally:
        timer.cancel()


async def _forget_deleted(broker: Broker) -> None:
    while True:
        await asyncio.sleep(FORGET_EVERY_S)
        with suppress(Unavailable):
            await forget_deleted(broker)


async def forget_deleted(broker: Broker) -> None:
    """Drop the series of versions that the catalog has no more, so that a process that lives long has those of the
    catalog and no others. Raises StoreUnavailable."""
    counted = broker.metrics.versions()
    if not counted:
        return
    known = {row.item.id for row in await broker.catalog.versions.list()}
    for version_id in counted - known:
        broker.metrics.forget(version_id)
        logger.debug("series_forgotten", extra={"version_id": version_id})
