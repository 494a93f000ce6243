"""What is declared, and what a page of it shows."""

from __future__ import annotations

import asyncio
import re
import threading
import uuid
from dataclasses import replace

import pytest

from broker.backends.breaker import Breaker
from broker.model import Version
from broker.ports import Broker
from broker.telemetry.exposition import Exposition
from broker.telemetry.metrics import (
    ATTEMPTS,
    BREAKER_OPEN,
    BREAKER_OPENED,
    DEPTH,
    FUNCTION_LATENCY,
    FUNCTION_REQUESTS,
    LOOP_LAG,
    OF_VERSION,
    REFUSALS,
    REGISTRY,
    SERVER_CONNECTIONS,
    AnyMetric,
    Counter,
    Histogram,
    Metrics,
    Process,
    Reading,
    Total,
)
from broker.telemetry.process import forget_deleted, observed
from tests.eventually import eventually
from tests.unit.scrapes import Scrape, scrape

# What a label may be called. None of them has values that grow with requests, accounts or instances.
BOUNDED = {
    *OF_VERSION,
    "answer",
    "backend",
    "cause",
    "end",
    "error_code",
    "function_name",
    "gpu",
    "http_request_method",
    "http_response_status_code",
    "http_route",
    "http_status_code",
    "instance_type",
    "limit",
    "python",
    "reason",
    "server",
    "state",
    "status",
    "version",
    "what",
    "where",
}  # fmt: skip


@pytest.mark.parametrize("metric", REGISTRY, ids=lambda metric: metric.name)
def test_names_say_what_is_counted_and_labels_are_bounded(metric: AnyMetric) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", metric.name)
    assert metric.by
    assert re.fullmatch(r"[A-Z0-9].*\.", metric.help, re.DOTALL)
    assert set(metric.labels) <= BOUNDED
    if metric.upstream:
        return
    assert metric.name.startswith("fnqueue_")
    assert isinstance(metric, Counter | Total) == metric.name.endswith("_total")
    assert isinstance(metric, Histogram) <= metric.name.endswith("_seconds")
    assert not re.search(r"_(ms|millis|minutes|kib|mb)(_|$)", metric.name)


def test_no_name_is_declared_twice() -> None:
    names = [metric.name for metric in REGISTRY]
    assert len(set(names)) == len(names) > 50


@pytest.mark.parametrize("process", Process)
def test_what_a_process_counts_is_there_before_it_happened(process: Process) -> None:
    metrics = Metrics()
    metrics.announce(process)
    metrics.announce(process)
    page = metrics.read().text().decode()
    told = {metric.name for metric in REGISTRY if isinstance(metric, Counter | Histogram) and process in metric.by}
    shown = re.findall(r"^# HELP (\S+)", page, re.MULTILINE)
    assert {name for name in shown if not name.startswith("process_")} == told
    assert Scrape.of(page).value("fnqueue_event_loop_lag_seconds_count") == 0


def test_what_is_told_is_shown_by_its_labels() -> None:
    metrics = Metrics()
    metrics.count(REFUSALS, "queue-full", "queue_limit")
    metrics.count(REFUSALS, "queue-full", "queue_limit", more=2)
    metrics.count(REFUSALS, "overloaded", "")
    metrics.observe(FUNCTION_LATENCY, 0.7, "f", "v")
    metrics.observe(LOOP_LAG, 0.3)
    seen = scrape(metrics)
    assert seen.value("fnqueue_refusals_total", reason="queue-full", limit="queue_limit") == 3
    assert seen.value("fnqueue_refusals_total", reason="overloaded") == 1
    assert seen.value("function_request_latency_bucket", le="0.5") == 0
    assert seen.value("function_request_latency_bucket", le="1.0") == 1
    assert seen.value("function_request_latency_sum", function_version_id="v") == 0.7
    assert not any(name.endswith("_created") for name in seen.names())


def test_a_label_cannot_be_left_out() -> None:
    with pytest.raises(ValueError, match="label"):
        Metrics().count(REFUSALS, "queue-full")


