"""What a container is given with a job: directories on disk and headers (contract/invocation.md §8.2, §8.3)."""

from __future__ import annotations

import asyncio
import functools
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
from broker.errors import FnqueueError
from broker.model import Job
from broker.ports import Blobs
from broker.settings import SidecarSettings
from workers import loops, trees
from workers.inference import AttemptFailed, end_to_end, prepare_scratch, problem

ASSETS_FAULT = "Internal error while downloading assets"
PREPARE_FAULT = "Internal error while preparing for inference"

_PARALLEL_DOWNLOADS = 8
_CANONICAL = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# Spoken to the front end, or set by the client library for its own connection to the container.
_NEVER_FORWARDED = frozenset(
    {
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
    (`prepare_scratch`). `body` is the request body, or the file that holds it. `left` is what may have to be removed.
    """

    __slots__ = ("assets_name", "body", "clerk", "empty", "left", "response_name", "scratch_name")

    def __init__(
        self,
        *,
        assets: str | Path,
        response: str | Path,
        scratch: str | Path,
        clerk: loops.Clerk,
        body: bytes | Path = b"",
    ) -> None:
        # Texts, because a Path costs more to make than what most jobs do with it.
        self.assets_name, self.response_name, self.scratch_name = str(assets), str(response), str(scratch)
        self.clerk = clerk
        self.body = body
        self.left: tuple[str, ...] = ()
        self.empty = False

    @property
    def assets(self) -> Path:
        return Path(self.assets_name)

    @property
    def response(self) -> Path:
        return Path(self.response_name)

    @property
    def scratch(self) -> Path:
        return Path(self.scratch_name)

    def is_empty(self) -> bool:
        """Whether there is nothing in the output directory. Looked at here and now: unlike making and removing, that
        never waits for a disk."""
        self.empty = self.empty or _is_empty(self.response_name)
        return self.empty


class workspace(AbstractAsyncContextManager[Workspace]):  # noqa: N801  used as a function is
    """Directories made and inputs fetched before the body, everything removed after it, also when cancelled. A class,
    because this is done for every job.

    Raises:
        AttemptFailed: the directories could not be made, or an input could not be fetched.
        BodyAltered.
    """

    __slots__ = ("_blobs", "_clerk", "_job", "_room", "_settings")

    def __init__(self, blobs: Blobs, settings: SidecarSettings, job: Job, clerk: loops.Clerk) -> None:
        self._blobs, self._settings, self._job, self._clerk = blobs, settings, job, clerk
        self._room: Workspace | None = None

    async def __aenter__(self) -> Workspace:
        job = self._job
        try:
            room = self._room = self._laid_out()
        except ValueError as exc:
            raise AttemptFailed(problem(job, 500, PREPARE_FAULT)) from exc
        try:
            await _make(room, job)
            if job.assets:
                await _fetch_assets(self._blobs, job, room.assets)
            if job.body_key:
                room.body = await _fetch_body(self._blobs, job, room.scratch)
        except BaseException:
            await _clear(room)
            raise
        return room

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._room is not None:
            await _clear(self._room)

    def _laid_out(self) -> Workspace:
        """Raises ValueError."""
        settings, name = self._settings, _canonical(self._job.id)
        room = Workspace(
            assets=f"{settings.asset_dir}/{name}",
            response=f"{settings.response_dir}/{name}",
            scratch=f"{settings.scratch_dir or tempfile.gettempdir()}/fnqueue-{secrets.token_hex(16)}",
            clerk=self._clerk,
            body=self._job.body,
        )
        room.left = (room.response_name, room.assets_name, room.scratch_name)
        return room


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
        "NVCF-INVOCATION-REGION": settings.region,
    }


def container_headers(job: Job, room: Workspace, for_all: Mapping[str, str], budget_s: float) -> list[tuple[str, str]]:
    """The client's headers that may reach the container, and ours in place of any that claim to be ours.

    The invocation region is where the request was accepted; a front end without a region leaves it to the sidecar.

    `for_all` comes from `headers_for_all`. `budget_s` is what is left for the attempt; it caps the poll seconds
    that the container is told.
    """
    age_s = max(0.0, time.time() - job.created_at)
    ours = {
        **for_all,
        "NVCF-REQID": job.id,
        "NVCF-SUB": job.subject,
        "NVCF-NCAID": job.account,
        "NVCF-FUNCTION-ID": job.function_id,
        "NVCF-FUNCTION-VERSION-ID": job.version_id,
        "NVCF-ASSET-DIR": room.assets_name,
        "NVCF-LARGE-OUTPUT-DIR": room.response_name,
        "NVCF-FUNCTION-ASSET-IDS": ",".join(job.assets),
        "NVCF-POLL-SECONDS": str(int(max(0.0, min(job.poll_s - age_s, budget_s)))),
    }
    if job.region:
        ours["NVCF-INVOCATION-REGION"] = job.region
    # Some servers read `nvcf_sub` and `nvcf-sub` as one name.
    dropped = _dropped(tuple(ours))
    if job.target:
        dropped -= {"cookie"}  # the front end lets those pass that are the container's own
    theirs = [pair for pair in end_to_end(job.headers) if pair[0].lower().replace("_", "-") not in dropped]
    if not job.assets:
        del ours["NVCF-FUNCTION-ASSET-IDS"]
    if not job.passthrough and all(name.lower() != "content-type" for name, _ in theirs):
        ours["Content-Type"] = "application/json"
    return [*theirs, *ours.items()]


@functools.cache
def _dropped(ours: tuple[str, ...]) -> frozenset[str]:
    """In lower case."""
    return _NEVER_FORWARDED | {name.lower() for name in ours}


async def _make(room: Workspace, job: Job) -> None:
    try:
        try:
            await room.clerk.soon(_make_directories, room, bool(job.assets))
        except (FileExistsError, FileNotFoundError):
            await loops.in_thread(_make_way, room)
            await room.clerk.run(_make_directories, room, bool(job.assets))
    except OSError as exc:
        raise AttemptFailed(problem(job, 500, PREPARE_FAULT)) from exc


def _make_directories(room: Workspace, assets_follow: bool) -> None:
    """The asset directory stays closed to the container until the assets are there: it must not plant a link
    where a download will be written."""
    os.mkdir(room.response_name, 0o700)
    _open_to_all(room.response_name)
    if assets_follow:
        os.mkdir(room.assets_name, 0o700)


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


async def _fetch_body(blobs: Blobs, job: Job, scratch: Path) -> Path:
    path = scratch / "body"
    try:
        await loops.in_thread(prepare_scratch, path)
        await blobs.download(job.body_key, path)
        digest = await loops.in_thread(_sha256, path) if job.body_sha256 else ""
    except (FnqueueError, OSError) as exc:
        raise AttemptFailed(problem(job, 500, PREPARE_FAULT)) from exc
    if digest != job.body_sha256:
        raise BodyAltered("its body in the blob store was changed after it was accepted")
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.sha256).hexdigest()


def _canonical(text: str) -> str:
    """An ID fit for a file name. Raises ValueError: it came through a queue, and `../x` is a name too."""
    return text if _CANONICAL.fullmatch(text) else str(uuid.UUID(text))


def _open_to_all(path: str | Path) -> None:
    """Mode 0777, whatever the umask; the container runs as another user."""
    opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.fchmod(opened, 0o777)
    finally:
        os.close(opened)


async def _clear(room: Workspace) -> None:
    """Most often nothing was ever put there, and nobody has to wait until the directories are gone."""
    left, room.left = room.left, ()
    if room.is_empty() and not _exists(room.scratch_name):
        room.clerk.later(_remove_empty, *left)
    else:
        await loops.in_thread(trees.remove, *map(Path, left))


def _is_empty(directory: str) -> bool:
    """A link in its place is not looked into, and what vanished holds nothing."""
    try:
        # Reading it would otherwise be noted on the disk.
        opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | getattr(os, "O_NOATIME", 0))
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        with os.scandir(opened) as entries:
            return next(entries, None) is None
    finally:
        os.close(opened)


def _exists(path: str) -> bool:
    return os.path.lexists(path)


def _remove_empty(*paths: str) -> None:
    """Directories that are empty or not there, but for what a container put into them after its answer."""
    for path in paths:
        try:
            os.rmdir(path)
        except FileNotFoundError:
            continue
        except OSError:
            trees.remove(Path(path))
