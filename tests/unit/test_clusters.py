"""Clusters as records: who may touch them, and what silence makes of them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from broker import accounts, clusters
from broker.accounts import Limits
from broker.errors import BadRequest, Forbidden, NotFound, StateConflict
from broker.model import Cluster, ClusterGpu, ClusterState, ClusterType, Deployment, Gpu, GpuSpecification, Principal
from broker.ports import Broker

OURS = Principal(account="ours", subject="me", scopes=frozenset())
THEIRS = Principal(account="theirs", subject="them", scopes=frozenset())
H100 = ClusterGpu(name="H100", capacity=8, types=(ClusterType(name="NCP.GPU.H100_1x", value="node"),))
DRAFT = Cluster(
    id="",
    account="",
    name="east",
    group="local",
    cloud_provider="ON-PREM",
    region="e",
    created_at=0.0,
    updated_at=0.0,
    gpus=(H100,),
)


async def connect(broker: Broker, cluster: Cluster, principal: Principal = OURS) -> Cluster:
    return await clusters.connect(
        broker,
        principal,
        cluster.id,
        state=ClusterState.READY,
        kubernetes_version="1.33",
        agent_version="2",
        gpus=(),
    )


async def test_a_name_is_registered_once_whoever_is_first(memory_broker: Broker) -> None:
    tries = [clusters.register(memory_broker, OURS, replace(DRAFT, name=name)) for name in ("east", "EAST", "east")]
    answers = await asyncio.gather(*tries, return_exceptions=True)
    assert sum(isinstance(answer, StateConflict) for answer in answers) == 2
    assert (await clusters.register(memory_broker, THEIRS, DRAFT)).account == "theirs"


async def test_a_foreign_cluster_is_unknown(memory_broker: Broker) -> None:
    cluster = await clusters.register(memory_broker, OURS, DRAFT)
    assert await clusters.list_clusters(memory_broker, THEIRS) == []
    for attempt in (
        clusters.get(memory_broker, THEIRS, cluster.id),
        clusters.update(memory_broker, THEIRS, cluster.id, DRAFT),
        clusters.delete(memory_broker, THEIRS, cluster.id),
        connect(memory_broker, cluster, THEIRS),
        clusters.heartbeat(memory_broker, THEIRS, cluster.id, state=ClusterState.READY, usage={}),
    ):
        with pytest.raises(NotFound):
            await attempt


def test_a_path_of_another_account_is_forbidden() -> None:
    clusters.own(OURS, "ours")
    with pytest.raises(Forbidden):
        clusters.own(OURS, "theirs")


async def test_a_cluster_that_was_never_heard_is_not_ready(memory_broker: Broker) -> None:
    cluster = await clusters.register(memory_broker, OURS, DRAFT)
    assert clusters.state_of(cluster, cluster.created_at + 1e9) is ClusterState.NOT_READY


@pytest.mark.parametrize(
    ("silent_s", "state"),
    [
        (clusters.SILENT_S - 1, ClusterState.CORDON),
        (clusters.SILENT_S + 1, ClusterState.UNHEALTHY),
        (clusters.ABANDONED_S + 1, ClusterState.ABANDONED),
    ],
)
def test_silence_outweighs_what_was_said_last(silent_s: float, state: ClusterState) -> None:
    cluster = replace(DRAFT, state=ClusterState.CORDON, seen_at=1000.0)
    assert clusters.state_of(cluster, 1000.0 + silent_s) is state


async def test_a_heartbeat_brings_a_cluster_back_with_its_counts(memory_broker: Broker) -> None:
    cluster = await connect(memory_broker, await clusters.register(memory_broker, OURS, DRAFT))
    beat = await clusters.heartbeat(
        memory_broker, OURS, cluster.id, state=ClusterState.READY, usage={"H100": (8, 3), "T4": (1, 1)}
    )
    assert clusters.state_of(beat, beat.seen_at) is ClusterState.READY
    assert beat.gpus == (replace(H100, allocated=3),)


async def test_an_update_leaves_what_the_agent_said(memory_broker: Broker) -> None:
    cluster = await connect(memory_broker, await clusters.register(memory_broker, OURS, DRAFT))
    moved = await clusters.update(memory_broker, OURS, cluster.id, replace(DRAFT, region="w", gpus=()))
    assert (moved.region, moved.state, moved.kubernetes_version, moved.gpus) == ("w", cluster.state, "1.33", (H100,))
    with pytest.raises(BadRequest) as refused:
        await clusters.update(memory_broker, OURS, cluster.id, replace(DRAFT, name="west"))
    assert refused.value.field == "clusterName"


async def test_updates_and_heartbeats_that_race_lose_nothing(memory_broker: Broker) -> None:
    cluster = await connect(memory_broker, await clusters.register(memory_broker, OURS, DRAFT))
    for number in range(20):
        await asyncio.gather(
            clusters.update(memory_broker, OURS, cluster.id, replace(DRAFT, region=f"r{number}")),
            clusters.heartbeat(memory_broker, OURS, cluster.id, state=ClusterState.CORDON, usage={}),
        )
        stored = await clusters.get(memory_broker, OURS, cluster.id)
        assert (stored.region, stored.state) == (f"r{number}", ClusterState.CORDON)


async def test_a_deleted_cluster_is_unknown_to_its_agent(memory_broker: Broker) -> None:
    cluster = await clusters.register(memory_broker, OURS, DRAFT)
    await clusters.delete(memory_broker, OURS, cluster.id)
    with pytest.raises(NotFound):
        await clusters.delete(memory_broker, OURS, cluster.id)
    with pytest.raises(NotFound):
        await connect(memory_broker, cluster)


# -- what is on offer ----------------------------------------------------------------------------


async def test_a_group_is_a_backend_on_offer_with_the_clusters_one_may_see(memory_broker: Broker) -> None:
    offered = [Gpu(name="CPU", instance_type="CPU", backend=backend, capacity=1) for backend in ("local", "far")]
    await memory_broker.catalog.offer(offered, ttl_s=60)
    await clusters.register(memory_broker, OURS, DRAFT)
    await clusters.register(memory_broker, THEIRS, replace(DRAFT, name="shared", authorized=("ours",)))
    await clusters.register(memory_broker, THEIRS, replace(DRAFT, name="public", authorized=("*",)))
    await clusters.register(memory_broker, THEIRS, replace(DRAFT, name="hidden"))
    await clusters.register(memory_broker, OURS, replace(DRAFT, name="elsewhere", group="nothing-offered"))
    seen = {
        group.name: {cluster.name for cluster in group.clusters} for group in await clusters.groups(memory_broker, OURS)
    }
    assert seen == {"local": {"east", "shared", "public"}, "far": set()}


async def test_usage_sums_what_is_deployed_by_type_and_place(memory_broker: Broker) -> None:
    def wanted(backend: str, least: int, most: int) -> GpuSpecification:
        return GpuSpecification(
            id="s", gpu="H100", instance_type="x", min_instances=least, max_instances=most, backend=backend
        )

    for number, undeployed in enumerate((False, False, True)):
        deployment = Deployment(
            id=str(number),
            function_id="f",
            version_id=str(number),
            account="ours",
            specifications=(wanted("a", 1, 2), wanted("b", 0, 3)),
            created_at=0.0,
            updated_at=0.0,
            undeployed=undeployed,
        )
        await memory_broker.catalog.deployments.put(deployment)
    used = [(part.backend, part.minimum, part.maximum) for part in await clusters.usage(memory_broker, OURS)]
    assert used == [("a", 2, 4), ("b", 0, 6)]
    assert await clusters.usage(memory_broker, THEIRS) == []


async def test_an_account_with_clusters_is_not_deleted(memory_broker: Broker) -> None:
    for account in ("ours", "theirs"):
        await accounts.create_account(memory_broker, account, Limits(name=account))
    cluster = await clusters.register(memory_broker, OURS, replace(DRAFT, authorized=("theirs",)))
    with pytest.raises(StateConflict, match="still has clusters"):
        await accounts.delete_account(memory_broker, "ours")
    with pytest.raises(StateConflict, match="shared with the account"):
        await accounts.delete_account(memory_broker, "theirs")
    await clusters.delete(memory_broker, OURS, cluster.id)
    for account in ("ours", "theirs"):
        await accounts.delete_account(memory_broker, account)
