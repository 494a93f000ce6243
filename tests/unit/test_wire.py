from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from fnqueue import wire

FUNCTION: dict[str, Any] = {"name": "echo", "inferenceUrl": "/echo", "containerImage": "fnqueue/echo:latest"}
HEALTH: dict[str, Any] = {
    "protocol": "HTTP",
    "uri": "/health",
    "port": 8000,
    "timeout": "PT10S",
    "expectedStatusCode": 200,
}
SPECIFICATION: dict[str, Any] = {"gpu": "CPU", "minInstances": 1, "maxInstances": 1}


def function(**fields: Any) -> wire.CreateFunction:
    return wire.CreateFunction.model_validate_json(json.dumps(FUNCTION | fields))


def deployment(**fields: Any) -> wire.CreateDeployment:
    return wire.CreateDeployment.model_validate_json(json.dumps({"deploymentSpecifications": [SPECIFICATION | fields]}))


def test_three_fields_make_a_function() -> None:
    asked = function()
    assert (asked.name, asked.inference_url, asked.container_image) == tuple(FUNCTION.values())
    assert (asked.inference_port, asked.health, asked.api_body_format) == (8000, None, "CUSTOM")


def test_unknown_fields_are_ignored_and_null_means_absent() -> None:
    asked = function(utilsContainerImage="u", description=None, tags=None, x=1)
    assert (asked.description, asked.tags) == ("", [])


def test_enums_come_in_any_case() -> None:
    asked = function(functionType="streaming", apiBodyFormat="predict_v2", health=HEALTH | {"protocol": "gRPC"})
    assert asked.function_type == "STREAMING"
    assert asked.api_body_format == "PREDICT_V2"
    assert asked.health is not None
    assert asked.health.protocol == "GRPC"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": ""}, "name"),
        ({"name": "-a"}, "name"),
        ({"name": "a" * 129}, "name"),
        ({"name": "a\n"}, "name"),
        ({"name": None}, "name"),
        ({"inferenceUrl": ""}, "inferenceUrl"),
        ({"inferenceUrl": "//evil/x"}, "inferenceUrl"),
        ({"inferenceUrl": "/a b"}, "inferenceUrl"),
        ({"inferenceUrl": "/a\r\nb"}, "inferenceUrl"),
        ({"inferenceUrl": "\\\\evil"}, "inferenceUrl"),
        ({"inferencePort": 0}, "inferencePort"),
        ({"inferencePort": 70000}, "inferencePort"),
        ({"tags": ["a"] * 65}, "tags"),
        ({"tags": ["not a tag"]}, "tags"),
        ({"description": "d" * 257}, "description"),
        ({"functionType": "BATCH"}, "functionType"),
        ({"containerEnvironment": [{"key": "A"}]}, "containerEnvironment.0.value"),
        ({"containerEnvironment": [{"key": "A=B", "value": ""}]}, "containerEnvironment.0.key"),
        ({"health": {"protocol": "HTTP"}}, "health.uri"),
        ({"health": HEALTH | {"timeout": "10"}}, "health.timeout"),
        ({"health": HEALTH | {"timeout": "PT0S"}}, "health.timeout"),
        ({"health": HEALTH | {"port": 0}}, "health.port"),
        ({"health": HEALTH | {"protocol": "UDP"}}, "health.protocol"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError) as refused:
        function(**fields)
    assert named in {".".join(map(str, fault["loc"])) for fault in refused.value.errors()}


MODEL: dict[str, Any] = {"name": "m", "version": "1", "uri": "/v2/org/o/models/m/versions/1/files"}
LLM_MODEL: dict[str, Any] = {"name": "m", "llmConfig": {"uris": ["/v1/chat/completions"], "tokenizer": "t"}}
LLM: dict[str, Any] = {"functionType": "LLM", "models": [LLM_MODEL]}
MANY = {str(number): 1 for number in range(65)}
HELM: dict[str, Any] = {
    "containerImage": None,
    "helmChart": "https://helm.example/c-1.0.tgz",
    "helmChartServiceName": "s",
}
ID = "65721e80-9b32-4396-9bec-8c08256297cf"


