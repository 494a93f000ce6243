"""What front ends, sidecars and controllers tell of their work, and where."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from api import server
from broker.errors import ConfigurationError
from broker.model import (
    Deployment,
    FunctionStatus,
    Gpu,
    GpuSpecification,
    Instance,
    InstanceStatus,
    Load,
    Outcome,
    RequestState,
    Verdict,
    Version,
)
from broker.ports import Broker
from broker.settings import ApiSettings, ControllerSettings
from broker.telemetry.metrics import Metrics
from infra.local.process import free_port
from tests.eventually import eventually
from tests.unit.container import FUNCTION_ID, VERSION_ID, answer
from tests.unit.scrapes import Scrape, scrape
from tests.unit.test_server import FUNCTION, INVOKE, NOW, VERSION, House, opened
from tests.unit.test_sidecar import Rig, a_rig
from tests.unit.test_undertaker import Loan, job_of
from workers import sidecar
from workers.controller import undertaker
from workers.controller.auditor import Auditor
from workers.controller.figures import BLIND_S, Figures
from workers.controller.status import Status
from workers.controller.undertaker import End
from workers.health import status_address

LOOPBACK = "127.0.0.1"


async def page_at(port: int) -> Scrape:
    async with aiohttp.ClientSession() as session, session.get(f"http://{LOOPBACK}:{port}/metrics") as answered:
        assert answered.status == 200
        assert answered.content_type == "text/plain"
        return Scrape.of(await answered.text())


async def work_off(house: House, status: int = 200) -> None:
    """Take the one job and end it as a worker would."""
    delivery = await eventually(lambda: house.broker.queue.take(VERSION), lambda found: found is not None)
    assert delivery is not None
    claim = await house.broker.results.claim(delivery.job, worker="w", lease_s=60, max_attempts=3)
    assert claim.verdict is Verdict.GRANTED
    assert claim.lease is not None
    state = RequestState.FULFILLED if status < 400 else RequestState.ERRORED
    await house.broker.results.settle(claim.lease, delivery.job, state, Outcome(status=status, body=b"{}"))
    await delivery.ack()


# -- front ends --------------------------------------------------------------------------------


async def test_a_front_end_counts_what_it_answers_by_route_and_function(tmp_path: Path) -> None:
    port = free_port()
    async with opened(tmp_path, status_port=port) as house:
        before = await page_at(port)
        assert before.value("fnqueue_waiting_callers") == 0
        waiting = asyncio.create_task(house.invoke())
        await work_off(house)
        assert (await waiting)[0] == 200
        failing = asyncio.create_task(house.invoke())
        await work_off(house, status=422)
        assert (await failing)[0] == 422
        async with house.client.get("/nowhere/at-all") as response:
            assert response.status == 404
        async with house.client.request("PROPFIND", "/v2/nvcf/functions") as response:
            assert response.status == 405
        host = {"Host": f"{FUNCTION}.example.com", **NOW}
        async with house.client.get("/any/path?at=all", headers=host) as response:
            assert response.status == 202
        seen = await eventually(
            lambda: page_at(port), lambda page: page.value("function_request_total", function_id=FUNCTION) == 3
        )

    route = "/v2/nvcf/pexec/functions/{function_id}"
    http = "http_server_request_duration_seconds_count"
    assert seen.value(http, http_request_method="POST", http_route=route, http_response_status_code="200") == 1
    assert seen.value(http, http_request_method="POST", http_route=route, http_response_status_code="422") == 1
    assert seen.value(http, http_route="(none)", http_response_status_code="404") == 1
    assert seen.value(http, http_request_method="_OTHER", http_response_status_code="405") == 1
    assert seen.value(http, http_request_method="GET", http_route="(function)", http_response_status_code="202") == 1
    assert seen.value("function_request_latency_count", function_version_id=VERSION) == 3
    assert seen.value("app_invocation_error_total", http_status_code="422", function_version_id=VERSION) == 1
    assert (seen.value("fnqueue_http_connections") or 0) >= 1
    assert not {"account", "request_id", "default"} & {label for _, labels in seen.samples for label, _ in labels}


async def test_what_a_front_end_refuses_is_counted_by_reason_and_limit(tmp_path: Path) -> None:
    async with opened(tmp_path, queue_limit=1, max_body_bytes=1024) as house:
        assert (await house.invoke(NOW))[0] == 202
        assert (await house.invoke(NOW))[0] == 429
        assert (await house.invoke(NOW, body=b"x" * 2000))[0] == 413
        async with house.client.get(INVOKE + "/unknown") as response:
            assert response.status == 404
        seen = scrape(house.broker.metrics)
    assert seen.value("fnqueue_refusals_total", reason="queue-full", limit="queue_limit") == 1
    assert seen.value("fnqueue_refusals_total", reason="payload-too-large", limit="") == 1
    refused = [value for (name, _), value in seen.samples.items() if name == "fnqueue_refusals_total"]
    assert sum(refused) == 2


async def test_who_waits_shows_and_who_leaves_is_499(tmp_path: Path) -> None:
    async with opened(tmp_path) as house:
        metrics = house.broker.metrics
        call = asyncio.create_task(house.invoke())

        async def waiting() -> float | None:
            return scrape(metrics).value("fnqueue_waiting_callers")

        await eventually(waiting, lambda count: count == 1)
        delivery = await eventually(lambda: house.broker.queue.take(VERSION), lambda found: found is not None)
        assert delivery is not None
        call.cancel()
        await eventually(waiting, lambda count: count == 0)

        async def left() -> float | None:
            return scrape(metrics).value("http_server_request_duration_seconds_count", http_response_status_code="499")

        await eventually(left, lambda count: count == 1)


async def test_metrics_are_on_the_internal_listener_and_on_no_other(tmp_path: Path) -> None:
    port = free_port()
    async with opened(tmp_path, status_port=port) as house:
        async with house.client.get("/metrics") as response:
            assert response.status == 404
        async with aiohttp.ClientSession(f"http://{LOOPBACK}:{port}") as inside:
            async with inside.get("/v1/health/live") as response:
                assert response.status == 200
            async with inside.get("/v1/health/ready") as response:
                assert response.status == 200
            async with inside.get("/v2/nvcf/functions") as response:
                assert response.status == 404


@pytest.mark.parametrize("kind", [ApiSettings, ControllerSettings])
def test_the_internal_listener_is_for_this_machine_until_told_otherwise(kind: type) -> None:
    assert kind().status_host == LOOPBACK


async def test_the_public_port_is_refused_for_metrics(memory_broker: Broker) -> None:
    port = free_port()
    settings = ApiSettings(port=port, host="0.0.0.0", status_port=port)
    with pytest.raises(ConfigurationError, match="public port"):
        async with server.serving(memory_broker, settings):
            pass


async def test_a_default_port_that_is_taken_is_gone_without_and_a_chosen_one_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]

        class Elsewhere(ApiSettings):
            """The real default may be another process's, on a machine where fnqueue runs."""

            status_port: int = port

        async with opened(tmp_path, kind=Elsewhere) as house:
            assert (await house.invoke(NOW))[0] == 202
        assert "status_port_taken" in caplog.messages
        with pytest.raises(ConfigurationError, match=f"status_port: {LOOPBACK}:{port} cannot be listened on"):
            async with opened(tmp_path, status_port=port):
                pass


