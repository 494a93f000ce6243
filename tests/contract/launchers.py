"""What the contract suite of launchers knows of each kind: how to look into its instances, and how to kill them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from broker.model import GpuSpecification, Login, Version
from broker.ports import Launched, Launcher
from broker.settings import ControllerSettings, load
from infra.local.podman import RUNTIME, ULIMITS, Podman
from tests import images
from tests.eventually import eventually
from workers.launchers import open_launcher
from workers.launchers.process import start_sidecar_process

CONTAINERS = Path(__file__).parents[1] / "containers"
SERVING = str(CONTAINERS / "serving.py")
DEADLINE_S = 30.0
# Where containers may have no more than the machine's own limits.

VERSION = Version(
    id=str(uuid.uuid4()),
    function_id=str(uuid.uuid4()),
    account="ours",
    name="server",
    inference_url="/echo",
    container_image="tests/serving:1",
    created_at=0.0,
)
SPECIFICATION = GpuSpecification(
    id="spec-1", gpu="CPU", instance_type="CPU", min_instances=1, max_instances=1, max_request_concurrency=3
)
Part = Literal["container", "sidecar"]
PARTS: tuple[Part, ...] = ("container", "sidecar")


class Kind(ABC):
    """`serving` runs until it is stopped, `crashing` exits with status 3."""

    settings: ControllerSettings
    serving: Version
    crashing: Version

    def open(self) -> AbstractAsyncContextManager[Launcher]:
        """A launcher as a controller has it; left as if the controller had been killed."""
        return open_launcher(self.settings, start_sidecar=start_sidecar_process)

    async def up(self, launcher: Launcher, instance_id: str) -> None:
        """Both parts run, and have said their first words."""

        async def said() -> tuple[bool, str]:
            error = next(item.error for item in await launcher.launched() if item.instance_id == instance_id)
            logs = [await asyncio.to_thread(self.log, instance_id, part) for part in PARTS]
            return all("\n" in log for log in logs), error

        seen = await eventually(said, lambda seen: seen[0] or seen[1] != "", within_s=DEADLINE_S)
        assert seen[1] == ""

    @abstractmethod
    def log(self, instance_id: str, part: Part) -> str: ...

    @abstractmethod
    def kill(self, instance_id: str, part: Part) -> None: ...

    @abstractmethod
    def secrets(self, instance_id: str) -> bytes | None:
        """The content of the instance's secrets file."""

    def kept_log(self, instance_id: str, part: Part) -> str:
        """Of an instance that is gone."""
        return (self.settings.data_dir / "instances" / instance_id / f"{part}.log").read_text()

    def told(self, instance_id: str, part: Part) -> Any:
        """What it said that it was given."""
        return json.loads(self.log(instance_id, part).partition("\n")[0])


class Processes(Kind):
    def __init__(self, folder: Path) -> None:
        file = folder / "images.toml"
        file.write_text(
            f'["{VERSION.container_image}"]\ncommand = {json.dumps([sys.executable, SERVING])}\n'
            f'["tests/crashing:1"]\ncommand = {json.dumps([sys.executable, SERVING, "crash"])}\n'
        )
        self.settings = load(ControllerSettings, images_file=file, data_dir=folder / "data", drain_s=7.0)
        self.serving = VERSION
        self.crashing = replace(VERSION, container_image="tests/crashing:1")

    def log(self, instance_id: str, part: Part) -> str:
        try:
            return self.kept_log(instance_id, part)
        except FileNotFoundError:
            return ""

    def kill(self, instance_id: str, part: Part) -> None:
        state = json.loads((self.settings.data_dir / "instances" / instance_id / "state.json").read_text())
        os.kill(state[part]["pid"], signal.SIGKILL)

    def secrets(self, instance_id: str) -> bytes | None:
        file = self.settings.data_dir / "instances" / instance_id / "secrets" / "secrets.json"
        return file.read_bytes() if file.exists() else None


class Containers(Kind):
    def __init__(self, folder: Path, podman: Podman, **settings: Any) -> None:
        self.podman = podman
        self.project = f"test-{uuid.uuid4().hex[:8]}"
        given = {
            "launcher_url": podman.url,
            "queue_url": "amqp://127.0.0.1:1/",
            "store_url": "redis://127.0.0.1:1/0",
            "blobs_url": "s3://a:b@127.0.0.1:1/bucket",
            "data_dir": folder / "data",
            "drain_s": 7.0,
            "docker_project": self.project,
            "docker_sidecar_image": images.STAND_IN,
            "docker_runtime": RUNTIME,
            "docker_ulimits": ULIMITS,
        }
        self.settings = load(ControllerSettings, **given | settings)
        self.serving = replace(VERSION, container_image=images.SERVER, container_args=SERVING)
        self.crashing = replace(self.serving, container_args=f"{SERVING} crash")

    def log(self, instance_id: str, part: Part) -> str:
        """Read where podman keeps it: asking podman takes a process each time."""
        store = self.podman.folder / "root" / "overlay-containers"
        with suppress(OSError, ValueError, StopIteration):
            rows = json.loads((store / "containers.json").read_text())
            found = next(row["id"] for row in rows if self._name(instance_id, part) in row["names"])
            lines = (store / found / "userdata" / "ctr.log").read_text().splitlines()
            words = [line.split(" ", 3) for line in lines]  # time, stream, F(ull) or P(artial), text
            return "".join(text + ("\n" if full == "F" else "") for _, _, full, text in words)
        return ""

    def kill(self, instance_id: str, part: Part) -> None:
        self.podman.control("kill", self._name(instance_id, part))

    def secrets(self, instance_id: str) -> bytes | None:
        file = self.podman.folder / "root/volumes" / f"{self.project}-{instance_id}-secrets" / "_data/secrets.json"
        return file.read_bytes() if file.exists() else None

    def things(self) -> list[str]:
        """Names of all that the engine has of this project."""
        label = f"label=fnqueue.project={self.project}"
        return [
            *self.podman.control("ps", "--all", "--filter", label, "--format", "{{.Names}}").split(),
            *self.podman.control("network", "ls", "--filter", label, "--format", "{{.Name}}").split(),
            *self.podman.control("volume", "ls", "--filter", label, "--format", "{{.Name}}").split(),
        ]

    def _name(self, instance_id: str, part: Part) -> str:
        return f"{self.project}-{instance_id}" + ("" if part == "container" else "-sidecar")


async def started(
    launcher: Launcher, version: Version, *, secrets: bytes | None = None, login: Login | None = None
) -> str:
    instance_id = str(uuid.uuid4())
    await launcher.start(instance_id, version, SPECIFICATION, secrets=secrets, login=login)
    return instance_id


async def dead(launcher: Launcher, instance_id: str) -> Launched:
    async def look() -> Launched:
        return next(item for item in await launcher.launched() if item.instance_id == instance_id)

    return await eventually(look, lambda instance: not instance.alive, within_s=DEADLINE_S)


@asynccontextmanager
async def tidy(kind: Kind) -> AsyncIterator[Kind]:
    """Stops what is left when the test is over."""
    try:
        yield kind
    finally:
        async with kind.open() as launcher:
            for instance in await launcher.launched():
                await launcher.stop(instance.instance_id, grace_s=0.0)
