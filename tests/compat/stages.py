"""Where scenarios are played: the API over back ends in memory, in this process; or the product on real servers."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, cast

from aiohttp import web
from multidict import CIMultiDict
from pydantic import SecretStr

from api.server import serving
from broker.accounts import ACCOUNT_SCOPES
from broker.connect import open_broker
from broker.model import FunctionStatus, Gpu, Place, Version
from broker.ports import Broker
from broker.revisions import edit
from broker.settings import ApiSettings, SidecarSettings
from tests.compat.exchange import Reply, exchange, request
from tests.compat.scenarios import RUNNING, Given
from tests.containers import mirror
from tests.house import CONTAINERS, House
from workers import loops, sidecar

NVCF = "/v2/nvcf"
IMAGE = "tests/mirror:latest"
SHARED = "acme"
STRANGERS = "strangers"
GPU = "CPU"
INFERENCE_URL = "/v1/infer"
HEALTH_URI = "/health"
NAME = "under-test"
DEFINITION = {"name": NAME, "inferenceUrl": INFERENCE_URL, "containerImage": IMAGE, "healthUri": HEALTH_URI}
SLOTS = 256
# Scenarios ask faster, and make more, than any person would.
SETTINGS = {
    "account_calls_per_s": 0,
    "function_calls_per_s": 0,
    "max_functions": 10_000,
    "keys_per_owner": 10_000,
    "body_timeout_s": 1.0,
}

SetStatus = Callable[[str, FunctionStatus], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    id: str
    version_id: str


@dataclass(slots=True, kw_only=True)
class Stage:
    """A server to call. `running` is the function of SHARED whose container does as it is told."""

    url: str
    admin_key: str
    set_status: SetStatus | None = None
    running: Function = field(default_factory=lambda: Function(id="", version_id=""))
    _keys: dict[str, str] = field(default_factory=dict)
    _numbers: Any = field(default_factory=count)

    async def send(self, raw: bytes) -> Reply:
        return await asyncio.to_thread(exchange, self.url, raw)

    async def call(self, method: str, path: str, *, key: str, data: Any = None) -> Reply:
        """One call of a preparation: it has to succeed."""
        body = b"" if data is None else json.dumps(data).encode()
        headers = CIMultiDict({"Host": "h", "Authorization": f"Bearer {key}", "Content-Length": str(len(body))})
        reply = await self.send(request(method, path, headers, body))
        assert reply.status < 300, f"{method} {path}: {reply}"
        return reply

    async def key_of(self, account: str, scopes: list[str] | None = None, resources: list[str] | None = None) -> str:
        """A key with every scope that accounts have and good for everything, unless told otherwise."""
        wanted = json.dumps([account, scopes, resources])
        if wanted not in self._keys:
            policy: dict[str, Any] = {"scopes": list(ACCOUNT_SCOPES) if scopes is None else scopes}
            if resources is not None:
                parts = (resource.partition("/") for resource in resources)
                policy["resources"] = [{"type": kind, "id": rest} for kind, _, rest in parts]
            asked = {"nca_id": account, "authorizations": {"policies": [policy]}}
            reply = await self.call("POST", "/v1/keys", key=self.admin_key, data=asked)
            self._keys[wanted] = str(reply.json["value"])
        return self._keys[wanted]

    async def prepare(self, given: Given) -> dict[str, Any]:
        """The variables of what is given."""
        account = f"a{next(self._numbers)}" if given.account == "fresh" else SHARED
        variables = {"account": account, "stranger": STRANGERS, "url": self.url}
        await self.key_of(STRANGERS)  # an account is one once it has a key
        key = await self.key_of(account)
        if given.function:
            function = await self._function(given, key)
            variables |= {"function": function.id, "version": function.version_id}
        if given.asset:
            variables["asset"] = await self._asset(key)
        return variables

    async def make(self, key: str, definition: Mapping[str, Any]) -> Function:
        made = await self.call("POST", f"{NVCF}/functions", key=key, data={**DEFINITION, **definition})
        return Function(id=made.json["function"]["id"], version_id=made.json["function"]["versionId"])

    async def deploy(self, key: str, function: Function, *, instances: int) -> None:
        path = f"{NVCF}/deployments/functions/{function.id}/versions/{function.version_id}"
        wanted = {"gpu": GPU, "minInstances": instances, "maxInstances": 1, "maxRequestConcurrency": SLOTS}
        await self.call("POST", path, key=key, data={"deploymentSpecifications": [wanted]})

    async def _function(self, given: Given, key: str) -> Function:
        if given.function == RUNNING:
            return self.running
        function = await self.make(key, given.definition)
        if given.function != "made":
            await self.deploy(key, function, instances=0)
        if given.function not in ("made", "idle"):
            assert self.set_status is not None, "on real servers nothing is put into a status"
            await self.set_status(function.version_id, FunctionStatus(given.function))
        return function

    async def _asset(self, key: str) -> str:
        asked = {"contentType": "text/plain", "description": "given"}
        made = (await self.call("POST", f"{NVCF}/assets", key=key, data=asked)).json
        where = made["uploadUrl"].partition("//")[2]
        host, _, path = where.partition("/")
        headers = CIMultiDict({"Host": host, "Content-Type": "text/plain", "Content-Length": "5"})
        headers["x-amz-meta-nvcf-asset-description"] = "given"
        stored = await asyncio.to_thread(exchange, f"http://{host}", request("PUT", f"/{path}", headers, b"asset"))
        assert stored.status == 200, stored
        return str(made["assetId"])


@asynccontextmanager
async def in_memory(folder: Path) -> AsyncIterator[Stage]:
    """The front end, a sidecar and a container as tasks of this process; nothing is reconciled."""
    admin_key = "nvapi-admin"
    settings = ApiSettings(
        port=0,
        data_dir=folder,
        admin_key=SecretStr(admin_key),
        encryption_keys=SecretStr(f"test:{'5e' * 32}"),
        **cast("dict[str, Any]", SETTINGS),
    )
    async with open_broker(settings) as broker:
        place = Place(region="east", attributes=("a",))
        offered = Gpu(name=GPU, instance_type="CPU", backend="local", capacity=8, place=place)
        await broker.catalog.offer([offered], ttl_s=3600)

        async def set_status(version_id: str, status: FunctionStatus) -> None:
            def change(version: Version) -> Version:
                return replace(version, status=status)

            await edit(broker.catalog.versions, version_id, change)

        async with serving(broker, settings) as url:
            stage = Stage(url=url, admin_key=admin_key, set_status=set_status)
            key = await stage.key_of(SHARED)
            stage.running = await stage.make(key, {})
            await stage.deploy(key, stage.running, instances=0)
            async with _working(broker, stage.running, folder):
                yield stage


@asynccontextmanager
async def _working(broker: Broker, function: Function, folder: Path) -> AsyncIterator[None]:
    """A container, and the sidecar that serves the function with it."""
    app = web.Application(client_max_size=64 * 1024 * 1024, handler_args={"auto_decompress": False})
    app.router.add_get(HEALTH_URI, mirror.health)
    app.router.add_route("*", "/{path:.*}", mirror.mirror)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    settings = SidecarSettings(
        function_id=function.id,
        function_version_id=function.version_id,
        function_name=NAME,
        inference_port=site.port,
        inference_url=INFERENCE_URL,
        health_uri=HEALTH_URI,
        max_request_concurrency=SLOTS,
        asset_dir=folder / "assets",
        response_dir=folder / "response",
        drain_s=0,
    )
    stop = asyncio.Event()
    try:
        async with loops.beside(sidecar.serve(broker, settings, stop)):
            yield
    finally:
        await runner.cleanup()


@asynccontextmanager
async def on_servers(folder: Path, servers: Mapping[str, str]) -> AsyncIterator[Stage]:
    """The production shape: a front end, a controller, and the instances that it starts."""
    images = folder / "mirror.toml"
    command = json.dumps([sys.executable, str(CONTAINERS / "mirror.py")])
    images.write_text(f"[{json.dumps(IMAGE)}]\ncommand = {command}\n")
    chosen = {f"FNQUEUE_{name.upper()}": str(value) for name, value in SETTINGS.items()}
    chosen |= {"FNQUEUE_IMAGES_FILE": str(images), "FNQUEUE_RECONCILE_S": "0.25", "FNQUEUE_DRAIN_S": "1"}
    house = House(folder, servers, fronts=1, **chosen)
    try:
        await asyncio.to_thread(house.start)
        stage = Stage(url=house.fronts[0].url, admin_key=house.key)
        key = await stage.key_of(SHARED)
        async with house.caller(key=key) as caller:
            made = await caller.deploy(IMAGE, inference_url=INFERENCE_URL, concurrency=SLOTS)
            stage.running = Function(id=made.id, version_id=made.version_id)
            yield stage
    finally:
        await asyncio.to_thread(house.stop)
