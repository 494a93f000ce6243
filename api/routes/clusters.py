"""GPUs on offer, and registered clusters (contract/management.md §3)."""

from __future__ import annotations

import time

from aiohttp import web

from api import headers, payloads
from api.definitions import instant
from api.front import Front
from broker import clusters
from broker.accounts import acting_for, require_for
from broker.clusters import Group, Usage
from broker.deployments import facts
from broker.errors import BadRequest
from broker.model import EVERYONE, Cluster, ClusterGpu, ClusterState, ClusterType, Gpu, Place, Principal
from fnqueue import wire

USAGE = "list_cluster_groups"


# -- what is on offer ----------------------------------------------------------------------------


async def supported_gpus(front: Front, request: web.Request, principal: Principal) -> web.Response:
    offered = dict.fromkeys((gpu.name, gpu.backend) for gpu in await front.broker.catalog.gpus())
    return payloads.answer(wire.SupportedGpus(tuple(wire.SupportedGpu(gpu=gpu, backend=at) for gpu, at in offered)))


async def list_groups(front: Front, request: web.Request, principal: Principal) -> web.Response:
    found = await clusters.groups(front.broker, principal)
    owner = front.settings.admin_account
    return payloads.answer(wire.ClusterGroups(cluster_groups=[_group(group, owner) for group in found]))


async def usage(front: Front, request: web.Request, principal: Principal) -> web.Response:
    account = request.match_info["nca_id"]
    require_for(principal, account, USAGE)
    if account != principal.account:
        principal = acting_for(principal, account)
    groups = {group.name: group for group in await clusters.groups(front.broker, principal)}
    used: dict[tuple[str, str], list[Usage]] = {}
    for part in await clusters.usage(front.broker, principal):
        used.setdefault((part.gpu, part.instance_type), []).append(part)
    return payloads.answer(
        wire.GpuUsages(
            gpus=[
                wire.GpuUsage(
                    gpu=gpu,
                    instance_type=instance_type,
                    current_min_usage=sum(part.minimum for part in parts),
                    current_max_usage=sum(part.maximum for part in parts),
                    placements=[_placement(part, groups.get(part.backend)) for part in parts],
                )
                for (gpu, instance_type), parts in used.items()
            ]
        )
    )


def _group(group: Group, owner: str) -> wire.ClusterGroup:
    return wire.ClusterGroup(
        id=group.id,
        name=group.name,
        nca_id=owner,
        authorized_nca_ids=[EVERYONE],
        gpus=[
            wire.OfferedGpu(
                name=name,
                instance_types=[
                    _type(gpu, default=number == 0)
                    for number, gpu in enumerate(gpu for gpu in group.gpus if gpu.name == name)
                ],
            )
            for name in dict.fromkeys(gpu.name for gpu in group.gpus)
        ],
        clusters=[
            wire.GroupCluster(id=each.id, name=each.name, k8s_version=each.kubernetes_version or None)
            for each in group.clusters
        ]
        + [wire.GroupCluster(id=clusters.group_id(name), name=name) for name in _unregistered(group)],
    )


def _unregistered(group: Group) -> list[str]:
    """Where controllers run instances without having registered it: a cluster of that name, or of its group's."""
    registered = {cluster.name.lower() for cluster in group.clusters}
    offering = dict.fromkeys(gpu.place.cluster for gpu in group.gpus if gpu.place.cluster)
    if not offering and not registered:
        return [group.name]
    return [name for name in offering if name.lower() not in registered]


def _type(gpu: Gpu, *, default: bool) -> wire.InstanceType:
    parts = [f"{gpu.gpu_count} {gpu.name}" if gpu.gpu_count else "", f"{gpu.cpu_cores} cores" if gpu.cpu_cores else ""]
    return wire.InstanceType(
        name=gpu.instance_type,
        description=", ".join(part for part in parts if part) or gpu.name,
        default=default,
        capacity=gpu.capacity,
        gpu_count=gpu.gpu_count,
        cpu_cores=gpu.cpu_cores or None,
        clusters=[gpu.place.cluster] if gpu.place.cluster else None,
        regions=[gpu.place.region] if gpu.place.region else None,
        attributes=list(gpu.place.attributes) or None,
        **dict(facts(gpu)),
    )


def _placement(part: Usage, group: Group | None) -> wire.GpuPlacement:
    """Which of a group's clusters takes an instance is not known before it is there: the first stands for all."""
    cluster = group.clusters[0] if group and group.clusters else None
    place = group.gpus[0].place if group else Place()
    name = place.cluster or part.backend
    return wire.GpuPlacement(
        cluster_id=cluster.id if cluster else clusters.group_id(name),
        cluster=cluster.name if cluster else name,
        cluster_group_id=clusters.group_id(part.backend),
        cluster_group=part.backend,
        cloud_provider=cluster.cloud_provider if cluster else None,
        region=cluster.region if cluster else place.region or None,
        current_min_usage=part.minimum,
        current_max_usage=part.maximum,
    )


# -- registration --------------------------------------------------------------------------------


async def register(front: Front, request: web.Request, principal: Principal) -> web.Response:
    draft = await _draft(front, request, principal)
    cluster = await clusters.register(front.broker, principal, draft)
    return payloads.answer(
        wire.ClusterRegistered(cluster_id=cluster.id, cluster_group_id=clusters.group_id(cluster.group))
    )


