"""What a container is given with a job: directories on disk and headers (contract/invocation.md §8.2, §8.3)."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import TracebackType

from broker import assets
from broker.errors import FnqueueError, PayloadTooLarge
from broker.model import Job
from broker.ports import Blobs
from broker.settings import MIB, SidecarSettings
from workers import loops, trees
from workers.inference import AttemptFailed, end_to_end, key_of, prepare_scratch, problem
from workers.spares import OPEN_TO_ALL, Spares, is_as_made, is_empty, remove_empty, remove_if_empty

ASSETS_FAULT = "Internal error while downloading assets"
PREPARE_FAULT = "Internal error while preparing for inference"

_ALTERED = "its body in the blob store was changed after it was accepted"

_PARALLEL_DOWNLOADS = 8
# A body of the blob store that is larger is a file: each slot may have one, and an answer in memory beside it.
_IN_MEMORY_BYTES = 5 * MIB
_CANONICAL = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# What `container_headers` sets; spoken to the front end; or set by the client for its own connection to the container.
_OURS = frozenset(
    {
        "nvcf-asset-dir",
        "nvcf-backend",
        "nvcf-env",
        "nvcf-function-asset-ids",
        "nvcf-function-id",
        "nvcf-function-name",
        "nvcf-function-version-id",
        "nvcf-instancetype",
        "nvcf-invocation-region",
        "nvcf-large-output-dir",
        "nvcf-max-response-size-bytes",
        "nvcf-ncaid",
        "nvcf-nspectid",
        "nvcf-region",
        "nvcf-reqid",
        "nvcf-sub",
        "authorization",
        "content-length",
        "cookie",
        "expect",
        "host",
        "nvcf-poll-seconds",
        "nvcf-queue-timeout-seconds",
        "nvcf-run-timeout-seconds",
    }
)


class BodyAltered(Exception):
    """What lies in the blob store is not what the front end signed. Nothing may be run with it, now or later."""


class Workspace:
    """One attempt's place on disk. `assets` and `response` are the container's too; `scratch` is ours alone.

    `response` is there from the beginning, `assets` if the job has any, `scratch` once somebody needs it
    (`prepare_scratch`), below `scratch_dir` or where this system has what is temporary. `body` is the request body, or
    the file that holds it. With `spares`, `response` may have been another attempt's, and be another's again.
    """

    __slots__ = ("_scratch", "_scratch_dir", "_spares", "assets_name", "body", "clerk", "empty", "response_name")

    def __init__(
        self,
        *,
        assets: str | Path,
        response: str | Path,
        scratch_dir: str | Path,
        clerk: loops.Clerk,
        spares: Spares | None = None,
        body: bytes | Path = b"",
    ) -> None:
        # Texts, because a Path costs more to make than what most jobs do with it.
        self.assets_name, self.response_name = str(assets), str(response)
        self.clerk = clerk
        self.body = body
        self.empty = False
        self._spares = spares
        self._scratch_dir = scratch_dir
        self._scratch: Path | None = None

    @property
    def assets(self) -> Path:
        return Path(self.assets_name)

    @property
    def response(self) -> Path:
        return Path(self.response_name)

    @property
    def scratch(self) -> Path:
        """Under a name that no container can guess, and be there first."""
        if self._scratch is None:
            self._scratch = Path(self._scratch_dir or tempfile.gettempdir(), f"fnqueue-{secrets.token_hex(16)}")
        return self._scratch

    def spill(self) -> Path:
        """Where an answer goes that is too large for memory."""
        return self.scratch / "response"

    def spare(self) -> str:
        """A directory that may become `response`, '' if there is none."""
        return "" if self._spares is None else self._spares.take(self.response_name)

    def is_empty(self) -> bool:
        """Whether there is nothing in the output directory. To be asked once there is a good answer, of a container
        that is done with it; to look never waits for a disk."""
        self.empty = self.empty or is_empty(self.response_name)
        return self.empty

    async def clear(self) -> None:
        """Remove all of it, but what the next attempt may have. Most often nothing was ever put there, and nobody has
        to wait for that."""
        gone = self.empty and self._spares is not None and self._spares.keep(self.response_name)
        if not gone and not self.clerk.patient:
            gone = self.clerk.now(remove_if_empty, self.response_name)
        if self._scratch is not None or not (gone or self.is_empty()):
            left = () if gone else (self.response,)
            scratch = () if self._scratch is None else (self._scratch,)
            await loops.in_thread(trees.remove, *left, self.assets, *scratch)
        elif not gone:
            self.clerk.later(remove_empty, self.response_name, self.assets_name)
        elif os.access(self.assets_name, os.F_OK, follow_symlinks=False):
            self.clerk.later(remove_empty, self.assets_name)


class workspace(AbstractAsyncContextManager[Workspace]):  # noqa: N801  used as a function is
    """Directories made and inputs fetched before the body, everything removed after it, also when cancelled. A class,
    because this is done for every job.

    Raises:
        AttemptFailed: the directories could not be made, or an input could not be fetched.
        BodyAltered.
    """

    __slots__ = ("_blobs", "_clerk", "_job", "_room", "_settings", "_spares")

    def __init__(
        self, blobs: Blobs, settings: SidecarSettings, job: Job, clerk: loops.Clerk, spares: Spares | None = None
    ) -> None:
        self._blobs, self._settings, self._job, self._clerk, self._spares = blobs, settings, job, clerk, spares
        self._room: Workspace | None = None

    async def __aenter__(self) -> Workspace:
        job = self._job
        try:
            room = self._room = self._laid_out()
        except ValueError as exc:
            raise AttemptFailed(problem(job, 500, PREPARE_FAULT)) from exc
        try:
            if self._clerk.patient or not _made_at_once(room, job):
                await _make(room, job)
            if job.assets:
                await _fetch_assets(self._blobs, job, room.assets)
            if job.body_key:
                room.body = await _fetch_body(self._blobs, job, room)
        except BaseException:
            await room.clear()
            raise
        return room

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._room is not None:
            await self._room.clear()

    def _laid_out(self) -> Workspace:
        """Raises ValueError."""
        settings, name = self._settings, _canonical(self._job.id)
        return Workspace(
            assets=f"{settings.asset_dir}/{name}",
            response=f"{settings.response_dir}/{name}",
            scratch_dir=settings.scratch_dir,
            clerk=self._clerk,
            spares=self._spares,
            body=self._job.body,
        )


def headers_for_all(settings: SidecarSettings) -> Mapping[str, str]:
    """What the container is told with every job alike."""
    return {
        "NVCF-FUNCTION-NAME": settings.function_name,
        "NVCF-MAX-RESPONSE-SIZE-BYTES": str(settings.max_response_bytes),
        "NVCF-NSPECTID": settings.nspect_id,
        "NVCF-BACKEND": settings.backend,
        "NVCF-INSTANCETYPE": settings.instance_type,
        "NVCF-REGION": settings.region,
        "NVCF-ENV": settings.environment,
    }


def container_headers(job: Job, room: Workspace, for_all: Mapping[str, str], budget_s: float) -> list[tuple[str, str]]:
    """The client's headers that may reach the container, and ours in place of any that claim to be ours.

    The invocation region is where the request was accepted; a front end without a region leaves it to the sidecar.

    `for_all` comes from `headers_for_all`. `budget_s` is what is left for the attempt; it caps the poll seconds
    that the container is told.
    """
    left_s = min(job.poll_s - max(0.0, time.time() - job.created_at), budget_s)
    found = []
    typed = job.passthrough
    for pair in end_to_end(job.headers):
        key = key_of(pair[0])
        # The front end lets those cookies pass that are the container's own.
        if key not in _OURS or (key == "cookie" and job.target):
            found.append(pair)
            typed = typed or pair[0].lower() == "content-type"
    if not typed:
        found.append(("Content-Type", "application/json"))
    if job.assets:
        found.append(("NVCF-FUNCTION-ASSET-IDS", ",".join(job.assets)))
    found += for_all.items()
    found += (
        ("NVCF-INVOCATION-REGION", job.region or for_all["NVCF-REGION"]),
        ("NVCF-REQID", job.id),
        ("NVCF-SUB", job.subject),
        ("NVCF-NCAID", job.account),
        ("NVCF-FUNCTION-ID", job.function_id),
        ("NVCF-FUNCTION-VERSION-ID", job.version_id),
        ("NVCF-ASSET-DIR", room.assets_name),
        ("NVCF-LARGE-OUTPUT-DIR", room.response_name),
        ("NVCF-POLL-SECONDS", str(int(left_s)) if left_s > 0 else "0"),
    )
    return found


def _made_at_once(room: Workspace, job: Job) -> bool:
    """As `_make`, for nearly every job; False if there is more to it."""
    try:
        room.clerk.now(_make_directories, room, bool(job.assets), room.spare())
    except OSError:
        return False
    return True


async def _make(room: Workspace, job: Job) -> None:
    try:
        try:
            await room.clerk.soon(_make_directories, room, bool(job.assets), room.spare())
        except (FileExistsError, FileNotFoundError):
            await loops.in_thread(_make_way, room)
            await room.clerk.run(_make_directories, room, bool(job.assets))
    except OSError as exc:
        raise AttemptFailed(problem(job, 500, PREPARE_FAULT)) from exc


def _make_directories(room: Workspace, assets_follow: bool, spare: str = "") -> None:
    """The asset directory stays closed to the container until the assets are there: it must not plant a link
    where a download will be written."""
    if not (spare and _renamed(spare, room.response_name)):
        os.mkdir(room.response_name, 0o700)
        _open_to_all(room.response_name)
    if assets_follow:
        os.mkdir(room.assets_name, 0o700)


def _renamed(spare: str, path: str) -> bool:
    """Whether it is at `path` now, and nothing is in it. If something is, `path` is not free."""
    try:
        os.rename(spare, path)
    except OSError:  # it is gone, or something is in the way
        remove_empty(spare)
        return False
    return is_as_made(path)


def _make_way(room: Workspace) -> None:
    """For the first job of all; or an earlier attempt that was killed left something, or its container planted a
    link there. What cannot be removed fails the attempt that needs the name."""
    for path in (room.assets, room.response):
        path.parent.mkdir(parents=True, exist_ok=True)
        trees.remove(path)


async def _fetch_assets(blobs: Blobs, job: Job, directory: Path) -> None:
    """Every asset as a file of its name, several at once."""
    slots = asyncio.Semaphore(_PARALLEL_DOWNLOADS)

    async def fetch(asset_id: str) -> None:
        path = directory / _canonical(asset_id)
        async with slots:
            await blobs.download(assets.key_of(job.account, asset_id), path)

    try:
        async with loops.together() as group:
            for asset_id in dict.fromkeys(job.assets):
                group.create_task(fetch(asset_id))
        await loops.in_thread(_hand_over, directory)
    except (FnqueueError, OSError, ValueError) as exc:
        raise AttemptFailed(problem(job, 500, ASSETS_FAULT)) from exc


def _hand_over(directory: Path) -> None:
    for path in directory.iterdir():
        path.chmod(0o644)
    _open_to_all(directory)


async def _fetch_body(blobs: Blobs, job: Job, room: Workspace) -> bytes | Path:
    body: bytes | Path
    try:
        if 0 < job.blob_bytes <= _IN_MEMORY_BYTES:
            body = await blobs.get(job.body_key, limit_bytes=job.blob_bytes)
        else:
            body = room.scratch / "body"
            await loops.in_thread(prepare_scratch, body)
            await blobs.download(job.body_key, body)
        digest = await loops.in_thread(_sha256, body) if job.body_sha256 else ""
    except PayloadTooLarge as exc:
        raise BodyAltered(_ALTERED) from exc
    except (FnqueueError, OSError) as exc:
        raise AttemptFailed(problem(job, 500, PREPARE_FAULT)) from exc
    if digest != job.body_sha256:
        raise BodyAltered(_ALTERED)
    return body


def _sha256(body: bytes | Path) -> str:
    if isinstance(body, bytes):
        return hashlib.sha256(body).hexdigest()
    with body.open("rb") as file:
        return hashlib.file_digest(file, hashlib.sha256).hexdigest()


def _canonical(text: str) -> str:
    """An ID fit for a file name. Raises ValueError: it came through a queue, and `../x` is a name too."""
    return text if _CANONICAL.fullmatch(text) else str(uuid.UUID(text))


def _open_to_all(path: str | Path) -> None:
    """Whatever the umask; the container runs as another user."""
    opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.fchmod(opened, OPEN_TO_ALL)
    finally:
        os.close(opened)
