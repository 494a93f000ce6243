"""What is there, followed by watches: the pods and Deployments that carry our labels."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import httpx2
from lightkube import AsyncClient
from lightkube.models.core_v1 import ContainerStatus
from lightkube.resources.apps_v1 import Deployment
from lightkube.resources.core_v1 import Pod

from broker.errors import LauncherUnavailable
from workers.launchers.kubernetes import objects

T = TypeVar("T")

# A watch whose connection died in silence tells nothing, and nothing says so: it is begun again this often, with a
# new list.
_WATCH_S = 60
_READY_S = 5.0
# A reason that is not a failure: it is on its way.
_UNDER_WAY = frozenset({"", "ContainerCreating", "PodInitializing"})
_CRASHED = "CrashLoopBackOff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A pod, as a Replica. `crashed` names the container whose log tells why, '' if none has ended."""

    instance_id: str
    name: str
    version_id: str
    specification_id: str
    alive: bool
    error: str
    delay: str
    restarts: int
    crashed: str
    cost: str
    ending: bool
    grace_s: int | None

    def hurried(self, grace_s: int) -> bool:
        """Whether it ends within `grace_s` as it is."""
        return self.ending and self.grace_s is not None and self.grace_s <= grace_s

    def telling(self, tail: str) -> Seen:
        return replace(self, error="\n".join(part for part in (self.error, tail) if part))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A Deployment. `products` are the cards' names that it was made for."""

    name: str
    version_id: str
    specification_id: str
    ending: bool
    products: frozenset[str]


@dataclass(slots=True)
class _Table(Generic[T]):
    rows: dict[str, T] = field(default_factory=dict)
    current: asyncio.Event = field(default_factory=asyncio.Event)


class Mirror:
    """Each `follow_…` is one term of a loop that repeats it; while none of its kind is current, there is no answer."""

    def __init__(self, client: AsyncClient, namespace: str) -> None:
        self._client = client
        self._namespace = namespace
        self._pods: _Table[Seen] = _Table()
        self._deployments: _Table[Kept] = _Table()

    async def follow_pods(self) -> None:
        await self._follow(Pod, self._pods, _pod)

    async def follow_deployments(self) -> None:
        await self._follow(Deployment, self._deployments, _deployment)

    async def pods(self) -> Sequence[Seen]:
        """Raises LauncherUnavailable while they are not known."""
        return list((await self._rows(self._pods)).values())

    async def deployments(self) -> Mapping[str, Kept]:
        """By specification. Raises LauncherUnavailable while they are not known."""
        return {each.specification_id: each for each in (await self._rows(self._deployments)).values()}

    async def _rows(self, table: _Table[T]) -> dict[str, T]:
        try:
            async with asyncio.timeout(_READY_S):
                await table.current.wait()
        except TimeoutError as exc:
            raise LauncherUnavailable("the Kubernetes API server does not answer") from exc
        return table.rows

    async def _follow(self, resource: Any, table: _Table[T], seen: Callable[[Any], T]) -> None:
        """List, then watch from there, for `_WATCH_S`. An error ends the term, and what is known with it."""
        try:
            async with asyncio.timeout(_WATCH_S):
                await self._watch(resource, table, seen)
        except TimeoutError:
            return
        except (httpx2.HTTPError, OSError) as exc:
            table.current.clear()
            raise LauncherUnavailable(f"cannot watch {resource.__name__}: {exc!r}") from exc
        except BaseException:
            table.current.clear()
            raise

    async def _watch(self, resource: Any, table: _Table[T], seen: Callable[[Any], T]) -> None:
        listing = self._client.list(resource, labels=objects.SELECTOR)
        table.rows = {each.metadata.uid: seen(each) async for each in listing}
        table.current.set()
        async for event, item in self._client.watch(
            resource, labels=objects.SELECTOR, resource_version=listing.resourceVersion, server_timeout=_WATCH_S
        ):
            if event == "DELETED":
                table.rows.pop(item.metadata.uid, None)
            elif event in ("ADDED", "MODIFIED"):
                table.rows[item.metadata.uid] = seen(item)


def _deployment(item: Deployment) -> Kept:
    metadata: Any = item.metadata
    labels, annotations = metadata.labels or {}, metadata.annotations or {}
    return Kept(
        name=metadata.name,
        version_id=labels.get(objects.VERSION, ""),
        specification_id=labels.get(objects.SPECIFICATION, ""),
        ending=metadata.deletionTimestamp is not None,
        products=frozenset(filter(None, annotations.get(objects.PRODUCTS, "").split(","))),
    )


def _pod(item: Pod) -> Seen:
    metadata: Any = item.metadata
    labels, status = metadata.labels or {}, item.status
    containers = [*(status.initContainerStatuses or []), *(status.containerStatuses or [])] if status else []
    phase = (status.phase or "") if status else ""
    ending = metadata.deletionTimestamp is not None
    ended = phase in ("Failed", "Succeeded")
    faults = [fault for fault in map(_fault, containers) if fault]
    if ended and status is not None:
        faults.insert(0, ": ".join(part for part in (status.reason or phase, status.message or "") if part))
    return Seen(
        instance_id=metadata.uid,
        name=metadata.name,
        version_id=labels.get(objects.VERSION, ""),
        specification_id=labels.get(objects.SPECIFICATION, ""),
        alive=not ending and not ended,
        error="\n".join(faults),
        delay=_delay(item),
        restarts=max((each.restartCount for each in containers), default=0),
        crashed=next((each.name for each in containers if _reason(each) == _CRASHED), ""),
        cost=(metadata.annotations or {}).get(objects.COST, ""),
        ending=ending,
        grace_s=metadata.deletionGracePeriodSeconds,
    )


def _reason(container: ContainerStatus) -> str:
    waiting = container.state.waiting if container.state else None
    return (waiting.reason or "") if waiting else ""


def _fault(container: ContainerStatus) -> str:
    """Why it does not run, '' if it does or is about to."""
    reason = _reason(container)
    if reason in _UNDER_WAY:
        return ""
    waiting = container.state.waiting if container.state else None
    last = container.lastState.terminated if container.lastState else None
    if last is not None:
        return f"{container.name} ended with status {last.exitCode} ({last.reason or reason})"
    return ": ".join(part for part in (container.name, reason, waiting.message if waiting else "") if part)


def _delay(pod: Pod) -> str:
    conditions = (pod.status.conditions or []) if pod.status else []
    waits = [each for each in conditions if each.type == "PodScheduled" and each.status == "False"]
    return next((each.message or each.reason or "" for each in waits), "")
