"""The verbs of a deployment: deploy, get, undeploy; and observe, by which the controller moves a version's status.

The deployment row is the desired state and the version's status follows it, so rows are written in this order:
deploy stores the row, then the status; undeploy marks the row, then sets INACTIVE. Whoever derives a status from
a row reads the version *before* the row: then a status that went stale in between fails on the version's
revision. A crash between two writes is healed by the controller's next look.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from broker.errors import BadRequest, NotFound, RevisionConflict, StateConflict, Unavailable
from broker.model import Deployment, FunctionStatus, Gpu, GpuSpecification, HealthInfo, Place, Principal, Version
from broker.ports import Broker, Row
from broker.revisions import TRIES, edit
from broker.visibility import UNKNOWN_VERSION, find_version

MAX_CONCURRENCY = 16_384
NO_DEPLOYMENT = "the function version has no deployment"
UNKNOWN_DEPLOYMENT = "no such deployment"

_FIELD = "deploymentSpecifications"
_GIB = 2**30
_REMOVAL_S = 2.0
_REMOVAL_LOOK_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What the controller sees of one GPU specification: instances by state, why the last one died, what keeps the
    starting ones from running, and whether they `failed`: died again and again and never ran. `quarantined`: `error`
    is that of an instance which takes no more work."""

    specification: GpuSpecification
    running: int = 0
    starting: int = 0
    error: str = ""
    delay: str = ""
    failed: bool = False
    quarantined: bool = False

    @property
    def satisfied(self) -> bool:
        return self.running >= self.specification.min_instances


async def deploy(
    broker: Broker, principal: Principal, function_id: str, version_id: str, specifications: Sequence[GpuSpecification]
) -> tuple[Version, Deployment]:
    """Make the version's queue, then store what is desired. `id` and `instance_type` of a specification may be
    empty: they are filled in. The version is DEPLOYING, or ACTIVE at once when every minimum is 0.

    A deployment that was undeployed and is not yet cleaned up is replaced; requests still queued from it run.

    Raises:
        NotFound: unknown or foreign version.
        BadRequest: names the specification's field at fault, or what of the version cannot be run here.
        StateConflict: there is a deployment already.
        Unavailable: there is nothing to place it on yet.
    """
    version = await find_version(broker, principal, function_id, version_id)
    _check_runnable(version)
    now = time.time()
    deployment = Deployment(
        id=str(uuid.uuid4()),
        function_id=function_id,
        version_id=version_id,
        account=version.account,
        specifications=place(specifications, await broker.catalog.gpus()),
        created_at=now,
        updated_at=now,
    )
    await _store(broker, version, deployment)
    status = _first_status(deployment.specifications)

    def begin(stored: Version) -> Version:
        # The controller may have seen the row already and be ahead.
        return replace(stored, status=status) if stored.status is FunctionStatus.INACTIVE else stored

    deployed = await edit(broker.catalog.versions, version_id, begin)
    if deployed is None:
        await disown(broker, deployment)
        raise NotFound(UNKNOWN_VERSION)
    return deployed, deployment


async def get(broker: Broker, principal: Principal, function_id: str, version_id: str) -> tuple[Version, Deployment]:
    """A deployment that is undeployed gracefully is found until it has drained. Raises NotFound."""
    version = await find_version(broker, principal, function_id, version_id, changing=False)
    row = await broker.catalog.deployments.get(version_id)
    if row is None or gone(row.item):
        raise NotFound(NO_DEPLOYMENT)
    return version, row.item


async def find(broker: Broker, principal: Principal, deployment_id: str) -> tuple[Version, Deployment]:
    """As `get`, by the deployment's own ID. Raises NotFound."""
    for row in await broker.catalog.deployments.list("account", principal.account):
        if row.item.id == deployment_id:
            return await get(broker, principal, row.item.function_id, row.item.version_id)
    raise NotFound(UNKNOWN_DEPLOYMENT)


