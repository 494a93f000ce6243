"""The product twice, over real HTTP: everything in one process, and the production shape. One suite for both."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from multidict import CIMultiDict

from infra.local.servers import S3, RabbitMQ, Redis
from tests import house
from tests.e2e import dev
from tests.eventually import eventually
from tests.house import CONTAINERS, RECORDER, STREAMER, Caller, Function, House, Record, Reply

MIRROR = "tests/mirror:latest"
TALKER = "tests/talker:latest"
NVCF = "/v2/nvcf"
UNKNOWN_ID = "0655fbd8-96c2-4a19-b877-4d42dfeceedf"
QUEUE_LIMIT = 20
# What the type of a 400 ends with: `about:blank` where the body has another shape than the document says.
MISFITS = ("bad-request", "blank")
BODY_TIMEOUT_S = 3.0
TALK_S = 60.0  # and the server has closed

# Of a test that needs several accounts: `fnqueue dev` has one key.
production_only = pytest.mark.parametrize(
    "site", [pytest.param("production", marks=pytest.mark.servers)], indirect=True, scope="session"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One running product. `log` is what its front end writes; `settings` are those of its store, for commands."""

    family: str
    url: str
    key: str
    record: Record
    log: Path
    settings: Mapping[str, str] = field(default_factory=dict)

    @asynccontextmanager
    async def caller(self, key: str | None = None) -> AsyncIterator[Caller]:
        """A client with the admin's key, or with another one."""
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            yield Caller(session, self.url, self.key if key is None else key)

    async def new_key(self, account: str, *scopes: str) -> str:
        """As an operator makes one; with every scope unless some are named."""
        words = ["keys", "create", "--account", account]
        for scope in scopes:
            words += ["--scope", scope]
        made = await asyncio.to_thread(dev.fnqueue, *words, env=dev.environment(**self.settings))
        assert made.returncode == 0, made.stderr
        return made.stdout.strip()


def settings_for(folder: Path) -> dict[str, str]:
    """Those of both families, and the images that stand for the test containers."""
    images = folder / "test-images.toml"
    record = json.dumps(str(folder / "record"))
    lines = []
    scripts = {RECORDER: "recorder.py", MIRROR: "mirror.py", STREAMER: "streamer.py", TALKER: "talker.py"}
    for image, script in scripts.items():
        command = json.dumps([sys.executable, str(CONTAINERS / script)])
        lines += [f"[{json.dumps(image)}]", f"command = {command}", f"env = {{ RECORD = {record} }}"]
    images.write_text("\n".join(lines) + "\n")
    return {
        "FNQUEUE_IMAGES_FILE": str(images),
        "FNQUEUE_QUEUE_LIMIT": str(QUEUE_LIMIT),
        "FNQUEUE_BODY_TIMEOUT_S": str(BODY_TIMEOUT_S),
        "FNQUEUE_RECONCILE_S": "0.25",
        # One account asks for everything here, faster than any person would.
        "FNQUEUE_ACCOUNT_CALLS_PER_S": "0",
        "FNQUEUE_FUNCTION_CALLS_PER_S": "0",
        "FNQUEUE_LEASE_S": "3",
        "FNQUEUE_RENEW_S": "0.5",
        "FNQUEUE_DRAIN_S": "3",
        "FNQUEUE_SWEEP_S": "1",
        "FNQUEUE_DASHBOARD_REFRESH_S": "0.5",
        "FNQUEUE_REGION": "here",
        # Receivers of the tests are here, and speak plain HTTP.
        "FNQUEUE_WEBHOOK_NETWORKS": "127.0.0.0/8",
        "FNQUEUE_WEBHOOK_PORTS": "1024-65535",
        "FNQUEUE_WEBHOOK_HTTP": "true",
    }


@pytest.fixture(scope="session", params=["embedded", pytest.param("production", marks=pytest.mark.servers)])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp(request.param)
    yield from (embedded if request.param == "embedded" else production)(folder, request)


def embedded(folder: Path, _: pytest.FixtureRequest) -> Iterator[Site]:
    with dev.running(folder, env=dev.environment(**settings_for(folder))) as server:
        record, log = Record(folder / "record"), folder / "errors.txt"
        yield Site(family="embedded", url=server.url, key=server.key, record=record, log=log)


