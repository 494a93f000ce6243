"""Instances as containers of one machine, through the Docker Engine API: Docker, or podman's service.

An instance is two containers on a private network, the function's and its sidecar; when either has ended, the instance
is not alive. `plans` lists all that it consists of. Everything carries labels, and the labels are the only state: a
controller finds by them what an earlier one started, and clears what that left half made. Files go in through the API,
so that the controller may itself run in a container; but it must see the engine's cards to offer them.

An image is pulled in the background: until its containers run, an instance is one that starts, known to this
controller alone. What an engine or a registry refuses is the instance's `error`, in their words.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import tarfile
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from weakref import WeakValueDictionary

import pynvml

from broker.errors import ConfigurationError, FnqueueError, LauncherUnavailable
from broker.model import Ended, Gpu, GpuSpecification, LogExcerpt, Login, Part, Version
from broker.ports import LOG_LINES, Launched
from broker.settings import ControllerSettings, SidecarSettings
from workers.launchers import logs
from workers.launchers.cards import CPU, Card, Cards, Nvml, choose, inventory
from workers.launchers.docker import plans
from workers.launchers.docker.engine import Absent, Engine, Found, archive_of
from workers.launchers.docker.plans import Plan
from workers.launchers.instances import ERROR_BYTES, last, place_of, refuse_elsewhere, sidecar_settings, told
from workers.launchers.secrets import FILE
from workers.loops import Fault, beside, every, guard, together

logger = logging.getLogger(__name__)

BACKEND = "local"

_CONTAINER_GRACE_S = 5.0
# A half made instance of this age is one whose controller died over it: containers are made after all images are there.
_MADE_S = 60.0
# An engine that has not started an ended container again by then does not do it any more.
_RESTARTED_S = 60.0
_ENDED = ("exited", "stopped", "dead")
_KILLED = 137
_SWEEP_S = 300.0
_ERROR_LINES = 100
_KEPT_LINES = 2000
_KEPT_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class DockerInstance:
    instance_id: str
    version_id: str
    specification_id: str
    alive: bool
    error: str = ""


@dataclass(slots=True, kw_only=True)
class _Start:
    """An instance on its way; `error` is set when it did not get there. `secrets` is the newest content."""

    plan: Plan
    secrets: bytes | None = field(repr=False)
    error: str = ""
    task: asyncio.Task[None] | None = None

    @property
    def instance(self) -> DockerInstance:
        return DockerInstance(
            instance_id=self.plan.instance_id,
            version_id=self.plan.version.id,
            specification_id=self.plan.specification_id,
            alive=not self.error,
            error=self.error,
        )


@asynccontextmanager
async def open_docker_launcher(settings: ControllerSettings, *, nvml: Nvml = pynvml) -> AsyncIterator[DockerLauncher]:
    """Closing it leaves its instances running, and gives up those that have not come as far.

    Raises:
        ConfigurationError: no engine is named, or sidecars in containers could not reach the servers.
    """
    _refuse_local_servers(settings)
    plans.ulimits(settings.docker_ulimits)
    engine = Engine(_address(settings.launcher_url))
    try:
        async with together() as group:
            launcher = DockerLauncher(settings, engine, group, nvml=nvml)
            async with beside(every(_SWEEP_S, launcher.sweep, name="engine_sweep")):
                try:
                    yield launcher
                finally:
                    launcher.close()
    finally:
        await engine.close()


class DockerLauncher:
    """The Launcher of `docker://`. Starts run in `group`."""

    def __init__(
        self, settings: ControllerSettings, engine: Engine, group: asyncio.TaskGroup, *, nvml: Nvml = pynvml
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._group = group
        self._project = f"{plans.PROJECT}={settings.docker_project}"
        self._logs = settings.data_dir.resolve() / "instances"
        self._cards = Cards(nvml, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
        self._starts: dict[str, _Start] = {}
        self._errors: dict[str, str] = {}
        self._pulls: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._orphans: set[str] = set()
        self._place = place_of(settings)

    @property
    def leaves_running(self) -> bool:
        return self._settings.docker_keep_instances

    async def gpus(self) -> list[Gpu]:
        """The types of this machine's NVIDIA cards, and `CPU`, whose capacity is not enforced."""
        gpus = inventory(await asyncio.to_thread(self._cards.read), backend=BACKEND)
        return [replace(gpu, place=self._place) for gpu in gpus]

    async def start(
        self,
        instance_id: str,
        version: Version,
        specification: GpuSpecification,
        *,
        secrets: bytes | None = None,
        login: Login | None = None,
    ) -> None:
        cards = await self._choose(specification)
        plan = Plan(
            settings=self._settings,
            instance_id=instance_id,
            version=version,
            specification_id=specification.id,
            cards=cards,
            offer=self._offer(specification),
            has_secrets=secrets is not None,
        )
        if not version.container_image:
            raise ConfigurationError("the version has no containerImage, and docker:// starts nothing else")
        settings = self._sidecar_settings(plan, specification)
        plan.container(settings)  # says now what can never be
        start = _Start(plan=plan, secrets=secrets)
        self._starts[instance_id] = start
        start.task = self._group.create_task(self._bring_up(start, settings, login), name=f"start {instance_id}")

    async def stop(self, instance_id: str, *, grace_s: float) -> None:
        start = self._starts.get(instance_id)
        if start is not None and start.task is not None:
            start.task.cancel()
            await asyncio.wait([start.task])
        parts = await self._engine.containers(self._project, f"{plans.INSTANCE}={instance_id}")
        by_role = {part.labels.get(plans.ROLE): part for part in parts}
        for role, grace in ((plans.SIDECAR, grace_s), (plans.CONTAINER, min(grace_s, _CONTAINER_GRACE_S))):
            if role in by_role:
                await self._engine.stop(by_role[role].id, grace_s=grace)
        await self._keep_logs(instance_id, by_role)
        for part in parts:
            await self._engine.remove(part.id)
        await self._remove_rest(instance_id)
        self._starts.pop(instance_id, None)
        if parts or start is not None:
            logger.info("instance_stopped", extra={"instance_id": instance_id})

    async def deliver(self, instance_id: str, secrets: bytes) -> None:
        start = self._starts.get(instance_id)
        if start is not None:
            start.secrets = secrets if start.secrets is not None else None
            return
        volume = plans.secrets_volume(self._settings.docker_project, instance_id)
        mine = f"{plans.INSTANCE}={instance_id}"
        if any(name == volume for name, _ in await self._engine.volumes(mine)):
            labels = {plans.PROJECT: self._settings.docker_project, plans.INSTANCE: instance_id}
            await self._write_secrets(volume, labels, secrets)

    async def launched(self) -> list[Launched]:
        starts = dict(self._starts)  # one that arrives while the engine answers may be on no list of either
        parts = await self._engine.containers(self._project)
        starts |= self._starts
        by_instance: dict[str, list[Found]] = {}
        for part in parts:
            if part.labels.get(plans.ROLE) in (plans.CONTAINER, plans.SIDECAR):
                by_instance.setdefault(part.labels.get(plans.INSTANCE, ""), []).append(part)
        found: list[Launched] = [start.instance for start in starts.values()]
        for instance_id, own in by_instance.items():
            if instance_id not in starts:
                found.append(await self._seen(instance_id, own))
        self._errors = {key: error for key, error in self._errors.items() if key in by_instance}
        return found

    async def log(self, instance_id: str, part: Part, *, after: str) -> LogExcerpt:
        for found in await self._engine.containers(self._project, f"{plans.INSTANCE}={instance_id}"):
            if found.labels.get(plans.ROLE) == part:
                text = await self._engine.stamped_log(found.id, lines=LOG_LINES, since_s=logs.since_s(after))
                return logs.stamped(text, after=after)
        try:
            if not logs.has_ended(self._logs, instance_id):
                return LogExcerpt(lines=(), position=after)
            kept = await asyncio.to_thread((self._logs / instance_id / f"{part}.log").read_text, encoding="utf-8")
        except FileNotFoundError:
            return LogExcerpt(lines=(), position=after or "0")
        except OSError as exc:
            raise LauncherUnavailable(f"the log of {instance_id} cannot be read: {exc}") from exc
        return logs.stamped(kept, after=after)

    async def ended(self) -> Sequence[Ended]:
        return await asyncio.to_thread(logs.ended, self._logs)

    async def sweep(self) -> None:
        """Remove networks and volumes that two sweeps in a row have found without a container: their controller was
        killed before it had made one, or after it had removed the last."""
        used = {part.labels.get(plans.INSTANCE) for part in await self._engine.containers(self._project)}
        there = [*await self._engine.networks(self._project), *await self._engine.volumes(self._project)]
        ids = {labels[plans.INSTANCE] for _, labels in there if plans.INSTANCE in labels}
        orphans = ids - used - self._starts.keys()
        for instance_id in orphans & self._orphans:
            await self._remove_rest(instance_id)
            logger.info("orphan_removed", extra={"instance_id": instance_id})
        self._orphans = orphans

    def close(self) -> None:
        """Give up what is on its way: the next controller's sweep clears it."""
        self._cards.close()
        for start in self._starts.values():
            if start.task is not None:
                start.task.cancel()

    # -- starting ----------------------------------------------------------------------------------

    async def _choose(self, specification: GpuSpecification) -> tuple[Card, ...]:
        """The cards for one more instance. Raises NoCapacity."""
        refuse_elsewhere(specification, self._place)
        if specification.gpu == CPU:
            return ()
        cards = self._cards.seen or await asyncio.to_thread(self._cards.read)
        # Taken before and after: one that arrives meanwhile is on neither the engine's list nor ours.
        starts = dict(self._starts)
        parts = await self._engine.containers(self._project)
        starts |= self._starts
        taken = {uuid for part in parts for uuid in part.labels.get(plans.CARDS, "").split(",")}
        taken |= {card.uuid for start in starts.values() for card in start.plan.cards}
        return choose(cards, specification.instance_type, specification.gpu, taken)

    def _offer(self, specification: GpuSpecification) -> Gpu | None:
        offers = inventory(self._cards.seen, backend=BACKEND)
        return next((offer for offer in offers if offer.instance_type == specification.instance_type), None)

    def _sidecar_settings(self, plan: Plan, specification: GpuSpecification) -> SidecarSettings:
        version = plan.version
        return sidecar_settings(
            self._settings,
            plan.instance_id,
            version,
            specification,
            backend=BACKEND,
            data_dir="/tmp",  # noqa: S108  its container's own
            gpu_count=len(plan.cards),
            inference_host=plans.CONTAINER_NAME,
            inference_port=version.inference_port,
            health_port=version.health.port or 0,
            asset_dir=f"{plans.REQUESTS_FOLDER}/inputAssets",
            response_dir=f"{plans.REQUESTS_FOLDER}/response",
            scratch_dir="",
            # On the engine's own network, every sidecar would want the same port, and others may be there.
            status_port="any" if self._on_host else plans.STATUS_PORT,
            status_host=self._settings.status_host if self._on_host else "0.0.0.0",
        )

    @property
    def _on_host(self) -> bool:
        return self._settings.docker_network == plans.HOST_NETWORK

    async def _bring_up(self, start: _Start, settings: SidecarSettings, login: Login | None) -> None:
        """Never raises but when cancelled: the group's other tasks go on."""
        plan = start.plan
        about = {"instance_id": plan.instance_id, "version_id": plan.version.id}
        try:
            await guard(self._make(start, settings, login), expected=(FnqueueError,), **about)
        except FnqueueError as exc:
            start.error = last(str(exc), ERROR_BYTES)
        except Fault as exc:
            start.error = f"its start failed: {exc}"
        else:
            self._starts.pop(plan.instance_id, None)
            logger.info("instance_started", extra=about)
            return
        logger.warning("instance_cannot_start", extra={**about, "cause": start.error})

    async def _make(self, start: _Start, settings: SidecarSettings, login: Login | None) -> None:
        plan, engine = start.plan, self._engine
        await self._pull(plan.version.container_image, plans.login_for(plan.version.container_image, login))
        await self._pull(self._settings.docker_sidecar_image, None)
        await engine.create_network(plan.network, plan.labels(), internal=not self._settings.docker_egress)
        for volume in plan.volumes:
            await engine.create_volume(volume, plan.labels())
        container = await engine.create(plan.name, plan.container(settings))
        await engine.put(container, plans.REQUESTS_FOLDER, archive_of(*_request_folders(settings)))
        written = start.secrets
        if written is not None:
            await self._write_secrets(plan.secrets_volume, plan.labels(), written)
        await engine.start(container)
        if self._on_host:
            # No name of that network holds here.
            address = await self._address_of(container, plan.network)
            if address is None:
                return  # it has ended already: half an instance, and dead
            settings = settings.model_copy(update={"inference_host": address})
        sidecar = await engine.create(f"{plan.name}-{plans.SIDECAR}", plan.sidecar(settings))
        if not self._on_host:
            await engine.connect(plan.network, sidecar)
        await engine.start(sidecar)
        while start.secrets is not None and start.secrets is not written:  # new ones were delivered meanwhile
            written = start.secrets
            await self._write_secrets(plan.secrets_volume, plan.labels(), written)

    async def _pull(self, image: str, login: Login | None) -> None:
        """One at a time of each image: what the first one fetched is there for the others."""
        reference = plans.qualified(image)
        async with self._pulls.setdefault(reference, asyncio.Lock()):
            wanted = self._settings.docker_pull
            if wanted != "always" and await self._engine.has_image(reference):
                return
            if wanted == "never":
                raise LauncherUnavailable(f"the image {image} is not on this machine, and docker_pull is `never`")
            logger.info("image_pull", extra={"image": image, "with_login": login is not None})
            await self._engine.pull(reference, login, within_s=self._settings.docker_pull_timeout_s)

    async def _address_of(self, container_id: str, network: str) -> str | None:
        shown = await self._engine.inspect(container_id)
        address: str = shown["NetworkSettings"]["Networks"].get(network, {}).get("IPAddress", "")
        return address or None

    async def _write_secrets(self, volume: str, labels: Mapping[str, str], content: bytes) -> None:
        """Put `content` in the file's place in one step, unless it is there already. The container that has the file
        may only read it."""
        config = plans.writer(self._settings, labels, volume)
        writer = await self._engine.create(f"{volume}-{uuid.uuid4().hex[:8]}", config)
        try:
            if await self._engine.get(writer, f"{plans.SECRETS_FOLDER}/{FILE}") == content:
                return
            entry = tarfile.TarInfo(f"{FILE}.new")
            entry.mode = 0o444  # its reader may be any user, of this one container
            await self._engine.put(writer, plans.SECRETS_FOLDER, archive_of(entry, content=content))
            await self._engine.start(writer)
            status = await self._engine.wait(writer)
            if status != 0:
                tail = await self._engine.log(writer, lines=_ERROR_LINES)
                raise LauncherUnavailable(f"the secrets file cannot be written: {last(tail, ERROR_BYTES)}")
        finally:
            await self._engine.remove(writer)

    # -- looking -----------------------------------------------------------------------------------

    async def _seen(self, instance_id: str, parts: Sequence[Found]) -> DockerInstance:
        by_role = {part.labels.get(plans.ROLE): part for part in parts}
        container, sidecar = by_role.get(plans.CONTAINER), by_role.get(plans.SIDECAR)
        whole = container is not None and sidecar is not None and container.alive and sidecar.alive
        # Perhaps another controller, which just lost the lead, is still at it.
        ended = any(part.state in _ENDED for part in parts)
        young = not ended and time.time() - max(part.created_at for part in parts) < _MADE_S
        starting = young or (sidecar is not None and sidecar.alive and await self._comes_again(container))
        if whole or starting:
            error = ""
        elif instance_id in self._errors:
            error = self._errors[instance_id]
        else:
            error = self._errors[instance_id] = await self._why(container, sidecar)
        labels = parts[0].labels
        return DockerInstance(
            instance_id=instance_id,
            version_id=labels.get(plans.VERSION, ""),
            specification_id=labels.get(plans.SPECIFICATION, ""),
            alive=whole or starting,
            error=error,
        )

    async def _comes_again(self, container: Found | None) -> bool:
        """Whether the engine is about to start it again, or has since it was listed. Docker has a state for that;
        podman shows the end as any, and then a container that is new."""
        if not self._settings.docker_restarts or container is None:
            return False
        try:
            shown = await self._engine.inspect(container.id)
        except Absent:
            return False
        state, left = shown["State"], self._settings.docker_restarts - int(shown.get("RestartCount", 0))
        if state["Running"]:
            return True
        ended_at = datetime.fromisoformat(state["FinishedAt"]).timestamp()
        over = state["Status"] in _ENDED and (left <= 0 or state["ExitCode"] == 0)
        return not over and time.time() - ended_at < _RESTARTED_S

    async def _why(self, container: Found | None, sidecar: Found | None) -> str:
        log = await self._engine.log(container.id, lines=_ERROR_LINES) if container else ""
        for name, part in ((plans.CONTAINER, container), (plans.SIDECAR, sidecar)):
            if part is not None and not part.alive:
                own = await self._engine.log(part.id, lines=_ERROR_LINES) if part is sidecar else ""
                return told(f"{name} {await self._fate(part)}", log, own)
        return told(f"its {plans.CONTAINER if container is None else plans.SIDECAR} is gone", log)

    async def _fate(self, part: Found) -> str:
        try:
            shown = await self._engine.inspect(part.id)
        except Absent:
            return "is gone"
        state, memory_bytes = shown["State"], shown["HostConfig"].get("Memory") or 0
        if state.get("OOMKilled"):
            return f"was killed: it used more memory than its {memory_bytes} bytes"
        status = int(state.get("ExitCode", 0))
        fate = f"was killed by signal {status - 128}" if status > 128 else f"exited with status {status}"
        if status == _KILLED and memory_bytes:  # not every engine says what for
            fate += f", perhaps because it used more memory than its {memory_bytes} bytes"
        fate = "was never started" if part.state in ("created", "configured", "initialized") else fate
        return f"{fate}: {state['Error']}" if state.get("Error") else fate

    # -- removing ----------------------------------------------------------------------------------

    async def _remove_rest(self, instance_id: str) -> None:
        mine = f"{plans.INSTANCE}={instance_id}"
        for name, labels in await self._engine.networks(mine):
            if labels.get(plans.PROJECT) == self._settings.docker_project:
                await self._engine.remove_network(name)
        for name, labels in await self._engine.volumes(mine):
            if labels.get(plans.PROJECT) == self._settings.docker_project:
                await self._engine.remove_volume(name)

    async def _keep_logs(self, instance_id: str, by_role: Mapping[str | None, Found]) -> None:
        """With times, so that who followed them before goes on where it was."""
        parts = {role: by_role[role] for role in (plans.CONTAINER, plans.SIDECAR) if role in by_role}
        texts = {f"{role}.log": last(await self._stamped(part), _KEPT_BYTES) for role, part in parts.items()}
        if not texts:
            return
        ended = Ended(
            instance_id=instance_id,
            version_id=next(iter(parts.values())).labels.get(plans.VERSION, ""),
            at=time.time(),
            cause=logs.cause_of(self._errors.get(instance_id, "")),
        )
        with suppress(OSError):  # a full disk must not keep an instance running
            await asyncio.to_thread(logs.keep, self._logs, instance_id, texts)
            await asyncio.to_thread(logs.note_end, self._logs, ended)
            await asyncio.to_thread(logs.forget_oldest, self._logs)

    async def _stamped(self, part: Found) -> str:
        """An engine that keeps no logs must not keep an instance running."""
        with suppress(LauncherUnavailable):
            return await self._engine.stamped_log(part.id, lines=_KEPT_LINES, since_s=0)
        return ""


