"""Deployments (contract/management.md §2)."""

from __future__ import annotations

from aiohttp import web

from api import payloads
from api.front import Front
from api.routes import functions
from broker import deployments
from broker.errors import BadRequest
from broker.model import Deployment, GpuSpecification, Principal, Version
from fnqueue import wire

_YES = frozenset({"true", "1", "yes", "on"})
_NO = frozenset({"", "false", "0", "no", "off"})


async def create(front: Front, request: web.Request, principal: Principal) -> web.Response:
    function_id, version_id = functions.ids(request)
    asked = await payloads.read(front, request, wire.CreateDeployment)
    specifications = [_specification(specification) for specification in asked.deployment_specifications]
    version, deployment = await deployments.deploy(front.broker, principal, function_id, version_id, specifications)
    front.versions.forget(function_id)
    return _one(version, deployment)


async def get(front: Front, request: web.Request, principal: Principal) -> web.Response:
    function_id, version_id = functions.ids(request)
    return _one(*await deployments.get(front.broker, principal, function_id, version_id))


async def delete(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """Undeploy; answers with the function, as upstream does."""
    function_id, version_id = functions.ids(request)
    graceful = _boolean(request.query.get("graceful", ""), field="graceful")
    version = await deployments.undeploy(front.broker, principal, function_id, version_id, graceful=graceful)
    front.versions.forget(function_id)
    return payloads.answer(wire.FunctionAnswer(function=functions.present(version)))


def _one(version: Version, deployment: Deployment) -> web.Response:
    return payloads.answer(wire.DeploymentAnswer(deployment=_present(version, deployment)))


def _present(version: Version, deployment: Deployment) -> wire.Deployment:
    health = [
        wire.HealthInfo(gpu=info.gpu, backend=info.backend or None, instance_type=info.instance_type, error=info.error)
        for info in deployment.health
    ]
    return wire.Deployment(
        function_id=deployment.function_id,
        function_version_id=deployment.version_id,
        deployment_id=deployment.id,
        function_name=version.name,
        nca_id=deployment.account,
        function_status=version.status.value,
        health_info=health or None,
        deployment_specifications=[
            wire.GpuSpecification(
                gpu_specification_id=specification.id,
                gpu=specification.gpu,
                instance_type=specification.instance_type,
                backend=specification.backend or None,
                min_instances=specification.min_instances,
                max_instances=specification.max_instances,
                max_request_concurrency=specification.max_request_concurrency,
            )
            for specification in deployment.specifications
        ],
        created_at=functions.instant(deployment.created_at),
        last_updated_at=functions.instant(deployment.updated_at),
    )


def _specification(asked: wire.GpuSpecificationRequest) -> GpuSpecification:
    """`broker.deployments` fills in what is empty, and the id."""
    return GpuSpecification(
        id="",
        gpu=asked.gpu,
        instance_type=asked.instance_type or "",
        backend=asked.backend or "",
        min_instances=asked.min_instances,
        max_instances=asked.max_instances,
        max_request_concurrency=asked.max_request_concurrency,
    )


def _boolean(text: str, *, field: str) -> bool:
    word = text.strip().lower()
    if word not in _YES | _NO:
        raise BadRequest(f"{field}: must be true or false", field=field)
    return word in _YES
