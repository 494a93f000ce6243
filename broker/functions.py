"""The verbs of a function: create, add version, get, list, update, delete, and pick a version to invoke.

A function is an id and its versions; it exists as long as it has one (contract/management.md §1.1).
"""

from __future__ import annotations

import secrets
import sys
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from broker.errors import BadRequest, NotFound, StateConflict
from broker.model import (
    Deployment,
    FunctionStatus,
    Health,
    LlmConfig,
    Model,
    Principal,
    Priority,
    RateLimit,
    Resource,
    Telemetries,
    Version,
)
from broker.ports import Broker
from broker.revisions import edit
from broker.visibility import UNKNOWN_FUNCTION, UNKNOWN_VERSION, find_version, visible

VISIBILITIES = frozenset({"private", "authorized", "public"})
LLM = "LLM"
UNLIMITED = sys.maxsize

_GRPC_URL = "/grpc"
_DEFAULT_HEALTH_URI = "/v2/health/ready"
_CACHE_S = 1.0
_CACHE_FUNCTIONS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """What a caller says a version is. `health` wins over the deprecated `health_uri`; without both, and
    without `description`, the defaults of contract/management.md §1.2 hold. `secrets` are names and values, a string
    or what JSON calls an object; of them the version keeps the names only."""

    name: str
    inference_url: str
    container_image: str = ""
    inference_port: int = 8000
    health: Health | None = None
    health_uri: str = ""
    container_args: str = ""
    container_environment: tuple[tuple[str, str], ...] = ()
    api_body_format: str = "CUSTOM"
    function_type: str = "DEFAULT"
    description: str = ""
    tags: tuple[str, ...] = ()
    models: tuple[Model, ...] = ()
    resources: tuple[Resource, ...] = ()
    helm_chart: str = ""
    helm_chart_service_name: str = ""
    rate_limit: RateLimit | None = None
    telemetries: Telemetries | None = None
    priority: Priority | None = None
    secrets: tuple[tuple[str, object], ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChange:
    """New limits or routing of the model `name`; '' leaves what is there."""

    name: str
    token_rate_limit: str = ""
    routing_method: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """All that may change of a version; None leaves what is there."""

    tags: tuple[str, ...] | None = None
    rate_limit: RateLimit | None = None
    models: tuple[ModelChange, ...] = ()
    priority: Priority | None = None


async def create(
    broker: Broker, principal: Principal, definition: Definition, *, max_versions: int = UNLIMITED
) -> Version:
    """The first version of a new function, INACTIVE. Names need not be unique.

    Raises BadRequest, also when the account has `max_versions` versions already (contract/management.md §1.2: what
    counts is versions, and only new functions are refused).
    """
    if (
        max_versions < UNLIMITED
        and len(await broker.catalog.versions.list("account", principal.account)) >= max_versions
    ):
        raise _quota_reached(max_versions)
    version = await _store(broker, principal, str(uuid.uuid4()), definition)
    if max_versions < UNLIMITED:
        await _keep_to_quota(broker, version, max_versions)
    return version


async def add_version(broker: Broker, principal: Principal, function_id: str, definition: Definition) -> Version:
    """One more version of a function, INACTIVE. Raises NotFound, BadRequest."""
    siblings = await list_versions(broker, principal, function_id)
    if any((sibling.function_type == LLM) != (definition.function_type == LLM) for sibling in siblings):
        raise BadRequest("functionType: all versions of a function are LLM, or none is", field="functionType")
    return await _store(broker, principal, function_id, definition)


async def get(broker: Broker, principal: Principal, function_id: str, version_id: str) -> Version:
    """Raises NotFound, also when the version is one of another function."""
    return await find_version(broker, principal, function_id, version_id)


async def list_functions(
    broker: Broker, principal: Principal, *, visibility: Collection[str] = ()
) -> Sequence[Version]:
    """Every version that the caller sees, oldest first; `visibility` keeps some of VISIBILITIES, all when empty.

    Raises BadRequest for an unknown visibility.
    """
    wanted = {word.lower() for word in visibility if word} or VISIBILITIES
    if unknown := sorted(wanted - VISIBILITIES):
        known = ", ".join(sorted(VISIBILITIES))
        raise BadRequest(f"visibility: unknown {', '.join(unknown)}; known are {known}", field="visibility")
    if "private" not in wanted:
        return []
    rows = await broker.catalog.versions.list("account", principal.account)
    return _oldest_first(row.item for row in rows if visible(principal, row.item))


async def list_versions(broker: Broker, principal: Principal, function_id: str) -> Sequence[Version]:
    """The versions of one function, oldest first. Raises NotFound when the caller sees none."""
    rows = await broker.catalog.versions.list("function_id", function_id)
    versions = _oldest_first(row.item for row in rows if visible(principal, row.item))
    if not versions:
        raise NotFound(UNKNOWN_FUNCTION)
    return versions


async def update(broker: Broker, principal: Principal, function_id: str, version_id: str, change: Change) -> Version:
    """Change what may change, in whatever status; the model limits and the priority of all versions of the function.

    Raises NotFound; BadRequest: an unknown model, or one of a function that is not LLM.
    """
    version = await find_version(broker, principal, function_id, version_id)
    _check_change(version, change)
    changed = await edit(broker.catalog.versions, version_id, lambda stored: _changed(stored, change))
    if changed is None:
        raise NotFound(UNKNOWN_VERSION)
    if change.models or change.priority is not None:
        shared = replace(change, tags=None, rate_limit=None)
        for sibling in await _versions_of(broker, function_id):
            await edit(broker.catalog.versions, sibling.id, lambda stored: _changed(stored, shared))
    return changed


async def lift_rate_limit(broker: Broker, principal: Principal, function_id: str, version_id: str) -> None:
    """The version has no rate limit from now on. Idempotent. Raises NotFound."""
    await find_version(broker, principal, function_id, version_id)
    if await edit(broker.catalog.versions, version_id, lambda stored: replace(stored, rate_limit=None)) is None:
        raise NotFound(UNKNOWN_VERSION)


async def delete_version(broker: Broker, principal: Principal, function_id: str, version_id: str) -> None:
    """Remove a version in whatever status, its deployment with it; the last one takes the function along.

    The controller then ends what is queued, stops the instances and removes the queue. Raises NotFound.
    """
    await find_version(broker, principal, function_id, version_id)

    def undeploy(deployment: Deployment) -> Deployment:
        return replace(deployment, undeployed=True, draining=False)

    await edit(broker.catalog.deployments, version_id, undeploy)
    if not await broker.catalog.versions.delete(version_id):
        raise NotFound(UNKNOWN_VERSION)


async def pick_callable(broker: Broker, principal: Principal, function_id: str, version_id: str = "") -> Version:
    """A version to send an invocation to: the named one, or any that is callable, uniformly at random.

    Raises:
        NotFound: none that the caller sees, or none that is deployed.
        StateConflict: not deployed well enough: one of them has lost all its instances.
    """
    return _choose(principal, await _versions_of(broker, function_id), version_id)


class CallableVersions:
    """`pick_callable` for the hot path: remembers the callable versions of a function for at most a second.

    One per process, made beside the Broker and handed to whoever invokes. Only a find is remembered: when
    nothing remembered can be called, the catalog is asked, so a version is callable as soon as it is ACTIVE.
    A second after it stopped being callable, at the latest, no front end picks it any more; `forget` makes that
    at once for this one, after a write.
    """

    def __init__(self, broker: Broker, *, now: Callable[[], float] = time.monotonic) -> None:
        self._broker = broker
        self._now = now
        self._found: dict[str, tuple[Sequence[Version], float]] = {}

    async def pick(self, principal: Principal, function_id: str, version_id: str = "") -> Version:
        """As `pick_callable`."""
        found, until = self._found.get(function_id, ((), 0.0))
        if until > self._now():
            candidates = [version for version in _candidates(principal, found, version_id) if version.status.invocable]
            if candidates:
                return _any(candidates)
        asked_at = self._now()
        versions = await _versions_of(self._broker, function_id)
        version = _choose(principal, versions, version_id)
        self._remember(function_id, versions, asked_at + _CACHE_S)
        return version

    def forget(self, function_id: str) -> None:
        """Ask the catalog at the next pick. Call after every write to a function or its deployments."""
        self._found.pop(function_id, None)

    def _remember(self, function_id: str, versions: Sequence[Version], until: float) -> None:
        self._found.pop(function_id, None)
        self._found[function_id] = (versions, until)
        if len(self._found) > _CACHE_FUNCTIONS:
            del self._found[next(iter(self._found))]


async def _store(broker: Broker, principal: Principal, function_id: str, definition: Definition) -> Version:
    version = Version(
        id=str(uuid.uuid4()),
        function_id=function_id,
        account=principal.account,
        name=definition.name,
        inference_url=definition.inference_url,
        container_image=definition.container_image,
        created_at=time.time(),
        inference_port=definition.inference_port,
        health=definition.health or _default_health(definition),
        container_args=definition.container_args,
        container_environment=definition.container_environment,
        api_body_format=definition.api_body_format,
        function_type=definition.function_type,
        description=definition.description or definition.name,
        tags=definition.tags,
        models=definition.models,
        resources=definition.resources,
        helm_chart=definition.helm_chart,
        helm_chart_service_name=definition.helm_chart_service_name,
        rate_limit=definition.rate_limit,
        telemetries=definition.telemetries,
        priority=definition.priority,
        secret_names=tuple(name for name, _ in definition.secrets),
    )
    await broker.catalog.versions.put(version)
    return version


async def _keep_to_quota(broker: Broker, version: Version, max_versions: int) -> None:
    """Of several who create at once, as many stay as there is room for: lists come in one order for all."""
    rows = await broker.catalog.versions.list("account", version.account)
    if any(row.item.id == version.id for row in rows[max_versions:]):
        await broker.catalog.versions.delete(version.id)
        raise _quota_reached(max_versions)


def _quota_reached(max_versions: int) -> BadRequest:
    return BadRequest(f"the account has as many function versions as it may: {max_versions}; delete one first")


def _default_health(definition: Definition) -> Health:
    return Health(
        protocol="gRPC" if definition.inference_url.lower() == _GRPC_URL else "HTTP",
        uri=definition.health_uri or _DEFAULT_HEALTH_URI,
        port=definition.inference_port,
    )


def _check_change(version: Version, change: Change) -> None:
    if (change.models or change.priority is not None) and version.function_type != LLM:
        at = "modelUpdates" if change.models else "llmInvocationConfig"
        raise BadRequest(f"{at}: for LLM functions only", field=at)
    if unknown := sorted({model.name for model in change.models} - {model.name for model in version.models}):
        raise BadRequest(f"modelUpdates: the version has no model {', '.join(unknown)[:256]}", field="modelUpdates")


def _changed(version: Version, change: Change) -> Version:
    wanted = {model.name: model for model in change.models}
    return replace(
        version,
        tags=version.tags if change.tags is None else change.tags,
        rate_limit=change.rate_limit or version.rate_limit,
        priority=change.priority or version.priority,
        models=tuple(
            _changed_model(model, wanted[model.name]) if model.name in wanted else model for model in version.models
        ),
    )


def _changed_model(model: Model, change: ModelChange) -> Model:
    llm = model.llm or LlmConfig()
    return replace(
        model,
        llm=replace(
            llm,
            token_rate_limit=change.token_rate_limit or llm.token_rate_limit,
            routing_method=change.routing_method or llm.routing_method,
        ),
    )


async def _versions_of(broker: Broker, function_id: str) -> Sequence[Version]:
    return [row.item for row in await broker.catalog.versions.list("function_id", function_id)]


def _choose(principal: Principal, versions: Sequence[Version], version_id: str) -> Version:
    candidates = _candidates(principal, versions, version_id)
    if not candidates:
        raise NotFound(UNKNOWN_VERSION if version_id else UNKNOWN_FUNCTION)
    callable_now = [version for version in candidates if version.status.invocable]
    if callable_now:
        return _any(callable_now)
    if any(version.status is FunctionStatus.DEGRADED for version in candidates):
        raise StateConflict("the function is DEGRADED: all its instances are lost and are being replaced")
    raise NotFound(f"no version of the function can be invoked: status {', '.join(_statuses(candidates))}")


def _candidates(principal: Principal, versions: Sequence[Version], version_id: str) -> list[Version]:
    return [
        version for version in versions if visible(principal, version) and (not version_id or version.id == version_id)
    ]


def _any(versions: Sequence[Version]) -> Version:
    return versions[0] if len(versions) == 1 else secrets.choice(versions)


def _statuses(versions: Sequence[Version]) -> list[str]:
    return sorted({version.status.value for version in versions})


def _oldest_first(versions: Iterable[Version]) -> list[Version]:
    return sorted(versions, key=lambda version: (version.created_at, version.id))
