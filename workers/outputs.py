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
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, cast

from broker.errors import BlobsUnavailable
from broker.model import Job, Outcome
from broker.ports import Blobs, Sink
from broker.settings import SidecarSettings
from workers import loops
from workers.inference import INFERENCE_FAULT, Answer, AttemptFailed, prepare_scratch, problem
from workers.inputs import Workspace

logger = logging.getLogger(__name__)

STORAGE_FAULT = "The result could not be stored before the deadline: the blob store is unavailable"

MAX_ARTIFACTS = 10_000
MAX_DEPTH = 32
_CHUNK_BYTES = 256 * 1024
_SAMPLE_BYTES = 64 * 1024
# Above it, a member's header has the long form, which not every reader of streams knows.
_PLAIN_BYTES = 2**31 - 2**24
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0
# What opening says of a link, of something that vanished, of a socket or a device: not a file to hand over.
_NOT_OURS = frozenset({errno.ELOOP, errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.ENODEV, errno.EMLINK})


class _Refused(Exception):
    """Past a cap."""


class _Unreadable(Exception):
    """A file of the container's cannot be read, or what holds it."""


async def collect(
    blobs: Blobs,
    settings: SidecarSettings,
    job: Job,
    answer: Answer,
    workspace: Workspace,
    *,
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
    if not answer.spilled and (not wants_files or workspace.is_empty()):
        return answer.outcome()
    try:
        if not answer.spilled and not await loops.in_thread(_holds_artifacts, workspace.response):
            return answer.outcome()
        await loops.in_thread(prepare_scratch, workspace.scratch / "part")
        pack = _Packing(
            f"{job.id}.response",
            answer,
            workspace.response if wants_files else None,
            limit_bytes=settings.max_artifact_bytes,
        )
        # An attempt that was refunded has the number of the next one, and may still be on its way to the store.
        key = f"results/{job.account}/{job.id}/{uuid.uuid4()}.zip"
        await _upload(blobs, job, key, pack, workspace.scratch, left_s)
    except (_Refused, _Unreadable, OSError) as exc:
        detail = str(exc) if isinstance(exc, _Refused) else INFERENCE_FAULT
        logger.warning("artifacts_refused", extra={"public": True, "request_id": job.id, "cause": str(exc)})
        raise AttemptFailed(problem(job, 500, detail)) from exc
    return Outcome(status=302, blob_key=key)


async def _upload(blobs: Blobs, job: Job, key: str, pack: _Packing, scratch: Path, left_s: Callable[[], float]) -> None:
    """The request stays `running` while the blob store is away, until its deadline (PROTOCOL §2.6). Each try packs
    anew: there is no archive on disk, and what goes into it is still there."""
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return await blobs.upload(key, pack, content_type="application/zip", scratch=scratch)
        except BlobsUnavailable as exc:
            if left_s() <= pause_s:
                raise AttemptFailed(problem(job, 500, STORAGE_FAULT)) from exc
            if pause_s == _FIRST_PAUSE_S:
                logger.warning("upload_retried", extra={"request_id": job.id, "cause": type(exc).__name__})
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)


class _Packing:
    """Writes the zip, within caps, as often as it is called."""

    def __init__(self, response_name: str, answer: Answer, artifacts: Path | None, *, limit_bytes: int) -> None:
        self._response_name = response_name
        self._answer = answer
        self._artifacts = artifacts
        self._limit_bytes = limit_bytes

    def __call__(self, sink: Sink) -> None:
        """Raises _Refused, _Unreadable, and what `sink` raises."""
        with zipfile.ZipFile(cast("BinaryIO", sink), "w", zipfile.ZIP_DEFLATED) as archive:
            members = _Members(archive, limit_bytes=self._limit_bytes)
            for path, file in self._files():
                with file:
                    members.add(path, file)

    def _files(self) -> Iterator[tuple[str, BinaryIO]]:
        spilled = self._answer.spilled
        try:
            yield self._response_name, spilled.open("rb") if spilled else BytesIO(self._answer.body)
            if self._artifacts is not None:
                yield from _artifacts(self._artifacts)
        except OSError as exc:
            raise _Unreadable(os.strerror(exc.errno or 0)) from exc


class _Members:
    """The members of one archive under way."""

    def __init__(self, archive: zipfile.ZipFile, *, limit_bytes: int) -> None:
        self._archive = archive
        self._limit_bytes = limit_bytes
        self._left_bytes = limit_bytes
        self._names: set[str] = set()

    def add(self, name: str, file: BinaryIO) -> None:
        """What the file holds now: one that grows must not do so for ever, and one that shrinks ends earlier."""
        size_bytes = file.seek(0, os.SEEK_END)
        file.seek(0)
        self._left_bytes -= size_bytes
        if self._left_bytes < 0:
            raise _Refused(f"The answer and its files are larger than {self._limit_bytes} bytes")
        unique = self._unique(name)
        chunk = _read(file, min(_CHUNK_BYTES, size_bytes))
        self._archive.compresslevel = _level(chunk)
        with self._archive.open(unique, "w", force_zip64=size_bytes > _PLAIN_BYTES) as member:
            while chunk:
                member.write(chunk)
                size_bytes -= len(chunk)
                chunk = _read(file, min(_CHUNK_BYTES, size_bytes))
        self._archive.getinfo(unique).external_attr = (stat.S_IFREG | 0o644) << 16

    def _unique(self, name: str) -> str:
        if len(self._names) > MAX_ARTIFACTS:
            raise _Refused(f"There are more than {MAX_ARTIFACTS} files beside the answer")
        unique = safe = _safe_name(name)
        count = 1
        while unique in self._names:
            count += 1
            unique = f"{safe}~{count}"
        self._names.add(unique)
        return unique


def _level(sample: bytes) -> int:
    """Pictures, videos and weights do not get smaller, however long one tries: 40 MB/s against 480 without. Level 0
    is still a deflated member, which can be read without having seen the end of the archive."""
    head = sample[:_SAMPLE_BYTES]
    return 1 if len(zlib.compress(head, 1)) < 0.9 * len(head) else 0


def _read(file: BinaryIO, size_bytes: int) -> bytes:
    try:
        return file.read(size_bytes)
    except OSError as exc:
        raise _Unreadable(os.strerror(exc.errno or 0)) from exc


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
