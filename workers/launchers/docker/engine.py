"""The calls of the Docker Engine API that instances need; podman's service speaks it too.

Every call has a deadline. A thing that is not there is `Absent`; all else that goes wrong is LauncherUnavailable, in
the engine's words.
"""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiodocker import Docker
from aiodocker.containers import DockerContainer
from aiodocker.exceptions import DockerError

from broker.errors import ConfigurationError, LauncherUnavailable
from broker.model import Login

CALL_S = 30.0
# An engine that is told to stop something needs a while beyond the grace: to kill it, and to take its mounts apart.
_STOPPED_S = 30.0
_NOT_FOUND = 404
_UNREACHABLE = 900  # aiodocker's own
_ALIVE = frozenset({"running", "restarting", "paused", "stopping"})


class Absent(LauncherUnavailable):
    """The engine knows no such thing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A container as the engine lists it; `created_at` in unix seconds."""

    id: str
    labels: Mapping[str, str]
    state: str
    created_at: float

    @property
    def alive(self) -> bool:
        return self.state in _ALIVE


class Engine:
    """Closed by `close`."""

    def __init__(self, url: str | None) -> None:
        """`url` as `unix:///…` or `tcp://host:port`; None for DOCKER_HOST or the usual socket. Connects to nothing
        yet. Raises ConfigurationError when there is no such thing."""
        try:
            self._docker = Docker(url, timeout=aiohttp.ClientTimeout(sock_connect=CALL_S))
        except (ValueError, AssertionError, OSError) as exc:
            raise ConfigurationError(
                "FNQUEUE_LAUNCHER_URL: no container engine: neither the URL, nor DOCKER_HOST, nor a socket at "
                f"/run/docker.sock names one ({exc})"
            ) from exc

    async def close(self) -> None:
        await self._docker.close()

    # -- images ------------------------------------------------------------------------------------

    async def has_image(self, reference: str) -> bool:
        try:
            async with self._call("look at an image"):
                await self._docker.images.inspect(reference)
        except Absent:
            return False
        return True

    async def pull(self, reference: str, login: Login | None, *, within_s: float) -> None:
        """Raises LauncherUnavailable with what the registry said."""
        credentials = {"username": login.username, "password": login.password} if login else None
        async with self._call(f"pull the image {reference}", within_s=within_s):
            await self._docker.images.pull(reference, auth=credentials, timeout=None)

    # -- containers --------------------------------------------------------------------------------

    async def containers(self, *labels: str) -> list[Found]:
        """Those that carry all `labels` (`name=value`), whatever their state."""
        async with self._call("list containers"):
            found = await self._docker.containers.list(all=True, filters=_labelled(labels))
        return [_found(container._container) for container in found]

    async def create(self, name: str, config: Mapping[str, Any]) -> str:
        """The new container's ID."""
        async with self._call("create a container"):
            container = await self._docker.containers.create(dict(config), name=name)
        return container.id

    async def start(self, container_id: str) -> None:
        async with self._call("start a container", within_s=4 * CALL_S):
            await self._of(container_id).start()

    async def stop(self, container_id: str, *, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after `grace_s`. Idempotent."""
        with suppress(Absent):
            async with self._call("stop a container", within_s=grace_s + _STOPPED_S):
                await self._of(container_id).stop(t=round(grace_s))

    async def wait(self, container_id: str) -> int:
        """The exit status of a container that ends soon."""
        async with self._call("wait for a container"):
            return int((await self._of(container_id).wait())["StatusCode"])

    async def remove(self, container_id: str) -> None:
        """With its unnamed volumes. Idempotent; one that runs is killed."""
        with suppress(Absent):
            async with self._call("remove a container", within_s=2 * CALL_S):
                await self._of(container_id).delete(force=True, v=True)

    async def inspect(self, container_id: str) -> Mapping[str, Any]:
        async with self._call("look at a container"):
            shown: Mapping[str, Any] = await self._of(container_id).show()
        return shown

    async def log(self, container_id: str, *, lines: int) -> str:
        """The last lines that it wrote; '' if the engine keeps none."""
        try:
            async with self._call("read a log"):
                return "".join(await self._of(container_id).log(stdout=True, stderr=True, tail=lines))
        except LauncherUnavailable:
            return ""

    async def stamped_log(self, container_id: str, *, lines: int, since_s: int) -> str:
        """The last lines that it wrote since that second, each behind its time; an engine that keeps none refuses."""
        async with self._call("read a log"):
            found = await self._of(container_id).log(
                stdout=True, stderr=True, timestamps=True, tail=lines, since=since_s
            )
        return "".join(found)

    async def put(self, container_id: str, folder: str, archive: bytes) -> None:
        """Unpack a tar archive inside a container, started or not."""
        async with self._call("write into a container"):
            await self._of(container_id).put_archive(folder, archive)

    async def get(self, container_id: str, path: str) -> bytes | None:
        """A small file of a container that runs nobody else's code; None without one."""
        try:
            async with self._call("read from a container"):
                archive = await self._of(container_id).get_archive(path)
        except Absent:
            return None
        with archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                return file.read() if file else None
        return None

    # -- networks and volumes ----------------------------------------------------------------------

    async def create_network(self, name: str, labels: Mapping[str, str], *, internal: bool) -> None:
        async with self._call("create a network"):
            await self._docker.networks.create({"Name": name, "Labels": dict(labels), "Internal": internal})

    async def connect(self, network: str, container_id: str) -> None:
        async with self._call("connect a container"):
            await (await self._docker.networks.get(network)).connect({"Container": container_id})

    async def networks(self, label: str) -> list[tuple[str, Mapping[str, str]]]:
        """Names and labels."""
        async with self._call("list networks"):
            found = await self._docker.networks.list(filters={"label": [label]})
        return [(item["Name"], item.get("Labels") or {}) for item in found]

    async def remove_network(self, name: str) -> None:
        """Idempotent."""
        with suppress(Absent):
            async with self._call("remove a network"):
                await (await self._docker.networks.get(name)).delete()

    async def create_volume(self, name: str, labels: Mapping[str, str]) -> None:
        async with self._call("create a volume"):
            await self._docker.volumes.create({"Name": name, "Labels": dict(labels)})

    async def volumes(self, label: str) -> list[tuple[str, Mapping[str, str]]]:
        """Names and labels."""
        async with self._call("list volumes"):
            found = await self._docker.volumes.list(filters={"label": [label]})
        return [(item["Name"], item.get("Labels") or {}) for item in found.get("Volumes") or []]

    async def remove_volume(self, name: str) -> None:
        """Idempotent."""
        with suppress(Absent):
            async with self._call("remove a volume"):
                await (await self._docker.volumes.get(name)).delete()

    def _of(self, container_id: str) -> DockerContainer:
        return self._docker.containers.container(container_id)

    @asynccontextmanager
    async def _call(self, what: str, *, within_s: float = CALL_S) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(within_s):
                yield
        except DockerError as exc:
            if exc.status == _NOT_FOUND:
                raise Absent(f"the container engine cannot {what}: {exc.message}") from exc
            if exc.status == _UNREACHABLE:
                raise LauncherUnavailable(f"the container engine cannot be reached: {exc.message}") from exc
            raise LauncherUnavailable(f"the container engine cannot {what}: {exc.message}") from exc
        except TimeoutError as exc:
            raise LauncherUnavailable(f"the container engine took longer than {within_s:g} s to {what}") from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise LauncherUnavailable(f"the container engine cannot {what}: {str(exc) or type(exc).__name__}") from exc


def archive_of(*entries: tarfile.TarInfo, content: bytes = b"") -> bytes:
    """A tar archive of `entries`; `content` is that of every plain file among them.

    It ends with the two empty blocks that end an archive, and not with the usual filling after them: podman's unpacker
    reads no further, and where it was faster than the rest arrived, the call failed with "broken pipe" (buildah 6573).
    """
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for entry in entries:
            entry.size = len(content) if entry.isfile() else 0
            archive.addfile(entry, io.BytesIO(content) if entry.isfile() else None)
        end = archive.offset
    return packed.getvalue()[: end + 2 * tarfile.BLOCKSIZE]


def _labelled(labels: Sequence[str]) -> str:
    return json.dumps({"label": list(labels)})


def _found(row: Mapping[str, Any]) -> Found:
    return Found(
        id=row["Id"], labels=row.get("Labels") or {}, state=str(row["State"]).lower(), created_at=float(row["Created"])
    )
