"""Functions and deployments through the front door (contract/management.md §1, §2, §5)."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from api.definitions import present
from broker.model import Gpu, HealthInfo, Instance, InstanceStatus, Place, Principal
from broker.revisions import edit
from tests.unit.test_server import NOBODYS, NVCF, House, caller, opened

ID = "65721e80-9b32-4396-9bec-8c08256297cf"
PLACE = Place(cluster="c", region="R", attributes=("a", "b"))
CPU = Gpu(
    name="CPU",
    instance_type="CPU",
    backend="local",
    capacity=4,
    cpu_arch="amd64",
    system_memory_bytes=2**33,
    place=PLACE,
)
PLAIN: dict[str, Any] = {"name": "f", "inferenceUrl": "/echo", "containerImage": "fnqueue/echo:latest"}
WHOLE: dict[str, Any] = {
    **PLAIN,
    "inferencePort": 9000,
    "health": {"protocol": "grpc", "uri": "/h", "port": 1, "timeout": "PT1M", "expectedStatusCode": 204},
    "containerArgs": "-v",
    "containerEnvironment": [{"key": "A", "value": "b"}],
    "models": [{"name": "m", "version": "1", "uri": "/v2/models/m/files"}],
    "resources": [{"name": "r", "version": "1", "uri": "/v2/resources/r/files"}],
    "apiBodyFormat": "predict_v2",
    "functionType": "streaming",
    "tags": ["a", "k=v"],
    "description": "d",
    "rateLimit": {"rateLimit": "1-S", "exemptedNcaIds": ["x"], "perNcaIdRate": {"y": "2-M"}, "syncCheck": True},
    "telemetries": {"logsTelemetryId": ID},
}
LLM: dict[str, Any] = {
    **PLAIN,
    "functionType": "LLM",
    "models": [
        {
            "name": "m",
            "llmConfig": {"uris": ["/v1"], "tokenizer": "t", "tokenRateLimit": "5-W", "routingMethod": "random"},
        }
    ],
    "llmInvocationConfig": {"priority": {"defaultPriority": 0, "perAccountPriority": {"x": 1}}},
}
HELM: dict[str, Any] = {
    "name": "f",
    "inferenceUrl": "/",
    "helmChart": "https://h.example/c.tgz",
    "helmChartServiceName": "s",
}
SPECIFICATION: dict[str, Any] = {
    "gpu": "cpu",
    "minInstances": 0,
    "maxInstances": 2,
    "maxRequestConcurrency": 3,
    "regions": ["r", ""],
    "attributes": ["a"],
    "availabilityZones": ["z"],
    "preferredOrder": 2,
    "cpuArch": "what the caller thinks",
    "autoscalingConfiguration": {
        "scaleUpDetails": {
            "factor": 1.5,
            "threshold": 80,
            "metric": "m",
            "stickiness": {"size": "PT5M", "threshold": "PT1M"},
        },
        "scaleDownDetails": {"factor": 0.5, "threshold": 20},
    },
}


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path, encryption_keys=SecretStr(f"k:{'1a' * 32}")) as found:
        await found.broker.catalog.offer([CPU], ttl_s=60)
        yield found


async def call(house: House, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
    """The JSON answered, None where there is none."""
    data = None if body is None else json.dumps(body)
    async with house.client.request(method, NVCF + path, data=data) as response:
        answer = await response.read()
        assert response.status == status, answer
        if status >= 400:
            assert response.content_type == "application/problem+json"
        return json.loads(answer) if answer else None


async def create(house: House, body: dict[str, Any] | None = None) -> dict[str, Any]:
    made: dict[str, Any] = (await call(house, "POST", "/functions", body or PLAIN))["function"]
    return made


def path(function: dict[str, Any]) -> str:
    return f"/functions/{function['id']}/versions/{function['versionId']}"


async def deploy(house: House, *specifications: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The path of the version, and its deployment."""
    function = await create(house)
    body = {"deploymentSpecifications": specifications or [SPECIFICATION]}
    return path(function), (await call(house, "POST", f"/deployments{path(function)}", body))["deployment"]


# -- functions ---------------------------------------------------------------------------------