# -- sidecars ----------------------------------------------------------------------------------


@asynccontextmanager
async def serving(rig: Rig, metrics: Metrics) -> AsyncIterator[None]:
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(sidecar.serve(replace(rig.broker, metrics=metrics), rig.settings, rig.stop))
        try:
            yield
        finally:
            rig.stop.set()


async def test_a_sidecar_counts_waits_runs_and_ends(tmp_path: Path) -> None:
    metrics, gate = Metrics(), asyncio.Event()
    async with a_rig(tmp_path) as rig:

        async def handler(request: web.Request) -> web.StreamResponse:
            await gate.wait()
            return await answer(b"{}", status=500 if b"fail" in await request.read() else 200)

        rig.box.handler = handler
        port = free_port()
        rig.set(status_port=port, max_request_concurrency=2)
        early = await rig.submit()
        async with serving(rig, metrics):
            await rig.box.called.wait()
            seen = await page_at(port)
            assert seen.value("fnqueue_sidecar_slots_busy") == 1
            assert seen.value("nvcf_worker_service_worker_thread_count_total") == 2
            assert seen.value("fnqueue_sidecar_ready") == 1
            assert [each.status_address for each in await rig.catalog.instances(VERSION_ID)] == [f"{LOOPBACK}:{port}"]
            gate.set()
            assert (await rig.ended(early)).state is RequestState.FULFILLED
            assert (await rig.ended(await rig.submit(body=b"fail"))).state is RequestState.ERRORED

            async def ends() -> float | None:
                return scrape(metrics).value("fnqueue_requests_ended_total", state="errored")

            await eventually(ends, lambda count: count == 1)
            seen = scrape(metrics)
    labels = {"function_id": FUNCTION_ID, "function_version_id": VERSION_ID}
    assert seen.value("fnqueue_request_wait_seconds_count", **labels) == 2
    assert seen.value("fnqueue_request_run_seconds_count", **labels) == 2
    assert seen.value("fnqueue_instance_start_seconds_count", **labels) == 1
    assert seen.value("fnqueue_cold_start_seconds_count", **labels) == 1, "the first came before any instance was ready"
    assert seen.value("fnqueue_attempts_total", end="fulfilled") == 1
    assert seen.value("fnqueue_attempts_total", end="errored") == 1
    assert seen.value("fnqueue_requests_ended_total", state="fulfilled") == 1
    assert seen.value("nvcf_worker_service_request_total") == 2
    assert seen.value("nvcf_worker_service_response_total", error_code="0") == 1
    assert seen.value("nvcf_worker_service_response_total", error_code="500") == 1
    assert (seen.value("nvcf_worker_service_worker_thread_busy_seconds_total") or 0) > 0
    assert scrape(metrics).value("fnqueue_sidecar_ready") is None, "its sidecar has ended"


