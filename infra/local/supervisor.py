"""Keeps a list of processes running, in order, until it is told to stop."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from types import FrameType
from typing import TypedDict

import psutil

from infra.local.process import MEMBER, Server, ServerFailed

TICK_S = 0.1
FIRST_DELAY_S = 0.2  # before a dead child is started again; doubles while it keeps dying
LONGEST_DELAY_S = 5.0
STEADY_S = 10.0  # alive this long, and the delay is short again
LEFTOVERS_S = 10.0  # from SIGTERM to SIGKILL for what a child left behind
PR_SET_CHILD_SUBREAPER = 36


class ChildReport(TypedDict):
    name: str
    pid: int | None
    restarts: int
    log: str


class Report(TypedDict):
    """What a supervisor says about itself in its state file. `ready`: every child has answered once."""

    ready: bool
    children: list[ChildReport]


class Supervisor:
    """Starts `children` in order, each once the one before it answers; restarts any that dies; on SIGTERM
    stops them in reverse order and leaves nothing behind. Writes a Report to `state`."""

    def __init__(self, children: Sequence[Server], state: Path) -> None:
        self._children = children
        self._state = state
        self._watched: list[Watched] = []
        self._ready = False
        self._stopping = threading.Event()  # set in a signal handler, so nobody may wait() on it

    def run(self) -> None:
        """Return after a SIGTERM or SIGINT, when everything has stopped. From the main thread only."""
        signal.signal(signal.SIGTERM, self._ask_to_stop)
        signal.signal(signal.SIGINT, self._ask_to_stop)
        adopt_orphans()
        try:
            for child in self._children:
                self._bring_up(child)
            self._ready = not self._stopping.is_set()
            self._report()
            while not self._stopping.is_set():
                self._tick()
        finally:
            self._stop_all()

    def _ask_to_stop(self, _signal: int, _frame: FrameType | None) -> None:
        self._stopping.set()

    def _bring_up(self, child: Server) -> None:
        if self._stopping.is_set():
            return
        self._watched.append(Watched(child))
        self._report()
        while not (self._stopping.is_set() or child.answers()):
            self._tick()

    def _tick(self) -> None:
        time.sleep(TICK_S)
        reap_orphans(self._own())
        changes = [watched.revive(time.monotonic()) for watched in self._watched]
        if any(changes):
            self._report()

    def _stop_all(self) -> None:
        self._ready = False
        for watched in reversed(self._watched):
            say("stopping", watched.server.name)
            watched.server.stop()
            end(orphans(self._own()))
            self._report()
        say("stopped")

    def _own(self) -> set[int]:
        leaders = (watched.server.leader for watched in self._watched)
        return {leader for leader in leaders if leader is not None}

    def _report(self) -> None:
        report: Report = {"ready": self._ready, "children": [watched.report() for watched in self._watched]}
        draft = self._state.with_suffix(".new")
        draft.write_text(json.dumps(report, indent=2))
        draft.replace(self._state)


class Watched:
    """A child, started at once, and how its restarts go."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.restarts = 0
        self._delay_s = FIRST_DELAY_S
        self._started_at = time.monotonic()
        self._retry_at: float | None = None
        self._spawn()

    def revive(self, now: float) -> bool:
        """Start the child again if it is dead and its delay is over; whether anything changed."""
        if self.server.alive():
            if now - self._started_at >= STEADY_S:
                self._delay_s = FIRST_DELAY_S
            return False
        if self._retry_at is None:
            say("died", self.server.name, restarted_in_s=self._delay_s)
            self.server.kill()  # what it left in its process group
            self._retry_at = now + self._delay_s
            self._delay_s = min(2 * self._delay_s, LONGEST_DELAY_S)
            return True
        if now < self._retry_at:
            return False
        self.restarts += 1
        self._started_at, self._retry_at = now, None
        self._spawn()
        return True

    def report(self) -> ChildReport:
        pid = self.server.leader if self.server.alive() else None
        return {
            "name": self.server.name,
            "pid": pid,
            "restarts": self.restarts,
            "log": str(self.server.log),
        }

    def _spawn(self) -> None:
        """A child that cannot even be started counts as one that died."""
        try:
            self.server.spawn()
        except (OSError, ServerFailed) as error:
            say("not started", self.server.name, error=str(error))
        else:
            say("started", self.server.name)


def adopt_orphans() -> None:
    """Become the parent of whatever our children leave behind, so that it can be found, reaped and stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans(own: Collection[int]) -> None:
    """Collect dead processes that we inherited; the `own` ones are collected by who started them.

    A dead process that nobody collects looks alive to whoever asks with signal 0.
    """
    with contextlib.suppress(ChildProcessError):
        while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if dead.si_pid in own:
                return
            os.waitpid(dead.si_pid, 0)


def orphans(own: Collection[int]) -> list[psutil.Process]:
    """Processes we inherited, and those below them."""
    inherited = [child for child in psutil.Process().children() if child.pid not in own]
    found = list(inherited)
    for process in inherited:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += process.children(recursive=True)
    return found


def members(folder: Path) -> list[psutil.Process]:
    """What a supervisor of `folder` that was itself killed has left running."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MEMBER) == str(folder):
                found.append(process)
    return found


def end(processes: list[psutil.Process]) -> None:
    """SIGTERM, then SIGKILL after `LEFTOVERS_S`."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=LEFTOVERS_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=LEFTOVERS_S)


def say(event: str, child: str = "", **facts: str | float) -> None:
    """One JSON line for the supervisor's log."""
    print(json.dumps({"at": time.time(), "event": event, "child": child, **facts}), flush=True)