def production(folder: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    rabbitmq: RabbitMQ = request.getfixturevalue("product_rabbitmq")
    redis: Redis = request.getfixturevalue("redis_server")
    s3: S3 = request.getfixturevalue("s3")
    # What other tests store in another database is not deployed here.
    servers, controllers = house.users(rabbitmq, redis, s3, database=9)
    with house.running(House(folder, servers, controllers, fronts=1, **settings_for(folder))) as running:
        [front] = running.fronts
        record, log = running.record, front.log
        yield Site(family="production", url=front.url, key=running.key, record=record, log=log, settings=servers)


@pytest.fixture(scope="session")
async def caller(site: Site) -> AsyncIterator[Caller]:
    async with site.caller() as found:
        yield found


@pytest.fixture(scope="session")
async def stranger(site: Site) -> AsyncIterator[Caller]:
    """With every scope, on another account."""
    async with site.caller(await site.new_key("other")) as found:
        yield found


# -- functions ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mirror:
    """A function that answers what it is told (tests/containers/mirror.py)."""

    function: Function
    caller: Caller

    @property
    def path(self) -> str:
        return invoke_path(self.function)

    async def post(
        self,
        body: bytes = b"{}",
        order: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        caller: Caller | None = None,
    ) -> Reply:
        sent = {"Content-Type": "application/json", **ordered(order or {}), **(headers or {})}
        return await (caller or self.caller).call("POST", self.path, body=body, headers=sent)


def ordered(order: Mapping[str, Any]) -> dict[str, str]:
    """The header that tells the mirror what to do; bytes go as base64."""
    plain = {
        name: base64.b64encode(value).decode() if isinstance(value, bytes) else value for name, value in order.items()
    }
    return {"X-Mirror": json.dumps(plain)}


def invoke_path(function: Function) -> str:
    return f"{NVCF}/pexec/functions/{function.id}"


@pytest.fixture(scope="session")
async def mirror(caller: Caller) -> AsyncIterator[Mirror]:
    """With slots for all: what a test asks for begins at once."""
    function = await caller.deploy(MIRROR, inference_url="/v1/mirror", concurrency=16)
    yield Mirror(function, caller)
    await function.undeploy()


@pytest.fixture(scope="session")
async def recorder(caller: Caller) -> AsyncIterator[Function]:
    """It runs one request at a time; leave it idle."""
    function = await caller.deploy(RECORDER)
    yield function
    await function.undeploy()


class Gate:
    """Jobs of a recorder that name it finish once it is open."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self) -> None:
        self._path.touch()

    def order(self, **more: Any) -> dict[str, Any]:
        return {"gate": str(self._path), **more}


@pytest.fixture
async def gate(tmp_path: Path) -> AsyncIterator[Gate]:
    """It opens when the test is over."""
    made = Gate(tmp_path / "gate")
    yield made
    made.open()


async def begun(caller: Caller, function: Function, order: Mapping[str, Any]) -> str:
    """The id of a request that runs now."""
    request_id = await caller.submit(function.id, order)
    await is_running(caller, request_id)
    return request_id


async def is_running(caller: Caller, request_id: str) -> None:
    await eventually(lambda: caller.position(request_id), lambda reply: reply.json["positionInQueue"] == 0)


async def idle(caller: Caller, function: Function) -> None:
    def empty(reply: Reply) -> bool:
        return all((queue["queueDepth"], queue["inFlight"]) == (0, 0) for queue in reply.json["queues"])

    await eventually(lambda: caller.depth(function.id), empty, within_s=30)


# -- HTTP as it is written ---------------------------------------------------------------------


async def exchange(
    caller: Caller, method: str, path: str, *, headers: Sequence[tuple[str, str | bytes]] = (), body: bytes = b""
) -> Reply:
    """One request with these headers in this order, and none but these, Authorization, Content-Length and Host."""
    return await asyncio.to_thread(_exchange, caller, method, path, headers, body)


def _exchange(caller: Caller, method: str, path: str, headers: Sequence[tuple[str, str | bytes]], body: bytes) -> Reply:
    connection = http.client.HTTPConnection(urlsplit(caller.url).netloc, timeout=60)
    try:
        own_host = any(name == "Host" for name, _ in headers)
        connection.putrequest(method, path, skip_host=own_host, skip_accept_encoding=True)
        for name, value in (("Authorization", f"Bearer {caller.key}"), ("Content-Length", str(len(body))), *headers):
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        return Reply(response.status, CIMultiDict(response.getheaders()), response.read())
    finally:
        connection.close()


async def talk(url: str, sent: bytes, *, close: bool = False) -> bytes:
    """What comes back for these bytes until the server closes. `close`: send nothing more. Fails when it does not
    close."""
    reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
    try:
        writer.write(sent)
        if close:
            writer.write_eof()
        async with asyncio.timeout(TALK_S):
            try:
                return await reader.read()
            except ConnectionResetError:
                return b""
    finally:
        writer.close()


def slug(reply: Reply) -> str:
    """The last word of a problem's type."""
    return str(reply.json["type"]).rpartition(":")[2]
