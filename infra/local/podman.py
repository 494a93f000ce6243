"""podman's service of the Docker Engine API on a private socket, with images and containers of its own."""

from __future__ import annotations

import contextlib
import hashlib
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
RUN_PATH_BYTES = 50  # podman takes no longer one for what it keeps while it runs


class Podman(Server):
    """Needs root. `insecure` are registries (`host:port`) that it pulls from without TLS. Containers outlive the
    service, as they do when an engine is restarted; `discard` removes them."""

    name = "podman"

    def __init__(self, folder: Path, *, insecure: Sequence[str] = ()) -> None:
        super().__init__(folder)
        self._run = self._short_folder()
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
        shutil.rmtree(self._run, ignore_errors=True)

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

    @property
    def _socket(self) -> Path:
        return self._run / "podman.sock"

    def _short_folder(self) -> Path:
        """Of ours alone, and the same for whoever names the same folder."""
        run = self.folder / "run"
        if len(os.fsencode(run)) > RUN_PATH_BYTES:
            name = hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:12]
            run = Path(tempfile.gettempdir()) / f"fnqueue-{name}"
        run.mkdir(mode=0o700, exist_ok=True)
        if run.is_symlink() or run.stat().st_uid != os.geteuid():
            raise ServerFailed(f"{run} is somebody else's; remove it")
        return run

    def _podman(self) -> list[str]:
        return [
            str(binaries.program("podman")),
            "--root", str(self.folder / "root"),
            "--runroot", str(self._run),
            "--tmpdir", str(self.folder / "tmp"),
            "--runtime", RUNTIME,
            "--cgroup-manager", "cgroupfs",
            "--events-backend", "file",
            "--network-backend", "netavark",
            "--network-config-dir", str(self.folder / "networks"),
        ]  # fmt: skip
