"""What an instance consists of in a container engine: names, labels and the bodies of the Engine API. Pure.

<project>-<instance>              the function's container, and the private network of the two
<project>-<instance>-sidecar      its sidecar, on that network and on the one of the servers
<project>-<instance>-requests     volume, /var/inf in both: the requests' directories
<project>-<instance>-secrets      volume, /var/secrets in the function's container, if the version has secrets
<project>-<instance>-<random>     a container that writes the secrets file, for a moment
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from broker.errors import ConfigurationError
from broker.model import Gpu, Login, Version
from broker.registries import registry_host
from broker.settings import ControllerSettings, SidecarSettings
from workers.launchers.cards import CPU, Card
from workers.launchers.instances import artifacts, container_arguments, container_variables, sidecar_variables
from workers.launchers.secrets import FILE, PATH_VARIABLE

PROJECT = "fnqueue.project"
INSTANCE = "fnqueue.instance"
VERSION = "fnqueue.version"
SPECIFICATION = "fnqueue.specification"
ROLE = "fnqueue.role"
CARDS = "fnqueue.cards"

CONTAINER = "container"
SIDECAR = "sidecar"
WRITER = "writer"

HOST_NETWORK = "host"
REQUESTS_FOLDER = "/var/inf"
SECRETS_FOLDER = "/var/secrets"
# By which the sidecar reaches the function's container on their own network.
CONTAINER_NAME = "function"
STATUS_PORT = 8090
_SCRIPT = "/usr/local/lib/fnqueue/healthy.py"  # infra/docker/Dockerfile
_S = 1_000_000_000  # the Engine API counts nanoseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One instance. `offer` is the type that it is of, as far as the inventory knows it."""

    settings: ControllerSettings
    instance_id: str
    version: Version
    specification_id: str
    cards: tuple[Card, ...]
    offer: Gpu | None
    has_secrets: bool

    @property
    def name(self) -> str:
        return f"{self.settings.docker_project}-{self.instance_id}"

    @property
    def network(self) -> str:
        return self.name

    @property
    def requests_volume(self) -> str:
        return f"{self.name}-requests"

    @property
    def secrets_volume(self) -> str:
        return secrets_volume(self.settings.docker_project, self.instance_id)

    @property
    def volumes(self) -> list[str]:
        return [self.requests_volume, *([self.secrets_volume] if self.has_secrets else [])]

    def labels(self, role: str = "") -> dict[str, str]:
        return {
            PROJECT: self.settings.docker_project,
            INSTANCE: self.instance_id,
            VERSION: self.version.id,
            SPECIFICATION: self.specification_id,
            CARDS: ",".join(card.uuid for card in self.cards),
            **({ROLE: role} if role else {}),
        }

    def container(self, sidecar: SidecarSettings) -> dict[str, Any]:
        """The function's. Raises ConfigurationError."""
        arguments = container_arguments(self.version)
        environment = dict(self.version.container_environment) | container_variables(self.version, sidecar)
        mounts = [_volume(self.requests_volume, REQUESTS_FOLDER), *self._artifacts()]
        if self.has_secrets:
            environment[PATH_VARIABLE] = posixpath.join(SECRETS_FOLDER, FILE)
            mounts.append(_volume(self.secrets_volume, SECRETS_FOLDER, read_only=True))
        host: dict[str, Any] = {
            **_host(self.settings),
            "Mounts": mounts,
            "NetworkMode": self.network,
            "RestartPolicy": _restarts(self.settings.docker_restarts),
            "SecurityOpt": ["no-new-privileges"],
            **self._limits(),
        }
        if self.cards:
            host["DeviceRequests"] = [self._devices()]
        return {
            "Image": qualified(self.version.container_image),
            **({"Cmd": arguments} if arguments else {}),
            "Env": _pairs(environment),
            "Labels": self.labels(CONTAINER),
            "HostConfig": host,
            "NetworkingConfig": {"EndpointsConfig": {self.network: {"Aliases": [CONTAINER_NAME]}}},
        }

    def sidecar(self, sidecar: SidecarSettings) -> dict[str, Any]:
        script = ["CMD", "python", _SCRIPT, f"http://127.0.0.1:{sidecar.status_port}/v1/health/ready"]
        checked = {"Test": script, "Interval": 10 * _S, "Timeout": 5 * _S, "Retries": 3, "StartPeriod": 60 * _S}
        return {
            "Image": qualified(self.settings.docker_sidecar_image),
            "Cmd": [SIDECAR],
            "Env": _pairs(sidecar_variables(sidecar)),
            "Labels": self.labels(SIDECAR),
            # The image's own check is that of the api.
            "Healthcheck": {"Test": ["NONE"]} if sidecar.status_port in (0, "any") else checked,
            "StopTimeout": round(self.settings.drain_s) + 10,  # for a stop by somebody else, or of the engine
            # On disk, not in memory: large inputs and results on their way.
            "Volumes": {"/tmp": {}},  # noqa: S108  the container's own
            "HostConfig": {
                **_host(self.settings),
                "Mounts": [_volume(self.requests_volume, REQUESTS_FOLDER)],
                "NetworkMode": self.settings.docker_network,
                "RestartPolicy": _restarts(0),
                "ReadonlyRootfs": True,
                "CapDrop": ["ALL"],
                "SecurityOpt": ["no-new-privileges"],
            },
        }

    def _artifacts(self) -> list[dict[str, Any]]:
        """Raises ConfigurationError."""
        wanted, root = artifacts(self.version), self.settings.docker_artifacts_dir
        if wanted and not root:
            raise ConfigurationError(
                f"the version has {wanted[0].kind}: FNQUEUE_DOCKER_ARTIFACTS_DIR must name the folder that holds them"
            )
        return [
            {"Type": "bind", "Source": posixpath.join(root, each.folder), "Target": each.target, "ReadOnly": True}
            for each in wanted
        ]

    def _limits(self) -> dict[str, Any]:
        share = self.offer if self.offer is not None and self.offer.name != CPU else None
        cpus = self.settings.docker_cpus or (share.cpu_cores if share else 0)
        memory_bytes = self.settings.docker_memory_bytes or (share.system_memory_bytes if share else 0)
        limits: dict[str, Any] = {}
        if cpus:
            limits["NanoCpus"] = round(cpus * _S)
        if memory_bytes:
            limits["Memory"] = memory_bytes
        if self.settings.docker_shm_bytes:
            limits["ShmSize"] = self.settings.docker_shm_bytes
        return limits

    def _devices(self) -> dict[str, Any]:
        uuids = [card.uuid for card in self.cards]
        if self.settings.docker_gpus == "cdi":
            return {"Driver": "cdi", "DeviceIDs": [f"nvidia.com/gpu={uuid}" for uuid in uuids]}
        return {"Driver": "nvidia", "DeviceIDs": uuids, "Capabilities": [["gpu"]]}


