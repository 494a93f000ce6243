"""The JSON on the wire, in both directions (contract/management.md §1, §2; contract/invocation.md §6, §7).

Names are camelCase on the wire. Unknown fields are ignored, null means absent, enum values come in any case.
What upstream has and this server does not is accepted and ignored, unless it could never run here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel

MAX_INSTANCES = 1_000_000
MAX_SECRET_CHARACTERS = 32_768

_TAG = re.compile(r"[A-Za-z0-9_:=-]{1,128}", re.ASCII)
_DURATION: TypeAdapter[timedelta] = TypeAdapter(timedelta)


class Wire(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        ser_json_bytes="utf8",
    )

    @model_validator(mode="before")
    @classmethod
    def _null_means_absent(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            return {name: value for name, value in given.items() if value is not None}
        return given

    def to_json(self) -> bytes:
        """As it goes on the wire: null fields left out."""
        return self.model_dump_json(by_alias=True, exclude_none=True).encode()


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _uri(value: str) -> str:
    """A path or an absolute URL. What it says of a host is not used: the container is always beside its sidecar."""
    if not value.isprintable() or " " in value or "\\" in value:
        raise ValueError("must be a URI without blanks, backslashes and control characters")
    try:
        parts = urlsplit(value)
    except ValueError:
        raise ValueError("must be a path or a URI") from None
    if not parts.scheme and (parts.netloc or value.startswith("//")):
        raise ValueError("must be a path with one leading slash, or a URI")
    return value


def _tags(values: list[str]) -> list[str]:
    if any(_TAG.fullmatch(value) is None for value in values):
        raise ValueError("each tag has 1 to 128 letters, digits, '-', '_', ':' and '='")
    return list(dict.fromkeys(values))


def _duration(value: str) -> str:
    try:
        seconds = _DURATION.validate_python(value).total_seconds() if value.startswith("P") else 0
    except ValidationError:
        seconds = 0
    if seconds <= 0:
        raise ValueError("must be an ISO-8601 duration above zero, as PT10S")
    return value


def _secret(value: Any) -> str:
    """The JSON text of a string or an object; says nothing of what it was."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if not isinstance(value, str | dict):
        raise ValueError("must be a string or a JSON object")
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=isinstance(value, str), separators=(",", ":"))
        text.encode()
    except ValueError:
        raise ValueError("must hold nothing that JSON in UTF-8 cannot") from None
    if not 1 <= len(value if isinstance(value, str) else text) <= MAX_SECRET_CHARACTERS:
        raise ValueError(f"must have 1 to {MAX_SECRET_CHARACTERS} characters as JSON")
    return text


Port = Annotated[int, Field(ge=1, le=65_535)]
Uri = Annotated[str, Field(min_length=1, max_length=2048), AfterValidator(_uri)]
Instances = Annotated[int, Field(le=MAX_INSTANCES)]
Protocol = Annotated[Literal["HTTP", "GRPC"], BeforeValidator(_upper)]


# -- functions ---------------------------------------------------------------------------------


class Health(Wire):
    """All five fields or none of the object."""

    protocol: Protocol
    uri: Uri
    port: Port
    timeout: Annotated[str, Field(max_length=64), AfterValidator(_duration)]
    expected_status_code: Annotated[int, Field(ge=100, le=599)]


class EnvironmentVariable(Wire):
    key: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^=\x00]+$")]
    value: Annotated[str, Field(max_length=32_768, pattern=r"^[^\x00]*$")]


SecretName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,47}$")]


class Secret(Wire):
    """`value` is a string or a JSON object on the wire, and its JSON text here."""

    name: SecretName
    value: Annotated[
        SecretStr,
        BeforeValidator(_secret),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string", "minLength": 1, "maxLength": MAX_SECRET_CHARACTERS},
                    {"type": "object"},
                ],
                "writeOnly": True,
            }
        ),
    ]


class CreateFunction(Wire):
    """Body of `POST /functions` and `POST /functions/{functionId}/versions`."""

    name: Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    inference_url: Uri
    inference_port: Port = 8000
    health: Health | None = None
    health_uri: Uri | None = None
    container_image: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    container_args: Annotated[str, Field(max_length=32_768)] = ""
    container_environment: Annotated[list[EnvironmentVariable], Field(max_length=1024)] = []
    helm_chart: str | None = None
    api_body_format: Annotated[Literal["PREDICT_V2", "CUSTOM"], BeforeValidator(_upper)] = "CUSTOM"
    function_type: Annotated[Literal["DEFAULT", "STREAMING", "LLM"], BeforeValidator(_upper)] = "DEFAULT"
    tags: Annotated[list[str], Field(max_length=64), AfterValidator(_tags)] = []
    description: Annotated[str, Field(max_length=256)] = ""
    secrets: list[Secret] = []

    @model_validator(mode="after")
    def _can_run_here(self) -> CreateFunction:
        if self.helm_chart is not None:
            raise ValueError("helmChart: Helm functions are not served; give a containerImage instead")
        if self.container_image is None:
            raise ValueError("containerImage: needed; a function of models alone is not served")
        return self


class Instance(Wire):
    instance_id: str
    function_id: str
    function_version_id: str
    instance_type: str
    instance_status: str
    nca_id: str
    gpu: str
    backend: str | None = None
    instance_created_at: datetime
    instance_updated_at: datetime


class Function(Wire):
    """One version of a function."""

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
    api_body_format: str
    health_uri: str
    health: FunctionHealth
    created_at: datetime
    active_instances: list[Instance] | None = None
    tags: list[str] | None = None
    description: str
    function_type: str
    secrets: list[str] | None = None


class FunctionHealth(Wire):
    """As `Health`, and as lenient as what reads it must be."""

    protocol: str
    uri: str
    port: int
    timeout: str
    expected_status_code: int