async def test_a_plain_function_is_shown_with_its_defaults(house: House) -> None:
    function = await create(house)
    made = {name: function.pop(name) for name in ("id", "versionId", "createdAt")}
    assert made["createdAt"].endswith("Z")
    assert function == {
        **PLAIN,
        "ncaId": "default",
        "status": "INACTIVE",
        "ownedByDifferentAccount": False,
        "inferencePort": 8000,
        "apiBodyFormat": "CUSTOM",
        "functionType": "DEFAULT",
        "description": "f",
        "healthUri": "/v2/health/ready",
        "health": {
            "protocol": "HTTP", "uri": "/v2/health/ready", "port": 8000, "timeout": "PT10S", "expectedStatusCode": 200,
        },
    }  # fmt: skip


async def test_every_field_is_kept_and_shown(house: House) -> None:
    function = await create(house, WHOLE)
    expected = WHOLE | {
        "health": WHOLE["health"] | {"protocol": "gRPC"},
        "healthUri": "/h",
        "apiBodyFormat": "PREDICT_V2",
        "functionType": "STREAMING",
    }
    assert {name: function.get(name) for name in expected} == expected
    assert (await call(house, "GET", path(function)))["function"].items() >= function.items()


@pytest.mark.parametrize("body", [LLM, HELM, {**PLAIN, "containerImage": None, "models": WHOLE["models"]}])
async def test_what_cannot_run_here_is_kept_and_shown(house: House, body: dict[str, Any]) -> None:
    function = await create(house, body)
    assert {name: function.get(name) for name in body} == body
    version = await call(house, "POST", f"/functions/{function['id']}/versions", body)
    assert version["function"]["id"] == function["id"]


@pytest.mark.parametrize(
    ("body", "field"),
    [(HELM, "helmChart"), ({**PLAIN, "containerImage": None, "models": WHOLE["models"]}, "containerImage")],
)
async def test_what_cannot_run_here_is_refused_when_it_is_deployed(
    house: House, body: dict[str, Any], field: str
) -> None:
    function = await create(house, body)
    wanted = {"deploymentSpecifications": [SPECIFICATION]}
    refused = await call(house, "POST", f"/deployments{path(function)}", wanted, status=400)
    assert refused["detail"].startswith(f"{field}: ")
    await call(house, "GET", f"/deployments{path(function)}", status=404)


async def test_a_body_that_does_not_fit_is_named_in_a_problem(house: House) -> None:
    refused = await call(house, "POST", "/functions", {**PLAIN, "name": "x" * 1000, "inferencePort": "no"}, status=400)
    detail = refused.pop("detail")
    assert refused == {
        "type": "about:blank", "title": "Bad Request", "status": 400, "instance": f"{NVCF}/functions",
    }  # fmt: skip
    assert 'object createFunction, field inferencePort, rejected value "no": ' in detail
    assert detail.count("x") < 300


@pytest.mark.parametrize("body", ["", "{", "[]", '"x"', "null", '{"name": "\ud800"}'])
async def test_a_body_that_is_no_object_is_400(house: House, body: str) -> None:
    for method, where in (("POST", "/functions"), ("PUT", f"/functions/{ID}/versions/{ID}")):
        async with house.client.request(method, NVCF + where, data=body.encode(errors="surrogatepass")) as response:
            assert response.status == 400