def test_readings_are_asked_while_they_are_there_and_add_up() -> None:
    metrics = Metrics()
    with metrics.reading(lambda: [Reading(DEPTH, 2, ("f", "v")), Reading(DEPTH, 0, ("f", "w"))]):
        with metrics.reading(lambda: [Reading(DEPTH, 3, ("f", "v"))]):
            assert scrape(metrics).value("fnqueue_queue_depth", function_version_id="v") == 5
        assert scrape(metrics).value("fnqueue_queue_depth", function_version_id="v") == 2
        assert scrape(metrics).value("fnqueue_queue_depth", function_version_id="w") == 0
    assert scrape(metrics).value("fnqueue_queue_depth") is None


async def test_series_of_deleted_versions_go_and_those_of_others_stay(memory_broker: Broker) -> None:
    kept, gone = str(uuid.uuid4()), str(uuid.uuid4())
    version = Version(
        id=kept, function_id="f", account="a", name="n", inference_url="/", container_image="i", created_at=1.0
    )
    metrics = memory_broker.metrics
    for version_id in (kept, gone):
        await memory_broker.catalog.versions.put(replace(version, id=version_id))
        metrics.count(FUNCTION_REQUESTS, "f", version_id)
        metrics.count(ATTEMPTS, "f", version_id, "fulfilled")
        metrics.observe(FUNCTION_LATENCY, 1.0, "f", version_id)
    metrics.count(REFUSALS, "queue-full", "")
    await forget_deleted(memory_broker)
    assert metrics.versions() == {kept, gone}

    await memory_broker.catalog.versions.delete(gone)
    await forget_deleted(memory_broker)
    assert metrics.versions() == {kept}
    assert gone not in metrics.read().text().decode()
    seen = scrape(metrics)
    assert seen.value("function_request_latency_count", function_version_id=kept) == 1
    assert seen.value("fnqueue_refusals_total") == 1
    metrics.count(FUNCTION_REQUESTS, "f", gone)
    assert scrape(metrics).value("function_request_total", function_version_id=gone) == 1


class Witness(float):
    """A value that notes in which thread it is written down."""

    threads: set[int] = set()  # noqa: RUF012  of all of them

    def __float__(self) -> float:
        self.threads.add(threading.get_ident())
        return 1.0


async def test_a_page_is_written_in_a_thread_once_for_all_who_ask() -> None:
    metrics, asked, witness = Metrics(), [], Witness(1.0)

    def read() -> list[Reading]:
        asked.append(threading.get_ident())
        return [Reading(DEPTH, witness, ("f", "v"))]

    with metrics.reading(read), Exposition(metrics) as exposition:
        pages = await asyncio.gather(*(exposition.text() for _ in range(8)))
        assert len({id(page) for page in pages}) == 1
        assert asked == [threading.get_ident()]
        assert b"fnqueue_queue_depth" in pages[0]

        async def again() -> bool:
            return await exposition.text() is pages[0]

        await eventually(again, lambda same: not same)
    assert threading.get_ident() not in witness.threads


async def test_one_who_scrapes_and_leaves_takes_the_page_from_nobody() -> None:
    with Exposition(Metrics()) as exposition:
        impatient = asyncio.create_task(exposition.text())
        await asyncio.sleep(0)
        patient = asyncio.create_task(exposition.text())
        await asyncio.sleep(0)
        impatient.cancel()
        assert (await patient).startswith(b"# HELP")


async def test_every_process_tells_of_its_servers_its_loop_and_itself(memory_broker: Broker) -> None:
    now = 0.0
    breaker = Breaker("queue", after_s=1, now=lambda: now)
    breaker.connected()
    broker = replace(memory_broker, circuits=(breaker,))
    async with observed(broker):
        seen = scrape(broker.metrics)
        assert seen.value("fnqueue_build_info") == 1
        assert seen.value(BREAKER_OPEN.name, server="queue") == 0
        assert seen.value(SERVER_CONNECTIONS.name, server="queue") == 1
        assert (seen.value("process_resident_memory_bytes") or 0) > 1e6
        now = 2.0
        assert breaker.failed(began_at=0.0)
        assert scrape(broker.metrics).value(BREAKER_OPEN.name, server="queue") == 1

        async def looks() -> float | None:
            return scrape(broker.metrics).value("fnqueue_event_loop_lag_seconds_count")

        await eventually(looks, bool)
    breaker.answered()
    assert (breaker.opened, scrape(broker.metrics).value(BREAKER_OPENED.name)) == (1, None)
