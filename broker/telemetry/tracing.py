"""Tracing: what the rest of the product sees of it. Off, which is the default, there is none: `Broker.tracing` is None,
and no package of OpenTelemetry is imported.

The trace context of a request travels as W3C Trace Context (`traceparent`, `tracestate`): in the headers of its caller,
among those of its job through the queue, and in the headers that its container is given.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any, Protocol, TypeVar

from broker.model import Job, Outcome, RequestState
from broker.settings import TracingSettings

T = TypeVar("T")

logger = logging.getLogger(__name__)

HEADERS = frozenset({"traceparent", "tracestate"})
# Who is traced has a name of its own; the launcher's is not its sidecars'.
_OF_ONE_PROCESS = "OTEL_SERVICE_NAME"


class Served(Protocol):
    """One HTTP request that is being answered."""

    def about(self, facts: Mapping[str, str]) -> None:
        """What is known of it by now; nothing that is ''."""

    def answered(self, status: int) -> None: ...


class Attempt(Protocol):
    """One attempt at a job, from its claim on. What is said of one that is over is not heard."""

    def carried(self, headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """The container's headers with the attempt's trace context in place of any other; it is called next."""

    def called(self, fault: BaseException | None) -> None:
        """The container has answered, or has not."""

    def uploaded(self, took_s: float) -> None:
        """Its answer was stored, which took the last `took_s` seconds."""

    def settling(self) -> AbstractContextManager[object]:
        """While the body runs, the result is stored."""

    def failed(self, kind: str, why: str) -> None:
        """It comes to nothing, and the request may be tried again. `kind` is one of few words."""

    def ended(self, state: RequestState, outcome: Outcome | None) -> None:
        """The state that the request is left in."""


class Tracing(Protocol):
    """Makes spans, and hands them to an exporter that nothing waits for."""

    def serve(
        self, method: str, route: str, path: str, carrier: Mapping[str, Sequence[str]]
    ) -> AbstractContextManager[Served]:
        """A request that is answered while the body runs. `route` is the template of its path, '' if it has none;
        `carrier` has what came under each of HEADERS. The caller's trace goes on if that is one."""

    def accept(self, work: Coroutine[Any, Any, T], *, request_id: str, version_id: str) -> Coroutine[Any, Any, T]:
        """`work`, as the acceptance of a request."""

    def publish(self, job: Job) -> AbstractContextManager[Job]:
        """The job to publish in the body, which carries the trace that goes on there. One that belongs to a trace
        already, as that of a dead request, is linked to it."""

    def attempt(self, job: Job, *, number: int, began_at: float) -> AbstractContextManager[Attempt]:
        """An attempt that was granted, and that the body makes; `began_at` is when it was asked for (unix seconds)."""


@asynccontextmanager
async def opened(service: str, *, system: str) -> AsyncIterator[Tracing | None]:
    """Tracing for as long as the body runs, if the environment asks for it; what was not sent by then is sent, for a
    few seconds at most. `service` is what this process is called unless OTEL_SERVICE_NAME says otherwise, `system` what
    its queue is. What is wrong with it is logged and leaves it off: no request is worth less for not being traced."""
    settings = TracingSettings()
    if not settings.wanted:
        yield None
        return
    try:
        spans = importlib.import_module("broker.telemetry.spans")
        tracing = spans.OpenTelemetry(settings, service, system=system)
    except ImportError as exc:
        logger.warning(
            "tracing_off", extra={"cause": f"{exc.name} is not installed; use: pip install 'fnqueue[tracing]'"}
        )
        yield None
        return
    except ValueError as exc:
        logger.warning("tracing_off", extra={"cause": str(exc)})
        yield None
        return
    try:
        yield tracing
    finally:
        await tracing.close()


def inherited() -> dict[str, str]:
    """What a sidecar is told of tracing by whoever starts it: the same, but for the name."""
    return {name: value for name, value in os.environ.items() if name.startswith("OTEL_") and name != _OF_ONE_PROCESS}
