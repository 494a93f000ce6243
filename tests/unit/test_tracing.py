"""Tracing: what becomes a span, whose child it is, and that nothing waits for it. The whole way, over a real receiver,
is in tests/e2e/test_tracing.py."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from api.front import Front
from api.tracing import traced
from broker.backends.memory.queue import MemoryQueue
from broker.connect import open_broker
from broker.model import RequestState
from broker.ports import Broker
from broker.settings import ApiSettings, TracingSettings
from broker.telemetry import logs, tracing
from broker.telemetry.queue import TracedQueue
from broker.telemetry.spans import OpenTelemetry
from fnqueue.tracing import exporting
from tests.unit.container import VERSION_ID, a_job, answer
from tests.unit.service import FUNCTION_ID, pending, serving
from tests.unit.test_sidecar import Gate, Rig, a_rig, crash, in_turn, never

TRACE = "0af7651916cd43dd8448eb211c80319c"
SENT = f"00-{TRACE}-b7ad6b7169203331-01"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


class Tracer(OpenTelemetry):
    """Its spans go to a list."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        super().__init__(TracingSettings(), "under-test", system="memory", exporter=self.exporter)

    def spans(self) -> list[ReadableSpan]:
        self.outbox.force_flush()
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans() if span.name.split(" ")[0] == name.split(" ", maxsplit=1)[0]]


class TracedRig(Rig):
    tracer: Tracer

    @property
    def broker(self) -> Broker:
        return replace(super().broker, tracing=self.tracer, queue=TracedQueue(self.queue, self.tracer))


@pytest.fixture
async def tracer(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Tracer]:
    monkeypatch.delenv("OTEL_TRACES_SAMPLER", raising=False)
    made = Tracer()
    yield made
    await made.close()


@pytest.fixture
async def rig(tmp_path: Path, tracer: Tracer) -> AsyncIterator[TracedRig]:
    async with a_rig(tmp_path) as made:
        traced = TracedRig(made.box, made.queue, made.results, made.catalog, made.blobs, made.settings)
        traced.tracer = tracer
        yield traced


def carrying(*pairs: tuple[str, str]) -> dict[str, tuple[tuple[str, str], ...]]:
    return {"headers": (("Content-Type", "application/json"), *pairs)}


def context_of(span: ReadableSpan) -> SpanContext:
    found = span.get_span_context()
    assert found is not None
    return found


def is_child(child: ReadableSpan, parent: ReadableSpan) -> bool:
    return child.parent is not None and child.parent.span_id == context_of(parent).span_id


def told(span: ReadableSpan, name: str) -> object:
    return (span.attributes or {}).get(name)


@contextmanager
def inside(flags: int = 1) -> Iterator[SpanContext]:
    context = SpanContext(int(TRACE, 16), 0xB7AD6B7169203331, is_remote=True, trace_flags=TraceFlags(flags))
    with trace.use_span(NonRecordingSpan(context)):
        yield context


# -- on and off --------------------------------------------------------------------------------


def test_nothing_that_traces_is_loaded_where_tracing_is_off() -> None:
    looked = (
        "import sys, api.commands, workers.commands, fnqueue.client; print('opentelemetry.sdk.trace' in sys.modules)"
    )
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", looked], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {ENDPOINT: ""},
        {ENDPOINT: "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"},
        {ENDPOINT: "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
async def test_it_is_off_unless_a_receiver_is_named(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    async with tracing.opened("fnqueue-api", system="memory") as found:
        assert found is None


async def test_off_nothing_is_between_a_job_and_its_queue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = ApiSettings(data_dir=tmp_path)
    async with open_broker(settings) as broker:
        front = Front.over(broker, settings)
        assert (broker.tracing, type(broker.queue), traced(front)) == (None, MemoryQueue, [])
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    async with open_broker(settings) as broker:
        front = Front.over(broker, settings)
        assert (type(broker.tracing), type(broker.queue)) == (OpenTelemetry, TracedQueue)
        assert len(traced(front)) == 1


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "only http/protobuf"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "plenty", "OTEL_BSP_MAX_QUEUE_SIZE"),
    ],
)
async def test_what_cannot_be_had_is_logged_and_leaves_it_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, value: str, cause: str
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setenv(name, value)
    async with tracing.opened("fnqueue-api", system="memory") as found:
        assert found is None
    [line] = [record for record in caplog.records if record.message == "tracing_off"]
    assert cause in vars(line)["cause"]


async def test_a_missing_package_is_named_and_leaves_it_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.delitem(sys.modules, "broker.telemetry.spans")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    async with tracing.opened("fnqueue-api", system="memory") as found:
        assert found is None
    [line] = [record for record in caplog.records if record.message == "tracing_off"]
    assert "fnqueue[tracing]" in vars(line)["cause"]


def test_a_sidecar_is_traced_as_its_controller_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://collector:4318")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "fnqueue-controller")
    assert tracing.inherited() == {ENDPOINT: "http://collector:4318"}


