"""Two front ends that write to the same function at once, over every Catalog: no update is lost, no half state left."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import SecretStr

from broker import accounts, deployments, functions, specifications
from broker.accounts import Limits
from broker.connect import open_broker
from broker.errors import BadRequest, NotFound, StateConflict
from broker.functions import Change, Definition
from broker.model import FunctionStatus, Gpu, GpuSpecification, Principal, Rate, RateLimit, Version
from broker.ports import Broker, Catalog
from broker.settings import Settings
from infra.local.servers import Redis

ECHO = Definition(name="echo", inference_url="/echo", container_image="fnqueue/echo:latest")
CPU = Gpu(name="CPU", instance_type="CPU", backend="local", capacity=4)
WANTED = GpuSpecification(id="", gpu="CPU", instance_type="", min_instances=0, max_instances=1)
ROUNDS = 20
S = FunctionStatus


class Yielding:
    """A table, or what holds tables, whose every call lets others go first: memory alone never interleaves."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return Yielding(found)

        async def call(*args: Any, **named: Any) -> Any:
            await asyncio.sleep(0)
            answer = await found(*args, **named)
            await asyncio.sleep(0)
            return answer

        return call


@dataclass(frozen=True, slots=True)
class Replicas:
    """Two front ends over one store, and an account of the test's own."""

    first: Broker
    second: Broker
    ours: Principal

    async def deployable(self) -> Version:
        await self.first.catalog.offer([CPU], ttl_s=60)
        return await functions.create(self.first, self.ours, ECHO)

    async def deployed(self) -> Version:
        version = await self.deployable()
        await deployments.deploy(self.first, self.ours, version.function_id, version.id, [WANTED])
        return version

    async def version(self, version: Version) -> Version:
        return await functions.get(self.first, self.ours, version.function_id, version.id)


@pytest.fixture(params=["memory", "redis"])
async def replicas(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Replicas]:
    ours = Principal(account=uuid.uuid4().hex, subject="me", scopes=frozenset())
    async with AsyncExitStack() as stack:
        if request.param == "memory":
            broker = await stack.enter_async_context(open_broker(Settings(data_dir=tmp_path)))
            shared = replace(broker, catalog=cast("Catalog", Yielding(broker.catalog)))
            yield Replicas(shared, shared, ours)
            return
        server: Redis = request.getfixturevalue("redis_server")
        settings = Settings(data_dir=tmp_path, store_url=SecretStr(server.url))
        first, second = [await stack.enter_async_context(open_broker(settings)) for _ in range(2)]
        yield Replicas(first, second, ours)


async def outcomes(*attempts: Awaitable[object]) -> Counter[str]:
    """How each ended: the name of its error, or `done`."""
    answers = await asyncio.gather(*attempts, return_exceptions=True)
    return Counter(type(answer).__name__ if isinstance(answer, BaseException) else "done" for answer in answers)


async def test_updates_of_different_things_are_all_kept(replicas: Replicas) -> None:
    limit = RateLimit(rates=(Rate(limit=5, window_s=1),))
    for _ in range(ROUNDS):
        version = await replicas.deployable()
        ids = (version.function_id, version.id)
        await asyncio.gather(
            functions.update(replicas.first, replicas.ours, *ids, Change(tags=("mine",))),
            functions.update(replicas.second, replicas.ours, *ids, Change(rate_limit=limit)),
            deployments.deploy(replicas.second, replicas.ours, *ids, [WANTED]),
        )
        expected = replace(version, tags=("mine",), rate_limit=limit, status=S.ACTIVE)
        assert await replicas.version(version) == expected


async def test_patches_of_different_bounds_are_all_kept(replicas: Replicas) -> None:
    for _ in range(ROUNDS):
        version = await replicas.deployed()
        _, deployment = await deployments.get(replicas.first, replicas.ours, version.function_id, version.id)
        named = specifications.Change(id=deployment.specifications[0].id)
        await asyncio.gather(
            specifications.patch(replicas.first, replicas.ours, deployment.id, replace(named, max_instances=9)),
            specifications.patch(replicas.second, replicas.ours, deployment.id, replace(named, min_instances=1)),
        )
        _, patched = await deployments.find(replicas.second, replicas.ours, deployment.id)
        (specification,) = patched.specifications
        assert (specification.min_instances, specification.max_instances) == (1, 9)


