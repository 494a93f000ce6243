"""Large results: an answer above the inline limit, or files beside it, become one zip in the blob store.

The container may have put anything into the output directory, and this process may read more than the container
may: no link is followed, only regular files are read (field/security.md, "zip slip / symlinks").
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from broker.errors import BlobsUnavailable
from broker.model import Job, Outcome
from broker.ports import Blobs
from broker.settings import SidecarSettings
from workers import loops
from workers.inference import INFERENCE_FAULT, Answer, AttemptFailed, prepare_scratch, problem
from workers.inputs import Workspace

logger = logging.getLogger(__name__)

STORAGE_FAULT = "The result could not be stored before the deadline: the blob store is unavailable"

MAX_ARTIFACTS = 10_000
MAX_DEPTH = 32
_CHUNK_BYTES = 1024 * 1024
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0
# What opening says of a link, of something that vanished, of a socket or a device: not a file to hand over.
_NOT_OURS = frozenset({errno.ELOOP, errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.ENODEV, errno.EMLINK})


class _Refused(Exception):
    """Past a cap, or told to stop."""


async def collect(
    blobs: Blobs,
    settings: SidecarSettings,
    job: Job,
    answer: Answer,
    workspace: Workspace,
    *,
    attempt: int,
    left_s: Callable[[], float],
) -> Outcome:
    """The answer itself, or `Outcome(status=302, blob_key=…)` for a zip of it and of the container's files.

    A failed answer takes no files along. Passthrough leaves the output directory alone, and only an answer too
    large to keep inline becomes a zip. `left_s` tells the seconds to the deadline.

    Raises:
        AttemptFailed: over a cap, unreadable, or not stored before the deadline.
    """
    if answer.failed and answer.spilled:
        raise AttemptFailed(problem(job, answer.status, "Inference error", source="inference-service"))
    wants_files = not (answer.failed or job.passthrough)
    archive = workspace.scratch / "result.zip"
    packing = _Packing(archive, limit_bytes=settings.max_artifact_bytes)
    try:
        if not answer.spilled and not (wants_files and await _has_artifacts(workspace)):
            return answer.outcome()
        await packing.run(f"{job.id}.response", answer, workspace.response if wants_files else None)
    except (_Refused, OSError) as exc:
        detail = str(exc) if isinstance(exc, _Refused) else INFERENCE_FAULT
        logger.warning("artifacts_refused", extra={"request_id": job.id, "cause": str(exc)})
        raise AttemptFailed(problem(job, 500, detail)) from exc
    key = f"results/{job.account}/{job.id}/{attempt}.zip"
    await _upload(blobs, job, key, archive, left_s)
    return Outcome(status=302, blob_key=key)


async def _upload(blobs: Blobs, job: Job, key: str, archive: Path, left_s: Callable[[], float]) -> None:
    """The request stays `running` while the blob store is away, until its deadline (PROTOCOL §2.6)."""
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return await blobs.upload(key, archive, content_type="application/zip")
        except BlobsUnavailable as exc:
            if left_s() <= pause_s:
                raise AttemptFailed(problem(job, 500, STORAGE_FAULT)) from exc
            if pause_s == _FIRST_PAUSE_S:
                logger.warning("upload_retried", extra={"request_id": job.id, "cause": type(exc).__name__})
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)


class _Packing:
    """One zip being written in a thread, within caps, and stopped at the next chunk when nobody waits for it."""

    def __init__(self, archive: Path, *, limit_bytes: int) -> None:
        self._archive = archive
        self._limit_bytes = limit_bytes
        self._left_bytes = limit_bytes
        self._stopped = threading.Event()
        self._names: set[str] = set()

    async def run(self, response_name: str, answer: Answer, artifacts: Path | None) -> None:
        """Raises _Refused, or OSError when something cannot be read or the disk is full."""
        await loops.in_thread(self._pack, response_name, answer, artifacts, stop=self._stopped.set)

    def _pack(self, response_name: str, answer: Answer, artifacts: Path | None) -> None:
        prepare_scratch(self._archive)
        with zipfile.ZipFile(self._archive, "x", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            if answer.spilled:
                with answer.spilled.open("rb") as body:
                    self._add(archive, response_name, body)
            else:
                archive.writestr(self._member(response_name), answer.body)
            if artifacts is None:
                return
            for path, file in _artifacts(artifacts):
                with file:
                    self._add(archive, path, file)

    def _add(self, archive: zipfile.ZipFile, name: str, file: BinaryIO) -> None:
        with archive.open(self._member(name), "w", force_zip64=True) as member:
            while chunk := file.read(_CHUNK_BYTES):
                self._left_bytes -= len(chunk)
                if self._left_bytes < 0:
                    raise _Refused(f"The answer and its files are larger than {self._limit_bytes} bytes")
                if self._stopped.is_set():
                    raise _Refused("nobody waits for the result any more")
                member.write(chunk)

    def _member(self, name: str) -> zipfile.ZipInfo:
        if len(self._names) > MAX_ARTIFACTS:
            raise _Refused(f"There are more than {MAX_ARTIFACTS} files beside the answer")
        unique = safe = _safe_name(name)
        count = 1
        while unique in self._names:
            count += 1
            unique = f"{safe}~{count}"
        self._names.add(unique)
        member = zipfile.ZipInfo(unique)
        member.compress_type = zipfile.ZIP_DEFLATED
        member.external_attr = (stat.S_IFREG | 0o644) << 16
        return member


async def _has_artifacts(workspace: Workspace) -> bool:
    """That it can be removed tells that nothing is in it, for the price of a removal that is due anyway."""
    return not await workspace.vacate() and await loops.in_thread(_holds_artifacts, workspace.response)


def _holds_artifacts(directory: Path) -> bool:
    for _, file in _artifacts(directory):
        file.close()
        return True
    return False


def _artifacts(directory: Path) -> Iterator[tuple[str, BinaryIO]]:
    """Relative path and open file of every regular file below `directory`, in order of path, but for progress
    reports and for files not yet complete. The caller closes each file."""
    opened = open_untrusted(directory, None)
    if opened is None:
        return
    try:
        if stat.S_ISDIR(os.fstat(opened).st_mode):
            yield from _walk(opened, (), [0])
    finally:
        os.close(opened)


def _walk(directory: int, above: tuple[str, ...], seen: list[int]) -> Iterator[tuple[str, BinaryIO]]:
    """Each name is opened relative to its parent's descriptor, so a directory that is swapped for a link after
    it was listed leads nowhere. `seen` counts entries across the whole walk."""
    for name in sorted(_names(directory, seen)):
        opened = open_untrusted(name, directory)
        if opened is None:
            continue
        try:
            kind = os.fstat(opened).st_mode
            path = (*above, name)
            if stat.S_ISDIR(kind):
                if len(path) > MAX_DEPTH:
                    raise _Refused(f"There are more than {MAX_DEPTH} folders in each other beside the answer")
                yield from _walk(opened, path, seen)
            elif stat.S_ISREG(kind) and name != "progress" and not name.endswith(".partial"):
                yield "/".join(path), os.fdopen(os.dup(opened), "rb")
        finally:
            os.close(opened)


def _names(directory: int, seen: list[int]) -> list[str]:
    names = []
    with os.scandir(directory) as entries:
        for entry in entries:
            seen[0] += 1
            if seen[0] > 2 * MAX_ARTIFACTS:
                raise _Refused(f"There are more than {2 * MAX_ARTIFACTS} files and folders beside the answer")
            names.append(entry.name)
    return names


def open_untrusted(name: str | Path, directory: int | None) -> int | None:
    """None for what is no regular file or directory. It is looked at before it is opened, because opening a
    device may do something, and without waiting, because opening a FIFO would hold the thread for ever."""
    try:
        kind = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            return None
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError as exc:
        if exc.errno in _NOT_OURS:
            return None
        raise


def _safe_name(path: str) -> str:
    """A member name that unpacks below its folder on every system: no drive, no backslash, no control
    characters, no lone surrogates."""
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join("_" if character in '\\:*?"<>|' or not character.isprintable() else character for character in text)
