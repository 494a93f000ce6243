"""Changes of a deployed GPU specification: what they keep, what they refuse, and in which state."""

from __future__ import annotations

from dataclasses import replace

import pytest

from broker import authorizations, deployments, functions, specifications
from broker.errors import BadRequest, NotFound, StateConflict
from broker.functions import Definition
from broker.model import Autoscaling, Deployment, FunctionStatus, Gpu, GpuSpecification, Principal, Scaling, Version
from broker.ports import Broker
from broker.revisions import edit
from broker.specifications import Change

OURS = Principal(account="ours", subject="me", scopes=frozenset())
THEIRS = Principal(account="theirs", subject="them", scopes=frozenset())
ECHO = Definition(name="echo", inference_url="/echo", container_image="fnqueue/echo:latest")
CPU = Gpu(name="CPU", instance_type="CPU", backend="local", capacity=4)
UNKNOWN = "00000000-0000-4000-8000-000000000000"
UP = Autoscaling(up=Scaling(factor=1.5, threshold=80))
S = FunctionStatus


def wanted(minimum: int = 1, maximum: int = 2) -> GpuSpecification:
    return GpuSpecification(id="", gpu="cpu", instance_type="", min_instances=minimum, max_instances=maximum)


@pytest.fixture
async def broker(memory_broker: Broker) -> Broker:
    await memory_broker.catalog.offer([CPU], ttl_s=60)
    return memory_broker


async def deployed(broker: Broker, *wished: GpuSpecification) -> tuple[Version, Deployment]:
    version = await functions.create(broker, OURS, ECHO)
    return await deployments.deploy(broker, OURS, version.function_id, version.id, wished or (wanted(),))


async def turn(broker: Broker, version: Version, status: FunctionStatus) -> None:
    await edit(broker.catalog.versions, version.id, lambda stored: replace(stored, status=status))


async def update(broker: Broker, version: Version, *changes: Change) -> Deployment:
    return (await specifications.update(broker, OURS, version.function_id, version.id, changes))[1]


# -- patch -------------------------------------------------------------------------------------


async def test_a_patch_merges_with_what_is_stored(broker: Broker) -> None:
    version, deployment = await deployed(broker, wanted(), wanted())
    first, second = deployment.specifications
    for change, expected in (
        (Change(id=first.id, max_instances=5), replace(first, max_instances=5)),
        (Change(id=first.id, min_instances=4), replace(first, max_instances=5, min_instances=4)),
        (
            Change(id=first.id, autoscaling=UP),
            replace(first, max_instances=5, min_instances=4, autoscaling=UP),
        ),
        (Change(id=first.id, platform_scaling=True), replace(first, max_instances=5, min_instances=4)),
    ):
        assert await specifications.patch(broker, OURS, deployment.id, change) == expected
        _, stored = await deployments.get(broker, OURS, version.function_id, version.id)
        assert stored.specifications == (expected, second)
        assert stored.updated_at > deployment.updated_at


async def test_what_changes_nothing_writes_nothing(broker: Broker) -> None:
    version, deployment = await deployed(broker)
    before = await broker.catalog.deployments.get(version.id)
    await specifications.patch(broker, OURS, deployment.id, Change(id=deployment.specifications[0].id, min_instances=1))
    assert await update(broker, version, Change(min_instances=1, max_instances=2)) == deployment
    assert await broker.catalog.deployments.get(version.id) == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (Change(min_instances=3), "maxInstances"),
        (Change(max_instances=0), "maxInstances"),
        (Change(min_instances=-1), "minInstances"),
    ],
)
async def test_bounds_are_checked_once_merged(broker: Broker, change: Change, field: str) -> None:
    _, deployment = await deployed(broker)
    named = replace(change, id=deployment.specifications[0].id)
    with pytest.raises(BadRequest) as refused:
        await specifications.patch(broker, OURS, deployment.id, named)
    assert refused.value.field == field


async def test_what_is_unknown_or_foreign_is_not_found(broker: Broker) -> None:
    version, deployment = await deployed(broker)
    (specification,) = deployment.specifications
    for principal, deployment_id, specification_id in (
        (THEIRS, deployment.id, specification.id),
        (OURS, UNKNOWN, specification.id),
        (OURS, deployment.id, UNKNOWN),
    ):
        change = Change(id=specification_id, min_instances=0)
        with pytest.raises(NotFound):
            await specifications.patch(broker, principal, deployment_id, change)
    with pytest.raises(NotFound):
        await deployments.find(broker, THEIRS, deployment.id)
    assert await deployments.find(broker, OURS, deployment.id) == (version, deployment)


