"""`make stack` for tests: the whole product under its supervisor, in a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil

from infra.local.process import free_port
from tests.house import CONTAINERS, RECORDER, Record


class Stack:
    """One of its own, driven by the commands that the Makefile runs, with `settings` in their environment."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.record = Record(folder / "record")
        self.url = f"http://127.0.0.1:{free_port()}"
        images = folder / "images.toml"
        command = json.dumps([sys.executable, str(CONTAINERS / "recorder.py")])
        images.write_text(
            f'["{RECORDER}"]\ncommand = {command}\nenv = {{ RECORD = {json.dumps(str(self.record.path))} }}\n'
        )
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FNQUEUE_")},
            "FNQUEUE_STACK_DIR": str(folder / "stack"),
            "FNQUEUE_PORT": self.url.rpartition(":")[2],
            "FNQUEUE_IMAGES_FILE": str(images),
            "FNQUEUE_LEASE_S": "3",
            "FNQUEUE_RENEW_S": "0.5",
            **settings,
        }

    def run(self, command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "infra.local.stack", command],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def key(self) -> str:
        return (self.folder / "stack" / "admin.key").read_text()

    def child(self, name: str) -> psutil.Process | None:
        """A process that the supervisor keeps, or one sidecar of the recorder."""
        listed = next((line for line in self.run("status").splitlines() if line.strip().startswith(name)), "")
        pid = listed.partition("pid ")[2].partition(",")[0]
        return psutil.Process(int(pid)) if pid else None

    def sidecar(self, version_id: str) -> psutil.Process | None:
        for path in (self.folder / "stack" / "data" / "instances").glob("*/state.json"):
            state = json.loads(path.read_text())
            if state["version_id"] == version_id and state["sidecar"] and psutil.pid_exists(state["sidecar"]["pid"]):
                return psutil.Process(state["sidecar"]["pid"])
        return None
