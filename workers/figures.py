"""What a sidecar tells of its attempts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from broker.model import AttemptEnd, RequestState, Timings
from broker.settings import SidecarSettings
from broker.telemetry.metrics import (
    ATTEMPTS,
    COLD_START,
    ENDED,
    INSTANCE_START,
    RUN,
    SIDECAR_BUSY,
    SIDECAR_READY,
    WAIT,
    WORKER_AFTER,
    WORKER_BEFORE,
    WORKER_BUSY,
    WORKER_INFERENCE,
    WORKER_LATENCY,
    WORKER_REQUESTS,
    WORKER_RESPONSE_BYTES,
    WORKER_RESPONSES,
    WORKER_SLOTS,
    Metrics,
    Process,
    Reading,
)

# Upstream's codes.
_GOOD, _BAD = "0", "500"


class Figures:
    """Of one sidecar, and so of one version."""

    def __init__(self, metrics: Metrics, settings: SidecarSettings) -> None:
        metrics.announce(Process.SIDECAR)
        self._metrics = metrics
        self._slots = settings.max_request_concurrency
        self._labels = settings.function_id, settings.function_version_id

    def shown(self, *, busy: Callable[[], int], ready: Callable[[], bool]) -> AbstractContextManager[None]:
        """While the body runs, these are asked by whoever looks."""

        def read() -> Iterable[Reading]:
            return (
                Reading(WORKER_SLOTS, self._slots, self._labels),
                Reading(SIDECAR_BUSY, busy(), self._labels),
                Reading(SIDECAR_READY, float(ready()), self._labels),
            )

        return self._metrics.reading(read)

    def ready(self, *, after_s: float) -> None:
        """For the first time."""
        self._metrics.observe(INSTANCE_START, after_s, *self._labels)

    def claimed(self, *, first: bool, waited_s: float, cold_start_s: float) -> None:
        """An attempt begins; of the `first` of a request is told what it waited, and how much of that for a cold
        start."""
        self._metrics.count(WORKER_REQUESTS, *self._labels)
        if first:
            self._metrics.observe(WAIT, waited_s, *self._labels)
            if cold_start_s > 0:
                self._metrics.observe(COLD_START, cold_start_s, *self._labels)

    def attempted(self, end: RequestState | AttemptEnd, *, took_s: float, timings: Timings, size_bytes: int) -> None:
        """An attempt is over."""
        metrics, labels = self._metrics, self._labels
        metrics.count(ATTEMPTS, *labels, end.value)
        metrics.observe(WORKER_LATENCY, took_s, *labels)
        metrics.count(WORKER_BUSY, *labels, more=took_s)
        if isinstance(end, RequestState):
            metrics.count(WORKER_RESPONSES, *labels, _GOOD if end is RequestState.FULFILLED else _BAD)
        if timings.container_s:
            metrics.observe(RUN, timings.container_s, *labels)
        for counter, amount in (
            (WORKER_BEFORE, timings.inputs_s),
            (WORKER_INFERENCE, timings.container_s),
            (WORKER_AFTER, timings.upload_s),
            (WORKER_RESPONSE_BYTES, size_bytes),
        ):
            if amount:
                metrics.count(counter, *labels, more=amount)

    def ended(self, state: RequestState) -> None:
        """A request's message is done with."""
        self._metrics.count(ENDED, *self._labels, state.value)
