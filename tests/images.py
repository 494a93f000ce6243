"""Container images made of what runs the tests, since there is no registry to pull from: this Python, the libraries
that a sidecar needs, and this checkout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

from infra.local.podman import Podman
from infra.local.process import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
# Nobody listens there, but for a test that serves a registry; another one for each run of the tests.
REGISTRY = f"127.0.0.1:{free_port()}"
SIDECAR = "localhost/tests/fnqueue:1"
STAND_IN = "localhost/tests/sidecar:1"
SERVER = "localhost/tests/server:1"
PACKAGES = ("broker", "examples/echo", "fnqueue", "tests/containers", "workers")

# Says what a sidecar has loaded: folders of packages, and the shared libraries that they took along.
_ASK = """
import sys, pathlib
import workers.commands, broker.connect, aiormq.connection, botocore.session, boto3.session
boto3.session.Session(aws_access_key_id="a", aws_secret_access_key="b", region_name="r").client("s3")
for path in {m.__file__ for m in sys.modules.values() if getattr(m, "__file__", None)}:
    print(path)
print(*{line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}, sep="\\n")
"""
_LEFT_OUT = re.compile(r"/(test|tests|idlelib|tkinter|ensurepip|lib2to3|site-packages|config-[^/]*|turtledemo)(/|$)")
_BOTO_DATA = re.compile(r"botocore/data/(?!s3(/|$)|[^/]*\.json$)[^/]+")


def build(podman: Podman, folder: Path) -> None:
    """Make all of them, of one layer: `SERVER` and `STAND_IN` run the Python file that is named first."""
    packed = folder / "root.tar"
    _pack(packed)
    python = sys.executable
    podman.control("import", str(packed), "localhost/tests/python:1")
    packed.unlink()
    script = str(REPOSITORY / "tests/containers/draining.py")
    entrypoints = {SIDECAR: ["-P", "-m", "fnqueue"], SERVER: [], STAND_IN: [script]}
    for image, words in entrypoints.items():
        recipe = folder / "Containerfile"
        recipe.write_text(
            f"FROM localhost/tests/python:1\n"
            f"ENV PYTHONPATH={REPOSITORY} PATH={Path(python).parent}:/usr/bin PYTHONDONTWRITEBYTECODE=1\n"
            f"ENTRYPOINT {json.dumps([python, *words])}\n"
        )
        podman.control("build", "--quiet", "--tag", image, "--file", str(recipe), str(folder / "empty"))


def _pack(target: Path) -> None:
    (target.parent / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _ASK], cwd=REPOSITORY, env={"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE, text=True, check=True, timeout=60,
    )  # fmt: skip
    loaded = [Path(line) for line in done.stdout.splitlines() if line.startswith("/")]
    with tarfile.open(target, "w") as archive:
        added: set[Path] = set()
        libraries = [path for path in loaded if ".so" in path.name]
        names = {link for path in libraries for link in path.parent.glob(f"{path.name.split('.so')[0]}*.so*")}
        for path in [*_folders(loaded), *_programs(), *libraries, *names]:
            _add(archive, path, added)
        for name in ("tmp", "var/inf", "var/secrets", "proc", "sys", "dev", "etc"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            archive.addfile(entry)


def _folders(loaded: list[Path]) -> set[Path]:
    """The standard library, the packages that were loaded, whole, and the metadata of all."""
    library = Path(textwrap.__file__).parent
    packages = {Path(path) for path in sys.path if path.endswith("site-packages")}
    found = {library, *(REPOSITORY / name for name in PACKAGES)}
    for path in loaded:
        for site in packages:
            if path.is_relative_to(site):
                found.add(site / path.relative_to(site).parts[0])
    return found | {info for site in packages for info in site.glob("*.dist-info")}


def _programs() -> set[Path]:
    """Python, `mv`, and what they are linked with."""
    programs = {Path(sys.executable), Path(sys.prefix) / "pyvenv.cfg", Path("/usr/bin/mv")}
    found = {path for path in programs if path.exists()}
    for program in (Path(sys.executable), Path("/usr/bin/mv")):
        listed = subprocess.run(["ldd", str(program)], stdout=subprocess.PIPE, text=True, check=True, timeout=10)
        found |= {Path(word) for word in listed.stdout.split() if word.startswith("/")}
    return found


def _add(archive: tarfile.TarFile, path: Path, added: set[Path]) -> None:
    """With the links on its way."""
    link = next((step for step in [*reversed(path.parents), path] if step.is_symlink()), None)
    if link is not None:
        if link not in added:
            added.add(link)
            archive.add(link, recursive=False)
        _add(archive, Path(os.path.normpath(link.parent / link.readlink() / path.relative_to(link))), added)
    elif added.isdisjoint([path, *path.parents]):
        added.add(path)
        archive.add(path, filter=_wanted)


def _wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Without what no sidecar loads; of the standard library, not its tests and the like."""
    library = "/lib/python3" in entry.name and "site-packages/" not in entry.name
    left_out = (library and _LEFT_OUT.search(f"/{entry.name}")) or _BOTO_DATA.search(entry.name)
    return None if left_out or ".opt-" in entry.name or "/uvloop/" in entry.name else entry
