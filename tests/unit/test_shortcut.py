"""Plain invocations and polls, which pass the application by, are answered and logged as those that do not."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import cast

import aiohttp
import pytest
from aiohttp import HttpVersion10, web
from aiohttp.test_utils import make_mocked_request
from pydantic import SecretStr

from api import shortcut
from api.connections import Connection
from api.front import Front
from api.server import serving
from broker.accounts import create_key
from broker.connect import open_broker
from broker.model import FunctionStatus, Outcome, RequestState, Version
from broker.ports import Broker
from broker.settings import ApiSettings

FUNCTION = "5636b912-ecc0-493d-ab0c-1f702b96d75c"
VERSION = "65721e80-9b32-4396-9bec-8c08256297cf"
NOBODYS = "0655fbd8-96c2-4a19-b877-4d42dfeceedf"
INVOKE = "/v2/nvcf/pexec/functions/"
STATUS = "/v2/nvcf/pexec/status/"
KEY = "admin-key"
NOW = {"Prefer": "respond-async"}
# Of each request by itself.
_OWN = ("Date", "NVCF-REQID", "Location", "Server-Timing")


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    settings = ApiSettings(
        queue_url=SecretStr("memory://"),
        store_url=SecretStr("memory://"),
        blobs_url=SecretStr("file://"),
        data_dir=tmp_path,
        admin_key=SecretStr(KEY),
        port=0,
        max_body_bytes=2048,
        queue_limit=3,
    )
    async with open_broker(settings) as opened:
        version = Version(
            id=VERSION,
            function_id=FUNCTION,
            account="default",
            name="f",
            inference_url="/",
            container_image="a/b:c",
            created_at=1.0,
            status=FunctionStatus.ACTIVE,
        )
        await opened.catalog.versions.put(version)
        await opened.queue.declare(VERSION)
        yield opened


@pytest.fixture
async def client(broker: Broker) -> AsyncIterator[aiohttp.ClientSession]:
    assert isinstance(broker.settings, ApiSettings)
    async with serving(broker, broker.settings) as url, aiohttp.ClientSession(url) as session:
        yield session


async def both_ways(
    client: aiohttp.ClientSession, method: str, path: str, headers: Mapping[str, str], body: bytes = b""
) -> tuple[int, Mapping[str, str]]:
    """What it is answered either way, which is the same but for what is each request's own."""
    told = []
    for way in (path, f"{path}?by=router"):
        async with client.request(method, way, headers=headers, data=body or None) as response:
            said = {name: value for name, value in response.headers.items() if name not in _OWN}
            own = {name for name in _OWN if name in response.headers}
            content = await response.read()
            said.pop("Content-Length", "")  # it is its body's, and IDs are left out of that
            told.append((response.status, said, own, content.replace(_id(content), b"")))
    assert told[0] == told[1]
    return told[0][0], {**told[0][1], **dict.fromkeys(told[0][2], "")}


def _id(content: bytes) -> bytes:
    """The ID of a request in a problem."""
    _, found, rest = content.partition(b'"requestId":"')
    return rest[:36] if found else b"\n"


