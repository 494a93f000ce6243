"""Functions and their versions (contract/management.md §1)."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from aiohttp import web

from api import headers, limits, payloads, queries
from api.front import Front
from api.routes.secrets import plains
from broker import functions, secrets
from broker.functions import Definition
from broker.model import Health, Instance, InstanceStatus, Principal, Version
from fnqueue import wire

# What other accounts do not see of a function (contract/management.md §1.6).
REDACTED = (
    "inference_url",
    "inference_port",
    "container_args",
    "container_environment",
    "container_image",
    "models",
    "resources",
    "helm_chart",
    "helm_chart_service_name",
    "active_instances",
    "secrets",
    "rate_limit",
)


async def create(front: Front, request: web.Request, principal: Principal) -> web.Response:
    definition = _definition(await payloads.read(front, request, wire.CreateFunction))
    return _one(await functions.create(front.broker, principal, definition))


async def add_version(front: Front, request: web.Request, principal: Principal) -> web.Response:
    function_id = headers.uuid(request.match_info["function_id"], field="functionId")
    definition = _definition(await payloads.read(front, request, wire.CreateFunction))
    return _one(await functions.add_version(front.broker, principal, function_id, definition))


async def list_functions(front: Front, request: web.Request, principal: Principal) -> web.Response:
    found = await functions.list_functions(front.broker, principal, visibility=_visibility(request))
    return payloads.answer(wire.FunctionList(functions=[present_to(principal, version) for version in found]))


async def list_ids(front: Front, request: web.Request, principal: Principal) -> web.Response:
    found = await functions.list_functions(front.broker, principal, visibility=_visibility(request))
    return payloads.answer(wire.FunctionIds(function_ids=list(dict.fromkeys(version.function_id for version in found))))


async def list_versions(front: Front, request: web.Request, principal: Principal) -> web.Response:
    function_id = headers.uuid(request.match_info["function_id"], field="functionId")
    found = await functions.list_versions(front.broker, principal, function_id)
    return payloads.answer(wire.FunctionList(functions=[present_to(principal, version) for version in found]))


async def get(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """With its instances and the names of its secrets, for those of its account who may see details."""
    function_id, version_id = ids(request)
    named = queries.boolean(request.query, "includeSecrets", absent=True)
    version = await functions.get(front.broker, principal, function_id, version_id)
    if version.account != principal.account:
        return payloads.answer(wire.FunctionAnswer(function=present_to(principal, version)))
    if "list_functions_details" not in principal.scopes:
        return _one(version)
    shown = present(version, await front.broker.catalog.instances(version.id))
    names = await secrets.names(front.broker, version.id) if named else []
    return payloads.answer(wire.FunctionAnswer(function=shown.model_copy(update={"secrets": names or None})))


async def delete_version(front: Front, request: web.Request, principal: Principal) -> web.Response:
    function_id, version_id = ids(request)
    await functions.delete_version(front.broker, principal, function_id, version_id)
    front.versions.forget(function_id)
    return web.Response(status=204)


def ids(request: web.Request) -> tuple[str, str]:
    """The function and the version that the path names. Raises BadRequest."""
    return (
        headers.uuid(request.match_info["function_id"], field="functionId"),
        headers.uuid(request.match_info["version_id"], field="functionVersionId"),
    )


def present_to(principal: Principal, version: Version) -> wire.Function:
    """A version as this caller may see it: those it is shared with do not see how it is made."""
    whole = present(version)
    if version.account == principal.account:
        return whole
    hidden: dict[str, object] = {name: None for name in REDACTED if name in wire.Function.model_fields}
    return whole.model_copy(update=hidden | {"owned_by_different_account": True})


def present(version: Version, instances: Iterable[Instance] | None = None) -> wire.Function:
    """A version as its owner sees it."""
    health = wire.FunctionHealth(
        protocol=version.health.protocol,
        uri=version.health.uri,
        port=version.health.port,
        timeout=version.health.timeout,
        expected_status_code=version.health.expected_status,
    )
    return wire.Function(
        id=version.function_id,
        nca_id=version.account,
        version_id=version.id,
        name=version.name,
        status=version.status.value,
        inference_url=version.inference_url,
        inference_port=version.inference_port,
        container_args=version.container_args or None,
        container_environment=[
            wire.EnvironmentVariable(key=key, value=value) for key, value in version.container_environment
        ]
        or None,
        container_image=version.container_image,
        api_body_format=version.api_body_format,
        health_uri=version.health.uri,
        health=health,
        created_at=instant(version.created_at),
        active_instances=None if instances is None else [_instance(one) for one in instances if _shown(one)],
        tags=list(version.tags) or None,
        description=version.description,
        function_type=version.function_type,
        rate_limit=limits.present(version.rate_limit) if version.rate_limit else None,
        queue_timeout=f"PT{version.queue_timeout_s:.15g}S" if version.queue_timeout_s else None,
        run_timeout=f"PT{version.run_timeout_s:.15g}S" if version.run_timeout_s else None,
    )


def instant(unix_s: float) -> datetime:
    return datetime.fromtimestamp(unix_s, UTC)


def _one(version: Version) -> web.Response:
    return payloads.answer(wire.FunctionAnswer(function=present(version)))


def _shown(instance: Instance) -> bool:
    return instance.status in (InstanceStatus.STARTING, InstanceStatus.RUNNING)


def _instance(instance: Instance) -> wire.Instance:
    return wire.Instance(
        instance_id=instance.id,
        function_id=instance.function_id,
        function_version_id=instance.version_id,
        instance_type=instance.instance_type,
        instance_status=instance.status.value,
        nca_id=instance.account,
        gpu=instance.gpu,
        backend=instance.backend or None,
        instance_created_at=instant(instance.created_at),
        instance_updated_at=instant(instance.updated_at),
    )


def _visibility(request: web.Request) -> list[str]:
    return queries.words(request.query, "visibility")


def _definition(asked: wire.CreateFunction) -> Definition:
    return Definition(
        name=asked.name,
        inference_url=asked.inference_url,
        container_image=asked.container_image or "",
        inference_port=asked.inference_port,
        health=_health(asked.health) if asked.health else None,
        health_uri=asked.health_uri or "",
        container_args=asked.container_args,
        container_environment=tuple((variable.key, variable.value) for variable in asked.container_environment),
        api_body_format=asked.api_body_format,
        function_type=asked.function_type,
        description=asked.description,
        tags=tuple(asked.tags),
        rate_limit=limits.define(asked.rate_limit) if asked.rate_limit else None,
        queue_timeout_s=wire.seconds(asked.queue_timeout) if asked.queue_timeout else 0.0,
        run_timeout_s=wire.seconds(asked.run_timeout) if asked.run_timeout else 0.0,
        secrets=plains(asked.secrets),
    )


def _health(asked: wire.Health) -> Health:
    return Health(
        protocol="gRPC" if asked.protocol == "GRPC" else "HTTP",
        uri=asked.uri,
        port=asked.port,
        timeout=asked.timeout,
        expected_status=asked.expected_status_code,
    )
