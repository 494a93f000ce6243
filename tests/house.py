"""The whole product as real processes: one front end or more, a controller, and what that starts."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from infra.local.process import free_port
from infra.local.servers import S3, RabbitMQ, Redis
from infra.local.stack import Program
from tests.eventually import eventually

CONTAINERS = Path(__file__).parent / "containers"
RECORDER = "tests/recorder:latest"
STREAMER = "tests/streamer:latest"
WAIT_S = 30


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def request_id(self) -> str:
        return self.headers["NVCF-REQID"]


class Caller:
    """A client of one front end, with the admin's key unless told otherwise."""

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str) -> None:
        self._session = session
        self.url = url
        self.key = key

    def with_key(self, key: str) -> Caller:
        return Caller(self._session, self.url, key)

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        data: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = WAIT_S + 10,
    ) -> Reply:
        """`data` is sent as JSON. Redirects are not followed."""
        sent = {"Authorization": f"Bearer {self.key}", **(headers or {})}
        if data is not None:
            body, sent = json.dumps(data).encode(), {"Content-Type": "application/json", **sent}
        async with self._session.request(
            method,
            self.url + path,
            data=body,
            headers=sent,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=timeout_s),
        ) as response:
            return Reply(response.status, response.headers.copy(), await response.read())

    async def invoke(
        self, function_id: str, data: Any = None, *, wait_s: int = WAIT_S, headers: Mapping[str, str] | None = None
    ) -> Reply:
        sent = {"NVCF-POLL-SECONDS": str(wait_s), **(headers or {})}
        return await self.call("POST", f"/v2/nvcf/pexec/functions/{function_id}", data=data or {}, headers=sent)

    async def submit(self, function_id: str, data: Any = None, *, headers: Mapping[str, str] | None = None) -> str:
        """The id of a request that was accepted and is not waited for."""
        reply = await self.invoke(function_id, data, headers={"Prefer": "respond-async", **(headers or {})})
        assert reply.status == 202, reply
        return reply.request_id

    async def status(self, request_id: str, *, wait_s: int = 1) -> Reply:
        return await self.call("GET", f"/v2/nvcf/pexec/status/{request_id}", headers={"NVCF-POLL-SECONDS": str(wait_s)})

    async def result(self, request_id: str, *, within_s: float = 60.0) -> Reply:
        """The terminal answer; errors of a server that is away are lived through."""

        async def look() -> Reply | None:
            try:
                return await self.status(request_id)
            except (aiohttp.ClientError, TimeoutError):
                return None

        reply = await eventually(
            look, lambda seen: seen is not None and seen.status not in (202, 503), within_s=within_s
        )
        assert reply is not None
        return reply

    async def cancel(self, request_id: str) -> Reply:
        return await self.call("DELETE", f"/v2/nvcf/requests/{request_id}")

    async def position(self, request_id: str) -> Reply:
        return await self.call("GET", f"/v2/nvcf/queues/{request_id}/position")

    async def depth(self, function_id: str) -> Reply:
        return await self.call("GET", f"/v2/nvcf/queues/functions/{function_id}")

    async def deploy(
        self,
        image: str,
        *,
        inference_url: str = "/",
        instances: int = 1,
        most: int | None = None,
        concurrency: int = 1,
        environment: Mapping[str, str] | None = None,
        **definition: Any,
    ) -> Function:
        """A new function, deployed and ACTIVE."""
        made = await self.call(
            "POST",
            "/v2/nvcf/functions",
            data={
                "name": "under-test",
                "inferenceUrl": inference_url,
                "containerImage": image,
                "containerEnvironment": [{"key": k, "value": v} for k, v in (environment or {}).items()],
                "health": {
                    "protocol": "HTTP", "uri": "/health", "port": 8000, "timeout": "PT10S", "expectedStatusCode": 200,
                },
                **definition,
            },
        )  # fmt: skip
        assert made.status == 200, made
        function = Function(self, made.json["function"]["id"], made.json["function"]["versionId"])
        await function.deploy(instances=instances, most=most, concurrency=concurrency)
        return function


@dataclass(frozen=True, slots=True)
class Function:
    caller: Caller
    id: str
    version_id: str

    @property
    def deployment_path(self) -> str:
        return f"/v2/nvcf/deployments/functions/{self.id}/versions/{self.version_id}"

    async def deploy(self, *, instances: int, concurrency: int = 1, most: int | None = None) -> None:
        """`instances`, and up to `most` where there may be more."""
        specification = {
            "gpu": "CPU",
            "instanceType": "CPU",
            "minInstances": instances,
            "maxInstances": most or max(1, instances),
            "maxRequestConcurrency": concurrency,
        }
        # Until the controller has made its first offer, there is nothing to place it on.
        deployed = await eventually(
            lambda: self.caller.call("POST", self.deployment_path, data={"deploymentSpecifications": [specification]}),
            lambda reply: reply.status != 503,
            within_s=60,
        )
        assert deployed.status == 200, deployed
        await eventually(self.state, lambda state: state == "ACTIVE", within_s=60)

    async def state(self) -> str:
        seen = await self.caller.call("GET", f"/v2/nvcf/functions/{self.id}/versions/{self.version_id}")
        assert seen.status == 200, seen
        return str(seen.json["function"]["status"])

    async def undeploy(self) -> None:
        await self.caller.call("DELETE", self.deployment_path)


