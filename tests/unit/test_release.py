"""What would be handed out is looked at, and what must not be is refused."""

from __future__ import annotations

import io
import pkgutil
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version as installed
from pathlib import Path

import pytest

import fnqueue
from infra import release
from infra.release import Unfit

INFORMATION = f"fnqueue-{release.version()}.dist-info"
WHOLE = {*release.NEEDED, f"{INFORMATION}/METADATA", f"{INFORMATION}/licenses/LICENSE"}
SERVERS = (
    "aiodocker",
    "aiohttp",
    "aio_pika",
    "aiormq",
    "boto3",
    "cryptography",
    "lightkube",
    "psutil",
    "pynvml",
    "redis",
)
SOURCE = {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "fnqueue/py.typed", "examples/images.toml"}


def wheel(folder: Path, names: set[str]) -> Path:
    path = folder / "fnqueue.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return path


def sdist(folder: Path, names: set[str]) -> Path:
    path = folder / "fnqueue.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(f"fnqueue-{release.version()}/{name}"), io.BytesIO())
    return path


def test_a_whole_wheel_and_source_are_fit(tmp_path: Path) -> None:
    release.check_wheel(wheel(tmp_path, WHOLE))
    release.check_sdist(sdist(tmp_path, SOURCE))


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_a_wheel_lacks_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(Unfit, match=re.escape(name)):
        release.check_wheel(wheel(tmp_path, WHOLE - {name}))


@pytest.mark.parametrize(
    "name", ["tests/e2e/house.py", "infra/stack.py", "api/test_app.py", "broker/.env", "api/a.pyc"]
)
def test_a_wheel_has_nothing_else(tmp_path: Path, name: str) -> None:
    with pytest.raises(Unfit):
        release.check_wheel(wheel(tmp_path, WHOLE | {name}))


@pytest.mark.parametrize("name", [".fnqueue/dev-key", ".venv/bin/python", "api/__pycache__/app.pyc"])
def test_a_source_has_nothing_of_the_machine_that_built_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(Unfit):
        release.check_sdist(sdist(tmp_path, SOURCE | {name}))


def test_there_is_one_version() -> None:
    """What was built of this, or of what it was before, tells the same."""
    assert fnqueue.__version__ == installed("fnqueue")


def test_the_client_needs_nothing_of_the_servers() -> None:
    """Whoever only calls functions may leave their packages out: `pip install --no-deps fnqueue`, and what is left."""
    client = [
        f"fnqueue.{module.name}" for module in pkgutil.walk_packages(fnqueue.__path__) if module.name != "__main__"
    ]
    left_out = [*SERVERS, *release.PACKAGES[:2], "workers"]
    program = f"import sys; sys.modules.update(dict.fromkeys({left_out!r})); import {', '.join(client)}; fnqueue.Client"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
