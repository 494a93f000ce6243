"""The libraries of the dashboard, as files in the package: an installation from PyPI needs no npm.

    python -m infra.vendored

fetches what is pinned here with npm, checks it, and writes the files anew. To take a newer version, change version and
integrity (`npm view preact@VERSION dist.integrity`), run this, and put the hashes that it prints into the table.
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "api" / "dashboard" / "files" / "vendor"
FETCH_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Vendored:
    """`files` maps what is in the archive to what it is called here, and the SHA-256 of that. Modules say where the
    others lie by `imports`: browsers know no package names, and a map of them would be an inline script."""

    package: str
    version: str
    integrity: str
    files: tuple[tuple[str, str, str], ...]
    imports: tuple[tuple[str, str], ...] = ()


LIBRARIES = (
    Vendored(
        package="preact",
        version="11.2.0",
        integrity="sha512-/HfHI/7N84e6GrWBJ3J280z3mLaRJiDcSvj/A+y/4AbLnND/1UlGHe1sR6oYuTGwId0nP7dqDU9OnLxMPZ7xBg==",
        files=(
            ("dist/preact.mjs", "preact.mjs", "bdcbd9abdf2c77c5c45326eab42191e949222d479d0d5f69467387a77040cb55"),
            ("hooks/dist/hooks.mjs", "hooks.mjs", "427a330c992595bfd3f6cfe43eb6ba7a238ea1a7fa99c0e4a8f380a30dde473b"),
            ("LICENSE", "preact.LICENSE.txt", "1fe6958409c8c257a70c587a18b6f7f412b179b456630790d30b2ec9a8e4b7d4"),
        ),
        imports=(('"preact"', '"./preact.mjs"'),),
    ),
    Vendored(
        package="htm",
        version="3.1.1",
        integrity="sha512-983Vyg8NwUE7JkZ6NmOqpCZ+sh1bKv2iYTlUkzlWmA5JD2acKoxd4KVxbMmxX/85mtfdnDmTFoNKcg5DGAvxNQ==",
        files=(
            ("dist/htm.mjs", "htm.mjs", "ab33dd3f38059b9be4d5f5350128eefb2356639c4e0bbe9d9e8b3ba75847e9e4"),
            ("LICENSE", "htm.LICENSE.txt", "740725f7252e750af735d0028cc534970772f513331e9f68150fede8fb3ce00f"),
        ),
    ),
    Vendored(
        package="uplot",
        version="1.6.32",
        integrity="sha512-KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw==",
        files=(
            ("dist/uPlot.iife.min.js", "uplot.js", "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"),
            ("dist/uPlot.min.css", "uplot.css", "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04"),
            ("LICENSE", "uplot.LICENSE.txt", "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd"),
        ),
    ),
)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for library in LIBRARIES:
        for name, content in _fetch(library).items():
            (FOLDER / name).write_bytes(content)
            print(f"{sha256(FOLDER / name)}  {name}")


def _fetch(library: Vendored) -> dict[str, bytes]:
    """What the files hold. Exits when the archive is another one than was pinned."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = f"{library.package}@{library.version}"
        subprocess.run(
            ["npm", "pack", "--silent", "--pack-destination", folder, wanted],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=FETCH_S,
        )
        [archive] = Path(folder).glob("*.tgz")
        found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if found != library.integrity:
            sys.exit(f"{wanted} is not what was pinned: it has {found}")
        with tarfile.open(archive) as files:
            return {name: _read(library, files, member) for member, name, _ in library.files}


def _read(library: Vendored, files: tarfile.TarFile, member: str) -> bytes:
    packed = files.extractfile(f"package/{member}")
    assert packed is not None, f"{member} is a file of {library.package}"
    content = packed.read()
    for name, place in library.imports:
        content = content.replace(name.encode(), place.encode())
    return content


if __name__ == "__main__":
    main()