async def test_secrets_are_named_to_who_may_see_details_and_never_told(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secrets = [{"name": "token", "value": "hunter2"}, {"name": "cert", "value": {"pem": "hunter2"}}]
    function = await create(house, {**PLAIN, "secrets": secrets})
    assert "secrets" not in function
    for query, names in (
        ("", ["token", "cert"]),
        ("?includeSecrets=TRUE", ["token", "cert"]),
        ("?includeSecrets=false", None),
        ("?includeSecrets=0", None),
    ):
        shown = (await call(house, "GET", path(function) + query))["function"]
        assert shown.get("secrets") == names
        assert "hunter2" not in str(shown)
    await call(house, "GET", f"{path(function)}?includeSecrets=maybe", status=400)
    async with (
        caller(house, "default", "list_functions") as client,
        client.get(NVCF + path(function)) as response,
    ):
        assert "secrets" not in (await response.json())["function"]
    assert not any("secrets" in each for each in (await call(house, "GET", "/functions"))["functions"])
    stored = await house.broker.catalog.versions.get(function["versionId"])
    assert "hunter2" not in f"{stored}"
    assert "hunter2" not in " ".join(str(vars(record)) for record in caplog.records)


async def test_instances_carry_the_request_that_asked_for_them_under_both_names(house: House) -> None:
    function = await create(house)
    for number, status in enumerate(InstanceStatus):
        instance = Instance(
            id=f"i{number}",
            function_id=function["id"],
            version_id=function["versionId"],
            account="default",
            gpu="CPU",
            instance_type="CPU_1x",
            backend="local",
            status=status,
            created_at=1.0,
            updated_at=2.0,
            specification_id=ID if number == 0 else "",
            location="here",
            error="GET /health answered 503, not 200" if status is InstanceStatus.STARTING else "",
        )
        await house.broker.catalog.beat(instance, ttl_s=60)
    first, second = (await call(house, "GET", path(function)))["function"]["activeInstances"]
    assert first == {
        "instanceId": "i0",
        "functionId": function["id"],
        "functionVersionId": function["versionId"],
        "instanceType": "CPU_1x",
        "instanceStatus": "STARTING",
        "sisRequestId": ID,
        "icmsRequestId": ID,
        "ncaId": "default",
        "gpu": "CPU",
        "backend": "local",
        "location": "here",
        "error": "GET /health answered 503, not 200",
        "instanceCreatedAt": "1970-01-01T00:00:01Z",
        "instanceUpdatedAt": "1970-01-01T00:00:02Z",
    }
    assert (second["instanceStatus"], second["sisRequestId"]) == ("RUNNING", "i1")
    assert not any("activeInstances" in each for each in (await call(house, "GET", "/functions"))["functions"])


async def test_a_foreign_account_sees_less(house: House) -> None:
    function = await create(house, WHOLE | {"secrets": [{"name": "s", "value": "v"}]})
    row = await house.broker.catalog.versions.get(function["versionId"])
    assert row is not None
    stranger = Principal(account="other", subject="s", scopes=frozenset())
    seen = json.loads(present(row.item, stranger, instances=[], secrets=["s"]).to_json())
    assert seen["ownedByDifferentAccount"] is True
    assert function.keys() - seen.keys() == {
        "inferenceUrl",
        "inferencePort",
        "containerArgs",
        "containerEnvironment",
        "containerImage",
        "models",
        "resources",
        "rateLimit",
    }
    assert not {"activeInstances", "secrets", "helmChart", "helmChartServiceName"} & seen.keys()


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", True),
        ("?visibility=", True),
        ("?visibility=private", True),
        ("?visibility=PRIVATE,public", True),
        ("?visibility=public&visibility=Private", True),
        ("?visibility=public,authorized", False),
        ("?visibility=authorized&visibility=public", False),
    ],
)
async def test_lists_are_filtered_in_both_spellings(house: House, query: str, found: bool) -> None:
    function = await create(house)
    await call(house, "POST", f"/functions/{function['id']}/versions", PLAIN)
    ids = [each["id"] for each in (await call(house, "GET", "/functions" + query))["functions"]]
    assert ids.count(function["id"]) == (2 if found else 0)
    distinct = (await call(house, "GET", "/functions/ids" + query))["functionIds"]
    assert distinct.count(function["id"]) == (1 if found else 0)
    assert len(distinct) == len(set(ids))


async def test_an_unknown_visibility_is_400(house: House) -> None:
    for where in ("/functions", "/functions/ids"):
        await call(house, "GET", f"{where}?visibility=private,secret", status=400)


async def test_the_quota_is_400(tmp_path: Path) -> None:
    async with opened(tmp_path, max_functions=2) as house:
        function = await create(house)
        refused = await call(house, "POST", "/functions", PLAIN, status=400)
        assert refused["type"].endswith(":bad-request")
        await call(house, "POST", f"/functions/{function['id']}/versions", PLAIN)


@pytest.mark.parametrize(
    ("where", "body", "expected"),
    [
        ("", {"tags": ["new", "new"]}, {"tags": ["new"]}),
        ("", {"tags": []}, {"tags": None, "rateLimit": WHOLE["rateLimit"]}),
        ("", {"rateLimit": {"perUserRate": "9-D"}}, {"rateLimit": {"perUserRate": "9-D"}}),
        ("", {"tags": ["x"], "name": "other", "containerImage": "other"}, {"tags": ["x"], "name": "f"}),
        ("/metadata", {"tags": ["meta"]}, {"tags": ["meta"]}),
    ],
)
async def test_an_update_replaces_what_it_gives(
    house: House, where: str, body: dict[str, Any], expected: dict[str, Any]
) -> None:
    function = await create(house, WHOLE)
    answered = (await call(house, "PUT", where + path(function), body))["function"]
    assert {name: answered.get(name) for name in expected} == expected
    kept = function.keys() - expected.keys()
    assert {name: answered.get(name) for name in kept} == {name: function[name] for name in kept}


