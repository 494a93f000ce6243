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
    Autoscaling,
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
    Priority,
    RateLimit,
    Resource,
    Scaling,
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
    async with open_store(server.url, Settings()) as (_, opened):
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
        rate_limit=RateLimit(rate="1-S", exempted=("a",), per_account=(("b", "2-M"),), sync_check=True),
        telemetries=Telemetries(logs="l"),
        priority=Priority(default=0, per_account=(("a", 2**32 - 1),)),
        secret_names=("token",),
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


async def test_an_instance_lives_by_its_beat(catalog: Catalog) -> None:
    version_id = str(uuid.uuid4())
    brief, lasting = make_instance(version_id), make_instance(version_id)
    await catalog.beat(brief, ttl_s=0.05)
    await catalog.beat(lasting, ttl_s=30)
    seen = await eventually(lambda: catalog.instances(version_id), lambda instances: len(instances) == 1)
    assert seen == [lasting]
    await catalog.retire(lasting)
    assert await catalog.instances(version_id) == []


async def test_the_inventory_is_the_last_offer(catalog: Catalog) -> None:
    gpus = [Gpu(name="CPU", instance_type="CPU", backend="local", capacity=2)]
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
