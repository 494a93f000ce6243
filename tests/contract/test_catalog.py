"""One suite for every Catalog back end."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from broker.backends.memory.catalog import MemoryCatalog
from broker.backends.redis.store import open_store
from broker.errors import RevisionConflict
from broker.model import (
    Account,
    Autoscaling,
    Cluster,
    ClusterGpu,
    ClusterState,
    ClusterType,
    Crash,
    Deployment,
    FunctionStatus,
    Gpu,
    GpuSpecification,
    Health,
    HealthInfo,
    Instance,
    InstanceStatus,
    Key,
    LlmConfig,
    Model,
    Place,
    Priority,
    Rate,
    RateLimit,
    RegistryCredential,
    RegistryCredentials,
    Resource,
    Scaling,
    Secret,
    Secrets,
    Sharing,
    Stickiness,
    Telemetries,
    Version,
)
from broker.ports import Catalog
from broker.settings import Settings
from infra.local.servers import Redis
from tests.eventually import eventually


@pytest.fixture(params=["memory", "redis"])
async def catalog(request: pytest.FixtureRequest) -> AsyncIterator[Catalog]:
    if request.param == "memory":
        yield MemoryCatalog()
        return
    server: Redis = request.getfixturevalue("redis_server")
    async with open_store(server.url, Settings()) as (_, opened, *_):
        yield opened


def make_version(account: str = "acme", function_id: str = "") -> Version:
    return Version(
        id=str(uuid.uuid4()),
        function_id=function_id or str(uuid.uuid4()),
        account=account,
        name="echo",
        inference_url="/echo",
        container_image="fnqueue/echo:latest",
        created_at=1.5,
        health=Health(uri="/health", expected_status=204),
        container_environment=(("A", "ä b"), ("B", "")),
        tags=("x", "y"),
        status=FunctionStatus.DEPLOYING,
        models=(
            Model(name="m", version="1", uri="/m"),
            Model(name="l", llm=LlmConfig(uris=("/v1", "/v2"), tokenizer="t", token_rate_limit="5-W")),
        ),
        resources=(Resource(name="r", version="1", uri="/r"),),
        rate_limit=RateLimit(
            rates=(Rate(limit=1, window_s=1),),
            exempted=("a",),
            per_account=(("b", (Rate(limit=2, window_s=60),)),),
            sync_check=True,
        ),
        telemetries=Telemetries(logs="l"),
        priority=Priority(default=0, per_account=(("a", 2**32 - 1),)),
    )


def make_instance(version_id: str) -> Instance:
    return Instance(
        id=str(uuid.uuid4()),
        function_id="f",
        version_id=version_id,
        account="acme",
        gpu="CPU",
        instance_type="CPU",
        backend="",
        status=InstanceStatus.RUNNING,
        created_at=1.0,
        updated_at=2.0,
    )


async def test_what_was_put_is_got(catalog: Catalog) -> None:
    version = make_version()
    revision = await catalog.versions.put(version)
    row = await catalog.versions.get(version.id)
    assert row is not None
    assert (row.item, row.revision) == (version, revision)
    assert await catalog.versions.get(str(uuid.uuid4())) is None


async def test_nested_items_survive(catalog: Catalog) -> None:
    specification = GpuSpecification(
        id="s",
        gpu="CPU",
        instance_type="CPU",
        min_instances=1,
        max_instances=2,
        clusters=("c",),
        autoscaling=Autoscaling(
            up=Scaling(factor=2.0, threshold=70, stickiness=Stickiness(size="PT1H", threshold="PT1M"))
        ),
        facts=(("os", "linux"),),
    )
    deployment = Deployment(
        id="d",
        function_id="f",
        version_id=str(uuid.uuid4()),
        account="acme",
        specifications=(specification, specification),
        created_at=1,
        updated_at=2.25,
        health=(HealthInfo(gpu="CPU", instance_type="CPU", backend="", error="tail\nof a log"),),
    )
    await catalog.deployments.put(deployment)
    row = await catalog.deployments.get(deployment.version_id)
    assert row is not None
    assert row.item == deployment


async def test_creating_twice_conflicts(catalog: Catalog) -> None:
    version = make_version()
    await catalog.versions.put(version)
    with pytest.raises(RevisionConflict):
        await catalog.versions.put(replace(version, name="other"))


async def test_a_stale_writer_conflicts(catalog: Catalog) -> None:
    version = make_version()
    first = await catalog.versions.put(version)
    second = await catalog.versions.put(replace(version, name="b"), revision=first)
    with pytest.raises(RevisionConflict):
        await catalog.versions.put(replace(version, name="c"), revision=first)
    row = await catalog.versions.get(version.id)
    assert row is not None
    assert (row.item.name, row.revision) == ("b", second)


async def test_of_two_racing_writers_one_wins(catalog: Catalog) -> None:
    version = make_version()
    revision = await catalog.versions.put(version)
    answers = await asyncio.gather(
        *(catalog.versions.put(replace(version, name=f"n{n}"), revision=revision) for n in range(10)),
        return_exceptions=True,
    )
    assert sum(isinstance(answer, RevisionConflict) for answer in answers) == 9


async def test_a_row_that_was_removed_and_made_anew_is_not_the_old_writers(catalog: Catalog) -> None:
    version = make_version()
    old = await catalog.versions.put(version)
    await catalog.versions.delete(version.id)
    new = await catalog.versions.put(replace(version, name="anew"))
    with pytest.raises(RevisionConflict):
        await catalog.versions.put(replace(version, name="stale"), revision=old)
    assert await catalog.versions.put(replace(version, name="later"), revision=new) > new


async def test_lists_follow_the_indexes(catalog: Catalog) -> None:
    account, function_id = str(uuid.uuid4()), str(uuid.uuid4())
    mine = [make_version(account, function_id), make_version(account, function_id), make_version(account)]
    for version in [*mine, make_version()]:
        await catalog.versions.put(version)
    assert {row.item.id for row in await catalog.versions.list("account", account)} == {v.id for v in mine}
    assert {row.item.id for row in await catalog.versions.list("function_id", function_id)} == {v.id for v in mine[:2]}
    assert {v.id for v in mine} < {row.item.id for row in await catalog.versions.list()}
    assert await catalog.versions.list("account", "nobody") == []
    with pytest.raises(LookupError):
        await catalog.versions.list("name", "echo")


async def test_a_deleted_item_is_gone_from_lists_too(catalog: Catalog) -> None:
    version = make_version(str(uuid.uuid4()))
    await catalog.versions.put(version)
    assert await catalog.versions.delete(version.id)
    assert not await catalog.versions.delete(version.id)
    assert await catalog.versions.get(version.id) is None
    assert await catalog.versions.list("account", version.account) == []


async def test_keys_are_kept_by_hash(catalog: Catalog) -> None:
    key = Key(
        hash=uuid.uuid4().hex,
        id=str(uuid.uuid4()),
        account=str(uuid.uuid4()),
        hint="nvapi-***abc",
        description="",
        scopes=("invoke_function",),
        created_at=1.0,
    )
    await catalog.keys.put(key)
    row = await catalog.keys.get(key.hash)
    assert row is not None
    assert row.item == key
    assert [row.item for row in await catalog.keys.list("account", key.account)] == [key]


async def test_clusters_are_kept_whole(catalog: Catalog) -> None:
    kind = ClusterType(name="NCP.GPU.H100_1x", value="node", default=True)
    cluster = Cluster(
        id=str(uuid.uuid4()),
        account=str(uuid.uuid4()),
        name="east",
        group="local",
        cloud_provider="ON-PREM",
        region="e",
        created_at=1.0,
        updated_at=2.0,
        authorized=("*",),
        custom_attributes=(("a", "b"),),
        gpus=(ClusterGpu(name="H100", capacity=8, types=(kind,), allocated=1),),
        state=ClusterState.CORDON,
        seen_at=3.5,
    )
    await catalog.clusters.put(cluster)
    row = await catalog.clusters.get(cluster.id)
    assert row is not None
    assert row.item == cluster
    assert [row.item for row in await catalog.clusters.list("account", cluster.account)] == [cluster]


async def test_an_index_of_many_values_follows_the_row(catalog: Catalog) -> None:
    first, second, third = (str(uuid.uuid4()) for _ in range(3))
    sharing = Sharing(function_id=str(uuid.uuid4()), account="acme", parties=(first,), versions=(("v", (second,)),))
    revision = await catalog.sharing.put(sharing)
    for party in (first, second):
        assert [row.item for row in await catalog.sharing.list("shared_with", party)] == [sharing]
    changed = replace(sharing, parties=(first, third), versions=())
    await catalog.sharing.put(changed, revision=revision)
    assert [row.item for row in await catalog.sharing.list("shared_with", third)] == [changed]
    assert await catalog.sharing.list("shared_with", second) == []
    assert await catalog.sharing.delete(sharing.function_id)
    assert await catalog.sharing.list("shared_with", first) == []
    assert await catalog.sharing.list("shared_with", second) == []


async def test_accounts_are_kept_by_id(catalog: Catalog) -> None:
    account = Account(
        id=str(uuid.uuid4()),
        name="acme-corp",
        max_functions=0,
        max_tasks=1,
        max_telemetries=2,
        max_registry_credentials=3,
        created_at=1.0,
        updated_at=2.0,
        client_ids=("c",),
    )
    await catalog.accounts.put(account)
    row = await catalog.accounts.get(account.id)
    assert row is not None
    assert row.item == account
    assert account in [row.item for row in await catalog.accounts.list()]


async def test_secrets_are_kept_by_version(catalog: Catalog) -> None:
    sealed = (Secret(name="A", sealed="1:k:AA=="), Secret(name="b.c", sealed="1:k:BB=="))
    secrets = Secrets(version_id=str(uuid.uuid4()), account="acme", secrets=sealed, updated_at=1.5)
    revision = await catalog.secrets.put(secrets)
    changed = replace(secrets, secrets=sealed[:1])
    await catalog.secrets.put(changed, revision=revision)
    with pytest.raises(RevisionConflict):
        await catalog.secrets.put(secrets, revision=revision)
    row = await catalog.secrets.get(secrets.version_id)
    assert row is not None
    assert row.item == changed
    assert changed in [row.item for row in await catalog.secrets.list()]
    assert await catalog.secrets.delete(secrets.version_id)
    assert await catalog.secrets.get(secrets.version_id) is None


async def test_registry_credentials_are_kept_by_account(catalog: Catalog) -> None:
    credential = RegistryCredential(
        id=str(uuid.uuid4()),
        name="pull",
        registry="GitHub",
        hostname="ghcr.io",
        artifact_types=("CONTAINER",),
        sealed="1:k:AA==",
        created_at=1.0,
        updated_at=2.0,
        tags=("t",),
    )
    credentials = RegistryCredentials(account=str(uuid.uuid4()), credentials=(credential,))
    await catalog.registry_credentials.put(credentials)
    with pytest.raises(RevisionConflict):
        await catalog.registry_credentials.put(replace(credentials, credentials=()))
    row = await catalog.registry_credentials.get(credentials.account)
    assert row is not None
    assert row.item == credentials


async def test_an_instance_lives_by_its_beat(catalog: Catalog) -> None:
    version_id = str(uuid.uuid4())
    brief, lasting = make_instance(version_id), make_instance(version_id)
    await catalog.beat(brief, ttl_s=0.05)
    await catalog.beat(lasting, ttl_s=30)
    seen = await eventually(lambda: catalog.instances(version_id), lambda instances: len(instances) == 1)
    assert seen == [lasting]
    await catalog.retire(lasting)
    assert await catalog.instances(version_id) == []


async def test_what_is_held_against_an_instance_is_kept_until_it_is_forgotten(catalog: Catalog) -> None:
    version_id = str(uuid.uuid4())
    first = Crash(request_id=str(uuid.uuid4()), origin="", began_at=1.5, ended_at=2.25)
    second = replace(first, origin="a1")
    for crash in (first, second, first):
        await catalog.note_crash(version_id, "one", crash)
    assert sorted(await catalog.crashes(version_id, "one"), key=lambda crash: crash.origin) == [first, second]
    assert await catalog.crashes(version_id, "other") == []
    assert await catalog.instances(version_id) == []
    await catalog.forget_crashes(version_id, "one")
    assert await catalog.crashes(version_id, "one") == []


async def test_the_inventory_is_the_last_offer(catalog: Catalog) -> None:
    gpus = [
        Gpu(
            name="H100",
            instance_type="NCP.GPU.H100_2x",
            backend="local",
            capacity=4,
            gpu_count=2,
            cpu_cores=16,
            system_memory_bytes=2**38,
            gpu_memory_bytes=80 * 2**30,
            cpu_arch="x86_64",
            os="linux",
            driver_version="550.90.07",
            place=Place(cluster="east-1", region="east", attributes=("hipaa",)),
        ),
        Gpu(name="CPU", instance_type="CPU", backend="local", capacity=2),
    ]
    await catalog.offer(gpus, ttl_s=30)
    assert await catalog.gpus() == gpus
    await catalog.offer([], ttl_s=0.05)
    assert await catalog.gpus() == []


async def test_one_holder_leads_at_a_time(catalog: Catalog) -> None:
    first, second = uuid.uuid4().hex, uuid.uuid4().hex
    assert await catalog.lead(first, ttl_s=30)
    assert await catalog.lead(first, ttl_s=30)
    assert not await catalog.lead(second, ttl_s=30)
    await catalog.resign(second)
    assert not await catalog.lead(second, ttl_s=30)
    await catalog.resign(first)
    assert await catalog.lead(second, ttl_s=0.05)
    await eventually(lambda: catalog.lead(first, ttl_s=30), bool)
    await catalog.resign(first)