@pytest.mark.parametrize(
    "fields",
    [
        HELM,
        HELM | {"models": [MODEL]},
        {"containerImage": None, "models": [MODEL]},
        {"containerImage": "nvcr.io/org/Name_x/y@sha256:" + "a" * 64},
        {"containerImage": "localhost:5000/y"},
        {"containerImage": "localhost:5000/y:1.0-rc_1"},
        {"models": [MODEL, MODEL | {"name": "n"}], "resources": [MODEL]},
        {"models": [MODEL | {"uri": "https://api.ngc.nvidia.com/v2/org/o/models/m/versions/1/files"}]},
        {"models": [MODEL | {"uri": "https://elsewhere.example/m"}]},
        LLM | {"llmInvocationConfig": {"priority": {"defaultPriority": 0, "perAccountPriority": {"a": 2**32 - 1}}}},
        LLM | {"models": [{"name": "m", "llmConfig": {"uris": ["/x"], "routingMethod": "Power_Of_Two"}}]},
        LLM | {"models": [{"name": "m", "llmConfig": {"uris": ["/x"], "tokenRateLimit": "9-W"}}]},
        {"tags": ["a" * 128] + [f"k:{n}=v" for n in range(63)]},
        {"secrets": [{"name": "a", "value": "v"}, {"name": "A", "value": {"k": [1]}}]},
        {"secrets": [{"name": "a" * 48, "value": "v" * 32_768}]},
        {"rateLimit": {"rateLimit": "100-S,500-H , 1-d"}},
        {"rateLimit": {"perUserRate": "1-M"}},
        {"rateLimit": {"perNcaIdRate": {"a": "1-M"}, "rateLimit": "2-M", "exemptedNcaIds": ["b"], "syncCheck": True}},
        {"telemetries": {"logsTelemetryId": ID}},
    ],
)
def test_a_function_as_upstream_takes_it(fields: dict[str, Any]) -> None:
    function(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"containerImage": None},
        {"containerImage": ""},
        {"containerImage": "a b"},
        {"containerImage": "name:-tag"},
        {"containerImage": "name:a:b"},
        {"containerImage": "name:" + "t" * 129},
        {"containerImage": "name@sha256:xyz"},
        HELM | {"containerImage": "i"},
        HELM | {"containerArgs": "-v"},
        HELM | {"containerEnvironment": [{"key": "A", "value": "b"}]},
        HELM | {"helmChartServiceName": None},
        {"helmChartServiceName": "s"},
        {"models": [{"name": "m"}]},
        {"models": [{"name": "m", "version": "1"}]},
        {"models": [MODEL, MODEL]},
        {"models": [MODEL | {"uri": "https://api.ngc.nvidia.com/v2/org/o/models/m/versions/1"}]},
        {"models": [MODEL | {"uri": "https://api.ngc.nvidia.com/v2/org/o/models/m/versions/1/zip"}]},
        {"resources": [{"name": "m", "uri": "/x"}]},
        {"resources": [MODEL, MODEL]},
        {"functionType": "LLM"},
        {"functionType": "LLM", "models": [MODEL]},
        {"functionType": "LLM", "models": [{"name": "m", "llmConfig": {"uris": []}}]},
        LLM | {"models": [{"name": "m", "llmConfig": {"uris": ["/x"], "routingMethod": "psychic"}}]},
        LLM | {"llmInvocationConfig": {"priority": {"defaultPriority": -1}}},
        LLM | {"llmInvocationConfig": {"priority": {"defaultPriority": 2**32}}},
        LLM | {"llmInvocationConfig": {"priority": {"perAccountPriority": {"a": 1}}}},
        LLM
        | {
            "llmInvocationConfig": {
                "priority": {"defaultPriority": 1, "perAccountPriority": dict.fromkeys(map(str, range(65)), 1)}
            }
        },
        {"llmInvocationConfig": {"priority": {"defaultPriority": 1}}},
        {"healthUri": ""},
        {"tags": ["a" * 129]},
        {"tags": [""]},
        {"secrets": [{"name": "a"}]},
        {"secrets": [{"name": "a", "value": ""}]},
        {"secrets": [{"name": "a", "value": 1}]},
        {"secrets": [{"name": "a", "value": ["v"]}]},
        {"secrets": [{"name": "a", "value": "v" * 32_769}]},
        {"secrets": [{"name": "a", "value": {"k": "v" * 32_768}}]},
        {"secrets": [{"name": "a" * 49, "value": "v"}]},
        {"secrets": [{"name": "-a", "value": "v"}]},
        {"rateLimit": {"rateLimit": "1-S", "exemptedNcaIds": [str(n) for n in range(33)]}},
        {"rateLimit": {"perNcaIdRate": {str(n): "1-S" for n in range(33)}}},
        {"telemetries": {}},
        {"telemetries": {"logsTelemetryId": "x"}},
    ],
)
def test_a_function_that_upstream_refuses(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        function(**fields)


def test_a_secrets_value_is_in_no_representation() -> None:
    assert "hunter2" not in repr(function(secrets=[{"name": "a", "value": "hunter2"}]))


@pytest.mark.parametrize(
    ("body", "works"),
    [
        ({}, False),
        ({"tags": None}, False),
        ({"name": "other"}, False),
        ({"tags": []}, True),
        ({"modelUpdates": []}, False),
        ({"modelUpdates": [{"modelName": "m", "llmConfig": {}}]}, False),
        ({"modelUpdates": [{"modelName": "m", "llmConfig": {"tokenRateLimit": "5-W"}}]}, True),
        ({"llmInvocationConfig": {}}, True),
        ({"rateLimit": {"rateLimit": "1-S"}}, True),
    ],
)
def test_an_update_says_what_to_change(body: dict[str, Any], works: bool) -> None:
    try:
        wire.UpdateFunction.model_validate(body)
    except ValidationError:
        assert not works
    else:
        assert works


@pytest.mark.parametrize("body", [{"rateLimit": "1-S"}, {"rateLimit": {"rateLimit": "1-S", "exemptedNcaIds": None}}])
def test_a_rate_limit_comes_bare_or_wrapped(body: dict[str, Any]) -> None:
    assert wire.SetRateLimit.model_validate(body).rate_limit == "1-S"


def test_paths_and_absolute_urls_are_inference_urls() -> None:
    for url in ("/", "/v1/infer?x=1", "infer", "http://host:8000/infer", "/grpc"):
        assert function(inferenceUrl=url).inference_url == url


SCALE: dict[str, Any] = {"factor": 1.5, "threshold": 70}


def sticky(size: str, threshold: str) -> dict[str, str]:
    return {"size": size, "threshold": threshold}


def test_a_specification_as_upstream_takes_it() -> None:
    asked = deployment(
        clusters=["c", "c"],
        regions=["r", " ", ""],
        attributes=[""],
        availabilityZones=["z"],
        preferredOrder=99,
        maxRequestConcurrency=16_384,
        cpuArch="amd64",
        configuration={},
        helmValidationPolicy={"name": "default"},
        autoscalingConfiguration={"scaleUpDetails": SCALE | {"metric": "m", "stickiness": sticky("PT1H", "PT59M")}},
    ).deployment_specifications[0]
    assert (asked.clusters, asked.regions, asked.attributes) == (["c"], ["r"], [])


@pytest.mark.parametrize(
    ("body", "works"),
    [
        ({}, False),
        ({"gpu": "CPU"}, False),
        ({"minInstances": -1}, False),
        ({"maxInstances": 0}, False),
        ({"minInstances": 0}, True),
        ({"autoscalingConfigurationPolicy": "platform_configuration"}, True),
        ({"autoscalingConfigurationPolicy": "other"}, False),
        ({"autoscalingConfiguration": {"scaleUpDetails": SCALE}}, True),
        (
            {
                "autoscalingConfiguration": {"scaleUpDetails": SCALE},
                "autoscalingConfigurationPolicy": "PLATFORM_CONFIGURATION",
            },
            False,
        ),
    ],
)
def test_a_patch_says_what_to_change(body: dict[str, Any], works: bool) -> None:
    try:
        wire.UpdateGpuSpecification.model_validate(body)
    except ValidationError:
        assert not works
    else:
        assert works


def test_a_deployment_needs_a_specification() -> None:
    bodies: list[dict[str, Any]] = [{}, {"deploymentSpecifications": None}, {"deploymentSpecifications": []}]
    for body in bodies:
        with pytest.raises(ValidationError):
            wire.CreateDeployment.model_validate(body)
    assert deployment().deployment_specifications[0].max_request_concurrency == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"gpu": ""},
        {"minInstances": None},
        {"maxInstances": "many"},
        {"maxInstances": 10**30},
        {"maxRequestConcurrency": 10**30},
        {"backend": "a", "clusters": ["b"]},
        {"configuration": {"a": 1}},
        {"preferredOrder": 0},
        {"preferredOrder": 100},
        {"helmValidationPolicy": {"name": "Lax"}},
        {"helmValidationPolicy": {"extraKubernetesTypes": [{"group": "g"}]}},
        {"autoscalingConfiguration": {}},
        {"autoscalingConfiguration": {"scaleUpDetails": {"factor": 1, "threshold": 70}}},
        {"autoscalingConfiguration": {"scaleUpDetails": {"threshold": 70}}},
        {"autoscalingConfiguration": {"scaleUpDetails": {"factor": 2}}},
        {"autoscalingConfiguration": {"scaleDownDetails": {"factor": 1, "threshold": 30}}},
        {"autoscalingConfiguration": {"scaleDownDetails": {"factor": 0, "threshold": 30}}},
        {"autoscalingConfiguration": {"scaleDownDetails": {"factor": 0.5, "threshold": -1}}},
        {"autoscalingConfiguration": {"scaleUpDetails": SCALE | {"stickiness": {"size": "PT1M"}}}},
        {"autoscalingConfiguration": {"scaleUpDetails": SCALE | {"stickiness": sticky("PT1M", "PT1M")}}},
        {"autoscalingConfiguration": {"scaleUpDetails": SCALE | {"stickiness": sticky("PT61M", "PT1M")}}},
        {"autoscalingConfiguration": {"scaleUpDetails": SCALE | {"stickiness": sticky("1m", "PT1S")}}},
    ],
)
def test_a_specification_that_cannot_be_placed_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        deployment(**fields)


