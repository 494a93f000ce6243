"""Spans by OpenTelemetry. The only module that imports it, and imported only where tracing is on.

Names and attributes are those of the semantic conventions for HTTP and for messaging; what they have no word for begins
with `fnqueue.`. One job is one message: what processes it is a child of what published it, and linked to it, so that a
request is one trace however long it waits.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from typing import Any, TypeVar

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from broker.model import Job, Outcome, RequestState
from broker.settings import TracingSettings
from broker.telemetry.tracing import HEADERS

T = TypeVar("T")

logger = logging.getLogger(__name__)

FLUSH_S = 3.0
REPORT_EVERY_S = 60.0
PROTOCOL = "http/protobuf"
_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
_FAILURES = frozenset(
    {RequestState.ERRORED, RequestState.EXPIRED, RequestState.TIMED_OUT, RequestState.DEAD, RequestState.ABANDONED}
)
_PROPAGATOR = TraceContextTextMapPropagator()
_NS = 1_000_000_000


class OpenTelemetry:
    """Implements `broker.telemetry.tracing.Tracing`. `exporter` is OTLP over HTTP unless one is given.

    Raises ValueError: the environment asks for what is not to be had here.
    """

    def __init__(
        self,
        settings: TracingSettings,
        service: str,
        *,
        system: str,
        exporter: SpanExporter | None = None,
        flush_s: float = FLUSH_S,
    ) -> None:
        if settings.protocol != PROTOCOL:
            raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL: only {PROTOCOL} is spoken")
        self._system = system
        self._flush_s = flush_s
        self.outbox = Outbox(exporter or OTLPSpanExporter(), most=_most(settings.bsp_max_queue_size))
        # What is left to be sent is sent by `close`, which waits for it no longer than it may.
        self._provider = TracerProvider(
            resource=Resource.create(
                {SERVICE_NAME: settings.service_name or service, SERVICE_VERSION: metadata.version("fnqueue")}
            ),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(self.outbox)
        self._tracer = self._provider.get_tracer("fnqueue")
        self._ids = _TraceIds()
        for handler in logging.root.handlers:
            handler.addFilter(self._ids)
        # Its exporter tells of each batch; `Outbox` tells of all of them, once in a while.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)

    async def close(self) -> None:
        """Send what is left, for at most `flush_s`: a thread that hangs is left to the end of the process."""
        thread = threading.Thread(target=self._provider.shutdown, name="tracing-flush", daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, self._flush_s)
        self.outbox.report()
        for handler in logging.root.handlers:
            handler.removeFilter(self._ids)

    @contextmanager
    def serve(self, method: str, route: str, path: str, carrier: Mapping[str, Sequence[str]]) -> Iterator[_Served]:
        known = method if method in _METHODS else "_OTHER"
        attributes = {"http.request.method": known, "url.path": path, "url.scheme": "http"}
        if route:
            attributes["http.route"] = route
        with self._tracer.start_as_current_span(
            f"{'HTTP' if known == '_OTHER' else method} {route}".rstrip(),
            _extracted(carrier),
            kind=SpanKind.SERVER,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            yield _Served(span)

    async def accept(self, work: Coroutine[Any, Any, T], *, request_id: str, version_id: str) -> T:
        attributes = {"fnqueue.request.id": request_id, "fnqueue.version.id": version_id}
        with self._tracer.start_as_current_span("accept", attributes=attributes):
            return await work

    @contextmanager
    def attempt(self, job: Job, *, number: int, began_at: float) -> Iterator[_Attempt]:
        parent = _of_job(job)
        began = _ns(began_at)
        if number == 1:
            # One clock may be behind the other.
            waiting = self._tracer.start_span("queue wait", parent, start_time=min(_ns(job.created_at), began))
            waiting.end(began)
        span = self._tracer.start_span(
            f"process {job.version_id}",
            parent,
            kind=SpanKind.CONSUMER,
            start_time=began,
            links=_links(parent),
            attributes={**self._message(job, "process"), "fnqueue.attempt": number},
        )
        self._tracer.start_span("claim", trace.set_span_in_context(span), start_time=began).end()
        with trace.use_span(span, record_exception=False, set_status_on_exception=False):
            attempt = _Attempt(self._tracer, span, job)
            try:
                yield attempt
            finally:
                attempt.close()

    @contextmanager
    def publish(self, job: Job) -> Iterator[Job]:
        """The job to publish in the body. That of a dead request has a trace of its own already, which is linked."""
        current = trace.get_current_span().get_span_context()
        carried = _of_job(job)
        own = _context_of(carried)
        elsewhere = current.is_valid and own.is_valid and own.trace_id != current.trace_id
        with self._tracer.start_as_current_span(
            f"send {job.version_id}",
            None if current.is_valid else carried,
            kind=SpanKind.PRODUCER,
            links=[Link(own)] if elsewhere else [],
            attributes=self._message(job, "send"),
        ):
            yield replace(job, headers=tuple(_injected(job.headers)))

    def _message(self, job: Job, operation: str) -> dict[str, str | int]:
        return {
            "messaging.system": self._system,
            "messaging.operation.name": operation,
            "messaging.operation.type": operation,
            "messaging.destination.name": job.version_id,
            "messaging.message.id": job.id,
            "messaging.message.body.size": job.size_bytes,
            "fnqueue.request.id": job.id,
            "fnqueue.function.id": job.function_id,
            "fnqueue.version.id": job.version_id,
            "fnqueue.account": job.account,
        }


class _Served:
    def __init__(self, span: Span) -> None:
        self._span = span

    def about(self, facts: Mapping[str, str]) -> None:
        self._span.set_attributes({f"fnqueue.{name}": value for name, value in facts.items() if value})

    def answered(self, status: int) -> None:
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            _fail(self._span, str(status))


class _Attempt:
    def __init__(self, tracer: trace.Tracer, span: Span, job: Job) -> None:
        self._tracer = tracer
        self._span = span
        self._job = job
        self._claimed = time.time_ns()
        self._call: Span | None = None
        self._called = 0
        self._fault = ""
        self._state = RequestState.QUEUED
        self._over = False

    def carried(self, headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        now = time.time_ns()
        self._tracer.start_span("inputs", start_time=self._claimed).end(now)
        # A target's path is the caller's own words.
        self._call = self._tracer.start_span(
            self._job.method, kind=SpanKind.CLIENT, start_time=now, attributes={"http.request.method": self._job.method}
        )
        return _injected(headers, trace.set_span_in_context(self._call))

    def called(self, fault: BaseException | None) -> None:
        self._called = time.time_ns()
        self._fault = type(fault).__name__ if fault is not None else ""

    def uploaded(self, took_s: float) -> None:
        now = time.time_ns()
        self._tracer.start_span("upload", start_time=now - _ns(took_s)).end(now)

    @contextmanager
    def settling(self) -> Iterator[None]:
        with self._tracer.start_as_current_span("settle"):
            yield

    def failed(self, kind: str, why: str) -> None:
        if not self._over:
            _fail(self._span, kind, why)

    def ended(self, state: RequestState, outcome: Outcome | None) -> None:
        if self._over:
            return
        self._state = state
        if state in _FAILURES:
            answered = outcome is not None and state is RequestState.ERRORED
            _fail(self._span, str(outcome.status) if outcome is not None and answered else state.value)
        if outcome is not None and self._call is not None and not self._fault:
            self._call.set_attribute("http.response.status_code", outcome.status)
            if outcome.status >= 400:
                _fail(self._call, str(outcome.status))

    def close(self) -> None:
        self._over = True
        if self._call is not None:
            if self._fault:
                _fail(self._call, self._fault)
            self._call.end(self._called or None)
        self._span.set_attribute("fnqueue.state", self._state.value)
        self._span.end()


class Outbox(SpanProcessor):
    """Finished spans on their way out, at most `most` and the one batch that is being sent; one more is dropped, and
    counted. Sending is another thread's work: whoever ends a span never waits."""

    def __init__(self, exporter: SpanExporter, *, most: int) -> None:
        """Raises ValueError: the SDK's own limits do not fit together."""
        self._most = most
        self._taken_in = 0
        self.dropped = 0
        self._exporter = _Counting(exporter, told=self._sent)
        self._reported = (0, 0)
        self._reported_at = time.monotonic() - REPORT_EVERY_S
        self._batches = BatchSpanProcessor(self._exporter, max_queue_size=most)

    @property
    def failed(self) -> int:
        """How many were sent, and not taken."""
        return self._exporter.failed

    def on_start(self, span: ReadableSpan, parent_context: Context | None = None) -> None:
        pass

    def on_end(self, span: ReadableSpan) -> None:
        context = span.get_span_context()
        if context is None or not context.trace_flags.sampled:
            return
        if self._taken_in - self._exporter.taken >= self._most:
            self.dropped += 1
            return
        self._taken_in += 1
        self._batches.on_end(span)

    def shutdown(self) -> None:
        self._batches.shutdown()  # type: ignore[no-untyped-call]  # the SDK's own gap

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._batches.force_flush(timeout_millis)

    def report(self) -> None:
        """Log what was lost since the last time, if anything was."""
        lost = (self.dropped, self.failed)
        if lost != self._reported:
            dropped, failed = (now - before for now, before in zip(lost, self._reported, strict=True))
            logger.warning("spans_lost", extra={"dropped": dropped, "failed": failed})
            self._reported = lost
            self._reported_at = time.monotonic()

    def _sent(self) -> None:
        if time.monotonic() - self._reported_at >= REPORT_EVERY_S:
            self.report()