async def list_clusters(front: Front, request: web.Request, principal: Principal) -> web.Response:
    clusters.own(principal, request.match_info["nca_id"])
    found = await clusters.list_clusters(front.broker, principal)
    return payloads.answer(wire.ClusterList(clusters=[_present(cluster) for cluster in found]))


async def get(front: Front, request: web.Request, principal: Principal) -> web.Response:
    clusters.own(principal, request.match_info["nca_id"])
    cluster = await clusters.get(front.broker, principal, _id(request))
    return payloads.answer(wire.ClusterAnswer(cluster=_present(cluster)))


async def update(front: Front, request: web.Request, principal: Principal) -> web.Response:
    cluster_id = _id(request)
    draft = await _draft(front, request, principal)
    cluster = await clusters.update(front.broker, principal, cluster_id, draft)
    return payloads.answer(wire.ClusterAnswer(cluster=_present(cluster)))


async def delete(front: Front, request: web.Request, principal: Principal) -> web.Response:
    clusters.own(principal, request.match_info["nca_id"])
    await clusters.delete(front.broker, principal, _id(request))
    return web.Response(status=204)


async def connect(front: Front, request: web.Request, principal: Principal) -> web.Response:
    cluster_id = _id(request)
    said = await payloads.read(front, request, wire.ConnectCluster)
    cluster = await clusters.connect(
        front.broker,
        principal,
        cluster_id,
        state=ClusterState(said.status),
        kubernetes_version=said.k8s_version,
        agent_version=said.nvca_version,
        gpus=_gpus(said.gpus),
    )
    return payloads.answer(
        wire.ClusterConnected(
            cluster_id=cluster.id,
            cluster_group_id=clusters.group_id(cluster.group),
            status=cluster.state.value,
            heartbeat_interval_seconds=int(clusters.HEARTBEAT_S),
        )
    )


async def heartbeat(front: Front, request: web.Request, principal: Principal) -> web.Response:
    cluster_id = _id(request)
    said = await payloads.read(front, request, wire.Heartbeat)
    counts = {count.name: (count.capacity, count.allocated) for count in said.gpu_usage}
    await clusters.heartbeat(front.broker, principal, cluster_id, state=ClusterState(said.status), usage=counts)
    return payloads.answer(wire.HeartbeatAnswer(action="ACCEPTED"))


def _id(request: web.Request) -> str:
    return headers.uuid(request.match_info["cluster_id"], field="clusterId")


async def _draft(front: Front, request: web.Request, principal: Principal) -> Cluster:
    """The cluster that the body describes; its verb gives it an id and times."""
    clusters.own(principal, request.match_info["nca_id"])
    asked = await payloads.read(front, request, wire.RegisterCluster)
    if asked.nca_id != principal.account:
        raise BadRequest("ncaId: must be the account in the path", field="ncaId")
    return Cluster(
        id="",
        account=principal.account,
        name=asked.cluster_name,
        group=asked.cluster_group_name,
        cloud_provider=asked.cloud_provider,
        region=asked.region,
        created_at=0.0,
        updated_at=0.0,
        agent_version=asked.nvca_version,
        authorized=tuple(asked.authorized_nca_ids),
        capabilities=tuple(asked.capabilities),
        attributes=tuple(asked.attributes),
        custom_attributes=tuple(sorted(asked.custom_attributes.items())),
        oidc_issuer=asked.oidc_issuer,
        jwks=asked.jwks,
        gpus=_gpus(asked.gpus),
    )


def _gpus(asked: list[wire.ClusterGpu]) -> tuple[ClusterGpu, ...]:
    return tuple(
        ClusterGpu(
            name=gpu.name,
            capacity=gpu.capacity,
            types=tuple(
                ClusterType(
                    name=kind.name,
                    value=kind.value,
                    description=kind.description,
                    default=kind.default,
                    gpu_count=kind.gpu_count,
                )
                for kind in gpu.instance_types
            ),
        )
        for gpu in asked
    )


def _present(cluster: Cluster) -> wire.Cluster:
    return wire.Cluster(
        cluster_id=cluster.id,
        cluster_name=cluster.name,
        cluster_group_id=clusters.group_id(cluster.group),
        cluster_group_name=cluster.group,
        nca_id=cluster.account,
        cloud_provider=cluster.cloud_provider,
        region=cluster.region,
        status=clusters.state_of(cluster, time.time()).value,
        nvca_version=cluster.agent_version or None,
        k8s_version=cluster.kubernetes_version or None,
        authorized_nca_ids=list(cluster.authorized),
        capabilities=list(cluster.capabilities),
        attributes=list(cluster.attributes),
        custom_attributes=dict(cluster.custom_attributes),
        gpus=[_gpu_use(gpu) for gpu in cluster.gpus],
        oidc_issuer=cluster.oidc_issuer or None,
        created_at=instant(cluster.created_at),
        last_updated_at=instant(cluster.updated_at),
        last_connected_at=instant(cluster.seen_at) if cluster.seen_at else None,
    )


def _gpu_use(gpu: ClusterGpu) -> wire.ClusterGpuUse:
    return wire.ClusterGpuUse(
        name=gpu.name,
        capacity=gpu.capacity,
        allocated=gpu.allocated,
        available=max(0, gpu.capacity - gpu.allocated),
        instance_types=[
            wire.ClusterInstanceType(
                name=kind.name,
                value=kind.value,
                description=kind.description,
                default=kind.default,
                gpu_count=kind.gpu_count,
            )
            for kind in gpu.types
        ],
    )