def test_answers_are_camel_case_without_nulls_and_with_instants_in_utc() -> None:
    deployed = wire.Deployment(
        function_id="f",
        function_version_id="v",
        deployment_id="d",
        function_name="echo",
        nca_id="a",
        function_status="ACTIVE",
        deployment_specifications=[wire.GpuSpecification(gpu="CPU", min_instances=1, max_instances=1)],
        created_at=datetime.fromtimestamp(0, UTC),
        last_updated_at=datetime.fromtimestamp(0.5, UTC),
    )
    assert json.loads(deployed.to_json()) == {
        "functionId": "f",
        "functionVersionId": "v",
        "deploymentId": "d",
        "functionName": "echo",
        "ncaId": "a",
        "functionStatus": "ACTIVE",
        "deploymentSpecifications": [{"gpu": "CPU", "minInstances": 1, "maxInstances": 1, "maxRequestConcurrency": 1}],
        "createdAt": "1970-01-01T00:00:00Z",
        "lastUpdatedAt": "1970-01-01T00:00:00.500000Z",
    }


def test_what_was_answered_can_be_read_again() -> None:
    upload = wire.AssetUpload(asset_id="a", upload_url="http://x", content_type="image/png", description="d")
    assert wire.AssetUpload.model_validate_json(upload.to_json()) == upload
