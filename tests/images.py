"""Container images for tests, since there is no registry to pull from."""

from __future__ import annotations

from pathlib import Path

from infra.local.images import REPOSITORY, SIDECAR_IMPORTS, Program, build
from infra.local.podman import Podman
from infra.local.process import free_port

# Nobody listens there, but for a test that serves a registry; another one for each run of the tests.
REGISTRY = f"127.0.0.1:{free_port()}"
SIDECAR = "localhost/tests/fnqueue:1"
STAND_IN = "localhost/tests/sidecar:1"
SERVER = "localhost/tests/server:1"


def build_all(podman: Podman, folder: Path) -> None:
    """`SERVER` and `STAND_IN` run the Python file that is named first."""
    build(
        podman,
        folder,
        imports=SIDECAR_IMPORTS,
        packages=("broker", "examples/echo", "fnqueue", "tests/containers", "workers"),
        programs=[
            Program(reference=SIDECAR, words=["-P", "-m", "fnqueue"]),
            Program(reference=SERVER, words=[]),
            Program(reference=STAND_IN, words=[str(REPOSITORY / "tests/containers/draining.py")]),
        ],
    )