class Record:
    """What the recorder containers wrote down."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def counts(self, word: str) -> Counter[str]:
        """How often each id was written down after `word`."""
        if not self.path.exists():
            return Counter()
        lines = (line.partition(" ") for line in self.path.read_text().splitlines())
        return Counter(rest for first, _, rest in lines if first == word)

    async def saw(self, word: str, name: str, *, times: int = 1, within_s: float = 30.0) -> None:
        async def count() -> int:
            return self.counts(word)[name]

        await eventually(count, lambda seen: seen >= times, within_s=within_s)


def users(rabbitmq: RabbitMQ, redis: Redis, s3: S3, *, database: int = 0) -> tuple[dict[str, str], dict[str, str]]:
    """What a House's front ends are told, and its controllers: each kind of process comes in as the user who is shipped
    for it. Versions have users where there is a management API to make them by."""
    fronts, controllers = (
        {
            "FNQUEUE_QUEUE_URL": rabbitmq.url_for(role),
            "FNQUEUE_STORE_URL": redis.url_for(role, database),
            "FNQUEUE_BLOBS_URL": s3.url,
        }
        for role in ("api", "controller")
    )
    controllers["FNQUEUE_SIDECAR_STORE_URL"] = redis.url_for("sidecar", database)
    if rabbitmq.has_management:
        controllers["FNQUEUE_QUEUE_MANAGEMENT_URL"] = rabbitmq.management_url_for("controller")
        controllers["FNQUEUE_VERSION_USERS"] = "true"
    else:
        controllers["FNQUEUE_SIDECAR_QUEUE_URL"] = rabbitmq.url_for("sidecar")
    return fronts, controllers


class House:
    """Front ends, controllers and their instances over servers that are given. `controllers` are settings of theirs
    alone: other users of the same servers."""

    def __init__(
        self,
        folder: Path,
        servers: Mapping[str, str],
        controllers: Mapping[str, str] | None = None,
        /,
        *,
        fronts: int = 1,
        **settings: str,
    ) -> None:
        self.folder = folder
        self.key = f"nvapi-{secrets.token_urlsafe(32)}"
        self.record = Record(folder / "record")
        images = folder / "images.toml"
        images.write_text(
            "".join(
                f'["{image}"]\ncommand = {json.dumps([sys.executable, str(CONTAINERS / script)])}\n'
                f"env = {{ RECORD = {json.dumps(str(self.record.path))} }}\n"
                for image, script in ((RECORDER, "recorder.py"), (STREAMER, "streamer.py"))
            )
        )
        shared = {
            **servers,
            "FNQUEUE_DATA_DIR": str(folder / "data"),
            "FNQUEUE_SECRET_KEY": secrets.token_hex(32),
            "FNQUEUE_ENCRYPTION_KEYS": f"test:{secrets.token_hex(32)}",
            "FNQUEUE_IMAGES_FILE": str(images),
            "FNQUEUE_LEASE_S": "3",
            "FNQUEUE_RENEW_S": "0.5",
            "FNQUEUE_LOG_LEVEL": "INFO",
            "FNQUEUE_STATUS_PORT": "0",
            **settings,
        }
        self.fronts = [self._front(number, shared) for number in range(fronts)]
        self._shared = {**shared, **(controllers or {})}
        self.controllers: list[Program] = []
        self.add_controller()

    @property
    def controller(self) -> Program:
        return self.controllers[0]

    def add_controller(self) -> None:
        """One more over the same data folder, from the next start on."""
        name = f"controller-{len(self.controllers)}"
        self.controllers.append(_program(name, self.folder, "controller", self._shared))

    def start(self) -> None:
        for program in (*self.fronts, *self.controllers):
            program.start()

    def stop(self) -> None:
        """Everything, what a killed controller left behind included."""
        for program in (*self.fronts, *self.controllers):
            program.stop()
        for process in [*self.sidecars(), *self.containers()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def sidecars(self) -> list[psutil.Process]:
        return self._processes("sidecar")

    def containers(self) -> list[psutil.Process]:
        return self._processes("container")

    @asynccontextmanager
    async def caller(self, front: int = 0, *, key: str = "") -> AsyncIterator[Caller]:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            yield Caller(session, self.fronts[front].url, key or self.key)

    def _front(self, number: int, shared: Mapping[str, str]) -> Program:
        port = free_port()
        own = {"FNQUEUE_HOST": "127.0.0.1", "FNQUEUE_PORT": str(port), "FNQUEUE_ADMIN_KEY": self.key}
        return _program(f"api-{number}", self.folder, "api", {**shared, **own}, url=f"http://127.0.0.1:{port}")

    def _processes(self, which: str) -> list[psutil.Process]:
        """Of the instances' own state files, so that those of a dead controller are found too."""
        found = []
        for state in (self.folder / "data" / "instances").glob("*/state.json"):
            with contextlib.suppress(OSError, ValueError, TypeError, psutil.NoSuchProcess):
                found.append(psutil.Process(json.loads(state.read_text())[which]["pid"]))
        return found


@contextmanager
def running(house: House) -> Iterator[House]:
    try:
        house.start()
        yield house
    finally:
        house.stop()


def _program(name: str, folder: Path, command: str, settings: Mapping[str, str], *, url: str = "") -> Program:
    argv: Sequence[str] = [sys.executable, "-P", "-m", "fnqueue", command]
    environment = {name: "" for name in os.environ if name.startswith("FNQUEUE_")}
    return Program(name, folder / name, command=argv, environment={**environment, **settings}, url=url)
