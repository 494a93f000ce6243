"""The verbs of a function: create, add version, get, list, update, delete, and pick a version to invoke.

A function is an id and its versions; it exists as long as it has one (contract/management.md §1.1).
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from broker import rollouts
from broker.errors import BadRequest, FnqueueError, Forbidden, NotFound, StateConflict
from broker.model import (
    EVERYONE,
    Callback,
    Deployment,
    FunctionStatus,
    Health,
    LlmConfig,
    Model,
    Principal,
    Priority,
    RateLimit,
    Resource,
    Sharing,
    Telemetries,
    Version,
)
from broker.ports import Broker
from broker.revisions import edit
from broker.secrets import Plain
from broker.secrets import begin as begin_secrets
from broker.secrets import delete as delete_secrets
from broker.visibility import (
    NOT_COVERED,
    OWN,
    UNKNOWN_VERSION,
    Family,
    Visibility,
    covers,
    find_family,
    find_function,
    find_version,
    find_visible,
    select,
    standing,
)

VISIBILITIES = frozenset(Visibility)
LLM = "LLM"

_GRPC_URL = "/grpc"
_DEFAULT_HEALTH_URI = "/v2/health/ready"
_CACHE_S = 1.0
_CACHE_FUNCTIONS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """What a caller says a version is. `health` wins over the deprecated `health_uri`; without both, and
    without `description`, the defaults of contract/management.md §1.2 hold. `secrets` are sealed and
    kept beside the version."""

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
    secrets: tuple[Plain, ...] = ()
    queue_timeout_s: float = 0.0
    run_timeout_s: float = 0.0


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


async def create(broker: Broker, principal: Principal, definition: Definition) -> Version:
    """The first version of a new function, INACTIVE. Names need not be unique.

    Raises BadRequest, StateConflict when the account has all the versions that it may have, or Forbidden when the
    key is for some functions only.
    """
    if OWN not in principal.resources:
        raise Forbidden(NOT_COVERED)
    limit = await _quota(broker, principal.account)
    if len(await broker.catalog.versions.list("account", principal.account)) >= limit:
        raise _quota_reached(limit)
    version = await _store(broker, principal, str(uuid.uuid4()), definition)
    await _keep_to_quota(broker, version, limit)
    return version


async def add_version(broker: Broker, principal: Principal, function_id: str, definition: Definition) -> Version:
    """One more version of a function of the caller's own, INACTIVE, shared as the function is.

    Raises NotFound, Forbidden, BadRequest, StateConflict when the function is public.
    """
    family = await find_function(broker, principal, function_id)
    if any((sibling.function_type == LLM) != (definition.function_type == LLM) for sibling in family.versions):
        raise BadRequest("functionType: all versions of a function are LLM, or none is", field="functionType")
    newest = max(family.versions, key=lambda sibling: sibling.created_at)
    return await _store(broker, principal, function_id, definition, callback=newest.callback)


async def get(broker: Broker, principal: Principal, function_id: str, version_id: str) -> Version:
    """One that the caller may see. Raises NotFound, also when the version is one of another function; Forbidden."""
    return await find_visible(broker, principal, function_id, version_id)


async def list_functions(
    broker: Broker, principal: Principal, *, visibility: Collection[str] = ()
) -> Sequence[Version]:
    """Every version that the caller sees: public, own and shared ones, each oldest first; `visibility` keeps some
    of VISIBILITIES, all when empty.

    Raises BadRequest for an unknown visibility.
    """
    wanted = {word.lower() for word in visibility if word} or VISIBILITIES
    if unknown := sorted(wanted - VISIBILITIES):
        known = ", ".join(sorted(VISIBILITIES))
        raise BadRequest(f"visibility: unknown {', '.join(unknown)}; known are {known}", field="visibility")
    found: dict[str, Version] = {}
    if Visibility.PUBLIC in wanted:
        shared = await _shared_with(broker, EVERYONE)
        public = (version for version, sharing in shared if EVERYONE in sharing.of(version.id))
        found |= {version.id: version for version in _oldest_first(public)}
    if Visibility.PRIVATE in wanted:
        rows = await broker.catalog.versions.list("account", principal.account)
        found |= {version.id: version for version in _oldest_first(row.item for row in rows)}
    if Visibility.AUTHORIZED in wanted:
        shared = await _shared_with(broker, principal.account)
        given = (v for v, sharing in shared if standing(principal, v, sharing) is Visibility.AUTHORIZED)
        found |= {version.id: version for version in _oldest_first(given)}
    return [version for version in found.values() if covers(principal, version)]


async def list_versions(broker: Broker, principal: Principal, function_id: str) -> Sequence[Version]:
    """The versions of one function that the caller may see, oldest first. Raises NotFound when its account sees
    none, Forbidden when its key covers none of those."""
    return _oldest_first(select(principal, await find_family(broker, function_id)))


async def update(broker: Broker, principal: Principal, function_id: str, version_id: str, change: Change) -> Version:
    """Change what may change, in whatever status; the model limits and the priority of all versions of the function.

    Raises NotFound, Forbidden; StateConflict: it is public; BadRequest: an unknown model, or one of a function that
    is not LLM.
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


