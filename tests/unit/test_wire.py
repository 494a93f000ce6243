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


def test_what_is_not_supported_yet_is_ignored_and_null_means_absent() -> None:
    asked = function(models=[{"name": "m"}], secrets=[{"name": "s", "value": "v"}], description=None, tags=None, x=1)
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


@pytest.mark.parametrize("fields", [{"containerImage": None}, {"containerImage": None, "models": [{"name": "m"}]}])
def test_a_function_needs_an_image(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="containerImage"):
        function(**fields)


def test_a_helm_chart_cannot_run_here_and_the_answer_says_so() -> None:
    with pytest.raises(ValidationError, match="Helm functions are not served"):
        function(containerImage=None, helmChart="oci://x/y", helmChartServiceName="s")


def test_paths_and_absolute_urls_are_inference_urls() -> None:
    for url in ("/", "/v1/infer?x=1", "infer", "http://host:8000/infer", "/grpc"):
        assert function(inferenceUrl=url).inference_url == url


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