async def test_bounds_that_only_fit_alone_are_not_both_taken(replicas: Replicas) -> None:
    for _ in range(ROUNDS):
        version = await replicas.deployed()
        ids = (version.function_id, version.id)
        await specifications.update(replicas.first, replicas.ours, *ids, [specifications.Change(max_instances=5)])
        ended = await outcomes(
            specifications.update(replicas.first, replicas.ours, *ids, [specifications.Change(min_instances=4)]),
            specifications.update(replicas.second, replicas.ours, *ids, [specifications.Change(max_instances=3)]),
        )
        assert ended == {"done": 1, BadRequest.__name__: 1}


async def test_of_two_deployments_one_stands(replicas: Replicas) -> None:
    for _ in range(ROUNDS):
        version = await replicas.deployable()
        ids = (version.function_id, version.id)
        ended = await outcomes(
            deployments.deploy(replicas.first, replicas.ours, *ids, [WANTED]),
            deployments.deploy(replicas.second, replicas.ours, *ids, [replace(WANTED, min_instances=1)]),
        )
        assert ended == {"done": 1, StateConflict.__name__: 1}
        stored, deployment = await deployments.get(replicas.first, replicas.ours, *ids)
        from_zero = deployment.specifications[0].min_instances == 0
        assert stored.status is (S.ACTIVE if from_zero else S.DEPLOYING)


async def test_a_deployment_that_meets_an_undeploy_is_all_there_or_all_gone(replicas: Replicas) -> None:
    for _ in range(ROUNDS):
        version = await replicas.deployed()
        ids = (version.function_id, version.id)
        deploying = deployments.deploy(replicas.second, replicas.ours, *ids, [replace(WANTED, min_instances=1)])
        await outcomes(deployments.undeploy(replicas.first, replicas.ours, *ids), deploying)
        try:
            stored, _ = await deployments.get(replicas.first, replicas.ours, *ids)
        except NotFound:
            assert (await replicas.version(version)).status is S.INACTIVE
        else:
            assert stored.status is S.DEPLOYING


async def test_a_patch_that_meets_an_undeploy_does_not_bring_it_back(replicas: Replicas) -> None:
    for _ in range(ROUNDS):
        version = await replicas.deployed()
        ids = (version.function_id, version.id)
        await outcomes(
            deployments.undeploy(replicas.first, replicas.ours, *ids),
            specifications.update(replicas.second, replicas.ours, *ids, [specifications.Change(max_instances=7)]),
        )
        row = await replicas.first.catalog.deployments.get(version.id)
        assert row is not None
        assert row.item.undeployed
        assert (await replicas.version(version)).status is S.INACTIVE


async def test_what_meets_a_delete_leaves_nothing_deployed(replicas: Replicas) -> None:
    for _ in range(ROUNDS):
        version = await replicas.deployable()
        ids = (version.function_id, version.id)
        ended = await outcomes(
            functions.delete_version(replicas.first, replicas.ours, *ids),
            deployments.deploy(replicas.second, replicas.ours, *ids, [WANTED]),
            functions.update(replicas.second, replicas.ours, *ids, Change(tags=("late",))),
        )
        assert set(ended) <= {"done", NotFound.__name__}
        assert await replicas.first.catalog.versions.get(version.id) is None
        row = await replicas.first.catalog.deployments.get(version.id)
        assert row is None or deployments.gone(row.item)


async def test_of_many_deletes_one_succeeds(replicas: Replicas) -> None:
    version = await replicas.deployed()
    ids = (version.function_id, version.id)
    ended = await outcomes(
        *(functions.delete_version(broker, replicas.ours, *ids) for broker in [replicas.first, replicas.second] * 4)
    )
    assert ended == {"done": 1, NotFound.__name__: 7}


async def test_a_quota_is_kept_by_many_at_once(replicas: Replicas) -> None:
    await accounts.create_account(replicas.first, replicas.ours.account, Limits(max_functions=3))
    ended = await outcomes(
        *(functions.create(broker, replicas.ours, ECHO) for broker in [replicas.first, replicas.second] * 5)
    )
    assert ended == {"done": 3, StateConflict.__name__: 7}
    assert len(await functions.list_functions(replicas.first, replicas.ours)) == 3
