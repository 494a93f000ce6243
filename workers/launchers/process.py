"""Instances as plain processes of this machine: no container engine needed.

An instance is two processes, the "container" (the command that stands for the image) and its sidecar; when either
has died, the instance is not alive. Each instance has a folder, `<data_dir>/instances/<instance_id>`:

    state.json       who the two processes are; a controller that was killed finds its instances again by it
    container.log    sidecar.log
    ended.json       when and how, once the instance is gone
    assets/          responses/       scratch/       request directories
    secrets/         the secrets file, if the version has secrets; gone with the instance

Every port that a version names (inference, health) is the one free loopback port that the process is given in PORT;
only a gRPC health check at another port than the inference's has one of its own, HEALTH_PORT.
An instance of a GPU type has that many cards to itself: CUDA_VISIBLE_DEVICES shows it those and no others, and where
no card is free, none is started. Instances of the type `CPU` are shown no cards, and there may be any number of them.
There is no isolation: a container here may do what the user who runs the controller may do. It is given none of the
FNQUEUE_* settings, and of the machine's environment only what `_INHERITED` lists.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

import pynvml
from pydantic import AliasChoices

from broker.errors import ConfigurationError, LauncherUnavailable
from broker.model import Ended, Gpu, GpuSpecification, LogExcerpt, Login, Part, Version
from broker.ports import Launched
from broker.settings import ControllerSettings, SidecarSettings
from workers import trees
from workers.launchers import logs
from workers.launchers import secrets as secrets_file
from workers.launchers.cards import CPU, Card, Cards, Nvml, choose, device_environment, inventory
from workers.launchers.children import Child, Identity, writers
from workers.launchers.images import Image, find_image, read_images
from workers.launchers.instances import (
    ERROR_BYTES,
    container_arguments,
    container_variables,
    place_of,
    refuse_elsewhere,
    sidecar_settings,
    sidecar_variables,
    told,
)

logger = logging.getLogger(__name__)

BACKEND = "local"

_INHERITED = (
    "PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "SSL_CERT_FILE",
    "CUDA_HOME",
)  # fmt: skip
_HOST = "127.0.0.1"
# Below the range from which systems take the ports of outgoing connections.
INSTANCE_PORTS = range(20_000, 32_000)
_PORT_TRIES = 100
_CONTAINER_GRACE_S = 5.0
_REQUEST_FOLDERS = ("assets", "responses", "scratch")


class Sidecar(Protocol):
    """A sidecar that was started."""

    @property
    def identity(self) -> Identity | None:
        """By what it is found again after a crash; None when it lives in this process and dies with it."""

    @property
    def alive(self) -> bool: ...

    @property
    def fate(self) -> str:
        """How it ended, to follow its name: "exited with status 1"."""

    async def stop(self, *, grace_s: float) -> None:
        """Drain for at most `grace_s`, then end it. Idempotent."""


class StartSidecar(Protocol):
    """How sidecars are run: `start_sidecar_process`, or inside this process where the back ends are in memory."""

    async def __call__(self, settings: SidecarSettings, *, log: Path) -> Sidecar:
        """Begin to run one. `log` is for its output, where it has one of its own."""


async def start_sidecar_process(settings: SidecarSettings, *, log: Path) -> Child:
    """A `fnqueue sidecar` of its own, which lives on when this process is killed."""
    # -P: a folder named `fnqueue` or `workers` where the controller was started must not be imported.
    command = [sys.executable, "-P", "-m", "fnqueue", "sidecar"]
    return await asyncio.to_thread(
        Child.spawn, command, environment=sidecar_environment(settings), folder=Path.cwd(), log=log
    )


def sidecar_environment(settings: SidecarSettings) -> dict[str, str]:
    """This process's environment, with every setting of the sidecar in it and no other word for any of them; nothing
    else of our settings, which may be keys."""
    left_out = ("FNQUEUE_", "OTEL_")
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith(left_out)}
    for name, field in SidecarSettings.model_fields.items():
        spellings = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else ()
        words = {name.upper(), *(str(spelling).upper() for spelling in spellings)} if spellings else set()
        for word in [word for word in environment if word.upper() in words]:
            del environment[word]
    return environment | sidecar_variables(settings)


@dataclass(slots=True, kw_only=True)
class _Instance:
    instance_id: str
    version_id: str
    specification_id: str
    port: int
    folder: Path
    cards: tuple[str, ...]
    container: Child
    sidecar: Sidecar | None

    @property
    def alive(self) -> bool:
        return self.container.alive and self.sidecar is not None and self.sidecar.alive

    @property
    def error(self) -> str:
        container, sidecar = self.folder / "container.log", self.folder / "sidecar.log"
        if not self.container.alive:
            return told(f"container {self.container.fate}", _tail(container))
        if self.sidecar is None:
            return told("its sidecar did not start", _tail(container))
        if not self.sidecar.alive:
            return told(f"sidecar {self.sidecar.fate}", _tail(container), _tail(sidecar))
        return ""

    def save(self) -> None:
        """Replace the state file in one step."""
        state = {
            "instance_id": self.instance_id,
            "version_id": self.version_id,
            "specification_id": self.specification_id,
            "port": self.port,
            "cards": self.cards,
            "container": asdict(self.container.identity),
            "sidecar": asdict(self.sidecar.identity) if self.sidecar and self.sidecar.identity else None,
        }
        written = self.folder / "state.json.new"
        written.write_text(json.dumps(state), encoding="utf-8")
        written.replace(self.folder / "state.json")


class ProcessLauncher:
    """The Launcher of `process://`. One at a time per data folder.

    The first call adopts the instances that a killed controller left in the data folder; it raises
    ConfigurationError while another controller is using the folder.
    """

    def __init__(
        self,
        settings: ControllerSettings,
        *,
        start_sidecar: StartSidecar = start_sidecar_process,
        nvml: Nvml = pynvml,
    ) -> None:
        """Raises ConfigurationError: the images file cannot be read."""
        self._settings = settings
        self._start_sidecar = start_sidecar
        self._root = settings.data_dir.resolve() / "instances"
        self._images = read_images(settings.images_file)
        self._instances: dict[str, _Instance] = {}
        self._lock: IO[bytes] | None = None
        self._cards = Cards(nvml, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
        self._secrets_lock = asyncio.Lock()
        self._place = place_of(settings)

    @property
    def leaves_running(self) -> bool:
        return False

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
        await self._open()
        image = find_image(self._images, version.container_image)
        cards = await self._choose(specification)
        taken = {instance.port for instance in self._instances.values()}
        port = _free_port(taken)
        health_port = _free_port({*taken, port}) if _is_asked_apart(version) else port
        folder = self._root / instance_id
        settings = self._sidecar_settings(
            instance_id,
            version,
            specification,
            port=port,
            health_port=health_port,
            status_port=_free_port({*taken, port, health_port}),
            folder=folder,
            gpu_count=len(cards),
        )
        try:
            container = await asyncio.to_thread(_spawn_container, image, version, settings, folder, cards, secrets)
        except BaseException:
            await self._clear(folder)
            raise
        instance = _Instance(
            instance_id=instance_id,
            version_id=version.id,
            specification_id=specification.id,
            port=port,
            folder=folder,
            cards=tuple(card.uuid for card in cards),
            container=container,
            sidecar=None,
        )
        self._instances[instance_id] = instance
        instance.save()
        instance.sidecar = await self._start_sidecar(settings, log=folder / "sidecar.log")
        instance.save()
        logger.info("instance_started", extra={"instance_id": instance_id, "version_id": version.id, "port": port})

    async def stop(self, instance_id: str, *, grace_s: float) -> None:
        await self._open()
        instance = self._instances.get(instance_id)
        if instance is None:
            return
        cause = logs.cause_of(instance.error)
        if instance.sidecar is not None:
            await instance.sidecar.stop(grace_s=grace_s)
        await instance.container.stop(grace_s=_CONTAINER_GRACE_S)
        ended = Ended(instance_id=instance_id, version_id=instance.version_id, at=time.time(), cause=cause)
        with suppress(OSError):  # a full disk must not keep an instance running
            await asyncio.to_thread(logs.note_end, self._root, ended)
        await self._clear(instance.folder)
        self._instances.pop(instance_id, None)
        logger.info("instance_stopped", extra={"instance_id": instance_id, "version_id": instance.version_id})

    async def deliver(self, instance_id: str, secrets: bytes) -> None:
        await self._open()
        instance = self._instances.get(instance_id)
        if instance is not None:
            async with self._secrets_lock:  # not while its folder is being cleared
                with suppress(FileNotFoundError):
                    await asyncio.to_thread(secrets_file.replace, instance.folder / "secrets", secrets)

    async def launched(self) -> list[Launched]:
        await self._open()
        return list(self._instances.values())

    async def log(self, instance_id: str, part: Part, *, after: str) -> LogExcerpt:
        try:
            if instance_id not in self._instances and not logs.has_ended(self._root, instance_id):
                return LogExcerpt(lines=(), position=after)
            return await asyncio.to_thread(logs.of_file, self._root / instance_id / f"{part}.log", after=after)
        except OSError as exc:
            raise LauncherUnavailable(f"the log of {instance_id} cannot be read: {exc}") from exc

    async def ended(self) -> Sequence[Ended]:
        return await asyncio.to_thread(logs.ended, self._root)

    async def close(self) -> None:
        """Leave the data folder to the next launcher. Instances go on."""
        self._cards.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    async def _choose(self, specification: GpuSpecification) -> tuple[Card, ...]:
        """The cards for one more instance. Raises NoCapacity."""
        refuse_elsewhere(specification, self._place)
        if specification.gpu == CPU:
            return ()
        cards = self._cards.seen or await asyncio.to_thread(self._cards.read)
        taken = {uuid for instance in self._instances.values() for uuid in instance.cards}
        return choose(cards, specification.instance_type, specification.gpu, taken)

    async def _open(self) -> None:
        if self._lock is None:
            self._lock, self._instances = await asyncio.to_thread(_take_over, self._root)

    def _sidecar_settings(
        self,
        instance_id: str,
        version: Version,
        specification: GpuSpecification,
        *,
        port: int,
        health_port: int,
        status_port: int,
        folder: Path,
        gpu_count: int,
    ) -> SidecarSettings:
        return sidecar_settings(
            self._settings,
            instance_id,
            version,
            specification,
            backend=BACKEND,
            data_dir=self._settings.data_dir.resolve(),
            gpu_count=gpu_count,
            status_port=status_port,
            inference_host=_HOST,
            inference_port=port,
            health_port=health_port,
            asset_dir=folder / "assets",
            response_dir=folder / "responses",
            scratch_dir=str(folder / "scratch"),
        )

    async def _clear(self, folder: Path) -> None:
        async with self._secrets_lock:
            await asyncio.to_thread(self._remove, folder)

    def _remove(self, folder: Path) -> None:
        """Forget an instance but for its logs, and keep the newest few of those."""
        secrets_file.remove(folder / "secrets")
        (folder / "state.json").unlink(missing_ok=True)
        _clear_requests(folder)
        logs.forget_oldest(self._root, in_use=lambda path: (path / "state.json").exists())


def _clear_requests(folder: Path) -> None:
    """On the disk of the data folder, not in memory: they may come to `max_artifact_bytes` a request. What killed
    processes left there goes with the instance, or when the next launcher takes over."""
    trees.remove(*(folder / name for name in _REQUEST_FOLDERS))


def _spawn_container(
    image: Image,
    version: Version,
    settings: SidecarSettings,
    folder: Path,
    cards: Sequence[Card],
    secrets: bytes | None,
) -> Child:
    for path in (folder, settings.asset_dir, settings.response_dir, Path(settings.scratch_dir)):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = image.command_for(settings.inference_port) + container_arguments(version)
    environment = _container_environment(image, version, settings) | device_environment(cards)
    if secrets is not None:
        secrets_file.lay(folder / "secrets", secrets)
        environment[secrets_file.PATH_VARIABLE] = str(folder / "secrets" / secrets_file.FILE)
    try:
        return Child.spawn(
            command,
            environment=environment,
            folder=image.folder,
            log=folder / "container.log",
        )
    except (FileNotFoundError, PermissionError, ValueError) as exc:
        raise ConfigurationError(f"the command of image {image.reference!r} cannot be run: {exc}") from exc


def _container_environment(image: Image, version: Version, settings: SidecarSettings) -> dict[str, str]:
    """What contract/management.md §7.2 promises, where to listen, and the user's own."""
    return {
        **{name: os.environ[name] for name in _INHERITED if name in os.environ},
        **image.environment_for(settings.inference_port),
        **dict(version.container_environment),
        "HOST": _HOST,
        "PORT": str(settings.inference_port),
        **({"HEALTH_PORT": str(settings.health_port)} if settings.health_port != settings.inference_port else {}),
        **container_variables(version, settings),
    }


