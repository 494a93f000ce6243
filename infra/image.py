"""`python -m infra.image FOLDER`: builds infra/docker/Dockerfile where no registry can be reached, and runs it.

The base is not python:slim but Debian's smallest system with this Python in it; what is put on top of it is what a
release has. api, controller and the sidecar that it starts then run as the image's user on a read-only file system
against real servers, until one invocation has come back. Needs root, and takes minutes, most of them for the base,
which is kept in FOLDER. docs/decisions/0045-image-without-a-registry.md
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from infra.local import binaries
from infra.local.podman import RUNTIME, ULIMITS, Podman
from infra.local.process import LOOPBACK, ServerFailed, free_port, kept_secret
from infra.local.stack import Own

REPOSITORY = Path(__file__).resolve().parent.parent
IMAGE, SAMPLE, BASE = "docker.io/fnqueue/fnqueue:local", "docker.io/fnqueue/echo:latest", "localhost/base:1.0"
LIMITS = tuple(f"--ulimit={limit}" for limit in ULIMITS.split(","))
BASE_S, READY_S, STEP_S = 1200.0, 180.0, 600.0
# Of what may lie in a Python that was built by hand, what python:slim has not either.
_LEFT_OUT = {"test", "tests", "idlelib", "tkinter", "turtledemo", "__pycache__"}


def base_archive(folder: Path) -> Path:
    """A root file system: Debian's smallest, and this Python with what it is linked with. Raises ServerFailed."""
    archive = folder / "base.tar"
    if archive.exists():
        return archive
    root, prefix = folder / "root", Path(sys.base_prefix)
    shutil.rmtree(root, ignore_errors=True)
    _run(["debootstrap", "--variant=minbase", "--include=ca-certificates", _suite(), str(root)], within_s=BASE_S)
    for part in ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(root / part, ignore_errors=True)
    python = Path(os.path.realpath(sys.executable))
    library = Path(sysconfig.get_paths(vars={"base": str(prefix)})["stdlib"])
    for path in (python, library):
        _copy(path, root / path.relative_to("/"))
    for step in python.parents[:-1]:  # some are their owner's alone, and the image's user is another
        (root / step.relative_to("/")).chmod(0o755)
    for needed in _linked([python, *library.glob("lib-dynload/*.so")]):
        if not (root / needed.relative_to("/")).exists():
            _copy(needed, root / needed.relative_to("/"))
    for name, script in {"python": 'exec "$python" "$@"', "pip": 'exec "$python" -m pip "$@"'}.items():
        wrapper = root / "usr/local/bin" / name
        wrapper.write_text(f"#!/bin/sh\npython={python}\n{script}\n")
        wrapper.chmod(0o755)
    with tarfile.open(folder / "base.tmp", "w") as packed:
        packed.add(root, arcname=".", filter=lambda entry: None if entry.name.startswith("./dev/") else entry)
    (folder / "base.tmp").rename(archive)
    shutil.rmtree(root)
    return archive


def build(podman: Podman, folder: Path) -> None:
    """The image and that of a sample, without network: what requirements/ names is fetched before."""
    wheels = folder / "wheels"
    for name in ("run", "build"):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--dest", str(wheels)]
        _run([*pip, "--requirement", str(REPOSITORY / "requirements" / f"{name}.txt")], within_s=STEP_S)
    offline = [f"--change=ENV {name}" for name in ("PIP_NO_INDEX=1", "PIP_FIND_LINKS=/wheels")]
    podman.control("import", *offline, str(base_archive(folder)), BASE)
    places = (("infra/docker/Dockerfile", ".", IMAGE), ("examples/echo/Dockerfile", "examples/echo", SAMPLE))
    for file, context, name in places:
        text = (REPOSITORY / file).read_text().replace("FROM python:3.13-slim", f"FROM {BASE}")
        recipe = folder / "Dockerfile"
        recipe.write_text(text)
        podman.control(
            *("build", "--quiet", "--no-cache", "--network=none", f"--runtime={RUNTIME}", *LIMITS),
            *(f"--volume={wheels}:/wheels:ro", f"--build-arg=BASE={BASE}", f"--file={recipe}", f"--tag={name}"),
            str(REPOSITORY / context),
        )


def try_out(podman: Podman, folder: Path) -> str:
    """What `fnqueue welcome` prints in the container of the api, with the others beside it. Raises ServerFailed."""
    own = Own.started(folder)
    for server in own.servers:
        server.start()
    try:
        return _welcomed(podman, folder, own)
    finally:
        podman.clear()
        for server in reversed(own.servers):
            server.stop()


