"""The verbs of a function: create, add version, get, list, delete, and pick a version to invoke.

A function is an id and its versions; it exists as long as it has one (contract/management.md §1.1).
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from broker.errors import BadRequest, NotFound, StateConflict
from broker.model import Deployment, FunctionStatus, Health, Principal, Version
from broker.ports import Broker
from broker.revisions import edit
from broker.secrets import Plain
from broker.secrets import begin as begin_secrets
from broker.secrets import delete as delete_secrets
from broker.visibility import UNKNOWN_FUNCTION, UNKNOWN_VERSION, find_version, visible

VISIBILITIES = frozenset({"private", "authorized", "public"})

_GRPC_URL = "/grpc"
_DEFAULT_HEALTH_URI = "/v2/health/ready"
_CACHE_S = 1.0
_CACHE_FUNCTIONS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """What a caller says a version is. `health` wins over the deprecated `health_uri`; without both, and
    without `description`, the defaults of contract/management.md §1.2 hold."""

    name: str
    inference_url: str
    container_image: str
    inference_port: int = 8000
    health: Health | None = None
    health_uri: str = ""
    container_args: str = ""
    container_environment: tuple[tuple[str, str], ...] = ()
    api_body_format: str = "CUSTOM"
    function_type: str = "DEFAULT"
    description: str = ""
    tags: tuple[str, ...] = ()
    secrets: tuple[Plain, ...] = ()


async def create(broker: Broker, principal: Principal, definition: Definition) -> Version:
    """The first version of a new function, INACTIVE. Names need not be unique. Raises BadRequest."""
    return await _store(broker, principal, str(uuid.uuid4()), definition)


async def add_version(broker: Broker, principal: Principal, function_id: str, definition: Definition) -> Version:
    """One more version of a function, INACTIVE. Raises NotFound, BadRequest."""
    await list_versions(broker, principal, function_id)
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


async def delete_version(broker: Broker, principal: Principal, function_id: str, version_id: str) -> None:
    """Remove a version in whatever status, with deployment and secrets; the last one takes the function along.

    The controller then ends what is queued, stops the instances and removes the queue. Raises NotFound.
    """
    await find_version(broker, principal, function_id, version_id)

    def undeploy(deployment: Deployment) -> Deployment:
        return replace(deployment, undeployed=True, draining=False)

    await edit(broker.catalog.deployments, version_id, undeploy)
    if not await broker.catalog.versions.delete(version_id):
        raise NotFound(UNKNOWN_VERSION)
    await delete_secrets(broker, version_id)


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
    if not definition.container_image:
        raise BadRequest("containerImage: needed; models and Helm charts alone cannot be run", field="containerImage")
    if definition.function_type == "LLM":
        raise BadRequest("functionType: LLM functions are not served; use DEFAULT or STREAMING", field="functionType")
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
    )
    # First, so that no version is ever seen without the secrets it was made with.
    await begin_secrets(broker, version, definition.secrets)
    await broker.catalog.versions.put(version)
    return version


def _default_health(definition: Definition) -> Health:
    return Health(
        protocol="gRPC" if definition.inference_url.lower() == _GRPC_URL else "HTTP",
        uri=definition.health_uri or _DEFAULT_HEALTH_URI,
        port=definition.inference_port,
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
