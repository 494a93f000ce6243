"""Metrics of the real product: every process tells what was done, and a real Prometheus, configured as shipped, has an
answer to every question of the dashboard."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from infra.dashboards import panels
from infra.local import binaries
from infra.local.process import LOOPBACK, free_port
from infra.local.servers import S3, RabbitMQ, Redis
from tests.eventually import eventually
from tests.house import RECORDER, Caller, Function, House, running, users
from tests.prometheus import Prometheus
from tests.receiver import receiving
from tests.unit.scrapes import Scrape

DB = 2
API, CONTROLLER = "127.0.0.1:8090", "127.0.0.1:8091"


@pytest.fixture
def ports() -> dict[str, int]:
    """Of the front end's status and the controller's, by where they are unless they are told otherwise."""
    return {API: free_port(), CONTROLLER: free_port()}


@pytest.fixture
def rabbitmq(programs: None, tmp_path: Path) -> Iterator[RabbitMQ]:
    """Of this test's own: which controller takes a dead letter, and counts it, is nobody's to choose."""
    server = RabbitMQ(tmp_path / "rabbitmq", management=True)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def house(rabbitmq: RabbitMQ, redis_server: Redis, s3: S3, tmp_path: Path, ports: dict[str, int]) -> Iterator[House]:
    fronts, controllers = users(rabbitmq, redis_server, s3, database=DB)
    controllers["FNQUEUE_STATUS_PORT"] = str(ports[CONTROLLER])
    made = House(
        tmp_path,
        fronts,
        controllers,
        FNQUEUE_STATUS_PORT=str(ports[API]),
        FNQUEUE_AUDIT_S="0.5",
        FNQUEUE_MAX_ATTEMPTS="1",
        # The receiver of the test is here, and speaks plain HTTP.
        FNQUEUE_WEBHOOK_NETWORKS="127.0.0.0/8",
        FNQUEUE_WEBHOOK_PORTS="1024-65535",
        FNQUEUE_WEBHOOK_HTTP="true",
    )
    with running(made) as started:
        yield started


@pytest.fixture
def prometheus(tmp_path: Path, ports: dict[str, int]) -> Iterator[Prometheus]:
    binaries.ensure(binaries.MONITORING)
    places = {shipped: f"{LOOPBACK}:{port}" for shipped, port in ports.items()}
    server = Prometheus(tmp_path / "prometheus", places)
    try:
        server.start()
        yield server
    finally:
        server.kill()


async def page_at(address: str) -> Scrape:
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}/metrics") as answered:
        assert answered.status == 200
        return Scrape.of(await answered.text())


async def sidecars(controller: int) -> list[str]:
    """As Prometheus is told of them."""
    url = f"http://{LOOPBACK}:{controller}/v1/targets"
    async with aiohttp.ClientSession() as session, session.get(url) as answered:
        return [target for group in await answered.json() for target in group["targets"]]


def as_grafana_asks(expression: str) -> str:
    return expression.replace("$__rate_interval", "1m").replace("$version", ".*")


async def test_an_invocation_shows_in_every_process_and_on_the_dashboard(
    house: House, prometheus: Prometheus, ports: dict[str, int]
) -> None:
    api, controller = (f"{LOOPBACK}:{port}" for port in ports.values())
    async with house.caller() as caller:
        # From nothing: so that there is a cold start.
        function = await caller.deploy(RECORDER, instances=0, most=1)
        before = await page_at(api)
        assert before.value("function_request_total", function_version_id=function.version_id) is None
        assert (await caller.invoke(function.id)).status == 200
        too_large = await caller.call("POST", f"/v2/nvcf/pexec/functions/{function.id}", body=b"x" * 6 * 1024 * 1024)
        assert too_large.status == 413
        await seen_by_the_front_end(api, function)
        await seen_by_the_sidecar(ports[CONTROLLER], function)
        await seen_by_the_controller(controller, function)
        await asyncio.gather(*(caller.invoke(function.id) for _ in range(5)))

        for job in ("fnqueue-api", "fnqueue-controller", "fnqueue-sidecar"):
            await eventually(partial(prometheus.query, f'up{{job="{job}"}} == 1'), bool)
        asked = [as_grafana_asks(query.expression) for panel in panels() for query in panel.queries]
        assert len(asked) > 40
        of_the_dead = [expression for expression in asked if "dead_letters" in expression]
        of_webhooks = [expression for expression in asked if "webhook" in expression]
        for expression in asked:
            if expression not in (*of_the_dead, *of_webhooks):
                await has_an_answer(prometheus, expression)

        await webhooks_are_told(caller, function)
        for expression in of_webhooks:
            await has_an_answer(prometheus, expression)
        given_up = await an_alert_fires(prometheus, "FnqueueWebhooksFailed")
        assert given_up["labels"]["function_version_id"] == function.version_id

        died = await caller.invoke(function.id, {"die": True})
        assert died.status == 500
        assert died.json["type"].endswith(":request-dead")
        for expression in of_the_dead:
            await has_an_answer(prometheus, expression)
        alert = await an_alert_fires(prometheus, "FnqueueDeadLetters")
        assert alert["labels"]["cause"] == "attempts-exhausted", json.dumps(alert)
        await every_alert_looks_at_something(prometheus)
        await function.undeploy()

        async def versions_of_the_controller() -> set[str]:
            samples = (await page_at(controller)).samples
            return {dict(labels)["function_version_id"] for name, labels in samples if name == "fnqueue_queue_depth"}

        await eventually(versions_of_the_controller, lambda seen: function.version_id not in seen)


async def webhooks_are_told(caller: Caller, function: Function) -> None:
    """One that its receiver takes, and one that is given up."""
    assert (await caller.call("POST", "/v2/nvcf/webhooks/secrets", data={})).status == 200
    async with receiving() as receiver:
        for answer, state in ((204, "delivered"), (410, "failed")):
            receiver.answers.append(answer)
            told = await caller.invoke(function.id, headers={"NVCF-CALLBACK-URL": receiver.url})
            assert told.status == 200
            at = f"/v2/nvcf/webhooks/deliveries/{told.request_id}"
            look = partial(caller.call, "GET", at)
            delivery = await eventually(look, lambda seen: seen.status == 200 and seen.json["state"] != "pending")
            assert delivery.json["state"] == state


async def seen_by_the_front_end(address: str, function: Function) -> None:
    page = await eventually(
        partial(page_at, address),
        lambda seen: seen.value("fnqueue_refusals_total", reason="payload-too-large") == 1,
    )
    assert page.value("function_request_total", function_version_id=function.version_id) == 1
    assert page.value("function_request_latency_count", function_id=function.id) == 1
    assert page.value("fnqueue_build_info") == 1
    for server in ("queue", "store", "blobs"):
        assert page.value("fnqueue_server_breaker_open", server=server) == 0
    for server in ("queue", "store"):
        assert (page.value("fnqueue_server_connections_total", server=server) or 0) >= 1


async def seen_by_the_sidecar(controller: int, function: Function) -> None:
    (address,) = await eventually(partial(sidecars, controller), bool)
    page = await eventually(
        partial(page_at, address), lambda seen: seen.value("fnqueue_requests_ended_total", state="fulfilled") == 1
    )
    version = {"function_id": function.id, "function_version_id": function.version_id}
    for name in ("fnqueue_request_wait_seconds", "fnqueue_request_run_seconds", "fnqueue_cold_start_seconds"):
        assert page.value(f"{name}_count", **version) == 1, name
    assert page.value("fnqueue_attempts_total", end="fulfilled", **version) == 1
    assert page.value("nvcf_worker_service_response_total", error_code="0", **version) == 1
    assert page.value("fnqueue_sidecar_ready", **version) == 1


async def seen_by_the_controller(address: str, function: Function) -> None:
    version = {"function_version_id": function.version_id}

    def settled(page: Scrape) -> bool:
        """Once the next pass of each loop has looked."""
        counted = page.value("fnqueue_audit_requests", state="done") == 1
        busy = [page.value(name, **version) for name in ("fnqueue_queue_depth", "fnqueue_requests_running")]
        return counted and busy == [0, 0] and page.value("fnqueue_version_slots", **version) == 1

    page = await eventually(partial(page_at, address), settled)
    assert page.value("fnqueue_controller_leads") == 1
    assert page.value("fnqueue_queue_source_available") == 1
    assert page.value("nvcf_function_queue_depth", **version) == 0
    assert page.value("fnqueue_instances", state="running", **version) == 1
    assert page.value("nvcf_function_info", **version, function_name="under-test") == 1
    assert page.value("fnqueue_audit_requests", state="accepted") == 1
    assert page.value("fnqueue_audit_balanced") == 1
    assert (page.value("fnqueue_gpu_capacity_instances", instance_type="CPU") or 0) > 0


async def has_an_answer(prometheus: Prometheus, expression: str) -> None:
    found = await eventually(partial(prometheus.query, expression), bool)
    assert found, expression


async def every_alert_looks_at_something(prometheus: Prometheus) -> None:
    """Prometheus has evaluated each without a complaint; and what does not fire here does not for its threshold or for
    the values of its labels: there are such series, with such labels."""
    rules = await prometheus.rules()
    assert len(rules) > 15
    assert {rule["health"] for rule in rules} == {"ok"}
    for rule in rules:
        await has_an_answer(prometheus, without_thresholds(rule["query"]))


def without_thresholds(expression: str) -> str:
    plain = re.sub(r"\s(==|>|<)\s[\d.]+", "", expression)
    plain = re.sub(r"absent\((.+)\)", r"\1", plain)
    return re.sub(r'(\w+)(=~|=)"[^"]*"', r'\1!=""', plain)


async def an_alert_fires(prometheus: Prometheus, name: str) -> dict[str, Any]:
    async def alerts() -> list[dict[str, Any]]:
        return [alert for rule in await prometheus.rules() if rule["name"] == name for alert in rule["alerts"]]

    (alert,) = await eventually(alerts, lambda found: bool(found) and found[0]["state"] == "firing")
    return alert
