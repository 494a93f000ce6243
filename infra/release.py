"""What is handed out: `python -m infra.release` builds wheel and sdist into dist/ and checks them. It uploads nothing.

What builds (`build`, `twine`) is in the environment of the interpreter that is named.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from fnqueue import __version__

REPOSITORY = Path(__file__).resolve().parent.parent
DIST = REPOSITORY / "dist"
PACKAGES = ("api", "broker", "fnqueue", "workers")
# What would be missed only by who uses it: types, the pages, the samples, the licence.
NEEDED = (
    *(f"{package}/py.typed" for package in PACKAGES),
    "api/reference/index.html",
    "api/reference/page.css",
    "api/reference/page.js",
    "api/dashboard/files/index.html",
    "api/dashboard/files/page.css",
    "api/dashboard/files/page.mjs",
    "api/dashboard/files/vendor/preact.mjs",
    "api/dashboard/files/vendor/preact.LICENSE.txt",
    "workers/examples/images.toml",
    "workers/examples/echo/server.py",
)
MOST_BYTES = 4 * 1024 * 1024


class Unfit(Exception):
    """What was built is not what is to be handed out; the text says why."""


def version() -> str:
    return __version__


def wheel(folder: Path) -> Path:
    """The wheel, built as pip does it for who installs from a checkout."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), "."]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    [made] = folder.glob("fnqueue-*.whl")
    return made


def check_wheel(path: Path) -> None:
    """Raises Unfit."""
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        information = f"fnqueue-{version()}.dist-info"
        _check(names, [*NEEDED, f"{information}/METADATA", f"{information}/licenses/LICENSE"])
        if strangers := {name.split("/")[0] for name in names} - {*PACKAGES, information}:
            raise Unfit(f"{path.name} has {', '.join(sorted(strangers))}, which is not ours to install")
        if left := [name for name in names if re.search(r"(^|/)(tests?/|test_|__pycache__|\.)|\.(pyc|log|env)$", name)]:
            raise Unfit(f"{path.name} has {', '.join(sorted(left))}")
        if (size := sum(each.file_size for each in archive.infolist())) > MOST_BYTES:
            raise Unfit(f"{path.name} unpacks to {size} bytes, more than {MOST_BYTES}")


def check_sdist(path: Path) -> None:
    """The wheel can be made of it, and the tests are there to be run. Raises Unfit."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    _check(
        names, ["pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "fnqueue/py.typed", "examples/images.toml"]
    )
    if left := [name for name in names if re.search(r"(^|/)(__pycache__|\.venv[^/]*|\.fnqueue|\.env)(/|$)", name)]:
        raise Unfit(f"{path.name} has {', '.join(sorted(left)[:5])}")


def check_changelog() -> None:
    """Each version that is handed out has its entry, and the newest comes first. Raises Unfit."""
    headings = re.findall(r"^## \[?([^\]\s]+)\]?", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    if version() not in released[:1]:
        raise Unfit(f"CHANGELOG.md has no entry for {version()} on top: rename Unreleased, and date it")


def _check(names: set[str], needed: list[str]) -> None:
    if missing := sorted(set(needed) - names):
        raise Unfit(f"not in what was built: {', '.join(missing)}")


def main(tools: str) -> int:
    for old in DIST.glob("fnqueue-*"):
        old.unlink()
    subprocess.run([tools, "-m", "build", "--outdir", str(DIST), str(REPOSITORY)], check=True)
    [built], [source] = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    subprocess.run([tools, "-m", "twine", "check", "--strict", str(built), str(source)], check=True)
    try:
        check_wheel(built)
        check_sdist(source)
        check_changelog()
    except Unfit as unfit:
        print(f"release: {unfit}", file=sys.stderr)
        return 1
    print(f"{built.name} and {source.name} are in dist/. CONTRIBUTING.md says what comes next.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else sys.executable))
