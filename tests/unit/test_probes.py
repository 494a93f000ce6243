"""Health checks against real servers: HTTP on the loopback, and grpcio's own health service."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import web
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from broker.errors import ConfigurationError
from broker.settings import SidecarSettings, load
from infra.local.process import free_port
from tests.unit.container import container, raw_container, settings_for
from workers.inference import Inference
from workers.probes import NOT_FOUND_PAUSE_S

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@asynccontextmanager
async def asking(folder: Path, port: int, **given: Any) -> AsyncIterator[Inference]:
    async with Inference(settings_for(folder, port, **given)) as inference:
        yield inference


# -- HTTP --------------------------------------------------------------------------------------


async def test_healthy_means_exactly_the_expected_status(tmp_path: Path) -> None:
    async with container() as box, asking(tmp_path, box.port) as inference:
        assert await inference.healthy()
        box.healthy = False
        assert not await inference.healthy()
        assert inference.fault.endswith("/health answered 503, not 200")


async def test_another_status_may_be_the_expected_one(tmp_path: Path) -> None:
    async with container() as box, asking(tmp_path, box.port, health_expected_status=503) as inference:
        assert not await inference.healthy()
        box.healthy = False
        assert await inference.healthy()


async def test_a_redirected_health_check_is_not_healthy(tmp_path: Path) -> None:
    reply = b"HTTP/1.1 302 Found\r\nLocation: /health\r\nContent-Length: 0\r\n\r\n"
    async with raw_container(reply) as port, asking(tmp_path, port) as inference:
        assert not await inference.healthy()


async def test_a_silent_health_check_is_bounded(tmp_path: Path) -> None:
    async def keep_quiet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(keep_quiet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, asking(tmp_path, port, health_timeout_s=0.05) as inference:
        assert not await inference.healthy()
        assert inference.silent
        assert "not answered within 0.05 s" in inference.fault


async def test_a_refused_health_check_fails_at_once(tmp_path: Path) -> None:
    async with asking(tmp_path, free_port()) as inference:
        assert not await inference.healthy()
        assert not inference.silent
        assert "ClientConnectorError" in inference.fault


@asynccontextmanager
async def not_yet(statuses: list[int]) -> AsyncIterator[int]:
    """The port of a server that answers with these, the last one for good."""

    async def handle(_: web.Request) -> web.Response:
        return web.Response(status=statuses.pop(0) if len(statuses) > 1 else statuses[0])

    app = web.Application()
    app.router.add_get("/health", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def test_a_path_that_is_not_served_yet_is_asked_again_within_the_check(tmp_path: Path) -> None:
    async with not_yet([404, 200]) as port, asking(tmp_path, port) as inference:
        began_at = time.monotonic()
        assert await inference.healthy()
        assert time.monotonic() - began_at >= NOT_FOUND_PAUSE_S[0]


async def test_a_path_that_is_not_served_is_not_asked_for_longer_than_a_check_may_take(tmp_path: Path) -> None:
    async with not_yet([404]) as port, asking(tmp_path, port, health_timeout_s=1) as inference:
        assert not await inference.healthy()
        assert not inference.silent
        assert inference.fault.endswith("answered 404, not 200")


async def test_no_other_status_is_asked_again(tmp_path: Path) -> None:
    async with not_yet([500, 200]) as port, asking(tmp_path, port) as inference:
        assert not await inference.healthy()


async def test_a_404_that_is_expected_is_healthy(tmp_path: Path) -> None:
    async with not_yet([404]) as port, asking(tmp_path, port, health_expected_status=404) as inference:
        assert await inference.healthy()


# -- gRPC --------------------------------------------------------------------------------------


@asynccontextmanager
async def grpc_server(servicer: Any | None, port: int = 0) -> AsyncIterator[int]:
    server = grpc.aio.server()
    if servicer is not None:
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def test_a_grpc_server_is_healthy_while_it_serves(tmp_path: Path) -> None:
    service = health.aio.HealthServicer()
    async with grpc_server(service) as port, asking(tmp_path, port, health_protocol="gRPC") as inference:
        await service.set("", SERVING)
        assert await inference.healthy()
        await service.set("", NOT_SERVING)
        assert not await inference.healthy()
        assert inference.fault == f"grpc.health.v1.Health/Check at 127.0.0.1:{port} answered that it is not serving"


async def test_a_grpc_server_that_comes_back_is_healthy_at_once(tmp_path: Path) -> None:
    port = free_port()
    async with asking(tmp_path, port, health_protocol="gRPC") as inference:
        for _ in range(5):  # a channel would wait longer after each
            assert not await inference.healthy()
            assert inference.fault.endswith("failed: UNAVAILABLE")
            assert not inference.silent
        async with grpc_server(health.aio.HealthServicer(), port):
            assert await inference.healthy()
        assert not await inference.healthy()


async def test_a_grpc_server_without_the_health_service_is_not_healthy(tmp_path: Path) -> None:
    async with grpc_server(None) as port, asking(tmp_path, port, health_protocol="gRPC") as inference:
        assert not await inference.healthy()
        assert inference.fault.endswith("failed: UNIMPLEMENTED")


async def test_a_silent_grpc_server_is_told_from_a_bad_one(tmp_path: Path) -> None:
    class Silent(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # its package has no types
        async def Check(self, request: Any, context: Any) -> None:  # noqa: N802  gRPC's name
            await asyncio.Event().wait()

    async with (
        grpc_server(Silent()) as port,
        asking(tmp_path, port, health_protocol="gRPC", health_timeout_s=0.2) as inference,
    ):
        assert not await inference.healthy()
        assert inference.silent
        assert "not answered within 0.2 s" in inference.fault


async def test_what_does_not_speak_grpc_is_not_healthy(tmp_path: Path) -> None:
    async with (
        raw_container(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") as port,
        asking(tmp_path, port, health_protocol="gRPC", health_timeout_s=2) as inference,
    ):
        assert not await inference.healthy()


def test_grpc_without_its_package_is_a_bad_setting_that_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['grpc'] = None\n"
        "from pathlib import Path; from tests.unit.container import settings_for; from workers.inference import "
        "Inference\n"
        "try: Inference(settings_for(Path('.'), 1, health_protocol='gRPC'))\n"
        "except Exception as exc: print(type(exc).__name__, exc)"
    )
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert said.startswith("ConfigurationError")
    assert "pip install 'fnqueue[grpc]'" in said


def test_a_sidecar_that_asks_by_http_does_not_load_grpc() -> None:
    program = "import sys, workers.commands; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# -- settings ----------------------------------------------------------------------------------

IDS = {"function_id": "f", "function_version_id": "v"}


@pytest.mark.parametrize(("said", "protocol"), [("grpc", "gRPC"), ("GRPC", "gRPC"), ("http", "HTTP"), ("HTTP", "HTTP")])
def test_the_protocol_may_be_spelt_in_any_case(monkeypatch: pytest.MonkeyPatch, said: str, protocol: str) -> None:
    monkeypatch.setenv("INFERENCE_HEALTH_PROTOCOL", said)
    assert load(SidecarSettings, **IDS).health_protocol == protocol


def test_an_unknown_protocol_is_a_bad_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERENCE_HEALTH_PROTOCOL", "tcp")
    with pytest.raises(ConfigurationError, match="settings: FNQUEUE_HEALTH_PROTOCOL: "):
        load(SidecarSettings, **IDS)


@pytest.mark.parametrize(("said", "timeout_s"), [("PT31S", 31), ("PT1M", 60), ("7", 7), ("2.5", 2.5)])
def test_the_time_out_may_be_a_duration(monkeypatch: pytest.MonkeyPatch, said: str, timeout_s: float) -> None:
    monkeypatch.setenv("INFERENCE_HEALTH_TIMEOUT", said)
    assert load(SidecarSettings, **IDS).health_timeout_s == timeout_s


@pytest.mark.parametrize(("said", "slots"), [("0", 1), ("-3", 1), ("1", 1), ("16384", 16_384)])
def test_there_is_at_least_one_slot(monkeypatch: pytest.MonkeyPatch, said: str, slots: int) -> None:
    monkeypatch.setenv("MAX_REQUEST_CONCURRENCY", said)
    assert load(SidecarSettings, **IDS).max_request_concurrency == slots


def test_more_slots_than_the_contract_has_are_a_bad_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_REQUEST_CONCURRENCY", "16385")
    with pytest.raises(ConfigurationError, match="16384"):
        load(SidecarSettings, **IDS)
