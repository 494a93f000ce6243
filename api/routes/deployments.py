"""Deployments (contract/management.md §2)."""

from __future__ import annotations

from aiohttp import web

from api import definitions, headers, payloads, queries
from api import specifications as specs
from api.front import Front
from api.routes import functions
from broker import deployments, specifications
from broker.model import Deployment, Principal, Version
from fnqueue import wire


async def create(front: Front, request: web.Request, principal: Principal) -> web.Response:
    function_id, version_id = functions.ids(request)
    asked = await payloads.read(front, request, wire.CreateDeployment)
    wanted = [specs.specification(specification) for specification in asked.deployment_specifications]
    version, deployment = await deployments.deploy(front.broker, principal, function_id, version_id, wanted)
    front.versions.forget(function_id)
    return _one(version, deployment)


async def get(front: Front, request: web.Request, principal: Principal) -> web.Response:
    function_id, version_id = functions.ids(request)
    return _one(*await deployments.get(front.broker, principal, function_id, version_id))


async def find(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """By the deployment's own ID."""
    deployment_id = headers.uuid(request.match_info["deployment_id"], field="deploymentId")
    return _one(*await deployments.find(front.broker, principal, deployment_id))


async def update(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """The deprecated way: all specifications at once."""
    function_id, version_id = functions.ids(request)
    asked = await payloads.read(front, request, wire.UpdateDeployment)
    changes = [specs.change(specification) for specification in asked.deployment_specifications]
    return _one(*await specifications.update(front.broker, principal, function_id, version_id, changes))


async def patch(front: Front, request: web.Request, principal: Principal) -> web.Response:
    deployment_id = headers.uuid(request.match_info["deployment_id"], field="deploymentId")
    specification_id = headers.uuid(request.match_info["gpu_specification_id"], field="gpuSpecificationId")
    change = specs.patch(specification_id, await payloads.read(front, request, wire.UpdateGpuSpecification))
    changed = await specifications.patch(front.broker, principal, deployment_id, change)
    return payloads.answer(wire.GpuSpecificationAnswer(gpu_specification=specs.shown(changed)))


async def delete(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """Undeploy; answers with the function, as upstream does."""
    function_id, version_id = functions.ids(request)
    graceful = queries.boolean(request.query, "graceful", absent=False)
    version = await deployments.undeploy(front.broker, principal, function_id, version_id, graceful=graceful)
    front.versions.forget(function_id)
    return payloads.answer(wire.FunctionAnswer(function=definitions.present(version, principal)))


async def of_account(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """What is busy or in ERROR, of the account that the path names."""
    found = await deployments.list_deployments(front.broker, request.match_info["nca_id"])
    return payloads.answer(wire.DeploymentList(deployments=[specs.present(*each) for each in found]))


async def evict(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """It finishes what it runs. Where a minimum asks for one, another takes its place."""
    await deployments.evict(front.broker, headers.uuid(request.match_info["instance_id"], field="instanceId"))
    return web.Response(status=204)


def _one(version: Version, deployment: Deployment) -> web.Response:
    return payloads.answer(wire.DeploymentAnswer(deployment=specs.present(version, deployment)))