async def list_deployments(broker: Broker, account: str) -> list[tuple[Version, Deployment]]:
    """What an account has deployed, oldest first: all that is busy, or in ERROR."""
    rows = [row.item for row in await broker.catalog.deployments.list("account", account)]
    versions = await asyncio.gather(*(broker.catalog.versions.get(deployment.version_id) for deployment in rows))
    return [
        (version.item, deployment)
        for version, deployment in zip(versions, rows, strict=True)
        if version
        and not gone(deployment)
        and (version.item.status.busy or version.item.status is FunctionStatus.ERROR)
    ]


async def evict(broker: Broker, instance_id: str) -> None:
    """Have an instance of whichever account stopped, once it has finished what it runs; the controller starts
    another where a minimum asks for one. Raises NotFound: no deployment keeps an instance of that ID."""
    for row in await broker.catalog.deployments.list():
        kept = {specification.id for specification in row.item.specifications}
        for instance in await broker.catalog.instances(row.item.version_id):
            if instance.id == instance_id and instance.specification_id in kept:
                await edit(
                    broker.catalog.deployments, row.item.version_id, lambda stored: _evicting(stored, instance_id)
                )
                return
    raise NotFound("no such instance")


async def undeploy(
    broker: Broker, principal: Principal, function_id: str, version_id: str, *, graceful: bool = False
) -> Version:
    """Take no more invocations from now on; the controller stops the instances and removes the queue last.

    Queued requests are cancelled, unless `graceful`: then the instances stay until nothing is queued or running.
    A second call without `graceful` cuts a graceful one short. In ERROR there are no instances to finish
    anything, so `graceful` means nothing. Returns the version, INACTIVE. Raises NotFound.
    """
    await find_version(broker, principal, function_id, version_id)
    version, _ = await get(broker, principal, function_id, version_id)
    await _mark_undeployed(broker, version_id, draining=graceful and version.status is not FunctionStatus.ERROR)
    return await deactivate(broker, version_id) or replace(version, status=FunctionStatus.INACTIVE)


# -- the controller's side -----------------------------------------------------------------------


def next_status(
    current: FunctionStatus, sights: Sequence[Sight], *, age_s: float, deploy_timeout_s: float
) -> tuple[FunctionStatus, tuple[HealthInfo, ...]]:
    """The status of a deployed version and why it is not well (contract/management.md §1.10).

    `age_s` is the age of the deployment. Not as upstream: DEPLOYING ends in ERROR after `deploy_timeout_s`.
    Health is told of a specification that has no running instance and lost its last one, or has one in quarantine.
    """
    health = tuple(_health(sight) for sight in sights if sight.error and (sight.quarantined or not sight.running))
    if current is FunctionStatus.ERROR:
        return current, health
    if all(sight.satisfied for sight in sights):
        return FunctionStatus.ACTIVE, health
    if current in (FunctionStatus.INACTIVE, FunctionStatus.DEPLOYING):
        return _while_deploying(sights, health, late=age_s >= deploy_timeout_s, deploy_timeout_s=deploy_timeout_s)
    if any(sight.running + sight.starting for sight in sights):
        return FunctionStatus.DEGRADING, health
    may_be_empty = any(sight.specification.min_instances == 0 for sight in sights)
    if current is FunctionStatus.ACTIVE and may_be_empty:
        return FunctionStatus.ACTIVE, health
    return FunctionStatus.DEGRADED, health