# -- one attempt -------------------------------------------------------------------------------


async def test_an_attempt_goes_on_in_the_trace_that_its_job_carries(rig: TracedRig) -> None:
    record = await rig.run(**carrying(("traceparent", SENT), ("tracestate", "vendor=1")))
    assert record.state is RequestState.FULFILLED
    [process] = rig.tracer.named("process")
    parts = {span.name: span for span in rig.tracer.spans()}
    assert {format(context_of(span).trace_id, "032x") for span in parts.values()} == {TRACE}
    assert process.kind is trace.SpanKind.CONSUMER
    assert process.name == f"process {VERSION_ID}"
    assert [link.context.span_id for link in process.links] == [0xB7AD6B7169203331]
    assert process.parent is not None
    assert process.parent.span_id == 0xB7AD6B7169203331
    assert parts["queue wait"].parent == process.parent
    assert all(is_child(parts[name], process) for name in ("claim", "inputs", "POST", "settle"))
    assert told(process, "messaging.message.id") == record.id
    assert (told(process, "fnqueue.state"), told(process, "fnqueue.attempt")) == ("fulfilled", 1)
    assert told(parts["POST"], "http.response.status_code") == 200
    assert not [span for span in parts.values() if not span.status.is_ok and span.status.status_code.name == "ERROR"]


async def test_the_container_is_told_the_span_that_calls_it(rig: TracedRig) -> None:
    await rig.run(**carrying(("traceparent", SENT), ("tracestate", "vendor=1")))
    [call] = rig.tracer.named("POST")
    assert rig.box.header("traceparent") == [f"00-{TRACE}-{context_of(call).span_id:016x}-01"]
    assert rig.box.header("tracestate") == ["vendor=1"]


async def test_each_attempt_is_a_span_and_one_that_lost_its_container_failed(rig: TracedRig) -> None:
    rig.box.handler = in_turn(crash, lambda _: answer(b'"done"'))
    record = await rig.run(**carrying(("traceparent", SENT)))
    assert record.state is RequestState.FULFILLED
    first, second = rig.tracer.named("process")
    assert (told(first, "fnqueue.attempt"), told(second, "fnqueue.attempt")) == (1, 2)
    assert (told(first, "error.type"), first.status.status_code) == ("container_lost", trace.StatusCode.ERROR)
    assert (told(first, "fnqueue.state"), told(second, "fnqueue.state")) == ("queued", "fulfilled")
    assert context_of(first).trace_id == context_of(second).trace_id
    assert len(rig.tracer.named("queue wait")) == 1


async def test_a_containers_error_fails_the_attempt_and_the_call(rig: TracedRig) -> None:
    rig.box.handler = lambda _: answer(b"{}", status=422)
    await rig.run()
    [process], [call] = rig.tracer.named("process"), rig.tracer.named("POST")
    assert (told(process, "error.type"), told(call, "error.type")) == ("422", "422")
    assert told(process, "fnqueue.state") == "errored"


async def test_a_run_that_takes_too_long_says_so(rig: TracedRig) -> None:
    rig.box.handler = never
    record = await rig.run(run_timeout_s=0.1)
    assert record.state is RequestState.TIMED_OUT
    [process] = rig.tracer.named("process")
    assert told(process, "error.type") == "timed-out"


async def test_one_that_its_caller_cancels_is_no_failure(rig: TracedRig) -> None:
    rig.box.handler = Gate()
    async with rig.sidecar():
        job = await rig.submit()
        await rig.box.called.wait()
        await rig.results.cancel(job.id, reason="not wanted")
        await rig.ended(job)
    [process] = rig.tracer.named("process")
    assert told(process, "fnqueue.state") == "cancelled"
    assert process.status.status_code is trace.StatusCode.UNSET


async def test_what_its_caller_does_not_sample_nobody_does(rig: TracedRig) -> None:
    record = await rig.run(**carrying(("traceparent", SENT[:-1] + "0")))
    assert record.state is RequestState.FULFILLED
    assert rig.tracer.spans() == []
    [header] = rig.box.header("traceparent")
    assert (header[3:35], header[-2:]) == (TRACE, "00")


@pytest.mark.parametrize(
    "pairs",
    [
        (("traceparent", "anything"),),
        (("traceparent", SENT.upper()),),
        (("traceparent", f"ff{SENT[2:]}"),),
        (("traceparent", f"{SENT}-more"),),
        (("traceparent", f"00-{'0' * 32}-b7ad6b7169203331-01"),),
        (("traceparent", f"00-{TRACE}-{'0' * 16}-01"),),
        (("traceparent", SENT), ("Traceparent", SENT)),
        (("traceparent", "cc-" + "9" * 600),),
    ],
)
async def test_what_is_no_trace_context_begins_a_trace_and_goes_no_further(
    rig: TracedRig, pairs: tuple[tuple[str, str], ...]
) -> None:
    await rig.run(**carrying(*pairs, ("tracestate", "vendor=1")))
    [process] = rig.tracer.named("process")
    assert process.parent is None
    assert not process.links
    [header] = rig.box.header("traceparent")
    assert header[:35] == f"00-{context_of(process).trace_id:032x}" != f"00-{TRACE}"
    assert rig.box.header("tracestate") == []


