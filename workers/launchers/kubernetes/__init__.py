"""Instances as pods: the Fleet of `kubernetes://`.

For each GPU specification there is one Deployment, and what goes with it is owned by it: Secrets, PodDisruptionBudget,
NetworkPolicy and KEDA's ScaledObject, which chooses the number of pods. `objects` says what they look like, `place`
what the URL means, `mirror` follows what is there. Nothing is kept here that a new controller would need.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace

import httpx2
from lightkube import ApiError, AsyncClient
from lightkube.config.kubeconfig import KubeConfig, SingleConfig
from lightkube.core.exceptions import ConfigError
from lightkube.resources.apps_v1 import Deployment
from lightkube.resources.core_v1 import Node, Pod
from lightkube.types import CascadeType, PatchType

from broker.errors import ConfigurationError, LauncherUnavailable
from broker.model import Gpu, GpuSpecification, LogExcerpt, Login, Part, Version
from broker.ports import LOG_LINES, Replica
from broker.settings import ControllerSettings
from workers.launchers import logs
from workers.launchers.instances import place_of, refuse_elsewhere
from workers.launchers.kubernetes import objects
from workers.launchers.kubernetes.inventory import inventory, products_of
from workers.launchers.kubernetes.mirror import Kept, Mirror, Seen
from workers.launchers.kubernetes.objects import Manifest, Place, read_place
from workers.launchers.kubernetes.resources import resource_of
from workers.loops import beside, every

logger = logging.getLogger(__name__)

# Who owns a field, for server-side apply. The number of pods is the autoscaler's.
MANAGER = "fnqueue"
REPLICAS_MANAGER = "fnqueue-replicas"
# What somebody else changed is put right this often.
REAPPLY_S = 300.0
# A busy instance is marked at once, an idle one after this: one patch per job would be a load on the API server.
IDLE_S = 10.0
# A watch tells of what was made within this, or it was deleted meanwhile.
_LAG_S = 10.0
# Pods whose marks change are patched at most so many at once.
_PATCHES = 16
_CALL_S = 10.0
# The API server's clock and ours may be that far apart.
_CLOCKS_S = 30
_TAIL_LINES = 40
_TAIL_BYTES = 4096


@dataclass(slots=True)
class _Applied:
    digest: str
    at: float


@dataclass(slots=True)
class _Weight:
    busy: bool
    idle_since: float | None = None


@asynccontextmanager
async def open_fleet(
    settings: ControllerSettings, *, config: SingleConfig | None = None
) -> AsyncIterator[KubernetesFleet]:
    """The fleet that `launcher_url` names. The API server is found as `kubectl` finds it: the pod's own service account
    inside a cluster, else KUBECONFIG. Closing it leaves everything running.

    Raises:
        ConfigurationError: a URL that cannot be read, or no API server to talk to.
    """
    place = read_place(settings.launcher_url)
    if settings.blobs_url.get_secret_value().startswith("file:"):
        raise ConfigurationError("FNQUEUE_BLOBS_URL is file://, which no pod could see; name an S3 server")
    try:
        client = AsyncClient(
            config=config or KubeConfig.from_env().get(),
            namespace=place.namespace,
            timeout=httpx2.Timeout(_CALL_S),
            field_manager=MANAGER,
        )
    except (ConfigError, OSError, ValueError) as exc:
        raise ConfigurationError(f"FNQUEUE_LAUNCHER_URL: no Kubernetes API server is configured: {exc}") from exc
    mirror = Mirror(client, place.namespace)
    try:
        async with beside(
            every(0, mirror.follow_pods, name="pods"),
            every(0, mirror.follow_deployments, name="deployments"),
        ):
            yield KubernetesFleet(client, mirror, place, settings)
    finally:
        await client.close()


@dataclass(slots=True)
class KubernetesFleet:
    """Opened by `open_fleet`."""

    _client: AsyncClient
    _mirror: Mirror
    _place: Place
    _settings: ControllerSettings
    _products: dict[str, frozenset[str]] = field(default_factory=dict)
    _applied: dict[str, _Applied] = field(default_factory=dict)
    _weights: dict[str, _Weight] = field(default_factory=dict)
    _tails: dict[tuple[str, int], str] = field(default_factory=dict)

    async def gpus(self) -> list[Gpu]:
        """The types of the nodes' NVIDIA cards, by the labels of GPU feature discovery, and `CPU`."""
        with _translated():
            nodes = [node async for node in self._client.list(Node)]
        self._products = products_of(nodes)
        here = place_of(self._settings)
        return [replace(gpu, place=here) for gpu in inventory(nodes, backend=self._place.cluster)]

    async def keep(
        self,
        version: Version,
        specification: GpuSpecification,
        *,
        secrets: bytes | None = None,
        login: Login | None = None,
    ) -> None:
        refuse_elsewhere(specification, place_of(self._settings))
        there = (await self._mirror.deployments()).get(specification.id)
        products = await self._products_for(specification, there)
        manifests = objects.render(
            self._place, self._settings, version, specification, products=products, secrets=secrets, login=login
        )
        digest = hashlib.sha256(json.dumps(manifests, sort_keys=True).encode()).hexdigest()
        applied = self._applied.get(specification.id)
        age_s = time.monotonic() - applied.at if applied else math.inf
        if there is None and age_s < _LAG_S:
            return  # the watch has yet to tell of it
        if there is not None and there.ending:
            return  # of an earlier deployment; when it has gone, this one is made
        if there is not None and applied is not None and applied.digest == digest and age_s < REAPPLY_S:
            return
        await self._apply_all(manifests, specification, create=there is None)
        self._applied[specification.id] = _Applied(digest, time.monotonic())
        logger.info("specification_applied", extra={"version_id": version.id, "specification_id": specification.id})

    async def drop(self, specification_id: str, *, grace_s: float) -> None:
        self._applied.pop(specification_id, None)
        there = (await self._mirror.deployments()).get(specification_id)
        if there is not None and not there.ending:
            # In the foreground: it is seen until its pods have gone, and makes none in their place.
            await self._delete(Deployment, there.name, cascade=CascadeType.FOREGROUND)
        hurry = math.ceil(grace_s) if grace_s < self._settings.drain_s else None
        if hurry is not None:
            for pod in await self._mirror.pods():
                if pod.specification_id == specification_id and not pod.hurried(hurry):
                    await self._delete(Pod, pod.name, grace_s=hurry)

    async def evict(self, instance_id: str) -> None:
        for pod in await self._mirror.pods():
            if pod.instance_id == instance_id and not pod.ending:
                await self._delete(Pod, pod.name)

    async def weigh(self, busy: Mapping[str, bool]) -> None:
        pods = {pod.instance_id: pod for pod in await self._mirror.pods() if not pod.ending}
        self._weights = {key: kept for key, kept in self._weights.items() if key in pods}
        due = [(pods[key], works) for key, works in busy.items() if key in pods and self._is_due(pods[key], works)]
        gate = asyncio.Semaphore(_PATCHES)

        async def mark(pod: Seen, works: bool) -> None:
            async with gate:
                await self._annotate(pod, objects.BUSY_COST if works else objects.IDLE_COST)
            self._weights[pod.instance_id] = _Weight(works)

        results = await asyncio.gather(*(mark(pod, works) for pod, works in due), return_exceptions=True)
        for fault in results:
            if isinstance(fault, BaseException):
                raise fault

    async def kept(self) -> Mapping[str, str]:
        return {key: each.version_id for key, each in (await self._mirror.deployments()).items()}

    async def replicas(self) -> Sequence[Replica]:
        pods = await self._mirror.pods()
        self._tails = {key: tail for key, tail in self._tails.items() if key[0] in {pod.instance_id for pod in pods}}
        return [await self._with_tail(pod) for pod in pods]

    async def log(self, instance_id: str, part: Part, *, after: str) -> LogExcerpt:
        names = {Part.CONTAINER: objects.CONTAINER_NAME, Part.SIDECAR: objects.SIDECAR_NAME}
        pod = next((pod for pod in await self._mirror.pods() if pod.instance_id == instance_id), None)
        if pod is None:
            return LogExcerpt(lines=(), position=after)
        since_s = logs.since_s(after)
        try:
            with _translated(f"the log of Pod {pod.name}"):
                lines = [
                    line
                    async for line in self._client.log(
                        pod.name,
                        container=names[part],
                        timestamps=True,
                        tail_lines=LOG_LINES,
                        # The API counts back from its own present.
                        since=max(1, math.ceil(time.time() - since_s) + _CLOCKS_S) if since_s else None,
                    )
                ]
        except (ConfigurationError, _Gone):  # its container has not begun, or it is no more
            return LogExcerpt(lines=(), position=after or "0")
        return logs.stamped("".join(lines), after=after)

    # -- applying ----------------------------------------------------------------------------------

    async def _apply_all(self, manifests: Sequence[Manifest], specification: GpuSpecification, *, create: bool) -> None:
        root, *rest = manifests
        if create:
            # KEDA and the autoscaler behind it take the number over; without a first one there would be one pod.
            first = {**root, "spec": {**root["spec"], "replicas": specification.min_instances}}
            await self._apply(first)
            await self._apply(objects.only_replicas(root, specification.min_instances), manager=REPLICAS_MANAGER)
        uid = await self._apply(root)
        owner = objects.owner_reference(root, uid)
        for manifest in rest:
            await self._apply(objects.owned(manifest, owner))

    async def _apply(self, manifest: Manifest, *, manager: str = MANAGER) -> str:
        """Server-side, so that fields which others set stay as they are. Returns the object's UID."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        try:
            with _translated(f"{kind} {name}"):
                answer = await self._client.patch(
                    resource_of(manifest), name, manifest, patch_type=PatchType.APPLY, field_manager=manager, force=True
                )
        except _Gone as exc:
            raise LauncherUnavailable(
                f"the cluster has no {manifest['apiVersion']} {kind}, or no namespace {self._place.namespace}"
            ) from exc
        return str(answer.metadata.uid)

    async def _delete(
        self,
        resource: type[Deployment] | type[Pod],
        name: str,
        *,
        cascade: CascadeType | None = None,
        grace_s: int | None = None,
    ) -> None:
        try:
            with _translated(f"{resource.__name__} {name}"):
                await self._client.delete(resource, name, grace_period=grace_s, cascade=cascade)
        except _Gone:
            return

    async def _products_for(self, specification: GpuSpecification, there: Kept | None) -> frozenset[str]:
        """The cards' full names that go by the specification's. Those that the Deployment names already stay: a pool of
        nodes that comes and goes must not restart its pods."""
        if not objects.wants_cards(specification):
            return frozenset()
        if not self._products:
            await self.gpus()
        return self._products.get(specification.gpu, frozenset()) | (there.products if there else frozenset())

    # -- marking -----------------------------------------------------------------------------------

    def _is_due(self, pod: Seen, works: bool) -> bool:
        now = time.monotonic()
        weight = self._weights.setdefault(pod.instance_id, _Weight(pod.cost == objects.BUSY_COST))
        if works:
            weight.idle_since = None
            return not weight.busy
        if weight.idle_since is None:
            weight.idle_since = now
        return weight.busy and now - weight.idle_since >= IDLE_S

    async def _annotate(self, pod: Seen, cost: str) -> None:
        change = {"metadata": {"uid": pod.instance_id, "annotations": {objects.COST: cost}}}
        try:
            with _translated(f"Pod {pod.name}"):
                await self._client.patch(Pod, pod.name, change, patch_type=PatchType.MERGE)
        except _Gone:
            return

    # -- telling -----------------------------------------------------------------------------------

    async def _with_tail(self, pod: Seen) -> Seen:
        """With the last words of a container that ends again and again, asked for once per ending."""
        if not pod.crashed:
            return pod
        key = (pod.instance_id, pod.restarts)
        if key not in self._tails:
            self._tails[key] = await self._tail(pod)
        return pod.telling(self._tails[key])

    async def _tail(self, pod: Seen) -> str:
        try:
            with _translated(f"Pod {pod.name}"):
                lines = [
                    line
                    async for line in self._client.log(
                        pod.name, container=pod.crashed, tail_lines=_TAIL_LINES, newlines=True
                    )
                ]
        except (LauncherUnavailable, ConfigurationError, _Gone):
            return ""
        return "".join(lines).encode()[-_TAIL_BYTES:].decode(errors="ignore").strip()


class _Gone(Exception):
    """There is no such object."""


@contextmanager
def _translated(what: str = "Kubernetes") -> Iterator[None]:
    """The errors of the client as ours."""
    try:
        yield
    except ApiError as exc:
        code = exc.status.code or 0
        if code == 404:
            raise _Gone(what) from exc
        if code in (400, 422):
            raise ConfigurationError(f"{what} is refused: {exc.status.message}") from exc
        raise LauncherUnavailable(f"{what}: {exc.status.message}") from exc
    except httpx2.HTTPStatusError as exc:  # of a kind that the server does not know, it says so in plain text
        if exc.response.status_code == 404:
            raise _Gone(what) from exc
        raise LauncherUnavailable(f"{what}: HTTP {exc.response.status_code}") from exc
    except (httpx2.HTTPError, OSError) as exc:
        raise LauncherUnavailable(f"{what}: the Kubernetes API server does not answer: {exc!r}") from exc
