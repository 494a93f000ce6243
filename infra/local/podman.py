"""podman's service of the Docker Engine API on a private socket, with images and containers of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from infra.local import binaries
from infra.local.process import PROBE_S, Server, ServerFailed, bare_environment

RUNTIME = "runc"
# Of containers, where this machine restricts those of its own processes.
ULIMITS = "nofile=1024:1024,nproc=1024:1024"
CTL_S = 600.0  # an image of some hundred megabytes is imported by then
SOCKET_PATH_BYTES = 100  # the kernel takes 107


class Podman(Server):
    """Needs root. `insecure` are registries (`host:port`) that it pulls from without TLS. Containers outlive the
    service, as they do when an engine is restarted; `discard` removes them."""

    name = "podman"

    def __init__(self, folder: Path, *, insecure: Sequence[str] = ()) -> None:
        super().__init__(folder)
        self._socket = self.folder / "podman.sock"
        self._elsewhere: Path | None = None
        if len(os.fsencode(self._socket)) > SOCKET_PATH_BYTES:
            self._elsewhere = Path(tempfile.mkdtemp(prefix="fnqueue-"))
            self._socket = self._elsewhere / self._socket.name
        self._registries = self.folder / "registries.conf"
        self._registries.write_text(
            "".join(f'[[registry]]\nlocation = "{host}"\ninsecure = true\n' for host in insecure)
        )
        self._policy = self.folder / "policy.json"
        self._policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')

    @property
    def url(self) -> str:
        return f"docker://{self._socket}"

    def command(self) -> Sequence[str]:
        return [*self._podman(), "system", "service", "--time=0", f"unix://{self._socket}"]

    def environment(self) -> Mapping[str, str]:
        return {
            **bare_environment(),
            "PATH": binaries.SEARCH_PATH,
            "HOME": str(self.folder),
            "CONTAINERS_REGISTRIES_CONF": str(self._registries),
        }

    def answers(self) -> bool:
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(PROBE_S)
                client.connect(str(self._socket))
                client.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
                return client.recv(64).startswith(b"HTTP/1.0 200")
        except OSError:
            return False

    def clear(self) -> None:
        """Remove every container, volume and network; images stay. The service need not run."""
        self.control("rm", "--all", "--force", "--volumes", "--time", "0")
        self.control("volume", "prune", "--force")
        self.control("network", "prune", "--force")

    def has_image(self, reference: str) -> bool:
        return reference in self.control("images", "--format", "{{.Repository}}:{{.Tag}}").split()

    def discard(self) -> None:
        """Remove everything, and end the service."""
        self.clear()
        self.control("rmi", "--all", "--force")
        self.kill()
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # it leaves its store mounted upon itself
            store = str(self.folder / "root" / "overlay")
            subprocess.run(["umount", store], stderr=subprocess.DEVNULL, timeout=CTL_S, check=False)
        if self._elsewhere is not None:
            shutil.rmtree(self._elsewhere, ignore_errors=True)

    def control(self, *arguments: str) -> str:
        """What `podman <arguments>` prints. Raises ServerFailed."""
        done = subprocess.run(
            [*self._podman(), *arguments],
            env=dict(self.environment()),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CTL_S,
            check=False,
        )
        if done.returncode != 0:
            raise ServerFailed(f"podman {arguments[0]} failed:\n{done.stderr[-2000:]}")
        return done.stdout

    def _podman(self) -> list[str]:
        return [
            str(binaries.program("podman")),
            "--root", str(self.folder / "root"),
            "--runroot", str(self.folder / "run"),
            "--tmpdir", str(self.folder / "tmp"),
            "--runtime", RUNTIME,
            "--cgroup-manager", "cgroupfs",
            "--events-backend", "file",
            "--network-backend", "netavark",
            "--network-config-dir", str(self.folder / "networks"),
        ]  # fmt: skip
