"""The calls that NVIDIA's own clients make, sent as they send them, and the shapes that they parse, held strictly:
a field that they need is there, and each is of the very type that they declare (contract/management.md §1 to §4)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar
from uuid import UUID

import pytest
from pydantic import BaseModel, ConfigDict, SecretStr
from pydantic.alias_generators import to_camel

from broker.model import Gpu, Instance, InstanceStatus, Outcome
from tests.unit.test_server import FUNCTION, KEY, VERSION, House, caller, opened

M = TypeVar("M", bound=BaseModel)

GPU = Gpu(name="H100", instance_type="NCP.GPU.H100_1x", backend="GFN", capacity=8, gpu_count=1)
Status = Literal["ACTIVE", "DEPLOYING", "ERROR", "INACTIVE", "DELETED"]


class Parsed(BaseModel):
    """Unknown fields pass, as in every client; a number in place of a text, or a text of another form, does not."""

    model_config = ConfigDict(alias_generator=to_camel, strict=True, extra="ignore")


@dataclass(frozen=True, slots=True)
class Client:
    """One of the clients: where it looks, and what it says of itself with every call."""

    house: House
    prefix: str
    says: Mapping[str, str] = field(default_factory=dict)

    async def call(
        self, method: str, path: str, body: Any = None, *, key: str = KEY
    ) -> tuple[int, Mapping[str, str], bytes]:
        sent = {"Authorization": f"Bearer {key}", **self.says}
        data = None if body is None else json.dumps(body)
        async with self.house.client.request(method, self.prefix + path, data=data, headers=sent) as response:
            return response.status, response.headers, await response.read()

    async def parse(self, kind: type[M], method: str, path: str, body: Any = None) -> M:
        status, headers, answer = await self.call(method, path, body)
        assert (status, headers["Content-Type"].partition(";")[0]) == (200, "application/json"), answer
        return kind.model_validate_json(answer)

    async def nothing(self, method: str, path: str, body: Any = None) -> None:
        """A call that the client expects no content of."""
        status, _, answer = await self.call(method, path, body)
        assert (status, answer) == (204, b"")


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path, encryption_keys=SecretStr(f"k:{'1a' * 32}")) as found:
        await found.broker.catalog.offer([GPU], ttl_s=60)
        yield found


# -- the SDK that Stainless generated ------------------------------------------------------------


class Health(Parsed):
    protocol: Literal["HTTP", "gRPC"]
    uri: str
    port: int
    timeout: str
    expected_status_code: int


class ActiveInstance(Parsed):
    instance_id: str
    function_id: str
    function_version_id: str
    instance_type: str
    instance_status: str
    sis_request_id: str
    nca_id: str
    gpu: str
    backend: str
    instance_created_at: datetime
    instance_updated_at: datetime


class Pair(Parsed):
    key: str
    value: str


class Artifact(Parsed):
    name: str
    uri: str
    version: str


class Function(Parsed):
    id: str
    created_at: datetime
    function_type: Literal["DEFAULT", "STREAMING"]
    health_uri: str
    name: str
    nca_id: str
    status: Status
    version_id: str
    active_instances: list[ActiveInstance] | None = None
    api_body_format: Literal["PREDICT_V2", "CUSTOM"] | None = None
    container_args: str | None = None
    container_environment: list[Pair] | None = None
    container_image: str | None = None
    description: str | None = None
    health: Health | None = None
    inference_port: int | None = None
    inference_url: str | None = None
    models: list[Artifact] | None = None
    owned_by_different_account: bool | None = None
    resources: list[Artifact] | None = None
    secrets: list[str] | None = None
    tags: list[str] | None = None


class OneFunction(Parsed):
    function: Function


class Functions(Parsed):
    functions: list[Function]


class FunctionIds(Parsed):
    function_ids: list[str]


class GpuSpecification(Parsed):
    gpu: str
    instance_type: str
    max_instances: int
    min_instances: int
    backend: str | None = None
    max_request_concurrency: int | None = None


class DeploymentHealth(Parsed):
    sis_request_id: str
    gpu: str
    instance_type: str
    error: str
    backend: str | None = None


class Deployment(Parsed):
    created_at: datetime
    deployment_specifications: list[GpuSpecification]
    function_id: str
    function_name: str
    function_status: Status
    function_version_id: str
    nca_id: str
    health_info: list[DeploymentHealth] | None = None


class OneDeployment(Parsed):
    deployment: Deployment


class Queue(Parsed):
    function_name: str
    function_status: Status
    function_version_id: str
    queue_depth: int


class Queues(Parsed):
    function_id: str
    queues: list[Queue]


class Position(Parsed):
    function_id: str
    function_version_id: str
    position_in_queue: int


class Party(Parsed):
    nca_id: str
    client_id: str | None = None


class Authorized(Parsed):
    id: str
    nca_id: str
    authorized_parties: list[Party] | None = None
    version_id: str | None = None


class OneAuthorized(Parsed):
    function: Authorized


class ManyAuthorized(Parsed):
    functions: list[Authorized]


class NewAsset(Parsed):
    asset_id: str
    content_type: str
    description: str
    upload_url: str


class Asset(Parsed):
    asset_id: str
    content_type: str | None = None
    description: str | None = None


class OneAsset(Parsed):
    asset: Asset


class Assets(Parsed):
    assets: list[Asset]


class InstanceType(Parsed):
    name: str
    description: str
    default: bool


class OfferedGpu(Parsed):
    name: str
    instance_types: list[InstanceType]


class NamedCluster(Parsed):
    id: UUID
    name: str
    k8s_version: str | None = None


class ClusterGroup(Parsed):
    id: UUID
    name: str
    nca_id: str
    authorized_nca_ids: list[str]
    gpus: list[OfferedGpu]
    clusters: list[NamedCluster]


class ClusterGroups(Parsed):
    cluster_groups: list[ClusterGroup]


@pytest.fixture
def sdk(house: House) -> Client:
    """It says what it takes and sends of every call, also of one without a body."""
    says = {
        "Accept": "application/json",
        "Content-Type": "application/json",
        "User-Agent": "NVCF/Python 0.1.0-alpha.2",
        "X-Stainless-Lang": "python",
        "X-Stainless-Package-Version": "0.1.0-alpha.2",
        "X-Stainless-Retry-Count": "0",
        "X-Stainless-Async": "false",
    }
    return Client(house, "/v2/nvcf", says)


DEFINITION: dict[str, Any] = {
    "name": "echo",
    "inferenceUrl": "/echo",
    "containerImage": "nvcr.io/org/echo:1",
    "containerArgs": "-v",
    "containerEnvironment": [{"key": "A", "value": "b"}],
    "apiBodyFormat": "CUSTOM",
    "functionType": "DEFAULT",
    "health": {"protocol": "gRPC", "uri": "/h", "port": 8001, "timeout": "PT20S", "expectedStatusCode": 200},
    "models": [{"name": "m", "version": "1", "uri": "/v2/org/o/models/m/versions/1/files"}],
    "resources": [{"name": "r", "version": "1", "uri": "/v2/org/o/resources/r/versions/1/files"}],
    "secrets": [{"name": "TOKEN", "value": "t"}],
    "tags": ["a"],
    "description": "d",
}


def at(function: Function) -> str:
    return f"/functions/{function.id}/versions/{function.version_id}"


async def test_the_sdk_manages_functions(sdk: Client) -> None:
    made = (await sdk.parse(OneFunction, "POST", "/functions", DEFINITION)).function
    assert (made.health, made.tags) == (Health.model_validate_json(json.dumps(DEFINITION["health"])), ["a"])
    other = (await sdk.parse(OneFunction, "POST", f"/functions/{made.id}/versions", DEFINITION)).function
    instance = Instance(
        id="i",
        function_id=made.id,
        version_id=made.version_id,
        account="default",
        gpu="H100",
        instance_type="NCP.GPU.H100_1x",
        backend="GFN",
        status=InstanceStatus.RUNNING,
        created_at=1.0,
        updated_at=2.5,
    )
    await sdk.house.broker.catalog.beat(instance, ttl_s=60)
    shown = (await sdk.parse(OneFunction, "GET", f"{at(made)}?includeSecrets=true")).function
    assert (shown.secrets, len(shown.active_instances or ())) == (["TOKEN"], 1)
    # Arrays of a query are joined by commas.
    listed = (await sdk.parse(Functions, "GET", "/functions?visibility=private%2Cauthorized")).functions
    assert {made.version_id, other.version_id} <= {function.version_id for function in listed}
    assert made.id in (await sdk.parse(FunctionIds, "GET", "/functions/ids?visibility=private,public")).function_ids
    assert len((await sdk.parse(Functions, "GET", f"/functions/{made.id}/versions")).functions) == 2
    tagged = (await sdk.parse(OneFunction, "PUT", f"/metadata{at(made)}", {"tags": ["b"]})).function
    assert tagged.tags == ["b"]
    await sdk.nothing("PUT", f"/secrets{at(made)}", {"secrets": [{"name": "TOKEN", "value": "u"}]})
    for version in (made, other):
        await sdk.nothing("DELETE", at(version))
    assert (await sdk.call("GET", at(made)))[0] == 404


async def test_the_sdk_deploys(sdk: Client) -> None:
    function = (await sdk.parse(OneFunction, "POST", "/functions", DEFINITION)).function
    (group,) = (await sdk.parse(ClusterGroups, "GET", "/clusterGroups")).cluster_groups
    (gpu,) = group.gpus
    wanted = {
        "gpu": gpu.name,
        "instanceType": gpu.instance_types[0].name,
        "backend": group.name,
        "minInstances": 1,
        "maxInstances": 2,
        "maxRequestConcurrency": 4,
    }
    where = f"/deployments{at(function)}"
    made = (await sdk.parse(OneDeployment, "POST", where, {"deploymentSpecifications": [wanted]})).deployment
    assert made.function_status == "DEPLOYING"
    assert (await sdk.parse(OneDeployment, "GET", where)).deployment == made
    changed = {"deploymentSpecifications": [wanted | {"maxInstances": 3}]}
    updated = (await sdk.parse(OneDeployment, "PUT", where, changed)).deployment
    assert updated.deployment_specifications[0].max_instances == 3
    undeployed = (await sdk.parse(OneFunction, "DELETE", f"{where}?graceful=true")).function
    assert undeployed.status == "INACTIVE"


async def test_the_sdk_shares(sdk: Client) -> None:
    where, party = f"/authorizations/functions/{FUNCTION}", {"ncaId": "partner"}
    async with caller(sdk.house, "partner"), caller(sdk.house, "other"):
        shared = (await sdk.parse(OneAuthorized, "POST", where, {"authorizedParties": [party]})).function
        assert [party.nca_id for party in shared.authorized_parties or ()] == ["partner"]
        other = {"authorizedParty": {"ncaId": "other"}}
        await sdk.parse(OneAuthorized, "PATCH", f"{where}/add", other)
        await sdk.parse(OneAuthorized, "PATCH", f"{where}/remove", other)
        await sdk.parse(OneAuthorized, "GET", f"{where}/versions/{VERSION}")
        (listed,) = (await sdk.parse(ManyAuthorized, "GET", where)).functions
        assert (listed.version_id, len(listed.authorized_parties or ())) == (VERSION, 1)
        await sdk.parse(OneAuthorized, "DELETE", where)


async def test_the_sdk_invokes_and_reads_queues(sdk: Client) -> None:
    # The SDK follows no status but 200: it polls by itself only when it is told to.
    held = replace(sdk, says={**sdk.says, "NVCF-POLL-SECONDS": "1"})
    status, headers, _ = await held.call("POST", f"/pexec/functions/{FUNCTION}", {"message": "hi"})
    request_id = headers["NVCF-REQID"]
    assert (status, headers["NVCF-STATUS"]) == (202, "pending-evaluation")
    position = await sdk.parse(Position, "GET", f"/queues/{request_id}/position")
    assert (position.function_version_id, position.position_in_queue) == (VERSION, 1)
    for where in (f"/queues/functions/{FUNCTION}", f"/queues/functions/{FUNCTION}/versions/{VERSION}"):
        (queue,) = (await sdk.parse(Queues, "GET", where)).queues
        assert (queue.queue_depth, queue.function_status) == (1, "ACTIVE")
    await sdk.house.finish(Outcome(status=200, headers=(("Content-Type", "application/json"),), body=b'{"a":1}'))
    status, headers, answer = await sdk.call("GET", f"/pexec/status/{request_id}")
    assert (status, headers["NVCF-STATUS"], json.loads(answer)) == (200, "fulfilled", {"a": 1})


async def test_the_sdk_keeps_assets(sdk: Client) -> None:
    made = await sdk.parse(NewAsset, "POST", "/assets", {"contentType": "image/png", "description": "a cat"})
    signed = {"Content-Type": "image/png", "x-amz-meta-nvcf-asset-description": "a cat"}
    async with sdk.house.client.put(made.upload_url, data=b"png", headers=signed) as response:
        assert response.status == 200
    assert [asset.asset_id for asset in (await sdk.parse(Assets, "GET", "/assets")).assets] == [made.asset_id]
    assert (await sdk.parse(OneAsset, "GET", f"/assets/{made.asset_id}")).asset.content_type == "image/png"
    await sdk.nothing("DELETE", f"/assets/{made.asset_id}")


# -- ngcsdk, by way of the gateway -----------------------------------------------------------------


class CallerInfo(Parsed):
    type: Literal["SERVICE_KEY", "PERSONAL_KEY"]
    org_name: str
    products: list[str]


@pytest.mark.parametrize("prefix", ["/v2/orgs/default/nvcf", "/v2/orgs/default/teams/research/nvcf"])
async def test_ngcsdk_asks_whose_key_it_has_and_goes_by_org_and_team(house: House, prefix: str) -> None:
    form = {"credentials": KEY}
    async with house.client.post("/v3/keys/get-caller-info", data=form) as response:
        assert response.status == 200
        told = CallerInfo.model_validate_json(await response.read())
    assert (told.type, told.org_name) == ("SERVICE_KEY", "default")
    ngc = Client(house, prefix, {"Accept": "*/*", "User-Agent": "NGC-CLI", "X-NGC-Source": "sdk"})
    made = (await ngc.parse(OneFunction, "POST", "/functions", DEFINITION)).function
    assert made in (await ngc.parse(Functions, "GET", "/functions?visibility=private&visibility=authorized")).functions
    (group,) = (await ngc.parse(ClusterGroups, "GET", "/clusterGroups")).cluster_groups
    wanted = {"gpu": "H100", "instanceType": "NCP.GPU.H100_1x", "backend": group.name}
    body = {"deploymentSpecifications": [wanted | {"minInstances": 0, "maxInstances": 1}]}
    assert (await ngc.parse(OneDeployment, "POST", f"/deployments{at(made)}", body)).deployment.nca_id == "default"
    assert (await ngc.parse(OneDeployment, "GET", f"/deployments{at(made)}")).deployment.function_status == "ACTIVE"
    assert (await ngc.parse(Queues, "GET", f"/queues/functions/{made.id}")).queues[0].queue_depth == 0
    assert (await ngc.parse(OneFunction, "DELETE", f"/deployments{at(made)}")).function.status == "INACTIVE"
    await ngc.nothing("DELETE", at(made))


async def test_ngcsdk_may_not_go_by_another_org(house: House) -> None:
    status, _, _ = await Client(house, "/v2/orgs/other/nvcf").call("GET", "/functions")
    assert status == 403


# -- langchain -------------------------------------------------------------------------------------


class Problem(Parsed):
    """What langchain makes its exception of: a status and a title, a detail, and the request where there is one."""

    status: int
    title: str
    detail: str
    request_id: str | None = None


@pytest.fixture
def langchain(house: House) -> Client:
    says = {
        "Accept": "application/json",
        "User-Agent": "langchain-nvidia-ai-endpoints",
        "X-BILLING-SOURCE": "langchain",
    }
    return Client(house, "/v2/nvcf", says)


async def test_langchain_polls_a_202_by_its_request_id_until_it_is_done(langchain: Client) -> None:
    impatient = replace(langchain, says={**langchain.says, "NVCF-POLL-SECONDS": "0"})
    status, headers, _ = await impatient.call("POST", f"/pexec/functions/{FUNCTION}", {"messages": []})
    assert status == 202
    waiting = asyncio.create_task(langchain.call("GET", f"/pexec/status/{headers['NVCF-REQID']}"))
    answer = b'{"choices":[{"message":{"role":"assistant","content":"hi"}}]}'
    await langchain.house.finish(Outcome(status=200, headers=(("Content-Type", "application/json"),), body=answer))
    status, headers, body = await waiting
    assert (status, body) == (200, answer)
    assert json.loads(body)["choices"][0]["message"]["content"] == "hi"


async def test_langchain_reads_what_went_wrong(langchain: Client) -> None:
    status, _, answer = await langchain.call("POST", f"/pexec/functions/{UUID(int=1)}", {})
    unknown = Problem.model_validate_json(answer)
    assert (status, unknown.status, unknown.request_id) == (404, 404, None)
    status, headers, answer = await langchain.call("GET", "/functions", key="nvapi-nobodys")
    assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
    assert Problem.model_validate_json(answer).status == 401
    now = replace(langchain, says={**langchain.says, "Prefer": "respond-async"})
    _, headers, _ = await now.call("POST", f"/pexec/functions/{FUNCTION}", {})
    request_id = headers["NVCF-REQID"]
    assert (await langchain.call("DELETE", f"/requests/{request_id}"))[0] == 202
    status, _, answer = await langchain.call("GET", f"/pexec/status/{request_id}")
    failed = Problem.model_validate_json(answer)
    assert (status, failed.status, failed.request_id) == (410, 410, request_id)


async def test_langchain_lists_what_it_may_call(langchain: Client) -> None:
    """Older releases choose among the functions that are ACTIVE, by name."""
    functions = (await langchain.parse(Functions, "GET", "/functions")).functions
    assert [(function.id, function.name) for function in functions if function.status == "ACTIVE"] == [(FUNCTION, "f")]
