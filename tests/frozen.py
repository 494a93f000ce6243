"""A process that is alive and does nothing: what a machine that hangs looks like from outside."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STOPPED_S = 5.0
_PROC = Path("/proc")


@contextmanager
def frozen(pid: int, *, group: bool = False) -> Iterator[None]:
    """SIGSTOP during the body, to one process or to all of the group that it leads.

    The signal is only asked for when `kill` returns: threads on other cores go on until they see it, and may answer
    yet. The body starts once none of them runs any more.
    """
    kill = os.killpg if group else os.kill
    kill(pid, signal.SIGSTOP)
    try:
        late = time.monotonic() + STOPPED_S
        while running := [thread for thread in _threads(pid, group=group) if _state(thread) not in "TZX"]:
            assert time.monotonic() < late, f"not stopped after {STOPPED_S} s: {running}"
            time.sleep(0.001)
        yield
    finally:
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGCONT)


def _threads(pid: int, *, group: bool) -> list[Path]:
    pids = [pid]
    if group:
        pids = []
        for folder in _PROC.iterdir():
            with suppress(ValueError, ProcessLookupError, PermissionError):
                if os.getpgid(found := int(folder.name)) == pid:
                    pids.append(found)
    return [thread for member in pids for thread in (_PROC / str(member) / "task").glob("*")]


def _state(thread: Path) -> str:
    """One letter, as proc(5) has them; of a thread that ended meanwhile, that of the dead."""
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"