async def test_an_attempt_that_came_to_nothing_is_told_apart(tmp_path: Path) -> None:
    metrics = Metrics()
    async with a_rig(tmp_path) as rig:

        async def hang_up(request: web.Request) -> web.StreamResponse:
            assert request.transport is not None
            request.transport.abort()
            raise asyncio.CancelledError

        rig.box.handler = hang_up
        rig.set(max_attempts=2, crash_backoff_s=0)
        async with serving(rig, metrics):
            assert (await rig.ended(await rig.submit())).state is RequestState.DEAD
            seen = scrape(metrics)
    assert seen.value("fnqueue_attempts_total", end="failed") == 2
    assert seen.value("fnqueue_requests_ended_total") is None, "the undertaker counts the dead"
    assert seen.value("nvcf_worker_service_request_total") == 2
    assert seen.value("nvcf_worker_service_response_total", error_code="500") == 0


async def test_a_sidecar_that_takes_any_free_port_says_which(tmp_path: Path) -> None:
    metrics = Metrics()
    async with a_rig(tmp_path) as rig:
        rig.set(status_port="any")
        async with serving(rig, metrics):
            await rig.ended(await rig.submit())
            [instance] = await rig.catalog.instances(VERSION_ID)
            host, _, port = instance.status_address.partition(":")
            assert (host, (await page_at(int(port))).value("fnqueue_sidecar_ready")) == (LOOPBACK, 1)


def test_a_sidecar_says_where_it_can_be_scraped() -> None:
    assert status_address(LOOPBACK, 0) == ""
    assert status_address("::1", 80) == "[::1]:80"
    everywhere = status_address("0.0.0.0", 80)
    assert everywhere.endswith(":80")


# -- controllers -------------------------------------------------------------------------------


@dataclass
class View:
    deployment: Deployment
    version: Version | None
    load: Load
    reports: dict[str, Instance] = field(default_factory=dict)


def instance_of(version_id: str, **given: object) -> Instance:
    made = Instance(
        id=str(uuid.uuid4()),
        function_id="f",
        version_id=version_id,
        account="ours",
        gpu="H100",
        instance_type="NCP.GPU.H100_1x",
        backend="local",
        status=InstanceStatus.RUNNING,
        created_at=0.0,
        updated_at=0.0,
    )
    return replace(made, **given)  # type: ignore[arg-type]  # whatever fields a test names


def view_of(version_id: str, load: Load, *instances: Instance) -> View:
    version = Version(
        id=version_id,
        function_id="f",
        account="ours",
        name="name",
        inference_url="/",
        container_image="i",
        created_at=1.0,
        status=FunctionStatus.ACTIVE,
    )
    specification = GpuSpecification(
        id="s", gpu="H100", instance_type="t", min_instances=1, max_instances=1, max_request_concurrency=4
    )
    deployment = Deployment(
        id="d",
        function_id="f",
        version_id=version_id,
        account="ours",
        specifications=(specification,),
        created_at=1.0,
        updated_at=1.0,
    )
    return View(deployment, version, load, {instance.id: instance for instance in instances})