async def test_an_undeployed_deployment_is_not_found_by_its_id(broker: Broker) -> None:
    version, old = await deployed(broker)
    await deployments.undeploy(broker, OURS, version.function_id, version.id)
    _, new = await deployments.deploy(broker, OURS, version.function_id, version.id, [wanted()])
    with pytest.raises(NotFound):
        await deployments.find(broker, OURS, old.id)
    assert (await deployments.find(broker, OURS, new.id))[1] == new


@pytest.mark.parametrize(
    ("status", "may"),
    [
        (S.DEPLOYING, True),
        (S.ACTIVE, True),
        (S.DEGRADING, True),
        (S.DEGRADED, True),
        (S.ERROR, False),
        (S.INACTIVE, False),
    ],
)
async def test_only_a_busy_version_is_changed(broker: Broker, status: FunctionStatus, may: bool) -> None:
    version, deployment = await deployed(broker)
    await turn(broker, version, status)
    change = Change(id=deployment.specifications[0].id, max_instances=9)
    for attempt in (specifications.patch(broker, OURS, deployment.id, change), update(broker, version, change)):
        if may:
            await attempt
        else:
            with pytest.raises(StateConflict, match=status.value):
                await attempt


async def test_of_a_public_function_only_a_super_admin_changes_the_deployment(broker: Broker) -> None:
    version, deployment = await deployed(broker)
    operator = replace(OURS, super_admin=True)
    await authorizations.replace_all(broker, operator, version.function_id, "", ["*"])
    change = Change(id=deployment.specifications[0].id, max_instances=9)
    for attempt in (specifications.patch(broker, OURS, deployment.id, change), update(broker, version, change)):
        with pytest.raises(StateConflict, match="public"):
            await attempt
    assert (await specifications.patch(broker, operator, deployment.id, change)).max_instances == 9


async def test_what_drains_is_not_changed(broker: Broker) -> None:
    version, deployment = await deployed(broker)
    await deployments.undeploy(broker, OURS, version.function_id, version.id, graceful=True)
    with pytest.raises(StateConflict):
        await update(broker, version, Change(max_instances=9))
    assert (await deployments.find(broker, OURS, deployment.id))[1].specifications == deployment.specifications


# -- update ------------------------------------------------------------------------------------


async def test_one_specification_needs_no_id(broker: Broker) -> None:
    version, _ = await deployed(broker)
    change = Change(gpu="CPU", instance_type="cpu", backend="LOCAL", clusters=(), max_request_concurrency=7)
    (changed,) = (await update(broker, version, change)).specifications
    assert (changed.min_instances, changed.max_instances, changed.max_request_concurrency) == (1, 2, 7)


async def test_several_are_told_apart_by_their_ids(broker: Broker) -> None:
    version, deployment = await deployed(broker, wanted(), wanted())
    first, second = deployment.specifications
    changed = await update(broker, version, Change(id=second.id, max_instances=8), Change(id=first.id, min_instances=0))
    assert changed.specifications == (replace(first, min_instances=0), replace(second, max_instances=8))


@pytest.mark.parametrize(
    ("count", "changes", "field"),
    [
        (1, [], "deploymentSpecifications"),
        (1, [Change(), Change()], "deploymentSpecifications"),
        (2, [Change(), Change()], "deploymentSpecifications"),
        (1, [Change(id=UNKNOWN)], "deploymentSpecifications"),
        (1, [Change(gpu="H100")], "deploymentSpecifications[0].gpu"),
        (1, [Change(instance_type="H100_1x")], "deploymentSpecifications[0].instanceType"),
        (1, [Change(backend="far")], "deploymentSpecifications[0].backend"),
        (1, [Change(clusters=("far",))], "deploymentSpecifications[0].clusters"),
        (1, [Change(max_instances=0)], "deploymentSpecifications[0].maxInstances"),
        (1, [Change(max_request_concurrency=16_385)], "deploymentSpecifications[0].maxRequestConcurrency"),
    ],
)
async def test_an_update_that_is_refused_names_its_field(
    broker: Broker, count: int, changes: list[Change], field: str
) -> None:
    version, deployment = await deployed(broker, *[wanted()] * count)
    with pytest.raises(BadRequest) as refused:
        await update(broker, version, *changes)
    assert refused.value.field == field
    assert (await deployments.find(broker, OURS, deployment.id))[1] == deployment
