"""A Launcher for tests: instances that live and die when the test says so. `test_process_launcher` holds it to what
is expected of a real one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from dataclasses import dataclass

from broker.errors import ConfigurationError, LauncherUnavailable, NoCapacity
from broker.model import Ended, Gpu, GpuSpecification, LogExcerpt, Login, LogLine, Part, Version
from broker.ports import Launched

KNOWN_IMAGE = "test/server:1"
CPU = Gpu(name="CPU", instance_type="CPU", backend="local", capacity=8)


@dataclass(slots=True)
class FakeInstance:
    instance_id: str
    version_id: str
    specification_id: str
    alive: bool = True
    error: str = ""
    secrets: bytes | None = None


class FakeLauncher:
    """`started` is set by the first start. `stopped` tells in what order instances were stopped, and with how much
    grace. No more than `room` run at once."""

    def __init__(self) -> None:
        self.room: int | None = None  # None: any number
        self.instances: dict[str, FakeInstance] = {}
        self.draining: asyncio.Event | None = None  # who is stopped goes when it is set
        self.stopped: list[tuple[str, float]] = []
        self.started = asyncio.Event()
        self.leaves_running = False
        self.logs: dict[tuple[str, Part], list[LogLine]] = {}
        self.unreadable: set[str] = set()
        self.reads = 0
        self.gone: list[Ended] = []

    async def gpus(self) -> list[Gpu]:
        return [CPU]

    async def start(
        self,
        instance_id: str,
        version: Version,
        specification: GpuSpecification,
        *,
        secrets: bytes | None = None,
        login: Login | None = None,
    ) -> None:
        if version.container_image != KNOWN_IMAGE:
            raise ConfigurationError(
                f"no command is known for the image {version.container_image!r}; known images: {KNOWN_IMAGE}"
            )
        if self.room is not None and len(self.instances) >= self.room:
            raise NoCapacity("1 H100 needed: 0 of 1 are free on this machine")
        self.instances[instance_id] = FakeInstance(instance_id, version.id, specification.id, secrets=secrets)
        self.started.set()

    async def stop(self, instance_id: str, *, grace_s: float) -> None:
        if self.draining is not None:
            await self.draining.wait()
        instance = self.instances.pop(instance_id, None)
        if instance is not None:
            cause = instance.error.partition("\n")[0] or "stopped"
            ended = Ended(instance_id=instance_id, version_id=instance.version_id, at=time.time(), cause=cause)
            self.gone.insert(0, ended)
            self.stopped.append((instance_id, grace_s))

    async def deliver(self, instance_id: str, secrets: bytes) -> None:
        instance = self.instances.get(instance_id)
        if instance is not None and instance.secrets is not None:
            instance.secrets = secrets

    async def launched(self) -> list[Launched]:
        return list(self.instances.values())

    async def log(self, instance_id: str, part: Part, *, after: str) -> LogExcerpt:
        """Positions are the numbers of lines."""
        self.reads += 1
        if instance_id in self.unreadable:
            raise LauncherUnavailable("its engine is away")
        known = instance_id in {*self.instances, *(ended.instance_id for ended in self.gone)}
        written = self.logs.get((instance_id, part), []) if known else []
        return LogExcerpt(lines=tuple(written[int(after or 0) :]), position=str(len(written)))

    async def ended(self) -> list[Ended]:
        return list(self.gone)

    def kill(self, instance_id: str, error: str = "container was killed by signal 9") -> None:
        self.instances[instance_id].alive = False
        self.instances[instance_id].error = error


class Users:
    """Those of a server that is away until `there`."""

    def __init__(self) -> None:
        self.there = True
        self.admitted: set[str] = set()

    async def admit(self, version_ids: Collection[str], *, look: bool = False) -> None:
        if not self.there:
            raise LauncherUnavailable("RabbitMQ is away")
        self.admitted.update(version_ids)

    async def expel(self, version_id: str) -> None:
        self.admitted.discard(version_id)
