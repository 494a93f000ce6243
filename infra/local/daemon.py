"""A supervisor in the background: at most one per folder, found again through the lock it holds."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, cast

from infra.local.process import MEMBER, Server, ServerFailed
from infra.local.supervisor import Report, Supervisor, end, members

LOCK_S = 2.0  # who asks whether a supervisor runs holds its lock for a moment, too
SWEEPS = 5
LAUNCH_S = 15.0
STOP_S = 240.0  # more than all children may take, one after the other
POLL_S = 0.1


class Daemon:
    """The supervisor of a folder, seen from outside (`launch`, `pid`, `report`, `stop`) and from inside (`serve`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.log = self.folder / "supervisor.log"
        self._state = self.folder / "state.json"
        self._lock = self.folder / "supervisor.pid"

    def launch(self, command: Sequence[str]) -> None:
        """Start `command`, which is to call `serve`, so that it outlives us. Returns at once."""
        self._state.unlink(missing_ok=True)
        with self.log.open("wb") as log:
            launched = subprocess.Popen(
                list(command),
                env={**os.environ, MEMBER: str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if not wait_until(lambda: self.pid() is not None or launched.poll() is not None, LAUNCH_S):
            launched.kill()
        if self.pid() is None:
            raise ServerFailed(f"the supervisor did not start:\n{self.log.read_text()}")

    def serve(self, children: Sequence[Server]) -> None:
        """Keep `children` running until SIGTERM. Raises ServerFailed when another supervisor has the folder."""
        with self._only_one():
            self._sweep()
            self._state.unlink(missing_ok=True)
            Supervisor(children, self._state).run()

    def pid(self) -> int | None:
        """The supervisor's process id, if one runs."""
        with contextlib.suppress(FileNotFoundError), self._lock.open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(lock.read() or 0) or None
        return None

    def report(self) -> Report | None:
        """What the running supervisor says; None when there is none, or it has not spoken yet."""
        if self.pid() is None:
            return None
        with contextlib.suppress(FileNotFoundError):
            return cast("Report", json.loads(self._state.read_text()))
        return None

    def stop(self) -> bool:
        """Stop the supervisor and all below it; whether there was anything to stop. Idempotent."""
        supervisor = self.pid()
        if supervisor is not None:
            os.kill(supervisor, signal.SIGTERM)
            if not wait_until(lambda: self.pid() is None, STOP_S):
                os.kill(supervisor, signal.SIGKILL)
        return self._sweep() or supervisor is not None

    def _sweep(self) -> bool:
        """End what a supervisor that was itself killed has left running; whether there was anything. Again, because
        whoever was being started while they were listed is seen only afterwards."""
        found = False
        for _ in range(SWEEPS):
            leftovers = members(self.folder)
            if not leftovers:
                break
            end(leftovers)
            found = True
        return found

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[None]:
        with self._lock.open("a") as lock:
            if not wait_until(lambda: _locked(lock), LOCK_S):
                raise ServerFailed(f"another supervisor runs from {self.folder}")
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield


def wait_until(done: Callable[[], bool], patience_s: float) -> bool:
    """Whether `done` came true in time."""
    late_at = time.monotonic() + patience_s
    while not done():
        if time.monotonic() >= late_at:
            return False
        time.sleep(POLL_S)
    return True


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