@pytest.mark.parametrize(
    ("where", "body"),
    [
        ("", {}),
        ("", {"name": "other"}),
        ("", {"tags": ["not a tag"]}),
        ("", {"llmInvocationConfig": {}}),
        ("", {"modelUpdates": [{"modelName": "m", "llmConfig": {"routingMethod": "random"}}]}),
        ("/metadata", {}),
        ("/ratelimit", {}),
    ],
)
async def test_an_update_that_says_nothing_good_is_400(house: House, where: str, body: dict[str, Any]) -> None:
    await call(house, "PUT", where + path(await create(house)), body, status=400)


async def test_limits_of_an_llm_function_are_updated(house: House) -> None:
    function = await create(house, LLM)
    body = {
        "modelUpdates": [{"modelName": "m", "llmConfig": {"tokenRateLimit": "7-M", "routingMethod": "ROUND_ROBIN"}}],
        "llmInvocationConfig": {"priority": {"defaultPriority": 5}},
    }
    answered = (await call(house, "PUT", path(function), body))["function"]
    config = LLM["models"][0]["llmConfig"] | {"tokenRateLimit": "7-M", "routingMethod": "round-robin"}
    assert answered["models"] == [{"name": "m", "llmConfig": config}]
    assert answered["llmInvocationConfig"] == body["llmInvocationConfig"]


async def test_a_rate_limit_is_set_and_lifted(house: House) -> None:
    function = await create(house)
    await call(house, "PUT", f"/ratelimit{path(function)}", {"rateLimit": "5-S"}, status=204)
    shown = (await call(house, "GET", path(function)))["function"]
    assert shown["rateLimit"] == {"rateLimit": "5-S"}
    for _ in range(2):
        await call(house, "DELETE", f"/ratelimit{path(function)}", status=204)
    assert "rateLimit" not in (await call(house, "GET", path(function)))["function"]


# -- deployments -------------------------------------------------------------------------------


async def test_a_deployment_is_shown_whole_and_found_in_both_ways(house: House) -> None:
    where, deployment = await deploy(house)
    assert await call(house, "GET", f"/deployments{where}") == {"deployment": deployment}
    assert await call(house, "GET", f"/deployments/{deployment['deploymentId']}") == {"deployment": deployment}
    (specification,) = deployment.pop("deploymentSpecifications")
    assert specification.pop("gpuSpecificationId")
    assert specification == SPECIFICATION | {
        "gpu": "CPU",
        "instanceType": "CPU",
        "backend": "local",
        "regions": ["r"],
        "cpuArch": "amd64",
        "systemMemory": "8G",
    }
    assert deployment.keys() == {
        "functionId",
        "functionVersionId",
        "deploymentId",
        "functionName",
        "ncaId",
        "functionStatus",
        "createdAt",
        "lastUpdatedAt",
    }
    assert (deployment["functionStatus"], deployment["functionName"], deployment["ncaId"]) == ("ACTIVE", "f", "default")


async def test_what_is_on_offer_says_where_it_is(house: House) -> None:
    (group,) = (await call(house, "GET", "/clusterGroups"))["clusterGroups"]
    assert [cluster["name"] for cluster in group["clusters"]] == ["c"]
    (shown,) = group["gpus"][0]["instanceTypes"]
    assert (shown["clusters"], shown["regions"], shown["attributes"]) == (["c"], ["R"], ["a", "b"])
    await deploy(house)
    (used,) = (await call(house, "GET", "/accounts/default/usage/gpus"))["gpus"]
    assert (used["placements"][0]["cluster"], used["placements"][0]["region"]) == ("c", "R")


async def test_health_carries_the_request_under_both_names(house: House) -> None:
    where, deployment = await deploy(house)
    told = [
        HealthInfo(gpu="CPU", instance_type="CPU", backend="", error="boom", specification_id=specification_id)
        for specification_id in (ID, "")
    ]
    version_id = deployment["functionVersionId"]
    await edit(house.broker.catalog.deployments, version_id, lambda stored: replace(stored, health=tuple(told)))
    first, second = (await call(house, "GET", f"/deployments{where}"))["deployment"]["healthInfo"]
    assert first == {
        "sisRequestId": ID, "icmsRequestId": ID, "gpu": "CPU", "instanceType": "CPU", "error": "boom",
    }  # fmt: skip
    assert second["sisRequestId"] == second["icmsRequestId"] == "00000000-0000-0000-0000-000000000000"