async def delete_version(broker: Broker, principal: Principal, function_id: str, version_id: str) -> None:
    """Remove a version in whatever status, with deployment and secrets; the last one takes the function along.

    The controller then ends what is queued, stops the instances and removes the queue. Raises NotFound, Forbidden.
    """
    await find_version(broker, principal, function_id, version_id)

    def undeploy(deployment: Deployment) -> Deployment:
        return replace(deployment, undeployed=True, draining=False)

    await edit(broker.catalog.deployments, version_id, undeploy)
    if not await broker.catalog.versions.delete(version_id):
        raise NotFound(UNKNOWN_VERSION)
    await _unshare(broker, function_id, version_id)
    await delete_secrets(broker, version_id)


async def pick_callable(broker: Broker, principal: Principal, function_id: str, version_id: str = "") -> Version:
    """A version to send an invocation to: the named one, or any that is callable, at random by their weights.

    Raises:
        NotFound: none that the caller sees, or none that is deployed and may be drawn.
        Forbidden: the key's resources leave it out.
        StateConflict: not deployed well enough: one of them has lost all its instances.
    """
    return _choose(principal, await find_family(broker, function_id), version_id)


class _Look:
    """At a function in the catalog, for all who want it when what was remembered has passed: under load that is one in
    ten. What was asked for after somebody came is good for him too."""

    __slots__ = ("_found", "asked_at", "turn", "waiting")

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.waiting = 0
        self.asked_at = -math.inf
        self._found: Family | FnqueueError | None = None

    async def ask(self, broker: Broker, function_id: str, now: float) -> None:
        """Nothing has been asked where this is cancelled."""
        try:
            self._found = await find_family(broker, function_id)
        except FnqueueError as exc:
            self._found = exc
        self.asked_at = now

    def answer(self) -> Family:
        """What the last question led to. Raises StoreUnavailable, RecordDamaged."""
        assert self._found is not None, "it was asked"
        if isinstance(self._found, FnqueueError):
            raise self._found
        return self._found


class CallableVersions:
    """`pick_callable` for the hot path: remembers a function's versions and their sharing for at most a second.

    One per process, made beside the Broker and handed to whoever invokes. Only a find is remembered: when
    nothing remembered can be called, the catalog is asked, so a version is callable as soon as it is ACTIVE.
    A second after it stopped being callable, or being shared with the caller, at the latest, no front end picks it
    any more; `forget` makes that at once for this one, after a write.
    """

    def __init__(self, broker: Broker, *, now: Callable[[], float] = time.monotonic) -> None:
        self._broker = broker
        self._now = now
        self._found: dict[str, _Found] = {}
        self._looking: dict[str, _Look] = {}

    def known(self, principal: Principal, function_id: str, version_id: str = "") -> Version | None:
        """What `pick` returns, where it would ask nobody; None where it is not known without asking."""
        found = self._found.get(function_id)
        return None if found is None or found.until <= self._now() else found.pick(principal, version_id)

    async def pick(self, principal: Principal, function_id: str, version_id: str = "") -> Version:
        """As `pick_callable`."""
        if version := self.known(principal, function_id, version_id):
            return version
        look = self._looking.setdefault(function_id, _Look())
        look.waiting += 1
        came_at = self._now()
        try:
            async with look.turn:
                if look.asked_at < came_at:
                    await look.ask(self._broker, function_id, self._now())
                family = look.answer()
                version = _choose(principal, family, version_id)
                self._remember(function_id, family, look.asked_at + _CACHE_S)
                return version
        finally:
            look.waiting -= 1
            if not look.waiting:
                self._looking.pop(function_id, None)

    def forget(self, function_id: str) -> None:
        """Ask the catalog at the next pick. Call after every write to a function or its deployments."""
        self._found.pop(function_id, None)

    def _remember(self, function_id: str, family: Family, until: float) -> None:
        self._found.pop(function_id, None)
        self._found[function_id] = _Found(family, until)
        if len(self._found) > _CACHE_FUNCTIONS:
            del self._found[next(iter(self._found))]