async def observe(
    broker: Broker, deployment: Deployment, sights: Sequence[Sight], *, now: float, deploy_timeout_s: float
) -> FunctionStatus | None:
    """Write the status and health that follow from what was seen; returns the status, None when the deployment
    was undeployed or replaced meanwhile."""
    for _ in range(TRIES):
        version = await broker.catalog.versions.get(deployment.version_id)
        row = await broker.catalog.deployments.get(deployment.version_id)
        if version is None or row is None or row.item.id != deployment.id or row.item.undeployed:
            return None
        current = version.item.status
        if current is FunctionStatus.ERROR:
            return current
        status, health = next_status(
            current, sights, age_s=now - row.item.created_at, deploy_timeout_s=deploy_timeout_s
        )
        try:
            # Health first: who sees ERROR finds the reason.
            if health != row.item.health:
                await broker.catalog.deployments.put(replace(row.item, health=health), revision=row.revision)
            if status is not current:
                await broker.catalog.versions.put(replace(version.item, status=status), revision=version.revision)
        except RevisionConflict:
            continue
        return status
    raise RevisionConflict(f"{deployment.version_id} keeps being changed by others; try again")


async def deactivate(broker: Broker, version_id: str) -> Version | None:
    """INACTIVE, if the version still exists and was not deployed anew meanwhile: then it is returned as it is.
    For a version whose deployment row is undeployed. Idempotent."""
    for _ in range(TRIES):
        version = await broker.catalog.versions.get(version_id)
        if version is None:
            return None
        row = await broker.catalog.deployments.get(version_id)
        if version.item.status is FunctionStatus.INACTIVE or (row is not None and not row.item.undeployed):
            return version.item
        inactive = replace(version.item, status=FunctionStatus.INACTIVE)
        try:
            await broker.catalog.versions.put(inactive, revision=version.revision)
        except RevisionConflict:
            continue
        return inactive
    raise RevisionConflict(f"{version_id} keeps being changed by others; try again")


async def forget_evicted(broker: Broker, deployment: Deployment, there: Collection[str]) -> None:
    """Of the evicted instances, keep in mind those that are still `there`."""

    def forget(stored: Deployment) -> Deployment:
        return replace(stored, evicted=tuple(each for each in stored.evicted if each in there))

    await edit(broker.catalog.deployments, deployment.version_id, forget)


async def disown(broker: Broker, deployment: Deployment) -> None:
    """Undeploy what nobody asks for any more: its version no longer exists, or it has been in ERROR for long."""
    await _mark_undeployed(broker, deployment.version_id, draining=False, deployment_id=deployment.id)


async def claim_removal(broker: Broker, deployment: Deployment) -> bool:
    """From now on nobody replaces the row, so its queue may be deleted. False when it was replaced before."""

    def claim(stored: Deployment) -> Deployment:
        removable = stored.id == deployment.id and stored.undeployed
        return replace(stored, removing=True) if removable else stored

    claimed = await edit(broker.catalog.deployments, deployment.version_id, claim)
    return claimed is not None and claimed.removing


async def finish_removal(broker: Broker, deployment: Deployment) -> None:
    """Delete the queue, then the row, of a claimed deployment. Idempotent."""
    await broker.queue.delete(deployment.version_id)
    await broker.catalog.deployments.delete(deployment.version_id)


def gone(deployment: Deployment) -> bool:
    """Whether callers see no deployment any more, though its remains may still be there."""
    return deployment.undeployed and not deployment.draining


# -- placing -------------------------------------------------------------------------------------


def place(specifications: Sequence[GpuSpecification], gpus: Sequence[Gpu]) -> tuple[GpuSpecification, ...]:
    """The specifications with the inventory's spelling and facts, default instance types, and ids.

    Raises BadRequest, and Unavailable while nothing is on offer.
    """
    if not specifications:
        raise BadRequest(f"{_FIELD}: at least one is needed", field=_FIELD)
    return tuple(
        _place(specification, gpus, f"{_FIELD}[{position}]") for position, specification in enumerate(specifications)
    )


def _place(specification: GpuSpecification, gpus: Sequence[Gpu], at: str) -> GpuSpecification:
    check_numbers(specification, f"{at}.")
    if not gpus:
        raise Unavailable("no GPU is on offer now: no controller is running, or it has just been started")
    rows = _matching(gpus, "backend", specification.backend, f"{at}.backend")
    rows = _admitting(rows, specification, at)
    rows = _matching(rows, "name", specification.gpu, f"{at}.gpu", required=True)
    rows = _matching(rows, "instance_type", specification.instance_type, f"{at}.instanceType")
    gpu = rows[0]
    return replace(
        specification,
        id=str(uuid.uuid4()),
        gpu=gpu.name,
        instance_type=gpu.instance_type,
        backend=gpu.backend,
        facts=facts(gpu),
    )


