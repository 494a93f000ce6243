"""Every metric of every process, declared once: `docs/metrics.md` is made from this list, and dashboards and alerts are
checked against it.

Counters and histograms are told as things happen; gauges and totals are asked when somebody looks. No label has values
without bound: there is none for requests, accounts or instances, and functions are those of the catalog.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import Any, NamedTuple

import prometheus_client
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.utils import floatToGoString


class Process(StrEnum):
    """Which process exports a metric."""

    API = "api"
    CONTROLLER = "controller"
    SIDECAR = "sidecar"


EVERY = (Process.API, Process.CONTROLLER, Process.SIDECAR)

FUNCTION, VERSION = "function_id", "function_version_id"
OF_VERSION = (FUNCTION, VERSION)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Metric:
    """`name` is as it is exposed, with its unit; `help` is one sentence. `upstream`: NVCF has it by this name
    (contract/management.md §8.3)."""

    name: str
    help: str
    by: tuple[Process, ...]
    labels: tuple[str, ...] = ()
    upstream: bool = False


class Counter(Metric):
    """Told of each thing that it counts."""

    __slots__ = ()
    kind = "counter"


class Total(Metric):
    """A counter that something else keeps, and that is asked for."""

    __slots__ = ()
    kind = "counter"


class Gauge(Metric):
    """Asked for."""

    __slots__ = ()
    kind = "gauge"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Histogram(Metric):
    """Told of each value."""

    buckets: tuple[float, ...]

    @property
    def kind(self) -> str:
        return "histogram"


AnyMetric = Counter | Total | Gauge | Histogram


class Reading(NamedTuple):
    """One value now. Readings of the same metric and labels are added up."""

    metric: Gauge | Total
    value: float
    labels: tuple[str, ...] = ()


Read = Callable[[], Iterable[Reading]]

# From an answer at once to a call that was held for the longest NVCF-POLL-SECONDS.
_CALL_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1200.0, 3600.0)
# From nothing to a day.
_JOB_S = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 1800.0, 3600.0, 14_400.0, 86_400.0)
_LAG_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
# Upstream's own.
_FUNCTION_S = (0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 1800.0)
_WORKER_S = (0.1, 0.25, 1.0, 5.0, 10.0, 30.0, 100.0, 500.0, 1000.0, 5000.0)

# -- every process -----------------------------------------------------------------------------

BUILD_INFO = Gauge(
    name="fnqueue_build_info", help="1, with what this process is.", by=EVERY, labels=("version", "python")
)
LOOP_LAG = Histogram(
    name="fnqueue_event_loop_lag_seconds",
    help="How late the event loop came to a timer that it has twice a second.",
    by=EVERY,
    buckets=_LAG_S,
)
BREAKER_OPEN = Gauge(
    name="fnqueue_server_breaker_open",
    help="1 while a server (queue, store, blobs) is away for so long that this process does not ask it.",
    by=EVERY,
    labels=("server",),
)
BREAKER_OPENED = Total(
    name="fnqueue_server_breaker_opened_total", help="Times that it came to that.", by=EVERY, labels=("server",)
)
SERVER_CONNECTIONS = Total(
    name="fnqueue_server_connections_total",
    help="Connections made to the queue and the store. A process makes a few and keeps them: more are reconnects.",
    by=EVERY,
    labels=("server",),
)

# -- front ends --------------------------------------------------------------------------------

HTTP_DURATION = Histogram(
    name="http_server_request_duration_seconds",
    help="HTTP requests by route and status, from the head to the last byte; held calls and streams for as long as "
    "they are. 499: the client left. The route is a template, `(function)` a call in a function's own name and "
    "`(none)` no route of ours.",
    by=(Process.API,),
    labels=("http_request_method", "http_route", "http_response_status_code"),
    buckets=_CALL_S,
    upstream=True,
)
FUNCTION_REQUESTS = Counter(
    name="function_request_total",
    help="Invocations that were accepted; a repeat with the same Idempotency-Key is one more.",
    by=(Process.API,),
    labels=OF_VERSION,
    upstream=True,
)
FUNCTION_LATENCY = Histogram(
    name="function_request_latency",
    help="Seconds from an accepted invocation's head to the last byte of what answered it, a 202 included.",
    by=(Process.API,),
    labels=OF_VERSION,
    buckets=_FUNCTION_S,
    upstream=True,
)
INVOCATION_ERRORS = Counter(
    name="app_invocation_error_total",
    help="Accepted invocations that were answered 400 or above, by status; 499: the client left before.",
    by=(Process.API,),
    labels=(*OF_VERSION, "http_status_code"),
    upstream=True,
)
REFUSALS = Counter(
    name="fnqueue_refusals_total",
    help="Requests that were refused for want of room or of a server, by the type of the problem; `limit` is the "
    "setting that was met, empty where no setting is.",
    by=(Process.API,),
    labels=("reason", "limit"),
)
CONNECTIONS = Gauge(name="fnqueue_http_connections", help="Connections of clients that are open.", by=(Process.API,))
WAITING_CALLERS = Gauge(
    name="fnqueue_waiting_callers", help="Calls that are held until their request has ended.", by=(Process.API,)
)
EVENT_STREAMS = Gauge(
    name="fnqueue_event_streams", help="Callers that listen to the events of their requests.", by=(Process.API,)
)
CHANNELS = Gauge(
    name="fnqueue_channels", help="WebSockets and bidirectional streams, queued ones included.", by=(Process.API,)
)
BODIES = Gauge(
    name="fnqueue_inflight_bodies", help="Requests that are being accepted, body in memory.", by=(Process.API,)
)
BODY_BYTES = Gauge(name="fnqueue_inflight_body_bytes", help="What those bodies take.", by=(Process.API,))

# -- sidecars ----------------------------------------------------------------------------------

WAIT = Histogram(
    name="fnqueue_request_wait_seconds",
    help="From a request's acceptance until its first attempt began, by the clocks of two machines.",
    by=(Process.SIDECAR,),
    labels=OF_VERSION,
    buckets=_JOB_S,
)
RUN = Histogram(
    name="fnqueue_request_run_seconds",
    help="An attempt's time in the container.",
    by=(Process.SIDECAR,),
    labels=OF_VERSION,
    buckets=_JOB_S,
)
COLD_START = Histogram(
    name="fnqueue_cold_start_seconds",
    help="Of requests that came while no instance was ready: how long until one was. The first that becomes ready "
    "tells.",
    by=(Process.SIDECAR,),
    labels=OF_VERSION,
    buckets=_JOB_S,
)
INSTANCE_START = Histogram(
    name="fnqueue_instance_start_seconds",
    help="From the start of a sidecar until its container was healthy for the first time.",
    by=(Process.SIDECAR,),
    labels=OF_VERSION,
    buckets=_JOB_S,
)
ATTEMPTS = Counter(
    name="fnqueue_attempts_total",
    help="Attempts by end: the state in which the request ended with it, or `failed` (the container was lost, and it "
    "counts), `returned` (it costs nothing) or `lost` (the request went on without it).",
    by=(Process.SIDECAR,),
    labels=(*OF_VERSION, "end"),
)
ENDED = Counter(
    name="fnqueue_requests_ended_total",
    help="Requests by end, counted when their message is done with: once each, and again for a message that was "
    "delivered again after a crash. `dead` ones are counted by controllers.",
    by=(Process.SIDECAR, Process.CONTROLLER),
    labels=(*OF_VERSION, "state"),
)
WORKER_REQUESTS = Total(
    name="nvcf_worker_service_request_total",
    help="Attempts that were begun.",
    by=(Process.SIDECAR,),
    labels=OF_VERSION,
    upstream=True,
)
WORKER_RESPONSES = Total(
    name="nvcf_worker_service_response_total",
    help="Attempts that ended their request: `error_code` 0 when it was fulfilled, 500 otherwise.",
    by=(Process.SIDECAR,),
    labels=(*OF_VERSION, "error_code"),
    upstream=True,
)
WORKER_RESPONSE_BYTES = Total(
    name="nvcf_worker_service_response_bytes_total",
    help="What containers answered.",
    by=(Process.SIDECAR,),
    labels=OF_VERSION,
    upstream=True,
)
WORKER_LATENCY = Histogram(
    name="nvcf_worker_service_request_latency_seconds",
    help="An attempt from its claim to its end.",
    by=(Process.SIDECAR,),
    labels=OF_VERSION,
    buckets=_WORKER_S,
    upstream=True,
)
WORKER_BEFORE = Total(
    name="nvcf_worker_service_pre_inference_seconds_total",
    help="What laying out assets and bodies took.",
    by=(Process.SIDECAR,),
    labels=OF_VERSION,
    upstream=True,
)
WORKER_INFERENCE = Total(
    name="nvcf_worker_service_inference_request_time_seconds_total",
    help="What the container took.",
    by=(Process.SIDECAR,),
    labels=OF_VERSION,
    upstream=True,
)
WORKER_BUSY = Total(
    name="nvcf_worker_service_worker_thread_busy_seconds_total",
    help="Slots' time with attempts that are over.",
    by=(Process.SIDECAR,),
    labels=OF_VERSION,
    upstream=True,
)
WORKER_AFTER = Total(
    name="nvcf_worker_service_post_inference_seconds_total",
    help="What storing large answers took.",
    by=(Process.SIDECAR,),
    labels=OF_VERSION,
    upstream=True,
)
WORKER_SLOTS = Gauge(
    name="nvcf_worker_service_worker_thread_count_total",
    help="Jobs that the container is sent at once.",
    by=(Process.SIDECAR,),
    labels=OF_VERSION,
    upstream=True,
)
SIDECAR_BUSY = Gauge(
    name="fnqueue_sidecar_slots_busy", help="Slots with an attempt now.", by=(Process.SIDECAR,), labels=OF_VERSION
)
SIDECAR_READY = Gauge(
    name="fnqueue_sidecar_ready",
    help="1 while the container is healthy and takes work.",
    by=(Process.SIDECAR,),
    labels=OF_VERSION,
)

# -- controllers -------------------------------------------------------------------------------

LEADS = Gauge(
    name="fnqueue_controller_leads",
    help="1 in the one controller that acts, whose figures of versions and of the auditor there are.",
    by=(Process.CONTROLLER,),
)
SOURCE = Gauge(
    name="fnqueue_queue_source_available",
    help="1 while the figures of versions are those of the last few seconds. 0: this controller leads and is blind, "
    "and there are none: no zero is a missing answer.",
    by=(Process.CONTROLLER,),
)
DEPTH = Gauge(
    name="fnqueue_queue_depth",
    help="Requests that were accepted and that no worker has begun.",
    by=(Process.CONTROLLER,),
    labels=OF_VERSION,
)
RUNNING = Gauge(
    name="fnqueue_requests_running",
    help="Requests that are claimed and not over.",
    by=(Process.CONTROLLER,),
    labels=OF_VERSION,
)
OLDEST = Gauge(
    name="fnqueue_queue_oldest_age_seconds",
    help="How long the request has waited that waits longest; 0 where none waits.",
    by=(Process.CONTROLLER,),
    labels=OF_VERSION,
)
SLOTS = Gauge(
    name="fnqueue_version_slots",
    help="Slots of the instances that are ready.",
    by=(Process.CONTROLLER,),
    labels=OF_VERSION,
)
SLOTS_BUSY = Gauge(
    name="fnqueue_version_slots_busy",
    help="Slots with an attempt, as the instances reported it last.",
    by=(Process.CONTROLLER,),
    labels=OF_VERSION,
)
INSTANCES = Gauge(
    name="fnqueue_instances",
    help="Instances that report: `starting`, `running`, `errored` (not healthy any more) or `quarantined`.",
    by=(Process.CONTROLLER,),
    labels=(*OF_VERSION, "state"),
)
NVCF_DEPTH = Gauge(
    name="nvcf_function_queue_depth",
    help="As `fnqueue_queue_depth`.",
    by=(Process.CONTROLLER,),
    labels=OF_VERSION,
    upstream=True,
)
NVCF_INSTANCES = Gauge(
    name="nvcf_function_instances_current",
    help="Instances that are ready.",
    by=(Process.CONTROLLER,),
    labels=OF_VERSION,
    upstream=True,
)
NVCF_CONCURRENCY = Gauge(
    name="nvcf_function_concurrency",
    help="Jobs that one container is sent at once, the most of the deployment's specifications.",
    by=(Process.CONTROLLER,),
    labels=OF_VERSION,
    upstream=True,
)
NVCF_STATUS = Gauge(
    name="nvcf_function_status",
    help="1, with the status of a deployed version.",
    by=(Process.CONTROLLER,),
    labels=(*OF_VERSION, "status"),
    upstream=True,
)
NVCF_INFO = Gauge(
    name="nvcf_function_info",
    help="1, with the name of a deployed version, for joins.",
    by=(Process.CONTROLLER,),
    labels=(*OF_VERSION, "function_name"),
    upstream=True,
)
GPUS = Gauge(
    name="fnqueue_gpu_capacity_instances",
    help="Instances of a type that fit when nothing else runs, as its controller offers them.",
    by=(Process.CONTROLLER,),
    labels=("gpu", "instance_type", "backend"),
)
AUDITED = Gauge(
    name="fnqueue_audit_requests",
    help="Conservation, by the auditor's last pass: `accepted` is the sum of `queued`, `running`, `done` and `dead`.",
    by=(Process.CONTROLLER,),
    labels=("state",),
)
BALANCED = Gauge(
    name="fnqueue_audit_balanced",
    help="1 if that sum was right: no record is damaged.",
    by=(Process.CONTROLLER,),
)
AUDITED_AT = Gauge(
    name="fnqueue_audit_timestamp_seconds", help="When the auditor's last pass ended.", by=(Process.CONTROLLER,)
)
MESSAGES = Gauge(
    name="fnqueue_audit_messages",
    help="Messages by the auditor's last look: `ready` in the queues of deployed versions, `dead` among the dead "
    "letters.",
    by=(Process.CONTROLLER,),
    labels=("where",),
)
MENDED = Total(
    name="fnqueue_audit_mended_total",
    help="What the auditor put right since this controller leads.",
    by=(Process.CONTROLLER,),
    labels=("what",),
)
DEAD_LETTERS = Counter(
    name="fnqueue_dead_letters_total",
    help="Requests that became dead letters, by cause.",
    by=(Process.CONTROLLER,),
    labels=(*OF_VERSION, "cause"),
)

WEBHOOK_TRIES = Counter(
    name="fnqueue_webhook_tries_total",
    help="Webhooks that were sent, by what the receiver said: `2xx` to `5xx`, or `none`: no answer, no connection, no "
    "address that may be reached or no secret to sign with.",
    by=(Process.CONTROLLER,),
    labels=("answer",),
)
WEBHOOKS = Counter(
    name="fnqueue_webhooks_total",
    help="Webhooks that are done with: `delivered`, or `failed`: given up.",
    by=(Process.CONTROLLER,),
    labels=(*OF_VERSION, "state"),
)
WEBHOOK_DELIVERY = Histogram(
    name="fnqueue_webhook_delivery_seconds",
    help="From the end of a request until its receiver had taken the webhook, retries included; not of one that was "
    "asked for again.",
    by=(Process.CONTROLLER,),
    buckets=_JOB_S,
)
WEBHOOKS_DUE = Gauge(
    name="fnqueue_webhooks_due",
    help="Webhooks that are due and that no controller has taken yet. All controllers tell the same.",
    by=(Process.CONTROLLER,),
)
WEBHOOKS_LATE = Gauge(
    name="fnqueue_webhooks_due_age_seconds",
    help="For how long the oldest of them has been due; 0 where there is none.",
    by=(Process.CONTROLLER,),
)

REGISTRY: tuple[AnyMetric, ...] = tuple(
    found for found in list(globals().values()) if isinstance(found, Counter | Total | Gauge | Histogram)
)

# Of prometheus-client's collector of the process.
OF_THE_PROCESS = (
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "process_virtual_memory_bytes",
    "process_start_time_seconds",
    "process_open_fds",
    "process_max_fds",
)


# -- what a process has of them ----------------------------------------------------------------

Labels = tuple[str, ...]


class Metrics:
    """Those of one process. `count` and `observe` take half a microsecond, hold nothing up, and belong to the
    loop. Values are not kept by prometheus-client, which takes a lock for each and looks through all buckets."""

    def __init__(self) -> None:
        self._vendor = CollectorRegistry()
        ProcessCollector(registry=self._vendor)
        self._counters: dict[Counter, dict[Labels, float]] = {}
        self._histograms: dict[Histogram, dict[Labels, _Spread]] = {}
        self._reads: list[Read] = []

    def announce(self, process: Process) -> None:
        """Show from now on what this process counts, at zero where there is no label."""
        for metric in REGISTRY:
            if process in metric.by:
                if isinstance(metric, Counter):
                    counts = self._counters.setdefault(metric, {})
                    if not metric.labels:
                        counts.setdefault((), 0.0)
                elif isinstance(metric, Histogram):
                    spreads = self._histograms.setdefault(metric, {})
                    if not metric.labels:
                        spreads.setdefault((), _Spread(metric.buckets))

    def count(self, metric: Counter, *labels: str, more: float = 1.0) -> None:
        try:
            self._counters[metric][labels] += more
        except KeyError:
            self._counters.setdefault(metric, {})[_named(metric, labels)] = more

    def observe(self, metric: Histogram, value: float, *labels: str) -> None:
        try:
            spread = self._histograms[metric][labels]
        except KeyError:
            spread = self._histograms.setdefault(metric, {})[_named(metric, labels)] = _Spread(metric.buckets)
        spread.counts[bisect_left(metric.buckets, value)] += 1
        spread.total += value

    @contextmanager
    def reading(self, read: Read) -> Iterator[None]:
        """While the body runs, `read` is asked by whoever looks, in the loop. It must be quick and raise nothing."""
        self._reads.append(read)
        try:
            yield
        finally:
            self._reads.remove(read)

    def versions(self) -> set[str]:
        """Those that anything was counted of."""
        return {labels[at] for at, children in self._of_versions() for labels in children}

    def forget(self, version_id: str) -> None:
        """Drop every series of this version. They begin at zero if anything of it is counted again."""
        for at, children in self._of_versions():
            for labels in [labels for labels in children if labels[at] == version_id]:
                del children[labels]

    def read(self) -> Page:
        """All of it now. To be called in the loop; what it returns may be rendered in a thread."""
        return Page(
            self._vendor,
            {metric: counts.copy() for metric, counts in self._counters.items()},
            {
                metric: {labels: spread.copy() for labels, spread in spreads.items()}
                for metric, spreads in self._histograms.items()
            },
            [reading for read in self._reads for reading in read()],
        )

    def _of_versions(self) -> Iterator[tuple[int, dict[Labels, Any]]]:
        """Where the version is among the labels, and what there is by those labels."""
        told: list[tuple[Metric, dict[Labels, Any]]] = [*self._counters.items(), *self._histograms.items()]
        for metric, children in told:
            if VERSION in metric.labels:
                yield metric.labels.index(VERSION), children


class _Spread:
    """The values that a histogram was told."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def copy(self) -> _Spread:
        made = _Spread(self._bounds)
        made.counts, made.total = self.counts.copy(), self.total
        return made

    def up_to(self, bounds: Iterable[str]) -> list[tuple[str, float]]:
        """How many values there are up to each of the bounds, as they are spelled."""
        return list(zip(bounds, accumulate(map(float, self.counts)), strict=True))