@pytest.mark.parametrize("state", ["no pair", "a=1,a=2", "k=" + "v" * 600, ",".join(f"k{n}=v" for n in range(33))])
async def test_a_bad_tracestate_costs_the_state_and_not_the_trace(rig: TracedRig, state: str) -> None:
    await rig.run(**carrying(("traceparent", SENT), ("tracestate", state)))
    assert rig.box.header("tracestate") == []
    assert rig.box.header("traceparent")[0][3:35] == TRACE


# -- publishing --------------------------------------------------------------------------------


async def test_a_job_carries_the_span_that_published_it(rig: TracedRig) -> None:
    with inside() as current:
        await rig.broker.queue.publish(a_job(**carrying(("traceparent", SENT))), timeout_s=1)
    delivery = await rig.queue.take(VERSION_ID)
    [sent] = rig.tracer.named("send")
    assert delivery is not None
    assert sent.kind is trace.SpanKind.PRODUCER
    assert context_of(sent).trace_id == current.trace_id
    assert not sent.links
    assert dict(delivery.job.headers)["traceparent"] == f"00-{TRACE}-{context_of(sent).span_id:016x}-01"


async def test_one_that_is_started_again_is_linked_to_its_first_trace(rig: TracedRig) -> None:
    old = f"00-{'1' * 32}-{'2' * 16}-01"
    with inside() as current:
        await rig.broker.queue.publish(a_job(**carrying(("traceparent", old))), timeout_s=1)
    [sent] = rig.tracer.named("send")
    assert context_of(sent).trace_id == current.trace_id
    assert [format(link.context.trace_id, "032x") for link in sent.links] == ["1" * 32]


async def test_a_copy_stays_in_the_trace_of_its_job(rig: TracedRig) -> None:
    await rig.broker.queue.publish(a_job(**carrying(("traceparent", SENT))), timeout_s=1)
    [sent] = rig.tracer.named("send")
    assert format(context_of(sent).trace_id, "032x") == TRACE


# -- logs --------------------------------------------------------------------------------------


async def test_lines_of_a_trace_have_its_id(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("INFO", "json")
    tracer = Tracer()
    with inside():
        logs.Note(logging.getLogger("sidecar"), "invocation", {}).add({"status": 200})
    logs.Note(logging.getLogger("sidecar"), "elsewhere", {}).add({"status": 200})
    await tracer.close()
    with inside():
        logs.Note(logging.getLogger("sidecar"), "afterwards", {}).add({"status": 200})
    await asyncio.sleep(0)
    lines = [orjson.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line.get("trace_id")) for line in lines] == [
        ("invocation", TRACE),
        ("elsewhere", None),
        ("afterwards", None),
    ]
    assert lines[0]["span_id"] == "b7ad6b7169203331"


# -- getting rid of them -----------------------------------------------------------------------


class Hanging(SpanExporter):
    def __init__(self) -> None:
        self.entered = threading.Event()
        self.let_go = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.entered.set()
        self.let_go.wait(60)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        pass


async def test_an_exporter_that_hangs_costs_spans_and_no_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10")
    exporter = Hanging()
    settings = TracingSettings(bsp_max_queue_size="20")
    made = OpenTelemetry(settings, "under-test", system="memory", exporter=exporter, flush_s=0.05)

    def serve(times: int) -> None:
        for _ in range(times):
            with made.serve("GET", "/", "/", {}):
                pass

    try:
        serve(10)
        assert await asyncio.to_thread(exporter.entered.wait, 60)
        serve(100)
        assert made.outbox.dropped == 80
        await made.close()
    finally:
        exporter.let_go.set()
    [line] = [record for record in caplog.records if record.message == "spans_lost"]
    assert vars(line)["dropped"] == 80


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {ENDPOINT: "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        {ENDPOINT: "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "TRUE"},
    ],
)
def test_a_command_that_is_not_to_send_spans_makes_none(environment: dict[str, str]) -> None:
    before = trace.get_tracer_provider()
    with exporting("fnqueue-cli", environment):
        assert trace.get_tracer_provider() is before


# -- the client --------------------------------------------------------------------------------


async def test_the_client_tells_the_server_its_callers_trace() -> None:
    async with serving() as service, service.client() as client:
        service.will(pending(), pending())
        with inside() as current:
            await client.function(FUNCTION_ID).spawn()
        await client.function(FUNCTION_ID).spawn()
    first, second = service.heard
    assert first.headers["traceparent"].split("-")[1] == format(current.trace_id, "032x")
    assert "traceparent" not in second.headers