class _Found:
    """A function's versions, good until then."""

    __slots__ = ("_family", "_only", "until")

    def __init__(self, family: Family, until: float) -> None:
        self._family = family
        self.until = until
        # Where there is nothing to choose. It is dropped with the rest, and so holds the callers of a second.
        self._only: dict[tuple[Principal, str], Version] = {}

    def pick(self, principal: Principal, version_id: str) -> Version | None:
        only = self._only.get((principal, version_id))
        if only is not None:
            return only
        candidates = [
            version for version in _candidates(principal, self._family, version_id) if version.status.invocable
        ]
        picked = _pick(self._family, candidates, version_id) if candidates else None
        if picked is not None and len(candidates) == 1:
            self._only[principal, version_id] = picked
        return picked


async def _store(
    broker: Broker,
    principal: Principal,
    function_id: str,
    definition: Definition,
    *,
    callback: Callback | None = None,
) -> Version:
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
        queue_timeout_s=definition.queue_timeout_s,
        run_timeout_s=definition.run_timeout_s,
        callback=callback,
    )
    # First, so that no version is ever seen without the secrets it was made with.
    await begin_secrets(broker, version, definition.secrets)
    await broker.catalog.versions.put(version)
    return version


async def _quota(broker: Broker, account: str) -> int:
    """What counts is versions, and only another function is refused (contract/management.md §1.2)."""
    record = await broker.catalog.accounts.get(account)
    return record.item.max_functions if record else broker.settings.max_functions


async def _keep_to_quota(broker: Broker, version: Version, limit: int) -> None:
    """Of several who create at once, as many stay as there is room for: lists come in one order for all."""
    rows = await broker.catalog.versions.list("account", version.account)
    if any(row.item.id == version.id for row in rows[limit:]):
        await broker.catalog.versions.delete(version.id)
        await delete_secrets(broker, version.id)
        raise _quota_reached(limit)


def _quota_reached(limit: int) -> StateConflict:
    return StateConflict(f"the account may have {limit} function versions and has them all; delete some")


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


async def _shared_with(broker: Broker, party: str) -> list[tuple[Version, Sharing]]:
    """All versions of the functions that name the party on any level."""
    shared = [row.item for row in await broker.catalog.sharing.list("shared_with", party)]
    families = await asyncio.gather(
        *(broker.catalog.versions.list("function_id", sharing.function_id) for sharing in shared)
    )
    return [(row.item, sharing) for sharing, rows in zip(shared, families, strict=True) for row in rows]


async def _unshare(broker: Broker, function_id: str, version_id: str) -> None:
    """Take a deleted version out of its function's sharing, and the sharing away with the last one."""

    def without(sharing: Sharing) -> Sharing:
        return replace(sharing, versions=tuple(level for level in sharing.versions if level[0] != version_id))

    shared = await edit(broker.catalog.sharing, function_id, without)
    if shared and not await broker.catalog.versions.list("function_id", function_id):
        await broker.catalog.sharing.delete(function_id)


def _choose(principal: Principal, family: Family, version_id: str) -> Version:
    candidates = select(principal, family, version_id)
    callable_now = [version for version in candidates if version.status.invocable]
    if callable_now:
        version = _pick(family, callable_now, version_id)
        if version is None:
            raise NotFound("no version of the function gets calls that name the function only: their weights are 0")
        return version
    if any(version.status is FunctionStatus.DEGRADED for version in candidates):
        raise StateConflict("the function is DEGRADED: all its instances are lost and are being replaced")
    raise NotFound(f"no version of the function can be invoked: status {', '.join(_statuses(candidates))}")


def _candidates(principal: Principal, family: Family, version_id: str) -> list[Version]:
    try:
        return select(principal, family, version_id)
    except (NotFound, Forbidden):
        return []


def _pick(family: Family, callable_now: Sequence[Version], version_id: str) -> Version | None:
    return callable_now[0] if version_id else rollouts.draw(family, callable_now)


def _statuses(versions: Sequence[Version]) -> list[str]:
    return sorted({version.status.value for version in versions})


def _oldest_first(versions: Iterable[Version]) -> list[Version]:
    return sorted(versions, key=lambda version: (version.created_at, version.id))