class _Counting(SpanExporter):
    """Another exporter, and how many spans it was given and did not get rid of."""

    def __init__(self, exporter: SpanExporter, *, told: Callable[[], None]) -> None:
        self._exporter = exporter
        self._told = told
        self.taken = 0
        self.failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.taken += len(spans)
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            if result is not SpanExportResult.SUCCESS:
                self.failed += len(spans)
            self._told()
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


class _TraceIds(logging.Filter):
    """Says on each line in which trace it was written."""

    def filter(self, record: logging.LogRecord) -> bool:
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            record.trace_id = trace.format_trace_id(context.trace_id)
            record.span_id = trace.format_span_id(context.span_id)
        return True


def _extracted(carrier: Mapping[str, Sequence[str]]) -> Context:
    """Anybody may send anything: two of them are none, as is one that is not exactly as W3C has it."""
    if len(carrier.get("traceparent", ())) != 1:
        return Context()
    return _PROPAGATOR.extract({name: list(values) for name, values in carrier.items()}, Context())


def _of_job(job: Job) -> Context:
    carrier: dict[str, list[str]] = {}
    for name, value in job.headers:
        if (key := name.lower()) in HEADERS:
            carrier.setdefault(key, []).append(value)
    return _extracted(carrier)


def _context_of(context: Context) -> SpanContext:
    return trace.get_current_span(context).get_span_context()


def _links(parent: Context) -> list[Link]:
    found = _context_of(parent)
    return [Link(found)] if found.is_valid else []


def _injected(headers: Iterable[tuple[str, str]], context: Context | None = None) -> list[tuple[str, str]]:
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, context)
    return [*(pair for pair in headers if pair[0].lower() not in HEADERS), *carrier.items()]


def _fail(span: Span, kind: str, why: str = "") -> None:
    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR, why or None)


def _most(text: str) -> int:
    """Raises ValueError."""
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 1_000_000:
        raise ValueError("OTEL_BSP_MAX_QUEUE_SIZE: must be a number from 1 to 1000000")
    return int(text)


def _ns(seconds: float) -> int:
    return int(seconds * _NS)
