"""What a sidecar tells of its attempts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from broker.model import AttemptEnd, RequestState
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


class Timed(Protocol):
    """As `broker.model.Timings`."""

    @property
    def inputs_s(self) -> float: ...

    @property
    def container_s(self) -> float: ...

    @property
    def upload_s(self) -> float: ...


class Figures:
    """Of one sidecar, and so of one version."""

    def __init__(self, metrics: Metrics, settings: SidecarSettings) -> None:
        metrics.announce(Process.SIDECAR)
        self._metrics = metrics
        # What upstream counts beside what we do is added up here, which costs next to nothing.
        self._begun = self._good = self._bad = self._answered_bytes = 0
        self._before_s = self._inference_s = self._after_s = self._busy_s = 0.0
        self._slots = settings.max_request_concurrency
        self._labels = settings.function_id, settings.function_version_id

    def shown(self, *, busy: Callable[[], int], ready: Callable[[], bool]) -> AbstractContextManager[None]:
        """While the body runs, these are asked by whoever looks."""

        labels = self._labels

        def read() -> Iterable[Reading]:
            return (
                Reading(WORKER_SLOTS, self._slots, labels),
                Reading(SIDECAR_BUSY, busy(), labels),
                Reading(SIDECAR_READY, float(ready()), labels),
                Reading(WORKER_REQUESTS, self._begun, labels),
                Reading(WORKER_RESPONSES, self._good, (*labels, _GOOD)),
                Reading(WORKER_RESPONSES, self._bad, (*labels, _BAD)),
                Reading(WORKER_RESPONSE_BYTES, self._answered_bytes, labels),
                Reading(WORKER_BEFORE, self._before_s, labels),
                Reading(WORKER_INFERENCE, self._inference_s, labels),
                Reading(WORKER_AFTER, self._after_s, labels),
                Reading(WORKER_BUSY, self._busy_s, labels),
            )

        return self._metrics.reading(read)

    def ready(self, *, after_s: float) -> None:
        """For the first time."""
        self._metrics.observe(INSTANCE_START, after_s, *self._labels)

    def claimed(self, *, first: bool, waited_s: float, cold_start_s: float) -> None:
        """An attempt begins; of the `first` of a request is told what it waited, and how much of that for a cold
        start."""
        self._begun += 1
        if first:
            self._metrics.observe(WAIT, waited_s, *self._labels)
            if cold_start_s > 0:
                self._metrics.observe(COLD_START, cold_start_s, *self._labels)

    def attempted(self, end: RequestState | AttemptEnd, *, took_s: float, timings: Timed, size_bytes: int) -> None:
        """An attempt is over."""
        metrics, labels = self._metrics, self._labels
        metrics.count(ATTEMPTS, *labels, end.value)
        metrics.observe(WORKER_LATENCY, took_s, *labels)
        if timings.container_s:
            metrics.observe(RUN, timings.container_s, *labels)
        if isinstance(end, RequestState):
            self._good += end is RequestState.FULFILLED
            self._bad += end is not RequestState.FULFILLED
        self._busy_s += took_s
        self._before_s += timings.inputs_s
        self._inference_s += timings.container_s
        self._after_s += timings.upload_s
        self._answered_bytes += size_bytes

    def ended(self, state: RequestState) -> None:
        """A request's message is done with."""
        self._metrics.count(ENDED, *self._labels, state.value)