def _welcomed(podman: Podman, folder: Path, own: Own) -> str:
    port, status_port = free_port(), free_port()
    key = kept_secret(folder / "admin.key")
    both = {
        "FNQUEUE_SECRET_KEY": kept_secret(folder / "secret.key"),
        "FNQUEUE_ENCRYPTION_KEYS": f"image:{kept_secret(folder / 'encryption.key')}",
    }
    api = {"FNQUEUE_HOST": LOOPBACK, "FNQUEUE_PORT": str(port), "FNQUEUE_ADMIN_KEY": key, "FNQUEUE_STATUS_PORT": "0"}
    controller = {
        "FNQUEUE_LAUNCHER_URL": podman.url,
        "FNQUEUE_DOCKER_SIDECAR_IMAGE": IMAGE,
        "FNQUEUE_DOCKER_PULL": "never",
        "FNQUEUE_DOCKER_RUNTIME": RUNTIME,
        "FNQUEUE_DOCKER_ULIMITS": ULIMITS,
        "FNQUEUE_STATUS_PORT": str(status_port),
    }
    socket = podman.url.removeprefix("docker://")
    os.chmod(socket, 0o666)  # noqa: S103  the image's user is not ours; the folder around it is closed
    _serve(podman, "api", {**own.told("api"), **both, **api})
    _serve(podman, "controller", {**own.told("controller"), **both, **controller}, f"--volume={socket}:{socket}")
    url = f"http://{LOOPBACK}:{port}"
    _until(lambda: urllib.request.urlopen(f"{url}/readyz", timeout=5).status == 200, podman)  # noqa: S310  ours
    told = podman.control("exec", "--env", f"FNQUEUE_ADMIN_KEY={key}", "api", "fnqueue", "welcome", "--url", url)
    _check_closed(podman)
    with urllib.request.urlopen(f"http://{LOOPBACK}:{status_port}/v1/targets", timeout=5) as answered:
        [[target]] = [each["targets"] for each in json.load(answered)]
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=5) as page:
        if not re.search(rb"^fnqueue_sidecar_ready(\{.*\})? 1\.0$", page.read(), re.MULTILINE):
            raise ServerFailed(f"the sidecar at {target} does not show that it is ready")
    return told


def _serve(podman: Podman, command: str, settings: Mapping[str, str], *options: str) -> None:
    podman.control(
        *("run", "--detach", f"--name={command}", "--network=host", f"--runtime={RUNTIME}", *LIMITS),
        *("--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp", "--cap-drop=all"),
        *("--security-opt=no-new-privileges", "--healthcheck-command=none"),
        *(f"--env={name}={value}" for name, value in settings.items()),
        *(*options, IMAGE, command),
    )


def _check_closed(podman: Podman) -> None:
    """All of our containers run as nobody of note, and can write nothing. Raises ServerFailed."""
    names = podman.control("ps", "--format", "{{.Names}} {{.Image}}").splitlines()
    ours = [line.split()[0] for line in names if line.endswith(IMAGE)]
    if len(ours) != 3:
        raise ServerFailed(f"not api, controller and one sidecar run, but {ours}")
    script = "import os; print(os.getuid()); open('/opt/fnqueue/x', 'w')"
    for name in ours:
        try:
            podman.control("exec", name, "python", "-c", script)
        except ServerFailed as refused:
            if "Read-only file system" not in str(refused):
                raise
        else:
            raise ServerFailed(f"{name} could write to its own file system")
        if podman.control("exec", name, "python", "-c", "import os; print(os.getuid())").strip() != "10001":
            raise ServerFailed(f"{name} does not run as the image's user")


def _until(holds: Callable[[], bool], podman: Podman) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        try:
            if holds():
                return
        except OSError:
            time.sleep(0.5)
    raise ServerFailed(f"the api was not ready within {READY_S:.0f} s\n{podman.control('logs', '--tail', '20', 'api')}")


def sizes(podman: Podman) -> Mapping[str, float]:
    """Of the image and of its base, in MB."""
    shown = {name: podman.control("image", "inspect", "--format", "{{.Size}}", name) for name in (IMAGE, BASE)}
    return {name: int(size) / 1e6 for name, size in shown.items()}


def _suite() -> str:
    """This machine's Debian, whose libraries are those that this Python was linked with."""
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "stable")


def _linked(files: Sequence[Path]) -> set[Path]:
    found: set[Path] = set()
    for file in files:
        listed = subprocess.run(["ldd", str(file)], stdout=subprocess.PIPE, text=True, check=True, timeout=STEP_S)
        found |= {Path(word) for word in listed.stdout.split() if word.startswith("/")}
    return found


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, ignore=_left_out)
    else:
        shutil.copy2(source, target)


def _left_out(folder: str, names: list[str]) -> list[str]:
    """Of site-packages, all but pip and what it is made with."""
    if Path(folder).name == "site-packages":
        return [name for name in names if not name.startswith(("pip", "setuptools", "wheel"))]
    return [name for name in names if name in _LEFT_OUT or name.endswith(".a")]


def _run(command: Sequence[str], *, within_s: float) -> None:
    environment = {**os.environ, "PATH": binaries.SEARCH_PATH}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=within_s, check=False)
    if done.returncode != 0:
        raise ServerFailed(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def main(arguments: Sequence[str]) -> int:
    folder = Path(arguments[0] if arguments else "build/image").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        binaries.ensure([*binaries.PROGRAMS, *binaries.ENGINE, "debootstrap"])
        with Podman(folder / "podman") as podman:
            build(podman, folder)
            told = try_out(podman, folder)
            size = sizes(podman)
    except ServerFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    print(told)
    print(f"{IMAGE}: {size[IMAGE]:.0f} MB, of which {size[BASE]:.0f} MB are the base's; read-only, as user 10001")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
