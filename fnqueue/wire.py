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
    AliasChoices,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    RootModel,
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


# -- every route -------------------------------------------------------------------------------


class Problem(Wire):
    """What went wrong (RFC 9457); `type` tells the kinds of one status apart."""

    type: str
    title: str
    status: int
    detail: str | None = None
    instance: str | None = None
    request_id: str | None = None
    outcome: Literal["unknown"] | None = None


class Up(Wire):
    status: Literal["OK"]


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


class RateLimitModel(Wire):
    """How often a version may be invoked. Rates are text such as `100-S, 500-H`: a number, a dash, and one of S, M,
    H, D. What makes a good rate, and which fields go together, is the server's to say."""

    rate_limit: Annotated[str, Field(max_length=256)] | None = None
    exempted_nca_ids: Annotated[list[Annotated[str, Field(max_length=128)]], Field(max_length=32)] | None = None
    per_nca_id_rate: (
        Annotated[
            dict[Annotated[str, Field(max_length=128)], Annotated[str, Field(max_length=256)]], Field(max_length=32)
        ]
        | None
    ) = None
    per_user_rate: Annotated[str, Field(max_length=256)] | None = None
    sync_check: bool | None = None


class SetRateLimit(RateLimitModel):
    """Body of `PUT /ratelimit/functions/{functionId}/versions/{versionId}`: the object itself, or within
    `{"rateLimit": …}` as it stands in a function."""

    @model_validator(mode="before")
    @classmethod
    def _unwrap(cls, given: Any) -> Any:
        inner = given.get("rateLimit") if isinstance(given, Mapping) else None
        return inner if isinstance(inner, Mapping) else given


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
    rate_limit: RateLimitModel | None = None
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
    rate_limit: RateLimitModel | None = None
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


# -- GPUs and clusters ---------------------------------------------------------------------------


class SupportedGpu(Wire):
    gpu: str
    backend: str


class SupportedGpus(RootModel[tuple[SupportedGpu, ...]]):
    """A bare array, as upstream's."""

    def to_json(self) -> bytes:
        return self.model_dump_json(by_alias=True, exclude_none=True).encode()


class InstanceType(Wire):
    """What one instance of it may count on; `gpu_memory` is that of each card. Memory as `80G`, in units of 2^30."""

    name: str
    description: str
    default: bool
    capacity: int | None = None
    gpu_count: int | None = None
    cpu_cores: int | None = None
    system_memory: str | None = None
    gpu_memory: str | None = None
    cpu_arch: str | None = None
    os: str | None = None
    driver_version: str | None = None


class OfferedGpu(Wire):
    name: str
    instance_types: list[InstanceType]


# Left to itself, the alias generator writes k8SVersion.
K8S_VERSION = Field(alias="k8sVersion")


class GroupCluster(Wire):
    id: str
    name: str
    k8s_version: Annotated[str | None, K8S_VERSION] = None


class ClusterGroup(Wire):
    """`name` is what a deployment gives as `backend`."""

    id: str
    name: str
    nca_id: str
    authorized_nca_ids: list[str]
    gpus: list[OfferedGpu]
    clusters: list[GroupCluster]


class ClusterGroups(Wire):
    cluster_groups: list[ClusterGroup]


class GpuPlacement(Wire):
    cluster_id: str
    cluster: str
    cluster_group_id: str
    cluster_group: str
    cloud_provider: str | None = None
    region: str | None = None
    current_min_usage: int
    current_max_usage: int


class GpuUsage(Wire):
    """In instances of `instance_type`."""

    gpu: str
    instance_type: str
    current_min_usage: int
    current_max_usage: int
    placements: list[GpuPlacement]


class GpuUsages(Wire):
    gpus: list[GpuUsage]


Word = Annotated[str, Field(min_length=1, max_length=256)]
State = Annotated[
    Literal["READY", "NOT_READY", "UNHEALTHY", "PAUSED", "FAILED", "CORDON", "CORDON_AND_DRAIN"],
    BeforeValidator(_upper),
]


class ClusterInstanceType(Wire):
    name: Word
    value: Word
    description: Annotated[str, Field(max_length=256)] = ""
    default: bool = False
    gpu_count: Annotated[int, Field(ge=1, le=1024)] = 1


class ClusterGpu(Wire):
    name: Word
    capacity: Annotated[int, Field(ge=0, le=MAX_INSTANCES)] = 0
    instance_types: Annotated[list[ClusterInstanceType], Field(min_length=1, max_length=64)]