async def test_what_was_got_can_be_put_back_with_other_bounds(house: House) -> None:
    where, deployment = await deploy(house, SPECIFICATION, SPECIFICATION | {"clusters": ["c"]})
    unchanged = await call(house, "PUT", f"/deployments{where}", deployment)
    assert unchanged == {"deployment": deployment}
    deployment["deploymentSpecifications"][1] |= {"minInstances": 1, "maxInstances": 9, "maxRequestConcurrency": 4}
    changed = (await call(house, "PUT", f"/deployments{where}", deployment))["deployment"]
    assert changed["deploymentSpecifications"] == deployment["deploymentSpecifications"]
    assert changed["lastUpdatedAt"] > deployment["lastUpdatedAt"]


async def test_a_patch_answers_with_the_specification(house: House) -> None:
    where, deployment = await deploy(house)
    (specification,) = deployment["deploymentSpecifications"]
    patch = f"/deployments/{deployment['deploymentId']}/gpu-specifications/{specification['gpuSpecificationId']}"
    body = {"maxInstances": 7, "autoscalingConfigurationPolicy": "PLATFORM_CONFIGURATION"}
    patched = await call(house, "PATCH", patch, body)
    specification |= {"maxInstances": 7}
    del specification["autoscalingConfiguration"]
    assert patched == {"gpuSpecification": specification}
    for refused in ({}, {"minInstances": 8}, {"maxInstances": 0}, {"gpu": "CPU"}):
        await call(house, "PATCH", patch, refused, status=400)
    await call(house, "DELETE", f"/deployments{where}?graceful=yes")
    await call(house, "PATCH", patch, {"maxInstances": 8}, status=400)
    await call(house, "DELETE", f"/deployments{where}")
    await call(house, "PATCH", patch, {"maxInstances": 8}, status=404)


@pytest.mark.parametrize(
    ("method", "where", "status"),
    [
        ("GET", f"/deployments/{NOBODYS}", 404),
        ("GET", "/deployments/x", 400),
        ("PATCH", f"/deployments/{NOBODYS}/gpu-specifications/{NOBODYS}", 404),
        ("PATCH", f"/deployments/{NOBODYS}/gpu-specifications/x", 400),
        ("PATCH", f"/deployments/x/gpu-specifications/{NOBODYS}", 400),
    ],
)
async def test_an_unknown_deployment_is_404_and_no_uuid_400(house: House, method: str, where: str, status: int) -> None:
    await call(house, method, where, {"minInstances": 1} if method == "PATCH" else None, status=status)


async def test_a_super_admin_sees_what_an_account_has_deployed(house: House) -> None:
    where, deployment = await deploy(house)
    await create(house)
    assert await call(house, "GET", "/accounts/default/deployments") == {"deployments": [deployment]}
    assert await call(house, "GET", "/accounts/other/deployments") == {"deployments": []}
    await call(house, "DELETE", f"/deployments{where}?graceful=true")
    assert await call(house, "GET", "/accounts/default/deployments") == {"deployments": []}
    async with (
        caller(house, "default", "deploy_function") as admin_of_one,
        admin_of_one.get(f"{NVCF}/accounts/default/deployments") as response,
    ):
        assert response.status == 403


async def test_a_super_admin_stops_an_instance(house: House) -> None:
    _, deployment = await deploy(house)
    (specification,) = deployment["deploymentSpecifications"]
    instance = Instance(
        id=ID,
        function_id=deployment["functionId"],
        version_id=deployment["functionVersionId"],
        account="default",
        gpu="CPU",
        instance_type="CPU",
        backend="local",
        status=InstanceStatus.RUNNING,
        created_at=1.0,
        updated_at=2.0,
        specification_id=specification["gpuSpecificationId"],
    )
    await house.broker.catalog.beat(instance, ttl_s=60)
    await call(house, "DELETE", f"/instances/{NOBODYS}", status=404)
    await call(house, "DELETE", "/instances/x", status=400)
    for _ in range(2):
        await call(house, "DELETE", f"/instances/{ID}", status=204)
    row = await house.broker.catalog.deployments.get(deployment["functionVersionId"])
    assert row is not None
    assert row.item.evicted == (ID,)