def left_out(specification: GpuSpecification, place: Place) -> str:
    """The first of `clusters`, `regions` and `attributes` that keeps the specification from a place; '' if none."""
    if specification.clusters and place.cluster.lower() not in _folded(specification.clusters):
        return "clusters"
    if specification.regions and place.region.lower() not in _folded(specification.regions):
        return "regions"
    return "" if _folded(specification.attributes) <= _folded(place.attributes) else "attributes"


def _admitting(gpus: Sequence[Gpu], specification: GpuSpecification, at: str) -> Sequence[Gpu]:
    """Those in places where the specification may be. Raises BadRequest that names the field that none satisfies."""
    for field in ("clusters", "regions", "attributes"):
        admitting = [gpu for gpu in gpus if left_out(specification, gpu.place) != field]
        if not admitting:
            known = ", ".join(sorted({name for gpu in gpus for name in _names(gpu.place, field) if name})) or "none"
            raise BadRequest(f"{at}.{field}: nothing is on offer there; on offer: {known}", field=f"{at}.{field}")
        gpus = admitting
    return gpus


def _names(place: Place, field: str) -> tuple[str, ...]:
    return {"clusters": (place.cluster,), "regions": (place.region,), "attributes": place.attributes}[field]


def _folded(names: Iterable[str]) -> set[str]:
    return {name.lower() for name in names}


def facts(gpu: Gpu) -> tuple[tuple[str, str], ...]:
    """What is known of the machine, as text; memory as `80G`, in units of 2^30."""
    known = (
        ("cpu_arch", gpu.cpu_arch),
        ("os", gpu.os),
        ("driver_version", gpu.driver_version),
        ("system_memory", _gibibytes(gpu.system_memory_bytes)),
        ("gpu_memory", _gibibytes(gpu.gpu_memory_bytes)),
    )
    return tuple((name, value) for name, value in known if value)


def _gibibytes(size_bytes: int) -> str:
    return f"{round(size_bytes / _GIB)}G" if size_bytes else ""


def _matching(gpus: Sequence[Gpu], attribute: str, wanted: str, field: str, *, required: bool = False) -> Sequence[Gpu]:
    if not wanted and not required:
        return gpus
    rows = [gpu for gpu in gpus if getattr(gpu, attribute).lower() == wanted.lower()]
    if not rows:
        known = ", ".join(sorted({getattr(gpu, attribute) for gpu in gpus}))
        raise BadRequest(f"{field}: unknown {wanted[:64]!r}; on offer: {known}", field=field)
    return rows


def check_numbers(specification: GpuSpecification, at: str = "") -> None:
    """Raises BadRequest that names the field, behind the path `at`."""

    def check(good: bool, field: str, rule: str) -> None:
        if not good:
            raise BadRequest(f"{at}{field}: {rule}", field=f"{at}{field}")

    lowest = max(1, specification.min_instances)
    concurrency = specification.max_request_concurrency
    check(specification.min_instances >= 0, "minInstances", "must be 0 or more")
    check(specification.max_instances >= lowest, "maxInstances", "must be at least 1 and at least minInstances")
    check(1 <= concurrency <= MAX_CONCURRENCY, "maxRequestConcurrency", f"must be 1 to {MAX_CONCURRENCY}")


def _check_runnable(version: Version) -> None:
    """What may be registered and cannot be run: this server starts containers."""
    if version.helm_chart:
        raise BadRequest("helmChart: Helm functions cannot be deployed here, containers can", field="helmChart")
    if not version.container_image:
        raise BadRequest(
            "containerImage: a function of models alone cannot be deployed here; register a version with an image",
            field="containerImage",
        )