class RegisterCluster(Wire):
    """Body of `POST /v1/accounts/{ncaId}/clusters` and of the PUT of one."""

    cluster_name: Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    cluster_group_name: Word
    nca_id: Word
    cloud_provider: Word
    nvca_version: Word
    region: Word
    authorized_nca_ids: Annotated[
        list[Word],
        Field(max_length=64, validation_alias=AliasChoices("authorizedNCAIds", "authorizedNcaIds")),
    ] = []
    capabilities: Annotated[list[Word], Field(max_length=64)] = []
    attributes: Annotated[list[Word], Field(max_length=64)] = []
    custom_attributes: Annotated[dict[str, Annotated[str, Field(max_length=1024)]], Field(max_length=64)] = {}
    gpus: Annotated[list[ClusterGpu], Field(max_length=64)] = []
    jwks: Annotated[str, Field(max_length=32_768)] = ""
    oidc_issuer: Annotated[str, Field(max_length=2048)] = ""


class ClusterRegistered(Wire):
    cluster_id: str
    cluster_group_id: str


class ClusterGpuUse(Wire):
    name: str
    capacity: int
    allocated: int
    available: int
    instance_types: list[ClusterInstanceType]


class Cluster(Wire):
    """A registered cluster; `last_connected_at` is the last word of its agent."""

    cluster_id: str
    cluster_name: str
    cluster_group_id: str
    cluster_group_name: str
    nca_id: str
    cloud_provider: str
    region: str
    status: str
    nvca_version: str | None = None
    k8s_version: Annotated[str | None, K8S_VERSION] = None
    authorized_nca_ids: Annotated[list[str], Field(serialization_alias="authorizedNCAIds")]
    capabilities: list[str]
    attributes: list[str]
    custom_attributes: dict[str, str]
    gpus: list[ClusterGpuUse]
    oidc_issuer: str | None = None
    created_at: datetime
    last_updated_at: datetime
    last_connected_at: datetime | None = None


class ClusterAnswer(Wire):
    cluster: Cluster


class ClusterList(Wire):
    clusters: list[Cluster]


class ConnectCluster(Wire):
    """Body of `PUT /v1/nvca/clusters/{clusterId}/register`: what an agent says when it starts."""

    status: State
    k8s_version: Annotated[str, Field(max_length=64), K8S_VERSION] = ""
    nvca_version: Annotated[str, Field(max_length=64)] = ""
    gpus: Annotated[list[ClusterGpu], Field(max_length=64)] = []


class ClusterConnected(Wire):
    """Not as upstream: no credentials of a queue. Who runs a controller has them already."""

    cluster_id: str
    cluster_group_id: str
    status: str
    heartbeat_interval_seconds: int


class GpuCount(Wire):
    name: Word
    capacity: Annotated[int, Field(ge=0, le=MAX_INSTANCES)]
    allocated: Annotated[int, Field(ge=0, le=MAX_INSTANCES)]


class Heartbeat(Wire):
    """Body of `POST /v1/nvca/clusters/{clusterId}/heartbeat`."""

    status: State
    gpu_usage: Annotated[list[GpuCount], Field(max_length=64)] = []


class HeartbeatAnswer(Wire):
    action: Literal["ACCEPTED", "SELF_DESTRUCT"]


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


# -- accounts and sharing ----------------------------------------------------------------------

