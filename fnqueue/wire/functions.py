"""Functions and their versions (contract/management.md §1)."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Literal
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from fnqueue.wire.fields import Duration, Name, Tags, Timeout, Uri, Wire, unique, upper
from fnqueue.wire.limits import RateLimitModel
from fnqueue.wire.llm import LlmConfig, LlmInvocationConfig, ModelUpdate
from fnqueue.wire.secrets import Secret

# Which names exist is the registry's to say.
_IMAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]*", re.ASCII)
_IMAGE_TAGGED = re.compile(r"[^:]+(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?", re.ASCII)
_IMAGE_DIGEST = re.compile(r"[a-z0-9]+:[0-9a-fA-F]{32,128}", re.ASCII)
_NGC = "ngc.nvidia.com"


def _image(value: str) -> str:
    name, at, digest = value.partition("@")
    tagged = _IMAGE_NAME.fullmatch(name) and _IMAGE_TAGGED.fullmatch(name.rpartition("/")[2])
    if not tagged or (at and not _IMAGE_DIGEST.fullmatch(digest)):
        raise ValueError("must be an image reference, as registry/name:tag or registry/name@sha256:…")
    return value


def _artifact(value: str) -> str:
    host = urlsplit(value).hostname or ""
    if (host == _NGC or host.endswith("." + _NGC)) and not urlsplit(value).path.endswith("/files"):
        raise ValueError("must name the files of a version: an NGC URI ends in /files")
    return value


Port = Annotated[int, Field(ge=1, le=65_535)]
ArtifactUri = Annotated[Uri, AfterValidator(_artifact)]
Protocol = Annotated[Literal["HTTP", "GRPC"], BeforeValidator(upper)]


class Health(Wire):
    """All five fields or none of the object."""

    protocol: Protocol
    uri: Uri
    port: Port
    timeout: Duration
    expected_status_code: Annotated[int, Field(ge=100, le=599)]


class EnvironmentVariable(Wire):
    key: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^=\x00]+$")]
    value: Annotated[str, Field(max_length=32_768, pattern=r"^[^\x00]*$")]


class Model(Wire):
    """`llm_config` for a model of an LLM function, `version` and `uri` for any other."""

    name: Name
    version: Name | None = None
    uri: ArtifactUri | None = None
    llm_config: LlmConfig | None = None


class Resource(Wire):
    name: Name
    version: Name
    uri: ArtifactUri


class Telemetries(Wire):
    logs_telemetry_id: UUID | None = None
    metrics_telemetry_id: UUID | None = None
    traces_telemetry_id: UUID | None = None

    @model_validator(mode="after")
    def _names_one(self) -> Telemetries:
        if not (self.logs_telemetry_id or self.metrics_telemetry_id or self.traces_telemetry_id):
            raise ValueError("telemetries: at least one of the three IDs is needed")
        return self


class CreateFunction(Wire):
    """Body of `POST /functions` and `POST /functions/{functionId}/versions`."""

    name: Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    inference_url: Uri
    inference_port: Port = 8000
    health: Health | None = None
    health_uri: Uri | None = None
    container_image: Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_image)] | None = None
    container_args: Annotated[str, Field(max_length=32_768)] = ""
    container_environment: Annotated[list[EnvironmentVariable], Field(max_length=1024)] = []
    models: Annotated[list[Model], Field(max_length=64)] = []
    resources: Annotated[list[Resource], Field(max_length=64)] = []
    helm_chart: Uri | None = None
    helm_chart_service_name: Name | None = None
    api_body_format: Annotated[Literal["PREDICT_V2", "CUSTOM"], BeforeValidator(upper)] = "CUSTOM"
    function_type: Annotated[Literal["DEFAULT", "STREAMING", "LLM"], BeforeValidator(upper)] = "DEFAULT"
    tags: Tags = []
    description: Annotated[str, Field(max_length=256)] = ""
    rate_limit: RateLimitModel | None = None
    secrets: list[Secret] = []
    telemetries: Telemetries | None = None
    llm_invocation_config: LlmInvocationConfig | None = None
    queue_timeout: Timeout | None = None
    run_timeout: Timeout | None = None

    @model_validator(mode="after")
    def _is_something_to_run(self) -> CreateFunction:
        if not (self.container_image or self.models or self.helm_chart):
            raise ValueError("containerImage: one of containerImage, models and helmChart is needed")
        if (self.helm_chart is None) != (self.helm_chart_service_name is None):
            raise ValueError("helmChart: helmChart and helmChartServiceName come together")
        if self.helm_chart and (self.container_image or self.container_args or self.container_environment):
            raise ValueError("helmChart: not with containerImage, containerArgs and containerEnvironment")
        return self

    @model_validator(mode="after")
    def _models_fit_the_type(self) -> CreateFunction:
        if self.function_type == "LLM":
            if not self.models or any(model.llm_config is None for model in self.models):
                raise ValueError("models: an LLM function needs models, each with llmConfig.uris")
        elif self.llm_invocation_config is not None:
            raise ValueError("llmInvocationConfig: for LLM functions only")
        elif any(not (model.version and model.uri) for model in self.models):
            raise ValueError("models: each needs a name, a version and a uri")
        return self

    @model_validator(mode="after")
    def _names_come_once(self) -> CreateFunction:
        unique((model.name for model in self.models), "models")
        unique((resource.name for resource in self.resources), "resources")
        return self


class UpdateFunction(Wire):
    """Body of `PUT /functions/{functionId}/versions/{versionId}`: all that may change. What is given replaces what
    was there in full, `tags` that are empty too."""

    tags: Tags | None = None
    rate_limit: RateLimitModel | None = None
    model_updates: Annotated[list[ModelUpdate], Field(min_length=1, max_length=64)] | None = None
    llm_invocation_config: LlmInvocationConfig | None = None

    @model_validator(mode="after")
    def _says_something(self) -> UpdateFunction:
        if not self.model_fields_set:
            raise ValueError("tags: one of tags, rateLimit, modelUpdates and llmInvocationConfig is needed")
        unique((update.model_name for update in self.model_updates or ()), "modelUpdates")
        return self


class UpdateMetadata(Wire):
    """Body of the deprecated `PUT /metadata/functions/{functionId}/versions/{versionId}`."""

    tags: Tags


class Instance(Wire):
    instance_id: str
    function_id: str
    function_version_id: str
    instance_type: str
    instance_status: str
    sis_request_id: str
    icms_request_id: str
    nca_id: str
    gpu: str
    backend: str | None = None
    location: str | None = None
    error: str | None = None
    instance_created_at: datetime
    instance_updated_at: datetime


class FunctionModel(Wire):
    name: str
    version: str | None = None
    uri: str | None = None
    llm_config: LlmConfig | None = None


class FunctionHealth(Wire):
    """As `Health`, and as lenient as what reads it must be."""

    protocol: str
    uri: str
    port: int
    timeout: str
    expected_status_code: int


class Function(Wire):
    """One version of a function. `secrets` are names."""

    id: str
    nca_id: str
    version_id: str
    name: str
    status: str
    inference_url: str | None = None
    owned_by_different_account: bool = False
    inference_port: int | None = None
    container_args: str | None = None
    container_environment: list[EnvironmentVariable] | None = None
    container_image: str | None = None
    models: list[FunctionModel] | None = None
    resources: list[Resource] | None = None
    helm_chart: str | None = None
    helm_chart_service_name: str | None = None
    api_body_format: str
    health_uri: str
    health: FunctionHealth
    created_at: datetime
    active_instances: list[Instance] | None = None
    tags: list[str] | None = None
    description: str
    function_type: str
    rate_limit: RateLimitModel | None = None
    secrets: list[str] | None = None
    telemetries: Telemetries | None = None
    llm_invocation_config: LlmInvocationConfig | None = None
    queue_timeout: str | None = None
    run_timeout: str | None = None


class FunctionAnswer(Wire):
    function: Function


class FunctionList(Wire):
    functions: list[Function]


class FunctionIds(Wire):
    function_ids: list[str]