async def test_a_leader_shows_versions_as_its_last_pass_saw_them_and_nothing_when_it_is_blind(
    memory_broker: Broker,
) -> None:
    now, metrics = 100.0, Metrics()
    figures = Figures(now=lambda: now)
    with metrics.reading(figures.read):
        seen = scrape(metrics)
        assert seen.value("fnqueue_controller_leads") == 0
        assert seen.value("fnqueue_queue_source_available") is None
        figures.leads(Auditor(memory_broker, ControllerSettings(), leads=lambda: True))
        assert scrape(metrics).value("fnqueue_queue_source_available") == 1
        figures.saw(
            [
                view_of(
                    "v",
                    Load(queued=3, running=2, oldest_age_s=7.5),
                    instance_of("v", slots=4, busy=2),
                    instance_of("v", status=InstanceStatus.STARTING),
                    instance_of("v", slots=4, quarantined=True),
                ),
                view_of("idle", Load(queued=0, running=0, oldest_age_s=0.0)),
            ]
        )
        figures.offered([Gpu(name="H100", instance_type="t", backend="local", capacity=8)])
        seen = scrape(metrics)
        version = {"function_id": "f", "function_version_id": "v"}
        assert seen.value("fnqueue_queue_depth", **version) == seen.value("nvcf_function_queue_depth", **version) == 3
        assert seen.value("fnqueue_requests_running", **version) == 2
        assert seen.value("fnqueue_queue_oldest_age_seconds", **version) == 7.5
        assert (
            seen.value("fnqueue_version_slots", **version),
            seen.value("fnqueue_version_slots_busy", **version),
        ) == (
            4,
            2,
        )
        assert seen.value("fnqueue_instances", **version, state="running") == 1
        assert seen.value("fnqueue_instances", **version, state="starting") == 1
        assert seen.value("fnqueue_instances", **version, state="quarantined") == 1
        assert seen.value("nvcf_function_status", **version, status="ACTIVE") == 1
        assert seen.value("nvcf_function_info", **version, function_name="name") == 1
        assert seen.value("nvcf_function_concurrency", **version) == 4
        assert seen.value("fnqueue_queue_depth", function_version_id="idle") == 0
        assert seen.value("fnqueue_gpu_capacity_instances", gpu="H100", instance_type="t") == 8

        now += BLIND_S + 1
        seen = scrape(metrics)
        assert seen.value("fnqueue_queue_source_available") == 0
        assert not {name for name in seen.names() if "depth" in name or "instances_current" in name}

        figures.saw([])
        assert scrape(metrics).value("fnqueue_queue_depth") is None, "an undeployed version has no figures"
        figures.leads(None)
        assert scrape(metrics).value("fnqueue_queue_source_available") is None


async def test_what_the_auditor_counted_is_conserved_in_the_metrics(memory_broker: Broker) -> None:
    figures = memory_broker.metrics
    status = Status(memory_broker)
    auditor = Auditor(memory_broker, ControllerSettings(), leads=lambda: True)
    status.figures.leads(auditor)
    with figures.reading(status.figures.read):
        assert scrape(figures).value("fnqueue_audit_balanced") is None, "nothing was counted yet"
        while auditor.conservation is None:
            await auditor.records.step()
        seen = scrape(figures)
    counted = {
        state: seen.value("fnqueue_audit_requests", state=state)
        for state in ("accepted", "queued", "running", "done", "dead")
    }
    assert counted == {"accepted": 0, "queued": 0, "running": 0, "done": 0, "dead": 0}
    assert seen.value("fnqueue_audit_balanced") == 1
    assert (seen.value("fnqueue_audit_timestamp_seconds") or 0) > 1e9
    assert seen.value("fnqueue_audit_mended_total", what="restored") == 0
    assert seen.value("fnqueue_audit_messages", where="dead") == 0


async def test_the_undertaker_counts_the_dead_by_cause(memory_broker: Broker) -> None:
    metrics = memory_broker.metrics
    loan = Loan(job_of("v"))
    assert await undertaker.bury(memory_broker, loan, End(RequestState.DEAD, "it was bad", "rejected"))
    assert await undertaker.bury(memory_broker, Loan(job_of("v")), End(RequestState.CANCELLED, "undeployed"))
    seen = scrape(metrics)
    assert seen.value("fnqueue_dead_letters_total", cause="rejected", function_version_id="v") == 1
    assert seen.value("fnqueue_requests_ended_total", state="dead") == 1
    assert seen.value("fnqueue_requests_ended_total", state="cancelled") == 1


async def test_controllers_tell_prometheus_where_sidecars_are(memory_broker: Broker) -> None:
    catalog, port = memory_broker.catalog, free_port()
    view = view_of("v", Load(queued=0, running=0, oldest_age_s=0.0))
    await catalog.deployments.put(view.deployment)
    addresses = ("10.0.0.7:28090", "[fd00::1]:80", "", "http://evil/?", "a/b:1")
    for address in addresses:
        await catalog.beat(instance_of("v", status_address=address), ttl_s=60)
    settings = ControllerSettings(status_port=port)
    async with Status(memory_broker).shown(settings), aiohttp.ClientSession(f"http://{LOOPBACK}:{port}") as session:
        told = await (await session.get("/v1/targets")).json()
    assert sorted(target for group in told for target in group["targets"]) == ["10.0.0.7:28090", "[fd00::1]:80"]
    assert all(set(group["labels"]) == {"instance_id"} for group in told)