AccountName = Annotated[str, Field(min_length=4, max_length=36, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Quota = Annotated[int, Field(ge=0, le=2**31 - 1)]


class CreateAccount(Wire):
    """Body of `POST /accounts/{ncaId}`."""

    name: AccountName
    admin_client_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    max_functions_allowed: Quota | None = None
    max_tasks_allowed: Quota | None = None
    max_telemetries_allowed: Annotated[int, Field(ge=0, le=25)] | None = None
    max_registry_credentials_allowed: Annotated[int, Field(ge=0, le=25)] | None = None


class UpdateAccount(Wire):
    """Body of `PATCH /accounts/{ncaId}`: something of it is needed."""

    name: AccountName | None = None
    max_functions_allowed: Quota | None = None
    max_tasks_allowed: Quota | None = None
    max_telemetries_allowed: Annotated[int, Field(ge=0, le=50)] | None = None
    max_registry_credentials_allowed: Annotated[int, Field(ge=0, le=50)] | None = None


class Account(Wire):
    nca_id: str
    name: str
    client_ids: list[str] | None = None
    admin_client_ids: list[str] | None = None
    max_functions_allowed: int
    max_tasks_allowed: int
    max_telemetries_allowed: int
    max_registry_credentials_allowed: int
    current_number_functions: int | None = None
    last_updated_at: datetime | None = None


class AccountAnswer(Wire):
    account: Account


class AccountList(Wire):
    cloud_accounts: list[Account]


class AuthorizedParty(Wire):
    """Here is no client to be shared with alone: a `client_id` is refused."""

    nca_id: Annotated[str, Field(min_length=1, max_length=64)]
    client_id: str | None = None

    @model_validator(mode="after")
    def _is_an_account(self) -> AuthorizedParty:
        if self.client_id:
            raise ValueError("clientId: no such client; share with the account")
        return self


class AuthorizeParties(Wire):
    """Body of `POST /authorizations/functions/{functionId}[/versions/{versionId}]`."""

    authorized_parties: Annotated[list[AuthorizedParty], Field(min_length=1, max_length=512)]


class AuthorizeParty(Wire):
    """Body of the `PATCH …/add` and `PATCH …/remove` of the same paths."""

    authorized_party: AuthorizedParty


class Authorization(Wire):
    """Who may use a function, or the one version that is named."""

    id: str
    nca_id: str
    version_id: str | None = None
    authorized_parties: list[AuthorizedParty]


class AuthorizationAnswer(Wire):
    function: Authorization


class AuthorizationList(Wire):
    functions: list[Authorization]


# -- keys --------------------------------------------------------------------------------------


class Snake(Wire):
    """The key service alone speaks snake_case."""

    model_config = ConfigDict(alias_generator=None)


class KeyResource(Snake):
    """`account-functions` or `authorized-functions` with the id `*`, or `function` with `<id>/*` or
    `<id>/<version id>`."""

    id: Annotated[str, Field(min_length=1, max_length=128)]
    type: Annotated[str, Field(min_length=1, max_length=64)]


class KeyPolicy(Snake):
    """Without `resources` it is about every function that the account sees; with none of them, about none."""

    scopes: list[str]
    resources: list[KeyResource] | None = None
    aud: Annotated[str, Field(max_length=256)] | None = None
    auds: list[Annotated[str, Field(max_length=256)]] | None = None
    product: Annotated[str, Field(max_length=256)] | None = None


class KeyAuthorizations(Snake):
    policies: Annotated[list[KeyPolicy], Field(min_length=1, max_length=1)]

    @model_validator(mode="after")
    def _is_short(self) -> KeyAuthorizations:
        if len(self.to_json()) > 2048:
            raise ValueError("must not be longer than 2048 characters")
        return self


class CreateKey(Snake):
    """Body of `POST /v1/keys`. `nca_id` is for who may make keys of another account."""

    description: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9 _-]+$")] | None = None
    expires_at: AwareDatetime | None = None
    authorizations: KeyAuthorizations
    audience_service_ids: Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=16)] = []
    nca_id: str | None = None


class UpdateKeyAuthorizations(Snake):
    authorizations: KeyAuthorizations


class UpdateKeyStatus(Snake):
    status: Annotated[Literal["ACTIVE", "SUSPENDED"], BeforeValidator(_upper)]


class ApiKey(Snake):
    """`value` is the key itself, once; `hint` is enough to tell it from others."""

    id: str
    status: str
    value: str | None = None
    hint: str
    nca_id: str
    owner_type: str = "USER"
    owner_id: str
    issuer_service_id: str | None = None
    audience_service_ids: list[str]
    description: str | None = None
    created_at: datetime
    expires_at: datetime | None = None
    authorizations: KeyAuthorizations | None = None


class ApiKeyList(Snake):
    keys: list[ApiKey]


class Introspect(Snake):
    """Body of `POST /v1/introspect`."""

    key: Annotated[str, Field(min_length=1, max_length=512)]
    audience_service_id: str | None = None


class Introspected(Snake):
    key_id: str
    nca_id: str
    owner_type: str = "USER"
    owner_id: str
    issuer_service_id: str | None = None
    authorizations: KeyAuthorizations
    expires_at: datetime | None = None


class Credentials(Wire):
    """The form of `POST /v3/keys/get-caller-info`; without it the Authorization header counts."""

    credentials: str | None = None


class CallerInfo(Wire):
    """What NGC's SDK and CLI ask of a key: a SERVICE_KEY belongs to an org and to no user."""

    type: str = "SERVICE_KEY"
    org_name: str
    key_id: str | None = None
    products: list[str]
    roles: list[str] = []


Function.model_rebuild()
