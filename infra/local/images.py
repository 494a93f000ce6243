"""Container images made of what runs here, for where no registry can be reached: this Python, the libraries that a
program has loaded, and folders of this checkout. Not for production: infra/docker/Dockerfile is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from infra.local.podman import Podman
from infra.local.process import ServerFailed

REPOSITORY = Path(__file__).resolve().parents[2]
ASK_S = 120.0

# Says what a program has loaded: its modules' files, and the shared libraries that they took along.
_ASK = """
import sys
{imports}
for path in {{m.__file__ for m in sys.modules.values() if getattr(m, "__file__", None)}}:
    print(path)
print(*{{line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}}, sep="\\n")
"""
_LEFT_OUT = re.compile(r"/(test|tests|idlelib|tkinter|ensurepip|lib2to3|site-packages|config-[^/]*|turtledemo)(/|$)")
_BOTO_DATA = re.compile(r"botocore/data/(?!s3(/|$)|[^/]*\.json$)[^/]+")

# `fnqueue sidecar`; an S3 client reads files only when it is made.
SIDECAR_IMPORTS = """
import workers.commands, broker.connect, aiormq.connection, botocore.session, boto3.session
boto3.session.Session(aws_access_key_id="a", aws_secret_access_key="b", region_name="r").client("s3")
"""


class NotInstalled(ServerFailed):
    """What an image should be made of is not installed here; the message ends with Python's words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Python `words` in an image named `reference`; they are arguments of the interpreter, with its options."""

    reference: str
    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def build(podman: Podman, folder: Path, *, imports: str, packages: Sequence[str], programs: Sequence[Program]) -> None:
    """Make the images of `programs`, of one layer: what `imports` loads, and `packages` (folders below REPOSITORY).

    Raises NotInstalled, or ServerFailed when podman refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    packed, empty, recipe = folder / "root.tar", folder / "empty", folder / "Containerfile"
    empty.mkdir(exist_ok=True)
    _pack(packed, imports, packages)
    layer = f"{programs[0].reference.partition(':')[0]}-layer:local"
    podman.control("import", str(packed), layer)
    packed.unlink()
    for program in programs:
        environment = {
            "PYTHONPATH": str(REPOSITORY),
            "PATH": f"{Path(sys.executable).parent}:/usr/bin",
            "PYTHONDONTWRITEBYTECODE": "1",
            **program.environment,
        }
        recipe.write_text(
            f"FROM {layer}\n"
            f"ENV {' '.join(f'{name}={json.dumps(value)}' for name, value in environment.items())}\n"
            f"ENTRYPOINT {json.dumps([sys.executable, *program.words])}\n"
        )
        podman.control("build", "--quiet", "--tag", program.reference, "--file", str(recipe), str(empty))


def _pack(target: Path, imports: str, packages: Sequence[str]) -> None:
    loaded = _loaded(imports)
    with tarfile.open(target, "w") as archive:
        added: set[Path] = set()
        libraries = [path for path in loaded if ".so" in path.name]
        names = {link for path in libraries for link in path.parent.glob(f"{path.name.split('.so')[0]}*.so*")}
        for path in [*_folders(loaded, packages), *_programs(), *libraries, *names]:
            _add(archive, path, added)
        for name in ("tmp", "var/inf", "var/secrets", "proc", "sys", "dev", "etc"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            archive.addfile(entry)


def _loaded(imports: str) -> list[Path]:
    done = subprocess.run(
        [sys.executable, "-c", _ASK.format(imports=imports)],
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
        timeout=ASK_S,
    )
    if done.returncode != 0:
        raise NotInstalled(done.stderr.strip().rpartition("\n")[2])
    return [Path(line) for line in done.stdout.splitlines() if line.startswith("/")]


def _folders(loaded: list[Path], packages: Sequence[str]) -> set[Path]:
    """The standard library, the packages that were loaded, whole, and the metadata of all."""
    library = Path(textwrap.__file__).parent
    sites = {Path(path) for path in sys.path if path.endswith("site-packages")}
    found = {library, *(REPOSITORY / name for name in packages)}
    for path in loaded:
        for site in sites:
            if path.is_relative_to(site):
                found.add(site / path.relative_to(site).parts[0])
    return found | {info for site in sites for info in site.glob("*.dist-info")}


def _programs() -> set[Path]:
    """Python, `mv`, and what they are linked with."""
    programs = {Path(sys.executable), Path(sys.prefix) / "pyvenv.cfg", Path("/usr/bin/mv")}
    found = {path for path in programs if path.exists()}
    for program in (Path(sys.executable), Path("/usr/bin/mv")):
        listed = subprocess.run(["ldd", str(program)], stdout=subprocess.PIPE, text=True, check=True, timeout=ASK_S)
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
    """Of the standard library, not its tests and the like; of boto3, only S3."""
    library = "/lib/python3" in entry.name and "site-packages/" not in entry.name
    left_out = (library and _LEFT_OUT.search(f"/{entry.name}")) or _BOTO_DATA.search(entry.name)
    return None if left_out or ".opt-" in entry.name or "/uvloop/" in entry.name else entry
