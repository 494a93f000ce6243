"""Output directories that jobs left as they were given them, for the jobs that follow.

To make a directory and to remove it takes 45 µs of CPU on a disk, and waits for milliseconds while that is flushed for
others. To give one another name takes 8, and hardly ever waits.
"""

from __future__ import annotations

import asyncio
import os
import stat
import time
from pathlib import Path

from workers import loops, trees

# Nobody comes for a spare that is older.
KEPT_S = 1.0
OPEN_TO_ALL = 0o777


class Spares:
    """Those of one sidecar, `most` at a time. To be closed while there is a loop.

    A spare keeps the name that its job had until another job takes it. So whoever writes there too late, by that name,
    has done it before, where `is_as_made` finds it, or finds nothing there.
    """

    def __init__(self, clerk: loops.Clerk, *, most: int) -> None:
        self._clerk = clerk
        self._most = most
        self._kept: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def keep(self, path: str) -> bool:
        """Whether the empty directory is kept; its owner removes it if not."""
        if len(self._kept) >= self._most:
            return False
        self._kept[path] = time.monotonic()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(KEPT_S, self._remove_old)
        return True

    def take(self, path: str) -> str:
        """One for the job whose directory will be `path`, from now on the caller's; '' if there is none."""
        if self._kept.pop(path, None) is not None:  # a job that is run again, and must share it with nobody
            return path
        return self._kept.popitem()[0] if self._kept else ""

    def close(self) -> None:
        self._remove(list(self._kept))
        if self._timer is not None:
            self._timer.cancel()

    def _remove_old(self) -> None:
        before = time.monotonic() - KEPT_S
        self._remove([path for path, since in self._kept.items() if since <= before])
        self._timer = None
        if self._kept:
            self._timer = asyncio.get_running_loop().call_later(KEPT_S, self._remove_old)

    def _remove(self, paths: list[str]) -> None:
        for path in paths:
            del self._kept[path]
        if paths:
            self._clerk.later(remove_empty, *paths)


def is_empty(directory: str) -> bool:
    """A link in its place is not looked into, and what vanished holds nothing."""
    try:
        opened = _open(directory)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        return not _holds_any(opened)
    finally:
        os.close(opened)


def is_as_made(directory: str) -> bool:
    """Whether it is a directory of ours, empty and open to all."""
    try:
        opened = _open(directory)
    except OSError:
        return False
    try:
        found = os.fstat(opened)
        ours = found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) == OPEN_TO_ALL
        return ours and not _holds_any(opened)
    finally:
        os.close(opened)


def remove_if_empty(directory: str) -> bool:
    """Whether it held nothing, and is gone."""
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def remove_empty(*paths: str) -> None:
    """Directories that are empty or not there, but for what a container put into them after its answer."""
    for path in paths:
        if not remove_if_empty(path):
            trees.remove(Path(path))


def _open(directory: str) -> int:
    # Reading it would otherwise be noted on the disk.
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | getattr(os, "O_NOATIME", 0))


def _holds_any(opened: int) -> bool:
    """A container may have left a million."""
    with os.scandir(opened) as entries:
        return next(entries, None) is not None