def _request_folders(settings: SidecarSettings) -> list[tarfile.TarInfo]:
    """Any user may be the sidecar's, and any other the container's; nobody may remove what is the other's."""
    folders = []
    for folder in (settings.asset_dir, settings.response_dir):
        entry = tarfile.TarInfo(folder.name)
        entry.type = tarfile.DIRTYPE
        entry.mode = 0o777 | stat.S_ISVTX
        folders.append(entry)
    return folders


def _address(launcher_url: str) -> str | None:
    rest = launcher_url.partition("://")[2]
    if not rest:
        return None
    return f"unix://{rest}" if rest.startswith("/") else f"tcp://{rest}"


def _refuse_local_servers(settings: ControllerSettings) -> None:
    for name, scheme in (("queue_url", "memory"), ("store_url", "memory"), ("blobs_url", "file")):
        if getattr(settings, name).get_secret_value().startswith(f"{scheme}:"):
            raise ConfigurationError(
                f"FNQUEUE_{name.upper()} is {scheme}://, which a sidecar in a container cannot reach; name a server, "
                "or use FNQUEUE_LAUNCHER_URL=process://"
            )
    if settings.docker_restarts and settings.docker_network == plans.HOST_NETWORK:
        raise ConfigurationError("FNQUEUE_DOCKER_RESTARTS needs a FNQUEUE_DOCKER_NETWORK other than `host`")


__all__ = ["BACKEND", "DockerInstance", "DockerLauncher", "open_docker_launcher"]