class FunctionAnswer(Wire):
    function: Function


class FunctionList(Wire):
    functions: list[Function]


class FunctionIds(Wire):
    function_ids: list[str]


# -- secrets and registry credentials ----------------------------------------------------------


class PutSecrets(Wire):
    """Body of `PUT /secrets/functions/{functionId}/versions/{versionId}`: merged by name."""

    secrets: list[Secret]


ArtifactType = Annotated[Literal["CONTAINER", "HELM", "MODEL", "RESOURCE"], BeforeValidator(_upper)]


class RegistrySecret(Wire):
    """`value` is the base64 of `user:password`."""

    name: SecretName
    value: Annotated[SecretStr, Field(min_length=1, max_length=MAX_SECRET_CHARACTERS)]


class CreateRegistryCredential(Wire):
    """Body of `POST /registry-credentials`."""

    registry_hostname: Annotated[
        str, Field(max_length=253, pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{1,5})?$")
    ]
    secret: RegistrySecret
    artifact_types: Annotated[list[ArtifactType], Field(min_length=1, max_length=16)]
    tags: Annotated[list[str], Field(max_length=64), AfterValidator(_tags)] = []
    description: Annotated[str, Field(max_length=256)] = ""


class UpdateRegistryCredential(Wire):
    """Body of `PATCH /registry-credentials/{registryCredentialId}`. Artifact types, by either name, are added."""

    secret: RegistrySecret | None = None
    artifact_types: Annotated[list[ArtifactType], Field(max_length=16)] = []
    artifact_type_enums: Annotated[list[ArtifactType], Field(max_length=16)] = []
    tags: Annotated[list[str], Field(max_length=64), AfterValidator(_tags)] | None = None
    description: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> UpdateRegistryCredential:
        if not (self.secret or self.artifact_types or self.artifact_type_enums) and (
            self.tags is None and self.description is None
        ):
            raise ValueError("give one of secret, artifactTypes, tags and description")
        return self


class RegistryCredential(Wire):
    registry_credential_id: str
    nca_id: str
    registry_credential_name: str
    registry_name: str
    registry_hostname: str
    artifact_types: list[str]
    tags: list[str] | None = None
    description: str | None = None
    provisioned_by: str
    last_updated_at: datetime
    created_at: datetime


class RegistryCredentialAnswer(Wire):
    registry_credential: RegistryCredential


class RegistryCredentialList(Wire):
    registry_credentials: list[RegistryCredential]


class RecognizedRegistry(Wire):
    """`*` in `hostname` stands for any part of one."""

    name: str
    hostname: str


class RecognizedRegistries(Wire):
    """By artifact type."""

    recognized_registries: dict[str, list[RecognizedRegistry]]


# -- deployments -------------------------------------------------------------------------------


class GpuSpecification(Wire):
    """Ranges and names are checked against what is on offer by the server."""

    gpu_specification_id: str | None = None
    gpu: Annotated[str, Field(min_length=1, max_length=256)]
    instance_type: Annotated[str, Field(max_length=256)] | None = None
    backend: Annotated[str, Field(max_length=256)] | None = None
    min_instances: Instances
    max_instances: Instances
    max_request_concurrency: Annotated[int, Field(le=MAX_INSTANCES)] = 1


class GpuSpecificationRequest(GpuSpecification):
    clusters: list[str] = []
    configuration: dict[str, Any] = {}

    @model_validator(mode="after")
    def _can_run_here(self) -> GpuSpecificationRequest:
        if self.clusters and self.backend:
            raise ValueError("clusters: not together with backend")
        if self.configuration:
            raise ValueError("configuration: Helm values; this is a container function")
        return self


class CreateDeployment(Wire):
    """Body of `POST /deployments/functions/{functionId}/versions/{versionId}`."""

    deployment_specifications: Annotated[list[GpuSpecificationRequest], Field(min_length=1, max_length=64)]


class HealthInfo(Wire):
    gpu: str
    backend: str | None = None
    instance_type: str
    error: str


class Deployment(Wire):
    function_id: str
    function_version_id: str
    deployment_id: str
    function_name: str
    nca_id: str
    function_status: str
    health_info: list[HealthInfo] | None = None
    deployment_specifications: list[GpuSpecification]
    created_at: datetime
    last_updated_at: datetime


class DeploymentAnswer(Wire):
    deployment: Deployment


# -- assets ------------------------------------------------------------------------------------


class CreateAsset(Wire):
    """Body of `POST /assets`; what makes a good value is the server's to say."""

    content_type: str
    description: str


class AssetUpload(Wire):
    """PUT the bytes to `upload_url` with `Content-Type` and `x-amz-meta-nvcf-asset-description` as they are here."""

    asset_id: str
    upload_url: str
    content_type: str
    description: str


class Asset(Wire):
    asset_id: str
    content_type: str | None = None
    description: str | None = None
    created_at: datetime | None = None


class AssetAnswer(Wire):
    asset: Asset


class AssetList(Wire):
    assets: list[Asset]


# -- queues and requests -----------------------------------------------------------------------


class QueueDepth(Wire):
    """`queue_depth` is accepted and not started; `in_flight` is started and not finished."""

    function_version_id: str
    function_name: str
    function_status: str
    queue_depth: int
    in_flight: int | None = None
    oldest_age_seconds: float | None = None


class Queues(Wire):
    function_id: str
    queues: list[QueueDepth]


class Position(Wire):
    """`position_in_queue` is 1 for the next, 0 once started, and 1000 for all further back."""

    function_id: str
    function_version_id: str
    position_in_queue: int
    queue_length: int | None = None


class Cancelled(Wire):
    request_id: str
    status: str


Function.model_rebuild()
