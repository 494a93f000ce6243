"""A process group under our care: started here, or found again by the process ID and start time of its leader."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

_KILLED_S = 5.0
_LOOK_S = 0.02
_STDOUT = 1
# The start time that the system tells may shift a little when the machine's clock is set.
_SAME_START_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Process IDs are used again; with its start time a process is told from a later one."""

    pid: int
    created_at: float


class Child:
    """The leader of a session of its own and whatever it starts in it."""

    def __init__(self, identity: Identity, process: subprocess.Popen[bytes] | None = None) -> None:
        self.identity = identity
        self._process = process
        self._ended = False

    @classmethod
    def spawn(cls, command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: Path) -> Self:
        """Start `command` without a shell; its output is appended to `log`. Blocks for some milliseconds.

        Raises OSError when it cannot be executed.
        """
        with log.open("ab") as output:
            process = subprocess.Popen(  # noqa: S603  the command is the operator's, from the images file
                list(command),
                env=dict(environment),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        # Even if it is over already, it keeps its place in the process table until `alive` reaps it.
        created_at = psutil.Process(process.pid).create_time()
        return cls(Identity(pid=process.pid, created_at=created_at), process)

    @property
    def alive(self) -> bool:
        """Whether the leader runs. Reaps it when it has ended."""
        if self._process is not None:
            return self._process.poll() is None
        return _runs(self.identity)

    @property
    def fate(self) -> str:
        """How the leader ended, to follow its name: "exited with status 1"."""
        status = self._process.poll() if self._process is not None else None
        if status is None:
            return "is gone"
        return f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"

    async def stop(self, *, grace_s: float) -> None:
        """SIGTERM, and SIGKILL to what is left of the group after `grace_s`. Idempotent."""
        if self._ended:
            return
        self._signal(signal.SIGTERM)
        if not await self._gone(grace_s):
            self._signal(signal.SIGKILL)
            await self._gone(_KILLED_S)
        self._ended = True

    def _signal(self, number: signal.Signals) -> None:
        if self._members():
            with suppress(ProcessLookupError):
                os.killpg(self.identity.pid, number)

    async def _gone(self, within_s: float) -> bool:
        until = _now() + within_s
        while self.alive or self._members():
            if _now() >= until:
                return False
            await asyncio.sleep(_LOOK_S)
        return True

    def _members(self) -> list[int]:
        """Who of the group runs. A group's number is not given to a new process while it has members, so it is
        another's only if a process with that number is not our leader. Zombies do not count: those that the leader
        left behind are for the system to reap, which can take its time."""
        leader = _find(self.identity.pid)
        if leader is not None and not _same(leader, self.identity):
            return []
        return [pid for pid in psutil.pids() if _group_of(pid) == self.identity.pid and _runs_now(pid)]


def writers(root: Path) -> dict[int, Path]:
    """Whose output goes to a file below `root`, by process group. Blocks for a while: it looks at every process of
    this user."""
    found: dict[int, Path] = {}
    for process in psutil.process_iter():
        try:
            if process.uids().real != os.getuid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            files = [Path(file.path) for file in process.open_files() if file.fd == _STDOUT]
        except (psutil.Error, OSError):
            continue
        for file in files:
            if file.is_relative_to(root):
                found[_group_of(process.pid)] = file
    found.pop(-1, None)
    found.pop(os.getpgrp(), None)
    return found


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except (ProcessLookupError, PermissionError):
        return -1


def _runs_now(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _runs(identity: Identity) -> bool:
    process = _find(identity.pid)
    return process is not None and _same(process, identity) and _runs_now(identity.pid)


def _find(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _same(process: psutil.Process, identity: Identity) -> bool:
    try:
        return abs(process.create_time() - identity.created_at) < _SAME_START_S
    except psutil.NoSuchProcess:
        return False


def _now() -> float:
    return asyncio.get_running_loop().time()