@pytest.mark.parametrize("graceful", ["", "false", "0", "NO", "off", "true", "1", "Yes", "on"])
async def test_an_undeploy_answers_with_the_function(house: House, graceful: str) -> None:
    where, _ = await deploy(house)
    answered = await call(house, "DELETE", f"/deployments{where}?graceful={graceful}")
    assert answered["function"]["status"] == "INACTIVE"
    drains = graceful.lower() in ("true", "1", "yes", "on")
    await call(house, "GET", f"/deployments{where}", status=200 if drains else 404)


async def test_an_undeploy_that_is_gracefully_unclear_is_400(house: House) -> None:
    where, _ = await deploy(house)
    await call(house, "DELETE", f"/deployments{where}?graceful=perhaps", status=400)
    await call(house, "DELETE", f"/deployments{where}")
    await call(house, "DELETE", f"/deployments{where}", status=404)


@pytest.mark.parametrize(
    ("method", "where", "scope"),
    [
        ("PUT", f"/functions/{ID}/versions/{ID}", "update_function"),
        ("PUT", f"/metadata/functions/{ID}/versions/{ID}", "update_function"),
        ("PUT", f"/ratelimit/functions/{ID}/versions/{ID}", "update_function"),
        ("DELETE", f"/ratelimit/functions/{ID}/versions/{ID}", "update_function"),
        ("PUT", f"/deployments/functions/{ID}/versions/{ID}", "deploy_function"),
        ("GET", f"/deployments/{ID}", "deploy_function"),
        ("PATCH", f"/deployments/{ID}/gpu-specifications/{ID}", "deploy_function"),
    ],
)
async def test_each_route_asks_for_its_scope(house: House, method: str, where: str, scope: str) -> None:
    async with caller(house, "default", "list_functions") as without, without.request(method, NVCF + where) as refused:
        assert refused.status == 403
    async with caller(house, "default", scope) as holder, holder.request(method, NVCF + where) as passed:
        assert passed.status in (204, 400, 404)


# -- weights -------------------------------------------------------------------------------------


async def test_a_canary_is_one_call(house: House) -> None:
    stable = await create(house)
    canary = (await call(house, "POST", f"/functions/{stable['id']}/versions", PLAIN))["function"]
    for version in (stable, canary):
        await call(house, "POST", f"/deployments{path(version)}", {"deploymentSpecifications": [SPECIFICATION]})
    weights = f"/functions/{stable['id']}/weights"
    body = {"weights": [{"functionVersionId": canary["versionId"].upper(), "weight": 5}]}
    told = await call(house, "PUT", weights, body)
    assert told == {
        "functionId": stable["id"],
        "weights": [
            {"functionVersionId": stable["versionId"], "functionStatus": "ACTIVE", "share": 95.0},
            {"functionVersionId": canary["versionId"], "functionStatus": "ACTIVE", "weight": 5.0, "share": 5.0},
        ],
    }
    assert await call(house, "GET", weights) == told


@pytest.mark.parametrize(
    "weights",
    [
        None,
        [{"functionVersionId": ID, "weight": 1}],
        [{"functionVersionId": "none", "weight": 1}],
        [{"weight": 1}],
        [{"functionVersionId": "own"}],
        [{"functionVersionId": "own", "weight": -1}],
        [{"functionVersionId": "own", "weight": 101}],
        [{"functionVersionId": "own", "weight": "NaN"}],
        [{"functionVersionId": "own", "weight": 1}, {"functionVersionId": "own", "weight": 2}],
    ],
)
async def test_weights_that_say_nothing_good_are_400(house: House, weights: list[dict[str, Any]] | None) -> None:
    function = await create(house)
    own = [
        {**each, "functionVersionId": function["versionId"]} if "own" in each.values() else each
        for each in weights or []
    ]
    sent = {} if weights is None else {"weights": own}
    await call(house, "PUT", f"/functions/{function['id']}/weights", sent, status=400)


async def test_weights_of_an_unknown_function_are_404(house: House) -> None:
    await call(house, "GET", f"/functions/{ID}/weights", status=404)
    await call(house, "PUT", f"/functions/{ID}/weights", {"weights": []}, status=404)