def bearing(key: str, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}", "Accept": "*/*", **more}


@pytest.mark.parametrize(
    ("path", "headers", "body", "status"),
    [
        (INVOKE + FUNCTION, bearing(KEY, **NOW), b"{}", 202),
        (f"{INVOKE}{FUNCTION}/versions/{VERSION}", bearing(KEY, **NOW), b"{}", 202),
        (INVOKE + FUNCTION, {}, b"{}", 401),
        (INVOKE + FUNCTION, {"Authorization": "Basic eDp5"}, b"{}", 401),
        (INVOKE + FUNCTION, bearing("another"), b"{}", 401),
        (INVOKE + NOBODYS, bearing(KEY), b"{}", 404),
        (f"{INVOKE}{FUNCTION}/versions/{NOBODYS}", bearing(KEY), b"{}", 404),
        (f"{INVOKE}{'-' * 36}", bearing(KEY), b"{}", 400),
        (INVOKE + FUNCTION, bearing(KEY, **{"NVCF-POLL-SECONDS": "soon"}), b"{}", 400),
        (INVOKE + FUNCTION, bearing(KEY, **NOW), b"x" * 3000, 413),
    ],
)
async def test_a_call_is_answered_alike(
    client: aiohttp.ClientSession, path: str, headers: dict[str, str], body: bytes, status: int
) -> None:
    found, said = await both_ways(client, "POST", path, headers, body)
    assert found == status
    assert said["Server"] == "fnqueue"
    assert "Date" in said


async def test_a_key_without_the_scope_is_refused_alike(broker: Broker, client: aiohttp.ClientSession) -> None:
    token, _ = await create_key(broker, account="default", scopes=("list_functions",))
    assert (await both_ways(client, "POST", INVOKE + FUNCTION, bearing(token), b"{}"))[0] == 403


async def accepted(client: aiohttp.ClientSession) -> str:
    async with client.post(INVOKE + FUNCTION, headers=bearing(KEY, **NOW), data=b"{}") as response:
        assert response.status == 202
        return response.headers["NVCF-REQID"]


async def finish(broker: Broker, outcome: Outcome) -> None:
    delivery = await broker.queue.take(VERSION)
    assert delivery is not None
    claim = await broker.results.claim(delivery.job, worker="w", lease_s=60, max_attempts=3)
    assert claim.lease is not None
    await broker.results.settle(claim.lease, delivery.job, RequestState.FULFILLED, outcome)


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(status=200, body=b"done", headers=(("Content-Type", "text/plain"), ("X-Two", "1"), ("X-Two", "2"))),
        Outcome(status=200, body=b"no type"),
        Outcome(status=200, body=b""),
        Outcome(status=204, body=b""),
        Outcome(status=304, body=b""),
        Outcome(status=500, body=b"fault"),
        Outcome(status=299, body=b"no phrase"),
        Outcome(status=202, body=b"later"),
    ],
    ids=lambda outcome: f"{outcome.status}-{len(outcome.body)}",
)
async def test_a_result_is_given_alike(broker: Broker, client: aiohttp.ClientSession, outcome: Outcome) -> None:
    request_id = await accepted(client)
    await finish(broker, outcome)
    status, said = await both_ways(client, "GET", STATUS + request_id, bearing(KEY))
    assert status == (200 if outcome.status == 202 else outcome.status)
    assert said["nvcf-status"] if "nvcf-status" in said else said["NVCF-STATUS"]


async def test_a_poll_of_a_foreign_request_is_refused_alike(client: aiohttp.ClientSession) -> None:
    assert (await both_ways(client, "GET", STATUS + NOBODYS, bearing(KEY)))[0] == 404


def passes(broker: Broker, request: web.BaseRequest) -> bool:
    """Whether the request passes the application by."""
    assert isinstance(broker.settings, ApiSettings)
    choose = shortcut.of(Front.over(broker, broker.settings))
    return choose(cast("Connection", request.protocol), request._message) is not None


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", INVOKE + FUNCTION),
        ("POST", f"{INVOKE}{FUNCTION.upper()}/versions/{VERSION}"),
        ("GET", STATUS + NOBODYS),
    ],
)
async def test_what_is_plain_passes_the_application_by(broker: Broker, method: str, path: str) -> None:
    assert passes(broker, make_mocked_request(method, path, headers={"Host": "h", **bearing(KEY)}))


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", INVOKE + FUNCTION, {}),
        ("HEAD", STATUS + NOBODYS, {}),
        ("POST", f"{INVOKE}{FUNCTION}/", {}),
        ("POST", f"{INVOKE}{FUNCTION}?a=b", {}),
        ("POST", f"{INVOKE}%35{FUNCTION[1:]}", {}),
        ("POST", f"http://h{INVOKE}{FUNCTION}", {}),
        ("POST", INVOKE + FUNCTION, {"Origin": "http://page"}),
        ("POST", INVOKE + FUNCTION, {"Expect": "100-continue"}),
        ("POST", INVOKE + FUNCTION, {"Transfer-Encoding": "chunked"}),
        ("POST", INVOKE + FUNCTION, {"Upgrade": "h2c"}),
        ("POST", INVOKE + FUNCTION, {"Function-Id": NOBODYS}),
        ("POST", INVOKE + FUNCTION, {"Host": f"{FUNCTION}.example.com"}),
    ],
)
async def test_what_is_not_plain_goes_through_the_application(
    broker: Broker, method: str, path: str, headers: dict[str, str]
) -> None:
    assert not passes(broker, make_mocked_request(method, path, headers={"Host": "h", **bearing(KEY), **headers}))


async def test_http_1_0_goes_through_the_application(broker: Broker) -> None:
    assert not passes(broker, make_mocked_request("POST", INVOKE + FUNCTION, version=HttpVersion10))


async def test_a_refusal_beyond_the_queue_limit_and_its_log_line(
    client: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="api.middleware"):
        for _ in range(3):
            await accepted(client)
        assert (await both_ways(client, "POST", INVOKE + FUNCTION, bearing(KEY, **NOW), b"{}"))[0] == 429
    answered = [line for line in caplog.records if line.msg == "answered"]
    assert [vars(line)["status"] for line in answered] == [202, 202, 202]
    assert all(vars(line)["function_id"] == FUNCTION for line in answered)


async def test_a_connection_is_closed_when_its_client_says_so(client: aiohttp.ClientSession) -> None:
    headers = bearing(KEY, Connection="close", **NOW)
    async with client.post(INVOKE + FUNCTION, headers=headers, data=b"{}") as response:
        assert (response.status, response.headers["Connection"]) == (202, "close")
