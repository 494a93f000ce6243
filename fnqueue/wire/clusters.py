"""GPUs on offer, and registered clusters (contract/management.md §3)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AliasChoices, BeforeValidator, Field, RootModel

from fnqueue.wire.fields import MAX_INSTANCES, Wire, upper

# Left to itself, the alias generator writes k8SVersion.
K8S_VERSION = Field(alias="k8sVersion")


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
    clusters: list[str] | None = None
    regions: list[str] | None = None
    attributes: list[str] | None = None


class OfferedGpu(Wire):
    name: str
    instance_types: list[InstanceType]


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
    BeforeValidator(upper),
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