def secrets_volume(project: str, instance_id: str) -> str:
    return f"{project}-{instance_id}-secrets"


def writer(settings: ControllerSettings, labels: Mapping[str, str], volume: str) -> dict[str, Any]:
    """A container that puts the file `<FILE>.new` in the place of the secrets file, which nothing but a process can do
    in one step."""
    new = posixpath.join(SECRETS_FOLDER, FILE + ".new")
    return {
        "Image": qualified(settings.docker_sidecar_image),
        "User": "0:0",
        "Entrypoint": ["mv", "-f", new, posixpath.join(SECRETS_FOLDER, FILE)],
        "Cmd": [],
        "Labels": {**labels, ROLE: WRITER},
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": {
            **_host(settings),
            "Mounts": [_volume(volume, SECRETS_FOLDER)],
            "NetworkMode": "none",
            "RestartPolicy": _restarts(0),
            "ReadonlyRootfs": True,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
        },
    }


def qualified(reference: str) -> str:
    """With its registry: the Engine API takes a login for no other reference, and podman guesses."""
    first, slash, _ = reference.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return reference
    return f"{registry_host(reference)}/{reference}" if slash else f"docker.io/library/{reference}"


def login_for(reference: str, login: Login | None) -> Login | None:
    """Never the login of another registry than the image's own."""
    return login if login is not None and login.hostname == registry_host(reference) else None


def ulimits(text: str) -> list[dict[str, Any]]:
    """`name=soft:hard, …` as the Engine API has it. Raises ConfigurationError."""
    limits = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        name, _, values = part.partition("=")
        soft, _, hard = values.partition(":")
        try:
            limits.append({"Name": name.strip(), "Soft": int(soft), "Hard": int(hard or soft)})
        except ValueError:
            raise ConfigurationError(f"FNQUEUE_DOCKER_ULIMITS: {part!r} is not of the form name=soft:hard") from None
    return limits


def _host(settings: ControllerSettings) -> dict[str, Any]:
    """Of the HostConfig of every container."""
    config: dict[str, Any] = {
        "LogConfig": {"Type": "json-file", "Config": {"max-size": str(settings.docker_log_bytes)}},
        "Ulimits": ulimits(settings.docker_ulimits),
    }
    if settings.docker_runtime:
        config["Runtime"] = settings.docker_runtime
    return config


def _restarts(count: int) -> dict[str, Any]:
    return {"Name": "on-failure", "MaximumRetryCount": count} if count else {"Name": "no"}


def _volume(name: str, folder: str, *, read_only: bool = False) -> dict[str, Any]:
    return {"Type": "volume", "Source": name, "Target": folder, "ReadOnly": read_only}


def _pairs(environment: Mapping[str, str]) -> Sequence[str]:
    return [f"{name}={value}" for name, value in environment.items()]
