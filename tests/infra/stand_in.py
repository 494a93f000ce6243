"""Two small children under a real supervisor: `python -m tests.infra.stand_in FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from infra.local.daemon import Daemon
from infra.local.stack import Program

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
# Leaves a process of its own session behind when it is killed, as a controller leaves its instances.
PARENT = [
    sys.executable,
    "-c",
    "import subprocess, sys, time; "
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True); "
    "time.sleep(600)",
]


def main(folder: Path) -> None:
    Daemon(folder).serve(
        [
            Program("first", folder / "first", command=SLEEP, environment={}),
            Program("parent", folder / "parent", command=PARENT, environment={}),
        ]
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
