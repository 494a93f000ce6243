"""The removal of what containers leave behind."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path


def remove(*paths: Path) -> None:
    """Remove files, links (not what they lead to) and folders with all that is in them; what cannot be removed stays.

    A container may nest its folders as deep as its disk allows: deeper than Python recurses, than a process may have
    files open, and than a path can name. `shutil.rmtree` fails at each of these.
    """
    for path in paths:
        with suppress(OSError):
            if stat.S_ISDIR(os.lstat(path).st_mode):
                _empty(path)
                os.rmdir(path)
            else:
                os.unlink(path)


def _empty(path: Path) -> None:
    """Folders in folders are moved up to the top one, so that at most two are open. Raises OSError."""
    top = _opened(path)
    try:
        waiting = os.listdir(top)
        while waiting:
            name = waiting.pop()
            with suppress(OSError):
                if not _removed(name, top):
                    waiting += _move_up(name, top)
                    os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)


def _move_up(name: str, top: int) -> list[str]:
    """Empty the folder `name`; under which names what was in it and is left is in `top` now. Raises OSError."""
    moved = []
    folder = _opened(name, top)
    try:
        for child in os.listdir(folder):
            with suppress(OSError):
                if not _removed(child, folder):
                    new = secrets.token_hex(16)
                    os.rename(child, new, src_dir_fd=folder, dst_dir_fd=top)
                    moved.append(new)
    finally:
        os.close(folder)
    return moved


def _removed(name: str, folder: int) -> bool:
    """Whether it is gone; a folder with something in it is not. Raises OSError."""
    if not stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode):
        os.unlink(name, dir_fd=folder)
        return True
    with suppress(OSError):
        os.rmdir(name, dir_fd=folder)
        return True
    return False


def _opened(name: str | Path, folder: int | None = None) -> int:
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
