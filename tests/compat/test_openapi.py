"""The server is what its OpenAPI document says, as schemathesis finds by trying: with a key and without, on every
operation, with bodies and parameters that are good, odd and wrong."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import pytest
import requests
import schemathesis
from aiohttp import web
from hypothesis import HealthCheck, settings
from pydantic import SecretStr
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.core.transport import Response
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from api import payloads
from api.app import make_app, operations
from api.front import Front
from api.openapi import document
from api.operations import FORM, JSON, Operation
from broker.backends.files import FileBlobs
from broker.connect import open_broker
from broker.model import FunctionStatus, Gpu, Version
from broker.ports import Broker
from broker.settings import ApiSettings

T = TypeVar("T")

KEY = "admin-key"
FUNCTION = "5636b912-ecc0-493d-ab0c-1f702b96d75c"
VERSION = "65721e80-9b32-4396-9bec-8c08256297cf"
KNOWN = {"functionId": FUNCTION, "versionId": VERSION, "ncaId": "default"}
RIGHTS = {"policies": [{"scopes": ["invoke_function"]}]}
GPU = Gpu(name="H100", instance_type="NCP.GPU.H100_1x", backend="local", capacity=8, gpu_count=1)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]

# Headers that no operation has a say in: HTTP itself refuses bad ones, before there is an operation.
OF_THE_CONNECTION = ("Connection", "Content-Length", "Expect", "Host", "TE", "Trailer", "Transfer-Encoding", "Upgrade")
MADE_UP = ("NVCF-INPUT-ASSET-REFERENCES", "NVCF-CALLBACK-URL", "NVCF-CALLBACK-EVENTS")

# No operation asks anything of its front end before it serves.
DESCRIBED = operations(cast("Front", None))
API = schemathesis.openapi.from_dict(
    document(DESCRIBED),
    config=SchemathesisConfig.from_dict({"phases": {"coverage": {"enabled": False}}, "generation": {"mode": "all"}}),
)
bounded = settings(
    max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def key_of(operation: Operation) -> tuple[str, str]:
    return operation.method, re.sub(r":[^{}]*", "", operation.path)


@dataclass(kw_only=True)
class Server:
    """Runs on a loop of its own: schemathesis is not asynchronous."""

    url: str
    broker: Broker
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    read: set[tuple[str, str]] = field(default_factory=set)
    lies: set[str] = field(default_factory=set)

    def watch(self, request: web.Request, response: web.StreamResponse) -> None:
        """Hold the models that a handler used against what its operation says."""
        resource = request.match_info.route.resource
        key = (request.method, resource.canonical if resource else "")
        operation = next((each for each in DESCRIBED if key_of(each) == key), None)
        if operation is None:
            return
        read, answered = request.get(payloads.READ), response.get(payloads.ANSWERED)
        if read is not None:
            self.read.add(key)
            if read is not operation.takes:
                self.lies.add(f"{operation.name} reads {read.__name__}")
        if answered is not None and answered not in [reply.model for reply in operation.replies]:
            self.lies.add(f"{operation.name} answers {answered.__name__}")

    async def seed(self) -> None:
        """What a case may name; earlier ones may have deleted it."""
        await self.broker.catalog.offer([GPU], ttl_s=600)
        await self.broker.queue.declare(VERSION)
        version = Version(
            id=VERSION,
            function_id=FUNCTION,
            account="default",
            name="f",
            inference_url="/",
            container_image="i",
            created_at=1.0,
            status=FunctionStatus.ACTIVE,
        )
        await self.broker.catalog.accounts.delete("default")  # or the limits that a case set for it would hold
        row = await self.broker.catalog.versions.get(VERSION)
        await self.broker.catalog.versions.put(version, revision=row.revision if row else 0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    ready: list[Server] = []
    started, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    def run(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, loop).result(10)

    async def serve() -> None:
        chosen = ApiSettings(
            port=0,
            data_dir=tmp_path_factory.mktemp("blobs"),
            admin_key=SecretStr(KEY),
            encryption_keys=SecretStr(f"test:{'5e' * 32}"),
        )
        async with open_broker(chosen) as broker:
            app = make_app(Front.over(broker, chosen))
            serving = Server(url="", broker=broker, run=run)

            async def watch(request: web.Request, response: web.StreamResponse) -> None:
                serving.watch(request, response)

            app.on_response_prepare.append(watch)
            runner = web.AppRunner(app, access_log=None, auto_decompress=False)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            if isinstance(broker.blobs, FileBlobs):
                broker.blobs.set_base_url(f"http://127.0.0.1:{site.port}")
            ready.append(replace(serving, url=f"http://127.0.0.1:{site.port}"))
            serving.read, serving.lies = ready[0].read, ready[0].lies
            started.set()
            await stop.wait()
            await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert started.wait(10)
    yield ready[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


@pytest.fixture(scope="module")
def client() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


@API.parametrize()
@bounded
def test_with_a_key_nothing_fails_and_nothing_is_undocumented(
    case: Case[Any], server: Server, client: requests.Session
) -> None:
    server.run(server.seed())
    name_what_exists(case)
    answer(case, server, client, headers={"Authorization": f"Bearer {KEY}"})
    assert not server.lies


@API.parametrize()
@settings(bounded, max_examples=5)
def test_without_a_key_what_is_not_open_is_401(case: Case[Any], server: Server, client: requests.Session) -> None:
    case.headers.pop("Authorization", None)
    response = answer(case, server, client, headers={})
    if case.operation.definition.raw.get("security"):
        assert response.status_code == 401


def test_every_body_was_read_as_documented(server: Server) -> None:
    """After the others: each operation that takes a model got as far as reading one."""
    takers = {key_of(operation) for operation in DESCRIBED if operation.takes not in (None, object)}
    assert takers <= server.read


def name_what_exists(case: Case[Any]) -> None:
    """Every other case is about the function that there is. Of an invocation, none waits, and every other one names no
    assets and no callback: what is made up is hardly ever one, and nothing would ever be run."""
    parts = case.path_parameters or {}
    known = sum(map(ord, "".join(map(str, parts.values())))) % 2
    if case.path.startswith(("/v2/nvcf/pexec", "/v2/nvcf/exec")):
        known = sum(map(ord, "".join(map(str, (*parts.values(), *case.headers.values()))))) % 2
        case.headers["Prefer"] = "respond-async"
        for name in MADE_UP if known else ():
            case.headers.pop(name, None)
    if parts and known:
        case.path_parameters = {**parts, **{name: KNOWN[name] for name in parts if name in KNOWN}}


def answer(case: Case[Any], server: Server, client: requests.Session, *, headers: dict[str, str]) -> Response:
    for name in OF_THE_CONNECTION:
        case.headers.pop(name, None)
    response = case.call(base_url=server.url, session=client, headers=headers, allow_redirects=False, timeout=10)
    case.validate_response(response, checks=CHECKS, additional_checks=[])
    return response


# -- by its operation IDs alone, as a generated client would -----------------------------------------


def test_a_script_by_operation_ids_gets_what_the_document_says(server: Server, client: requests.Session) -> None:
    server.run(server.seed())

    def call(
        operation: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        query: dict[str, str] | None = None,
        media: str = JSON,
        **named: str,
    ) -> Any:
        found = API.find_operation_by_id(operation)
        facts: dict[str, Any] = {"query": query or {}} | ({} if body is None else {"body": body, "media_type": media})
        case = found.Case(path_parameters=named, headers=headers or {}, **facts)
        response = answer(case, server, client, headers={"Authorization": f"Bearer {KEY}"})
        assert response.status_code < 300, (operation, response.content)
        return response.json() if response.content else dict(response.headers)

    # A function
    definition = {"name": "f", "inferenceUrl": "/", "containerImage": "i"}
    function = call("functions_create", definition)["function"]["id"]
    version = call("functions_add_version", definition, functionId=function)["function"]["versionId"]
    of = {"functionId": function, "versionId": version}
    assert len(call("functions_list_versions", functionId=function)["functions"]) == 2
    assert function in call("functions_list_ids")["functionIds"]
    assert call("functions_list_functions")["functions"]
    # With a secret, and a credential for its image's registry
    call("secrets_put", {"secrets": [{"name": "TOKEN", "value": {"any": "thing"}}]}, **of)
    assert call("functions_get", **of)["function"]["secrets"] == ["TOKEN"]
    assert "secrets" not in call("functions_get", query={"includeSecrets": "false"}, **of)["function"]
    hidden = {"name": "pull", "value": "dXNlcjpwYXNz"}
    login = {"registryHostname": "ghcr.io", "secret": hidden, "artifactTypes": ["CONTAINER"]}
    credential = call("registries_create", login)["registryCredential"]["registryCredentialId"]
    changed = call("registries_update", {"description": "d"}, credentialId=credential)["registryCredential"]
    assert call("registries_get", credentialId=credential)["registryCredential"] == changed
    listed = call("registries_list_credentials", query={"artifactType": "CONTAINER"})["registryCredentials"]
    assert changed in listed
    assert call("registries_list_recognized")["recognizedRegistries"]["CONTAINER"]
    call("registries_delete", credentialId=credential)
    # Deployed from zero, so that it is ACTIVE at once
    (group,) = call("clusters_list_groups")["clusterGroups"]
    (gpu,) = group["gpus"]
    wanted = {"gpu": gpu["name"], "instanceType": gpu["instanceTypes"][0]["name"], "backend": group["name"]}
    wanted |= {"minInstances": 0, "maxInstances": 2}
    assert call("clusters_supported_gpus") == [{"gpu": "H100", "backend": "local"}]
    assert call("deployments_create", {"deploymentSpecifications": [wanted]}, **of)["deployment"]["deploymentId"]
    assert call("deployments_get", **of)["deployment"]["functionStatus"] == "ACTIVE"
    assert call("functions_get", **of)["function"]["status"] == "ACTIVE"
    assert call("deployments_of_account", ncaId="default")["deployments"]
    # Changed while it is deployed
    changed = call("functions_update", {"tags": ["a"], "rateLimit": {"rateLimit": "100-S"}}, **of)["function"]
    assert (changed["tags"], changed["rateLimit"]) == (["a"], {"rateLimit": "100-S"})
    assert call("functions_update_metadata", {"tags": ["b"]}, **of)["function"]["tags"] == ["b"]
    call("limits_replace", {"rateLimit": "50-S, 500-M"}, **of)
    assert call("functions_get", **of)["function"]["rateLimit"] == {"rateLimit": "50-S, 500-M"}
    call("limits_clear", **of)
    deployment = call("deployments_get", **of)["deployment"]
    (specification,) = deployment["deploymentSpecifications"]
    assert call("deployments_find", deploymentId=deployment["deploymentId"])["deployment"] == deployment
    named = {
        "deploymentId": deployment["deploymentId"],
        "gpuSpecificationId": specification["gpuSpecificationId"],
    }
    patched = call("deployments_patch", {"maxInstances": 3}, **named)["gpuSpecification"]
    assert patched == specification | {"maxInstances": 3}
    wanted |= {"maxInstances": 2, "maxRequestConcurrency": 4}
    put = call("deployments_update", {"deploymentSpecifications": [wanted]}, **of)["deployment"]
    assert put["deploymentSpecifications"] == [specification | {"maxInstances": 2, "maxRequestConcurrency": 4}]
    (used,) = call("clusters_usage", ncaId="default")["gpus"]
    assert (used["currentMinUsage"], used["currentMaxUsage"], used["placements"][0]["cluster"]) == (0, 2, "local")
    # All calls of the function for it
    weight = {"functionVersionId": version, "weight": 100}
    shared = call("rollouts_put", {"weights": [weight]}, functionId=function)["weights"]
    assert [each["share"] for each in shared if each["functionVersionId"] == version] == [100]
    assert call("rollouts_get", functionId=function)["weights"] == shared
    # Invoked
    now = {"Prefer": "respond-async"}
    (request,) = call("invocations_invoke_version", {"any": "thing"}, headers=now, **of)["nvcf-reqid"]
    call("invocations_invoke", {}, headers=now, functionId=function)
    call("invocations_poll", headers=now, requestId=request)
    assert call("queues_position", requestId=request)["positionInQueue"] == 1
    assert call("queues_of_version", **of)["queues"][0]["queueDepth"] == 2
    assert call("queues_of_function", functionId=function)["queues"]
    assert call("requests_cancel", requestId=request)["status"] == "cancelled"
    # With an envelope
    envelope = {"requestBody": {"any": "thing"}, "requestHeader": {"pollDurationSeconds": 1}}
    waits = call("envelopes_invoke_version", envelope, headers=now, **of)
    assert call("envelopes_poll", headers=now, requestId=waits["reqId"]) == waits
    call("envelopes_invoke", envelope, headers=now, functionId=function)
    # By somebody else, for a while
    token = call("tokens_create_for_functions", {"clientId": "c", "functions": [{"functionId": function}]})
    for operation, named in (("tokens_create", {"functionId": function}), ("tokens_create_for_version", of)):
        delegated = call(operation, {"clientId": "c"}, **named)
        assert (delegated.keys(), delegated["expires_in"]) == (token.keys(), 3600)
    # With an asset
    asset = call("assets_create", {"contentType": "text/plain", "description": "d"})
    signed = {"Content-Type": "text/plain", "x-amz-meta-nvcf-asset-description": "d"}
    assert client.put(asset["uploadUrl"], data=b"x", headers=signed, timeout=10).status_code == 200
    assert call("assets_list_assets")["assets"]
    assert call("assets_get", assetId=asset["assetId"])["asset"]["contentType"] == "text/plain"
    call("assets_delete", assetId=asset["assetId"])
    # Shared, with an account that has a record
    account = call("accounts_create", {"name": "partner"}, ncaId="partner")["account"]
    assert account in call("accounts_list_accounts")["cloudAccounts"]
    assert call("accounts_update", {"maxFunctionsAllowed": 1}, ncaId="partner")["account"]["maxFunctionsAllowed"] == 1
    assert call("accounts_get", ncaId="partner")["account"]["currentNumberFunctions"] == 0
    partner, other = {"ncaId": "partner"}, {"ncaId": "other"}
    key = call("keys_create", {"authorizations": RIGHTS, "nca_id": "other"})
    for level, named in (("", {"functionId": function}), ("_of_version", of)):
        shared = call(f"authorizations_replace_all{level}", {"authorizedParties": [partner]}, **named)["function"]
        assert shared["authorizedParties"] == [partner]
        added = call(f"authorizations_add{level}", {"authorizedParty": other}, **named)["function"]
        assert added["authorizedParties"] == [partner, other]
        call(f"authorizations_remove{level}", {"authorizedParty": other}, **named)
    assert call("authorizations_of_version", **of)["function"]["authorizedParties"] == [partner]
    assert len(call("authorizations_of_function", functionId=function)["functions"]) == 2
    call("authorizations_clear", functionId=function)
    call("authorizations_clear_of_version", **of)
    call("accounts_delete", ncaId="partner")
    # Webhooks, of an account that other tests may have given all the secrets that it may have
    for old in call("webhooks_list_secrets")["secrets"]:
        call("webhooks_delete_secret", secretId=old["secretId"])
    secret = call("webhooks_create_secret", {})
    assert secret["secretId"] in [each["secretId"] for each in call("webhooks_list_secrets")["secrets"]]
    hook = {"url": "https://hooks.example/", "events": ["dead"]}
    assert call("webhooks_set_default", hook, functionId=function) == {"functionId": function, **hook}
    assert call("webhooks_get_default", functionId=function) == {"functionId": function, **hook}
    call("webhooks_clear_default", functionId=function)
    assert call("webhooks_list_deliveries")["deliveries"] == []
    call("webhooks_delete_secret", secretId=secret["secretId"])
    # Keys
    assert call("keys_introspect", {"key": key["value"]})["key_id"] == key["id"]
    assert key["id"] in [each["id"] for each in call("keys_list_keys", query={"nca_id": "other"})["keys"]]
    assert call("keys_authorize", {"authorizations": RIGHTS}, keyId=key["id"])["status"] == "ACTIVE"
    assert call("keys_caller_info", {"credentials": key["value"]}, media=FORM)["orgName"] == "other"
    assert call("keys_set_status", {"status": "SUSPENDED"}, keyId=key["id"])["status"] == "SUSPENDED"
    assert call("keys_get", keyId=key["id"])["hint"] == key["hint"]
    call("keys_delete", keyId=key["id"])
    # And removed
    assert call("deployments_delete", **of)["function"]["status"] == "INACTIVE"
    call("functions_delete_version", **of)
    # A cluster
    types = [{"name": "NCP.GPU.H100_1x", "value": "node", "default": True}]
    registration = {
        "clusterName": "east-1",
        "clusterGroupName": "local",
        "ncaId": "default",
        "cloudProvider": "ON-PREM",
        "nvcaVersion": "1",
        "region": "east",
        "gpus": [{"name": "H100", "capacity": 8, "instanceTypes": types}],
    }
    cluster = call("clusters_register", registration, ncaId="default")["clusterId"]
    in_account = {"ncaId": "default", "clusterId": cluster}
    call("clusters_connect", {"status": "READY", "k8sVersion": "1.33"}, clusterId=cluster)
    beat = {"status": "READY", "gpuUsage": [{"name": "H100", "capacity": 8, "allocated": 3}]}
    assert call("clusters_heartbeat", beat, clusterId=cluster) == {"action": "ACCEPTED"}
    seen = call("clusters_get", **in_account)["cluster"]
    assert (seen["status"], seen["gpus"][0]["available"]) == ("READY", 5)
    assert call("clusters_update", registration | {"region": "west"}, **in_account)["cluster"]["region"] == "west"
    assert len(call("clusters_list_clusters", ncaId="default")["clusters"]) == 1
    assert call("clusters_list_groups")["clusterGroups"][0]["clusters"][0]["name"] == "east-1"
    call("clusters_delete", **in_account)
    assert not server.lies