def _named(metric: Metric, labels: Labels) -> Labels:
    """Raises ValueError: one is missing, or too many."""
    if len(labels) != len(metric.labels):
        raise ValueError(f"{metric.name} has {len(metric.labels)} labels, not {len(labels)}")
    return labels


def _counted(metric: Counter, counts: Mapping[Labels, float]) -> Family:
    family = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
    for labels, value in counts.items():
        family.add_metric(labels, value)
    return family


def _spread(metric: Histogram, spreads: Mapping[Labels, _Spread]) -> Family:
    bounds = [floatToGoString(bound) for bound in (*metric.buckets, math.inf)]  # type: ignore[no-untyped-call]
    family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    for labels, spread in spreads.items():
        family.add_metric(labels, spread.up_to(bounds), spread.total)
    return family


class Page:
    """What one look at a process found."""

    def __init__(
        self,
        vendor: CollectorRegistry,
        counters: Mapping[Counter, Mapping[Labels, float]],
        histograms: Mapping[Histogram, Mapping[Labels, _Spread]],
        readings: Iterable[Reading],
    ) -> None:
        self._vendor = vendor
        self._counters = counters
        self._histograms = histograms
        self._readings = readings

    def text(self) -> bytes:
        """In Prometheus' text format. May take long: a microsecond for each 5 bytes."""
        return prometheus_client.generate_latest(self)

    def collect(self) -> Iterator[Family]:
        yield from self._vendor.collect()
        yield from (_counted(metric, counts) for metric, counts in self._counters.items())
        yield from (_spread(metric, spreads) for metric, spreads in self._histograms.items())
        sums: dict[Gauge | Total, dict[tuple[str, ...], float]] = {}
        for metric, value, labels in self._readings:
            found = sums.setdefault(metric, {})
            found[labels] = found.get(labels, 0.0) + value
        for metric, values in sums.items():
            kind = CounterMetricFamily if isinstance(metric, Total) else GaugeMetricFamily
            family = kind(metric.name, metric.help, labels=metric.labels)
            for labels, value in values.items():
                family.add_metric(labels, value)
            yield family


CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