# -- storing -------------------------------------------------------------------------------------


async def _store(broker: Broker, version: Version, deployment: Deployment) -> None:
    for _ in range(TRIES):
        row = await _replaceable(broker, version)
        if row is not None:  # its undeploy may be yet to say so, and `deploy` begins from INACTIVE
            await deactivate(broker, version.id)
        await broker.queue.declare(version.id)
        try:
            await broker.catalog.deployments.put(deployment, revision=row.revision if row else 0)
        except RevisionConflict:
            continue
        return
    raise RevisionConflict(f"{version.id} keeps being changed by others; try again")


async def _replaceable(broker: Broker, version: Version) -> Row[Deployment] | None:
    """The row that a new deployment may take the place of. A removal that has begun takes a moment: waits."""
    loop = asyncio.get_running_loop()
    until = loop.time() + _REMOVAL_S
    while True:
        row = await broker.catalog.deployments.get(version.id)
        if row is None:
            return None
        if not gone(row.item):
            raise _conflict(version, row.item)
        if not row.item.removing:
            return row
        if loop.time() >= until:
            raise StateConflict("the last deployment of this function version is still being removed; try again")
        await asyncio.sleep(_REMOVAL_LOOK_S)


def _evicting(deployment: Deployment, instance_id: str) -> Deployment:
    return replace(deployment, evicted=tuple(dict.fromkeys((*deployment.evicted, instance_id))))


def _conflict(version: Version, deployment: Deployment) -> StateConflict:
    if deployment.draining:
        return StateConflict("the function version is being undeployed gracefully; wait for that, or undeploy it now")
    if version.status is FunctionStatus.ERROR:
        return StateConflict("the function version has a faulty deployment; undeploy it first")
    return StateConflict(
        "the function version is deployed already; change its instances with "
        f"PATCH /v2/nvcf/deployments/{deployment.id}/gpu-specifications/{{gpuSpecificationId}}"
    )


async def _mark_undeployed(broker: Broker, version_id: str, *, draining: bool, deployment_id: str = "") -> None:
    """Whichever deployment the version has, unless told which."""

    def mark(deployment: Deployment) -> Deployment:
        if gone(deployment) or (deployment_id and deployment.id != deployment_id):
            return deployment
        return replace(deployment, undeployed=True, draining=draining, updated_at=time.time())

    await edit(broker.catalog.deployments, version_id, mark)


def _first_status(specifications: Iterable[GpuSpecification]) -> FunctionStatus:
    from_zero = all(specification.min_instances == 0 for specification in specifications)
    return FunctionStatus.ACTIVE if from_zero else FunctionStatus.DEPLOYING


# -- status --------------------------------------------------------------------------------------


def _while_deploying(
    sights: Sequence[Sight], health: tuple[HealthInfo, ...], *, late: bool, deploy_timeout_s: float
) -> tuple[FunctionStatus, tuple[HealthInfo, ...]]:
    waiting = [sight for sight in sights if not sight.satisfied]
    nothing_runs = not any(sight.running for sight in sights)
    if nothing_runs and all(sight.failed for sight in waiting):
        return FunctionStatus.ERROR, health
    if late:
        return FunctionStatus.ERROR, tuple(_late(sight, deploy_timeout_s) for sight in waiting)
    return FunctionStatus.DEPLOYING, health


def _health(sight: Sight) -> HealthInfo:
    specification = sight.specification
    return HealthInfo(
        gpu=specification.gpu,
        instance_type=specification.instance_type,
        backend=specification.backend,
        error=sight.error,
        specification_id=specification.id,
    )


def _late(sight: Sight, deploy_timeout_s: float) -> HealthInfo:
    missing = sight.specification.min_instances - sight.running
    late = f"{missing} of {sight.specification.min_instances} instances were not ready within {deploy_timeout_s:g} s"
    return replace(_health(sight), error="; ".join(filter(None, (late, sight.delay, sight.error))))
