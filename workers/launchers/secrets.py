"""The secrets file of an instance that is a process: a folder of its own, replaced in one step, gone with it.

A container of its own sees it as `/var/secrets/secrets.json`. Processes share one `/var/secrets`, so there the path is
another for each and told in NVCF_SECRETS_FILE. Nothing follows a link: the folder's owner also runs the container.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

FILE = "secrets.json"
PATH_VARIABLE = "NVCF_SECRETS_FILE"


def lay(folder: Path, content: bytes) -> None:
    """Make the folder and the file in it."""
    folder.mkdir(mode=0o700, parents=True)
    replace(folder, content)


def replace(folder: Path, content: bytes) -> None:
    """Put `content` in the file's place, unless it is there already. Raises FileNotFoundError without the folder."""
    file, written = folder / FILE, folder / f"{FILE}.new"
    with suppress(FileNotFoundError):
        if file.read_bytes() == content:
            return
    with suppress(FileNotFoundError):
        written.unlink()
    descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(content)
        written.replace(file)
    except OSError:
        written.unlink(missing_ok=True)
        raise


def remove(folder: Path) -> None:
    """Idempotent."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
