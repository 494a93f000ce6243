"""What a container is given with a job: directories on disk and headers (contract/invocation.md §8.2, §8.3)."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from broker import assets
from broker.errors import FnqueueError
from broker.model import Job
from broker.ports import Blobs
from broker.settings import SidecarSettings
from workers import loops
from workers.inference import AttemptFailed, end_to_end, problem

ASSETS_FAULT = "Internal error while downloading assets"
PREPARE_FAULT = "Internal error while preparing for inference"

_PARALLEL_DOWNLOADS = 8
# Spoken to the front end, or set by the client library for its own connection to the container.
_NEVER_FORWARDED = frozenset({"authorization", "content-length", "cookie", "expect", "host", "nvcf-poll-seconds"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """One attempt's place on disk. `assets` and `response` are the container's too; `scratch` is ours alone.
    `body` is the request body, or the file that holds it."""

    assets: Path
    response: Path
    scratch: Path
    body: bytes | Path = b""


@asynccontextmanager
async def workspace(blobs: Blobs, settings: SidecarSettings, job: Job) -> AsyncIterator[Workspace]:
    """Directories made and inputs fetched before the body, everything removed after it, also when cancelled.

    Raises:
        AttemptFailed: the directories could not be made, or an input could not be fetched.
    """
    try:
        name = _canonical(job.id)
        room = Workspace(
            assets=settings.asset_dir / name,
            response=settings.response_dir / name,
            scratch=Path(tempfile.gettempdir(), f"fnqueue-{uuid.uuid4()}"),
        )
    except ValueError as exc:
        raise AttemptFailed(problem(job, 500, PREPARE_FAULT)) from exc
    try:
        await _make(room, job)
        await _fetch_assets(blobs, job, room.assets)
        yield replace(room, body=await _fetch_body(blobs, job, room.scratch))
    finally:
        await loops.in_thread(_remove, room.assets, room.response, room.scratch)


def container_headers(job: Job, settings: SidecarSettings, budget_s: float) -> list[tuple[str, str]]:
    """The client's headers that may reach the container, and ours in place of any that claim to be ours.

    `budget_s` is what is left for the attempt; it caps the poll seconds that the container is told.
    """
    age_s = max(0.0, time.time() - job.created_at)
    ours = {
        "NVCF-REQID": job.id,
        "NVCF-SUB": job.subject,
        "NVCF-NCAID": job.account,
        "NVCF-FUNCTION-NAME": settings.function_name,
        "NVCF-FUNCTION-ID": job.function_id,
        "NVCF-FUNCTION-VERSION-ID": job.version_id,
        "NVCF-ASSET-DIR": str(settings.asset_dir / job.id),
        "NVCF-LARGE-OUTPUT-DIR": str(settings.response_dir / job.id),
        "NVCF-MAX-RESPONSE-SIZE-BYTES": str(settings.max_response_bytes),
        "NVCF-NSPECTID": "",
        "NVCF-BACKEND": settings.backend,
        "NVCF-INSTANCETYPE": settings.instance_type,
        "NVCF-REGION": settings.region,
        "NVCF-ENV": settings.environment,
        "NVCF-FUNCTION-ASSET-IDS": ",".join(job.assets),
        "NVCF-INVOCATION-REGION": settings.region,
        "NVCF-POLL-SECONDS": str(int(max(0.0, min(job.poll_s - age_s, budget_s)))),
    }
    # Some servers read `nvcf_sub` and `nvcf-sub` as one name.
    dropped = _NEVER_FORWARDED | {name.lower() for name in ours}
    theirs = [pair for pair in end_to_end(job.headers) if pair[0].lower().replace("_", "-") not in dropped]
    if not job.assets:
        del ours["NVCF-FUNCTION-ASSET-IDS"]
    if not job.passthrough and all(name.lower() != "content-type" for name, _ in theirs):
        ours["Content-Type"] = "application/json"
    return [*theirs, *ours.items()]


async def _make(room: Workspace, job: Job) -> None:
    try:
        await loops.in_thread(_make_directories, room, bool(job.assets))
    except OSError as exc:
        raise AttemptFailed(problem(job, 500, PREPARE_FAULT)) from exc


def _make_directories(room: Workspace, assets_follow: bool) -> None:
    """`assets_follow`: keep the asset directory closed to the container until they are there; it must not plant
    a link where a download will be written."""
    for path in (room.assets, room.response):
        path.parent.mkdir(parents=True, exist_ok=True)
        # An earlier attempt that was killed left it, or its container planted a link here.
        _remove(path)
    for path in (room.assets, room.response, room.scratch):
        path.mkdir(mode=0o700)
    _open_to_all(room.response)
    if not assets_follow:
        _open_to_all(room.assets)


async def _fetch_assets(blobs: Blobs, job: Job, directory: Path) -> None:
    """Every asset as a file of its name, several at once."""
    if not job.assets:
        return
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


async def _fetch_body(blobs: Blobs, job: Job, scratch: Path) -> bytes | Path:
    if not job.body_key:
        return job.body
    path = scratch / "body"
    try:
        await blobs.download(job.body_key, path)
    except (FnqueueError, OSError) as exc:
        raise AttemptFailed(problem(job, 500, PREPARE_FAULT)) from exc
    return path


def _canonical(text: str) -> str:
    """An ID fit for a file name. Raises ValueError: it came through a queue, and `../x` is a name too."""
    return str(uuid.UUID(text))


def _open_to_all(path: Path) -> None:
    """Mode 0777, whatever the umask; the container runs as another user."""
    opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.fchmod(opened, 0o777)
    finally:
        os.close(opened)


def _remove(*paths: Path) -> None:
    """What cannot be removed stays, and fails the next attempt that needs the name."""
    for path in paths:
        if path.is_symlink() or path.is_file():
            with suppress(OSError):
                path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)
