"""Deployments: placing, the order of writes, and the state table of contract/management.md §1.10 as data."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from broker import deployments, functions
from broker.deployments import Sight, next_status
from broker.errors import BadRequest, NotFound, RevisionConflict, StateConflict, Unavailable
from broker.functions import Definition
from broker.model import Deployment, FunctionStatus, Gpu, GpuSpecification, Place, Principal, Version
from broker.ports import Broker
from broker.revisions import edit

OURS = Principal(account="ours", subject="me", scopes=frozenset())
THEIRS = Principal(account="theirs", subject="them", scopes=frozenset())
ECHO = Definition(name="echo", inference_url="/echo", container_image="fnqueue/echo:latest")
GPUS = [
    Gpu(name="CPU", instance_type="CPU", backend="local", capacity=4),
    Gpu(name="H100", instance_type="H100_1x", backend="local", capacity=1),
    Gpu(name="H100", instance_type="H100_2x", backend="far", capacity=1),
]
EAST = Place(cluster="east-1", region="east", attributes=("hipaa",))
WEST = Place(cluster="west-1", region="west", attributes=("hipaa", "greenpower"))
PLACED = [
    Gpu(name="CPU", instance_type="CPU", backend="east", capacity=4, place=EAST),
    Gpu(name="CPU", instance_type="CPU", backend="west", capacity=4, place=WEST),
]
S = FunctionStatus


def wanted(
    gpu: str = "CPU",
    instance_type: str = "",
    *,
    backend: str = "",
    minimum: int = 1,
    maximum: int = 1,
    concurrency: int = 1,
) -> GpuSpecification:
    return GpuSpecification(
        id="",
        gpu=gpu,
        instance_type=instance_type,
        min_instances=minimum,
        max_instances=maximum,
        max_request_concurrency=concurrency,
        backend=backend,
    )


@pytest.fixture
async def broker(memory_broker: Broker) -> Broker:
    await memory_broker.catalog.offer(GPUS, ttl_s=60)
    return memory_broker


@pytest.fixture
async def version(broker: Broker) -> Version:
    return await functions.create(broker, OURS, ECHO)


async def deploy(broker: Broker, version: Version, *specifications: GpuSpecification) -> tuple[Version, Deployment]:
    return await deployments.deploy(broker, OURS, version.function_id, version.id, specifications or (wanted(),))


async def undeploy(broker: Broker, version: Version, *, graceful: bool = False) -> Version:
    return await deployments.undeploy(broker, OURS, version.function_id, version.id, graceful=graceful)


async def turn(broker: Broker, version: Version, status: FunctionStatus) -> None:
    await edit(broker.catalog.versions, version.id, lambda stored: replace(stored, status=status))


async def stored(broker: Broker, version: Version) -> tuple[Version, Deployment]:
    rows = await broker.catalog.versions.get(version.id), await broker.catalog.deployments.get(version.id)
    assert rows[0] is not None
    assert rows[1] is not None
    return rows[0].item, rows[1].item


# -- placing -----------------------------------------------------------------------------------


def test_names_compare_in_any_case_and_are_stored_as_offered() -> None:
    (placed,) = deployments.place([wanted("h100", "h100_2X", backend="FAR")], GPUS)
    assert (placed.gpu, placed.instance_type, placed.backend) == ("H100", "H100_2x", "far")
    assert placed.id


def placed_in(filters: Mapping[str, Sequence[str]]) -> str:
    named = {field: tuple(filters.get(field, ())) for field in ("clusters", "regions", "attributes")}
    asked = replace(wanted(), clusters=named["clusters"], regions=named["regions"], attributes=named["attributes"])
    (placed,) = deployments.place([asked], PLACED)
    return placed.backend


@pytest.mark.parametrize(
    ("filters", "backend"),
    [
        ({"clusters": ["WEST-1"]}, "west"),
        ({"clusters": ["moon", "west-1", "east-1"]}, "east"),
        ({"regions": ["West"]}, "west"),
        ({"attributes": ["hipaa", "GreenPower"]}, "west"),
        ({"clusters": ["west-1"], "regions": ["west"], "attributes": ["greenpower"]}, "west"),
        ({"attributes": ["hipaa"]}, "east"),
        ({}, "east"),
    ],
)
def test_a_specification_goes_only_where_its_filters_let_it(filters: dict[str, list[str]], backend: str) -> None:
    assert placed_in(filters) == backend


@pytest.mark.parametrize(
    ("filters", "field", "on_offer"),
    [
        ({"clusters": ["moon"]}, "clusters", "east-1, west-1"),
        ({"regions": ["moon"]}, "regions", "east, west"),
        ({"clusters": ["east-1"], "regions": ["west"]}, "regions", "east"),
        ({"attributes": ["hipaa", "moonlight"]}, "attributes", "greenpower, hipaa"),
        ({"regions": ["east"], "attributes": ["greenpower"]}, "attributes", "hipaa"),
    ],
)
def test_what_cannot_be_placed_as_asked_is_refused_with_what_is_on_offer(
    filters: dict[str, list[str]], field: str, on_offer: str
) -> None:
    with pytest.raises(BadRequest, match=f"on offer: {on_offer}$") as refused:
        placed_in(filters)
    assert refused.value.field == f"deploymentSpecifications[0].{field}"


def test_where_no_place_is_told_none_can_be_asked_for() -> None:
    with pytest.raises(BadRequest, match="on offer: none"):
        deployments.place([replace(wanted(), regions=("local",))], GPUS)


def test_an_instance_type_that_is_not_given_is_the_gpus_default() -> None:
    (placed,) = deployments.place([wanted("H100")], GPUS)
    assert (placed.instance_type, placed.backend) == ("H100_1x", "local")


def test_two_specifications_may_ask_for_the_same() -> None:
    first, second = deployments.place([wanted(), wanted()], GPUS)
    assert first.id != second.id


@pytest.mark.parametrize(
    ("specifications", "field"),
    [
        ([], "deploymentSpecifications"),
        ([wanted("A100")], "deploymentSpecifications[0].gpu"),
        ([wanted(""), wanted()], "deploymentSpecifications[0].gpu"),
        ([wanted(), wanted("CPU", "H100_1x")], "deploymentSpecifications[1].instanceType"),
        ([wanted(backend="moon")], "deploymentSpecifications[0].backend"),
        ([wanted(minimum=-1)], "deploymentSpecifications[0].minInstances"),
        ([wanted(minimum=0, maximum=0)], "deploymentSpecifications[0].maxInstances"),
        ([wanted(minimum=2, maximum=1)], "deploymentSpecifications[0].maxInstances"),
        ([wanted(concurrency=0)], "deploymentSpecifications[0].maxRequestConcurrency"),
        ([wanted(concurrency=16_385)], "deploymentSpecifications[0].maxRequestConcurrency"),
    ],
)
def test_a_refused_specification_names_its_field(specifications: Sequence[GpuSpecification], field: str) -> None:
    with pytest.raises(BadRequest) as refused:
        deployments.place(specifications, GPUS)
    assert refused.value.field == field


def test_without_an_inventory_nothing_is_deployed() -> None:
    with pytest.raises(Unavailable, match="controller"):
        deployments.place([wanted()], [])


# -- deploy ------------------------------------------------------------------------------------


async def test_deploying_makes_the_queue_and_begins(broker: Broker, version: Version) -> None:
    deployed, deployment = await deploy(broker, version)
    assert deployed.status is S.DEPLOYING
    assert await stored(broker, version) == (deployed, deployment)
    assert await deployments.get(broker, OURS, version.function_id, version.id) == (deployed, deployment)


async def test_a_deployment_from_zero_is_active_at_once(broker: Broker, version: Version) -> None:
    deployed, _ = await deploy(broker, version, wanted(minimum=0), wanted(minimum=0))
    assert deployed.status is S.ACTIVE


@pytest.mark.parametrize("status", [S.DEPLOYING, S.ACTIVE, S.DEGRADING, S.DEGRADED])
async def test_a_busy_version_points_at_the_update(broker: Broker, version: Version, status: FunctionStatus) -> None:
    _, deployment = await deploy(broker, version)
    await turn(broker, version, status)
    with pytest.raises(StateConflict, match=f"PATCH /v2/nvcf/deployments/{deployment.id}/"):
        await deploy(broker, version)


async def test_a_faulty_version_asks_for_an_undeploy(broker: Broker, version: Version) -> None:
    await deploy(broker, version)
    await turn(broker, version, S.ERROR)
    with pytest.raises(StateConflict, match="undeploy"):
        await deploy(broker, version)
    await undeploy(broker, version)
    assert (await deploy(broker, version))[0].status is S.DEPLOYING


async def test_a_draining_version_is_not_deployed(broker: Broker, version: Version) -> None:
    await deploy(broker, version)
    await undeploy(broker, version, graceful=True)
    with pytest.raises(StateConflict, match="gracefully"):
        await deploy(broker, version)


async def test_a_foreign_version_is_not_found(broker: Broker, version: Version) -> None:
    with pytest.raises(NotFound):
        await deployments.deploy(broker, THEIRS, version.function_id, version.id, [wanted()])
    with pytest.raises(NotFound):
        await deployments.get(broker, THEIRS, version.function_id, version.id)


async def test_a_deployment_waits_for_a_removal_that_has_begun(broker: Broker, version: Version) -> None:
    _, old = await deploy(broker, version)
    await undeploy(broker, version)
    assert await deployments.claim_removal(broker, old)
    async with asyncio.TaskGroup() as group:
        again = group.create_task(deploy(broker, version))
        await deployments.finish_removal(broker, old)
    _, new = again.result()
    assert (await stored(broker, version))[1] == new


async def test_a_replaced_deployment_is_not_removed(broker: Broker, version: Version) -> None:
    _, old = await deploy(broker, version)
    await undeploy(broker, version)
    _, new = await deploy(broker, version)
    assert not await deployments.claim_removal(broker, old)
    assert (await stored(broker, version))[1] == new


# -- undeploy ----------------------------------------------------------------------------------


async def test_undeploying_is_inactive_at_once_and_keeps_the_row(broker: Broker, version: Version) -> None:
    await deploy(broker, version)
    assert (await undeploy(broker, version)).status is S.INACTIVE
    inactive, row = await stored(broker, version)
    assert inactive.status is S.INACTIVE
    assert (row.undeployed, row.draining) == (True, False)
    for verb in (deployments.get, deployments.undeploy):
        with pytest.raises(NotFound):
            await verb(broker, OURS, version.function_id, version.id)


async def test_a_graceful_undeploy_is_found_until_it_is_cut_short(broker: Broker, version: Version) -> None:
    await deploy(broker, version)
    await undeploy(broker, version, graceful=True)
    inactive, row = await deployments.get(broker, OURS, version.function_id, version.id)
    assert (inactive.status, row.draining) == (S.INACTIVE, True)
    await undeploy(broker, version)
    assert not (await stored(broker, version))[1].draining


async def test_a_faulty_version_has_nothing_to_drain(broker: Broker, version: Version) -> None:
    await deploy(broker, version)
    await turn(broker, version, S.ERROR)
    await undeploy(broker, version, graceful=True)
    assert not (await stored(broker, version))[1].draining


async def test_undeploying_what_is_not_deployed_is_not_found(broker: Broker, version: Version) -> None:
    with pytest.raises(NotFound):
        await undeploy(broker, version)


# -- the state table ---------------------------------------------------------------------------

NONE, START, RUN, DEAD = "none", "start", "run", "dead"


def sight(minimum: int, state: str) -> Sight:
    return Sight(
        specification=replace(wanted(minimum=minimum, maximum=max(1, minimum)), id=f"{minimum}{state}"),
        running=max(1, minimum) if state == RUN else 0,
        starting=max(1, minimum) if state == START else 0,
        error="boom" if state == DEAD else "",
        failed=state == DEAD,
    )


@pytest.mark.parametrize(
    ("before", "seen", "after"),
    [
        # A crash between the two writes of `deploy` leaves a deployment that is INACTIVE.
        (S.INACTIVE, [(1, NONE)], S.DEPLOYING),
        (S.INACTIVE, [(0, NONE)], S.ACTIVE),
        (S.DEPLOYING, [(1, NONE)], S.DEPLOYING),
        (S.DEPLOYING, [(1, START)], S.DEPLOYING),
        (S.DEPLOYING, [(1, RUN)], S.ACTIVE),
        (S.DEPLOYING, [(1, RUN), (1, START)], S.DEPLOYING),
        (S.DEPLOYING, [(1, RUN), (2, RUN)], S.ACTIVE),
        (S.DEPLOYING, [(1, RUN), (0, NONE)], S.ACTIVE),
        (S.DEPLOYING, [(1, DEAD)], S.ERROR),
        (S.DEPLOYING, [(1, DEAD), (1, START)], S.DEPLOYING),
        (S.DEPLOYING, [(1, DEAD), (1, RUN)], S.DEPLOYING),
        (S.DEPLOYING, [(1, DEAD), (1, DEAD)], S.ERROR),
        (S.ACTIVE, [(1, RUN)], S.ACTIVE),
        (S.ACTIVE, [(1, START)], S.DEGRADING),
        (S.ACTIVE, [(1, RUN), (1, NONE)], S.DEGRADING),
        (S.ACTIVE, [(1, NONE)], S.DEGRADED),
        (S.ACTIVE, [(1, DEAD)], S.DEGRADED),
        (S.ACTIVE, [(0, NONE)], S.ACTIVE),
        (S.ACTIVE, [(0, NONE), (1, NONE)], S.ACTIVE),
        (S.ACTIVE, [(0, DEAD)], S.ACTIVE),
        (S.DEGRADING, [(1, RUN)], S.ACTIVE),
        (S.DEGRADING, [(1, START)], S.DEGRADING),
        (S.DEGRADING, [(1, NONE)], S.DEGRADED),
        (S.DEGRADING, [(0, NONE), (1, NONE)], S.DEGRADED),
        (S.DEGRADED, [(1, START)], S.DEGRADING),
        (S.DEGRADED, [(1, RUN)], S.ACTIVE),
        (S.DEGRADED, [(1, NONE)], S.DEGRADED),
        (S.ERROR, [(1, RUN)], S.ERROR),
        (S.ERROR, [(0, NONE)], S.ERROR),
    ],
)
def test_the_next_status(before: FunctionStatus, seen: list[tuple[int, str]], after: FunctionStatus) -> None:
    sights = [sight(minimum, state) for minimum, state in seen]
    status, _ = next_status(before, sights, age_s=10.0, deploy_timeout_s=100.0)
    assert status is after


def test_deploying_for_too_long_is_an_error_that_says_so() -> None:
    late = replace(sight(2, START), delay="health check: HTTP 503")
    status, health = next_status(S.DEPLOYING, [late, sight(1, RUN)], age_s=100.0, deploy_timeout_s=100.0)
    assert status is S.ERROR
    assert [info.error for info in health] == ["2 of 2 instances were not ready within 100 s; health check: HTTP 503"]


def test_time_alone_breaks_nothing_that_is_active() -> None:
    status, _ = next_status(S.ACTIVE, [sight(1, RUN)], age_s=1e9, deploy_timeout_s=100.0)
    assert status is S.ACTIVE


def test_health_is_told_of_a_specification_whose_instances_all_failed() -> None:
    _, health = next_status(S.DEPLOYING, [sight(1, DEAD), sight(1, RUN)], age_s=0.0, deploy_timeout_s=100.0)
    assert [(info.gpu, info.error) for info in health] == [("CPU", "boom")]
    running = replace(sight(1, RUN), error="an older death")
    assert next_status(S.ACTIVE, [running], age_s=0.0, deploy_timeout_s=100.0) == (S.ACTIVE, ())


# -- observe -----------------------------------------------------------------------------------


async def observe(broker: Broker, deployment: Deployment, *sights: Sight) -> FunctionStatus | None:
    return await deployments.observe(broker, deployment, sights, now=deployment.created_at + 1, deploy_timeout_s=100.0)


async def test_what_is_observed_is_written(broker: Broker, version: Version) -> None:
    _, deployment = await deploy(broker, version)
    assert await observe(broker, deployment, sight(1, DEAD)) is S.ERROR
    failed, row = await stored(broker, version)
    assert failed.status is S.ERROR
    assert [info.error for info in row.health] == ["boom"]


async def test_health_is_cleared_when_instances_run(broker: Broker, version: Version) -> None:
    _, deployment = await deploy(broker, version)
    dying = replace(sight(1, START), error="first try died")
    await observe(broker, deployment, dying)
    assert len((await stored(broker, version))[1].health) == 1
    assert await observe(broker, deployment, sight(1, RUN)) is S.ACTIVE
    assert (await stored(broker, version))[1].health == ()


async def test_an_error_and_its_reason_stay_until_the_undeploy(broker: Broker, version: Version) -> None:
    _, deployment = await deploy(broker, version)
    await observe(broker, deployment, sight(1, DEAD))
    assert await observe(broker, deployment, sight(1, RUN)) is S.ERROR
    assert [info.error for info in (await stored(broker, version))[1].health] == ["boom"]


@pytest.mark.parametrize("graceful", [False, True])
async def test_an_undeployed_version_stays_inactive_whatever_runs(
    broker: Broker, version: Version, graceful: bool
) -> None:
    _, deployment = await deploy(broker, version)
    await undeploy(broker, version, graceful=graceful)
    assert await observe(broker, deployment, sight(1, RUN)) is None
    assert (await stored(broker, version))[0].status is S.INACTIVE


async def test_what_was_seen_of_a_replaced_deployment_is_not_written(broker: Broker, version: Version) -> None:
    _, old = await deploy(broker, version)
    await undeploy(broker, version)
    await deploy(broker, version)
    assert await observe(broker, old, sight(1, RUN)) is None
    assert (await stored(broker, version))[0].status is S.DEPLOYING


async def test_a_status_derived_before_an_undeploy_loses(broker: Broker, version: Version) -> None:
    """The race that the order of reads in `observe` is for, played step by step."""
    await deploy(broker, version)
    seen = await broker.catalog.versions.get(version.id)
    assert seen is not None
    await undeploy(broker, version)
    with pytest.raises(RevisionConflict):
        await broker.catalog.versions.put(replace(seen.item, status=S.ACTIVE), revision=seen.revision)
    assert (await stored(broker, version))[0].status is S.INACTIVE
