"""The verbs of a deployed GPU specification: change how many instances it keeps, and how they scale.

Every change is one compare-and-set of the deployment's row. The controller acts on it with its next pass; a changed
`max_request_concurrency` holds for the instances that it starts from then on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from broker import deployments
from broker.errors import BadRequest, NotFound, StateConflict
from broker.model import Autoscaling, Deployment, GpuSpecification, Principal, Version
from broker.ports import Broker
from broker.revisions import edit
from broker.visibility import find_version

UNKNOWN_SPECIFICATION = "no such GPU specification"

_FIELD = "deploymentSpecifications"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What to change of a specification; None leaves what is there.

    `id` says which, and may be empty where there is only one. `gpu`, `instance_type`, `backend` and `clusters` never
    change: what is given must be what is deployed. `platform_scaling` drops the user's own autoscaling policy.
    """

    id: str = ""
    gpu: str | None = None
    instance_type: str | None = None
    backend: str | None = None
    clusters: tuple[str, ...] | None = None
    min_instances: int | None = None
    max_instances: int | None = None
    max_request_concurrency: int | None = None
    autoscaling: Autoscaling | None = None
    platform_scaling: bool = False


async def update(
    broker: Broker, principal: Principal, function_id: str, version_id: str, changes: Sequence[Change]
) -> tuple[Version, Deployment]:
    """Change all specifications of a deployment at once; as many changes as there are specifications.

    Raises:
        NotFound: no such version, or it is not deployed.
        BadRequest: names the specification's field at fault.
        StateConflict: the deployment is faulty, or being undeployed; or the function is public.
    """
    await find_version(broker, principal, function_id, version_id)
    version, _ = await deployments.get(broker, principal, function_id, version_id)
    return version, await _edit(broker, version, lambda specifications: _update(specifications, changes))


async def patch(broker: Broker, principal: Principal, deployment_id: str, change: Change) -> GpuSpecification:
    """Change the one specification that `change.id` names.

    Raises:
        NotFound: no such deployment or specification.
        BadRequest: names the field at fault.
        StateConflict: the deployment is faulty, or being undeployed; or the function is public.
    """
    version, _ = await deployments.find(broker, principal, deployment_id)
    await find_version(broker, principal, version.function_id, version.id)

    def apply(specifications: Sequence[GpuSpecification]) -> tuple[GpuSpecification, ...]:
        if change.id not in {specification.id for specification in specifications}:
            raise NotFound(UNKNOWN_SPECIFICATION)
        return tuple(_changed(each, change, "") if each.id == change.id else each for each in specifications)

    deployment = await _edit(broker, version, apply, deployment_id=deployment_id)
    return next(each for each in deployment.specifications if each.id == change.id)


async def _edit(
    broker: Broker,
    version: Version,
    change: Callable[[Sequence[GpuSpecification]], tuple[GpuSpecification, ...]],
    *,
    deployment_id: str = "",
) -> Deployment:
    def apply(stored: Deployment) -> Deployment:
        if deployments.gone(stored) or (deployment_id and stored.id != deployment_id):
            raise NotFound(deployments.NO_DEPLOYMENT)
        specifications = change(stored.specifications)
        # Last, so that who asks for the impossible hears that in every state.
        if stored.undeployed or not version.status.busy:
            raise StateConflict(f"the deployment cannot be changed now: the function version is {version.status}")
        if specifications == stored.specifications:
            return stored
        return replace(stored, specifications=specifications, updated_at=time.time())

    deployment = await edit(broker.catalog.deployments, version.id, apply)
    if deployment is None:
        raise NotFound(deployments.NO_DEPLOYMENT)
    return deployment


def _update(stored: Sequence[GpuSpecification], changes: Sequence[Change]) -> tuple[GpuSpecification, ...]:
    if len(changes) != len(stored):
        raise BadRequest(f"{_FIELD}: as many are needed as are deployed, {len(stored)}", field=_FIELD)
    if len(stored) == 1 and not changes[0].id:
        return (_changed(stored[0], changes[0], f"{_FIELD}[0]."),)
    at = {change.id: position for position, change in enumerate(changes)}
    if set(at) != {specification.id for specification in stored}:
        raise BadRequest(f"{_FIELD}: each needs its own gpuSpecificationId, as the deployment has them", field=_FIELD)
    return tuple(_changed(each, changes[at[each.id]], f"{_FIELD}[{at[each.id]}].") for each in stored)


def _changed(stored: GpuSpecification, change: Change, at: str) -> GpuSpecification:
    _check_unchanged(stored, change, at)
    wanted = replace(
        stored,
        min_instances=stored.min_instances if change.min_instances is None else change.min_instances,
        max_instances=stored.max_instances if change.max_instances is None else change.max_instances,
        max_request_concurrency=(
            stored.max_request_concurrency if change.max_request_concurrency is None else change.max_request_concurrency
        ),
        autoscaling=None if change.platform_scaling else change.autoscaling or stored.autoscaling,
    )
    deployments.check_numbers(wanted, at)
    return wanted


def _check_unchanged(stored: GpuSpecification, change: Change, at: str) -> None:
    fixed = (
        ("gpu", stored.gpu, change.gpu),
        ("instanceType", stored.instance_type, change.instance_type),
        ("backend", stored.backend, change.backend),
    )
    for field, deployed, given in fixed:
        if given is not None and given.lower() != deployed.lower():
            raise BadRequest(f"{at}{field}: cannot be changed, undeploy first", field=f"{at}{field}")
    if change.clusters is not None and _folded(change.clusters) != _folded(stored.clusters):
        raise BadRequest(f"{at}clusters: cannot be changed, undeploy first", field=f"{at}clusters")


def _folded(names: Sequence[str]) -> set[str]:
    return {name.lower() for name in names}