def _take_over(root: Path) -> tuple[IO[bytes], dict[str, _Instance]]:
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = (root / ".lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        lock.close()
        raise ConfigurationError(
            f"another controller runs instances in {root}; give each its own FNQUEUE_DATA_DIR"
        ) from exc
    for folder in root.iterdir():
        if folder.is_dir() and not (folder / "state.json").exists():
            _clear_requests(folder)
    adopted = [_adopt(state.parent) for state in root.glob("*/state.json")]
    found = {instance.instance_id: instance for instance in adopted if instance is not None}
    _end_unknown(root, found.values())
    for leftover in root.glob("*/secrets"):
        if leftover.parent.name not in found:  # its controller was killed before it had written the instance down
            secrets_file.remove(leftover)
    return lock, found


def _end_unknown(root: Path, found: Collection[_Instance]) -> None:
    """Kill what a controller started and was killed before it had written down."""
    known = {instance.container.identity.pid for instance in found}
    known |= {item.sidecar.identity.pid for item in found if item.sidecar is not None and item.sidecar.identity}
    for group, log in writers(root).items():
        if group not in known:
            logger.warning("unknown_process_killed", extra={"group": group, "instance_id": log.parent.name})
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)


def _adopt(folder: Path) -> _Instance | None:
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        instance = _Instance(
            instance_id=state["instance_id"],
            version_id=state["version_id"],
            specification_id=state["specification_id"],
            port=state["port"],
            folder=folder,
            cards=tuple(state.get("cards", ())),
            container=Child(Identity(**state["container"])),
            sidecar=Child(Identity(**state["sidecar"])) if state["sidecar"] else None,
        )
    except (OSError, ValueError, KeyError, TypeError) as exc:
        logger.warning("instance_state_unreadable", extra={"folder": folder.name, "cause": str(exc)})
        return None
    logger.info("instance_adopted", extra={"instance_id": instance.instance_id, "version_id": instance.version_id})
    return instance


def _is_asked_apart(version: Version) -> bool:
    return version.health.protocol.lower() == "grpc" and version.health.port != version.inference_port


def _free_port(taken: set[int]) -> int:
    for port in random.sample(INSTANCE_PORTS, _PORT_TRIES):  # spreads them, guards nothing
        if port in taken:
            continue
        with socket.socket() as probe:
            try:
                probe.bind((_HOST, port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port among {_PORT_TRIES} from {INSTANCE_PORTS.start} to {INSTANCE_PORTS.stop}")


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as lines:
            lines.seek(max(0, lines.seek(0, os.SEEK_END) - ERROR_BYTES))
            return lines.read(ERROR_BYTES).decode(errors="ignore").strip()
    except OSError:
        return ""
