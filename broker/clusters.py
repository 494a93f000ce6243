"""Clusters: registered by an operator, kept alive by the heartbeats of their agents; and what is on offer in all.

Registration is a record that others read. Instances are placed by the inventory of the controllers alone.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from broker.deployments import gone
from broker.errors import BadRequest, Forbidden, NotFound, RevisionConflict, StateConflict
from broker.model import EVERYONE, Cluster, ClusterGpu, ClusterState, Gpu, Principal
from broker.ports import Broker
from broker.revisions import edit

# Of what upstream's API allows an agent (contract/management.md §3.4); agents are told to beat three times as often.
SILENT_S = 180.0
HEARTBEAT_S = 60.0
ABANDONED_S = 7 * 86_400.0

_UNKNOWN = "no such cluster"
_NAMES = uuid.UUID("6f7ac7b5-3f1e-4f7b-9a55-0f0a2d1c6b10")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What a deployment may name as its backend: instance types on offer, and the clusters that run them."""

    id: str
    name: str
    gpus: tuple[Gpu, ...]
    clusters: tuple[Cluster, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How many instances of one type the deployments of an account take: at the least, and at the most."""

    gpu: str
    instance_type: str
    backend: str
    minimum: int
    maximum: int


def group_id(name: str) -> str:
    """The same everywhere and always: groups are known by name, and no record holds them."""
    return str(uuid.uuid5(_NAMES, f"group/{name.lower()}"))


def state_of(cluster: Cluster, now: float) -> ClusterState:
    """What the agent said, unless it has been silent for too long."""
    if not cluster.seen_at or cluster.state is ClusterState.DELETED:
        return cluster.state
    silent_s = now - cluster.seen_at
    if silent_s > ABANDONED_S:
        return ClusterState.ABANDONED
    return ClusterState.UNHEALTHY if silent_s > SILENT_S else cluster.state


# -- the operator's side -------------------------------------------------------------------------


def own(principal: Principal, account: str) -> None:
    """Raises Forbidden: the path names an account that is not the caller's (contract/management.md §4.1)."""
    if account != principal.account:
        raise Forbidden("the credential is of another account")


async def register(broker: Broker, principal: Principal, draft: Cluster) -> Cluster:
    """Store a new cluster of the caller's; the id and the times of `draft` do not count.

    The id follows from the account and the name, so of two that register the same name one is refused.

    Raises:
        StateConflict: the account has a cluster of that name.
    """
    now = time.time()
    key = f"cluster/{principal.account}/{draft.name.lower()}"
    cluster = replace(draft, id=str(uuid.uuid5(_NAMES, key)), account=principal.account, created_at=now, updated_at=now)
    try:
        await broker.catalog.clusters.put(cluster)
    except RevisionConflict:
        raise StateConflict(f"the account has a cluster named {cluster.name!r} already") from None
    return cluster


async def list_clusters(broker: Broker, principal: Principal) -> list[Cluster]:
    rows = await broker.catalog.clusters.list("account", principal.account)
    return sorted((row.item for row in rows), key=lambda cluster: cluster.name)


async def get(broker: Broker, principal: Principal, cluster_id: str) -> Cluster:
    """Raises NotFound."""
    row = await broker.catalog.clusters.get(cluster_id)
    if row is None or row.item.account != principal.account:
        raise NotFound(_UNKNOWN)
    return row.item


async def update(broker: Broker, principal: Principal, cluster_id: str, draft: Cluster) -> Cluster:
    """Replace what the operator says of a cluster; what its agent said stays. Raises NotFound, or BadRequest for
    another name."""

    def change(stored: Cluster) -> Cluster:
        if draft.name.lower() != stored.name.lower():
            raise BadRequest("clusterName: cannot be changed; register another cluster", field="clusterName")
        return replace(
            draft,
            id=stored.id,
            account=stored.account,
            created_at=stored.created_at,
            updated_at=time.time(),
            gpus=draft.gpus or stored.gpus,
            kubernetes_version=stored.kubernetes_version,
            state=stored.state,
            seen_at=stored.seen_at,
        )

    return await _edit(broker, principal, cluster_id, change)


async def delete(broker: Broker, principal: Principal, cluster_id: str) -> None:
    """Raises NotFound. An agent that still beats is told that its cluster is unknown."""
    await get(broker, principal, cluster_id)
    if not await broker.catalog.clusters.delete(cluster_id):
        raise NotFound(_UNKNOWN)


# -- the agent's side ----------------------------------------------------------------------------


async def connect(
    broker: Broker,
    principal: Principal,
    cluster_id: str,
    *,
    state: ClusterState,
    kubernetes_version: str,
    agent_version: str,
    gpus: Sequence[ClusterGpu],
) -> Cluster:
    """An agent has started and tells what its cluster is. Raises NotFound."""

    def change(stored: Cluster) -> Cluster:
        return replace(
            stored,
            state=state,
            kubernetes_version=kubernetes_version or stored.kubernetes_version,
            agent_version=agent_version or stored.agent_version,
            gpus=tuple(gpus) or stored.gpus,
            seen_at=time.time(),
        )

    return await _edit(broker, principal, cluster_id, change)


async def heartbeat(
    broker: Broker, principal: Principal, cluster_id: str, *, state: ClusterState, usage: Mapping[str, tuple[int, int]]
) -> Cluster:
    """The agent lives. `usage` tells capacity and allocation by GPU; a GPU left out keeps its own.

    Raises:
        NotFound: this is also what the agent of a cluster hears that was deleted.
    """

    def count(gpu: ClusterGpu) -> ClusterGpu:
        capacity, allocated = usage.get(gpu.name, (gpu.capacity, gpu.allocated))
        return replace(gpu, capacity=capacity, allocated=allocated)

    def change(stored: Cluster) -> Cluster:
        return replace(stored, state=state, seen_at=time.time(), gpus=tuple(count(gpu) for gpu in stored.gpus))

    return await _edit(broker, principal, cluster_id, change)


# -- what is on offer ----------------------------------------------------------------------------


async def groups(broker: Broker, principal: Principal) -> list[Group]:
    """One per backend on offer, with those registered clusters that the caller's account may see."""
    offered = await broker.catalog.gpus()
    visible = [row.item for row in await broker.catalog.clusters.list() if _visible(principal, row.item)]
    return [
        Group(
            id=group_id(name),
            name=name,
            gpus=tuple(gpu for gpu in offered if gpu.backend == name),
            clusters=tuple(cluster for cluster in visible if cluster.group.lower() == name.lower()),
        )
        for name in dict.fromkeys(gpu.backend for gpu in offered)
    ]


async def usage(broker: Broker, principal: Principal) -> list[Usage]:
    """What the account's deployments may take, in instances, by type and backend."""
    totals: dict[tuple[str, str, str], tuple[int, int]] = {}
    for row in await broker.catalog.deployments.list("account", principal.account):
        if gone(row.item):
            continue
        for wanted in row.item.specifications:
            key = (wanted.gpu, wanted.instance_type, wanted.backend)
            least, most = totals.get(key, (0, 0))
            totals[key] = (least + wanted.min_instances, most + wanted.max_instances)
    return [
        Usage(gpu=gpu, instance_type=instance_type, backend=backend, minimum=least, maximum=most)
        for (gpu, instance_type, backend), (least, most) in sorted(totals.items())
    ]


def _visible(principal: Principal, cluster: Cluster) -> bool:
    return cluster.account == principal.account or bool({EVERYONE, principal.account} & set(cluster.authorized))


async def _edit(broker: Broker, principal: Principal, cluster_id: str, change: Callable[[Cluster], Cluster]) -> Cluster:
    await get(broker, principal, cluster_id)
    changed = await edit(broker.catalog.clusters, cluster_id, change)
    if changed is None:
        raise NotFound(_UNKNOWN)
    return changed
