from __future__ import annotations

import asyncio
import json
import stat
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from broker import assets
from broker.backends.files import FileBlobs, open_blobs
from broker.errors import BlobsUnavailable
from broker.model import Job
from broker.settings import Settings, SidecarSettings
from tests.eventually import eventually
from tests.unit.container import FUNCTION_ID, VERSION_ID, a_job, settings_for
from workers import loops
from workers.inference import AttemptFailed
from workers.inputs import BodyAltered, Workspace, container_headers, headers_for_all, workspace

ASSET = "5b9b7d1e-6a0c-4f43-9d57-3f6f1f1d2e44"


@pytest.fixture
async def blobs(tmp_path: Path) -> AsyncIterator[FileBlobs]:
    async with open_blobs("file://", Settings(data_dir=tmp_path / "data")) as opened:
        yield opened


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SidecarSettings:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    return settings_for(tmp_path, 1, region="eu-1", backend="cluster", environment="test", instance_type="H100")


@asynccontextmanager
async def laid_out(blobs: FileBlobs, settings: SidecarSettings, job: Job) -> AsyncIterator[Workspace]:
    with loops.Clerk() as clerk:
        async with workspace(blobs, settings, job, clerk) as room:
            yield room


def left_behind(settings: SidecarSettings) -> list[str]:
    folders = (settings.asset_dir, settings.response_dir, Path(tempfile.gettempdir()))
    return [path.name for folder in folders if folder.exists() for path in folder.iterdir()]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_directories_are_open_to_the_container_and_gone_afterwards(
    blobs: FileBlobs, settings: SidecarSettings
) -> None:
    job = a_job()
    async with laid_out(blobs, settings, job) as room:
        assert (room.assets, room.response) == (settings.asset_dir / job.id, settings.response_dir / job.id)
        assert mode(room.response) == 0o777
        (room.response / "deep").mkdir()
        (room.response / "deep" / "file").touch()
        assert room.body == job.body
    assert left_behind(settings) == []


async def test_a_job_without_assets_has_its_output_directory_and_no_other(
    blobs: FileBlobs, settings: SidecarSettings
) -> None:
    async with laid_out(blobs, settings, a_job()) as room:
        assert left_behind(settings) == [room.response.name]


async def test_what_a_container_made_where_assets_would_be_is_removed(
    blobs: FileBlobs, settings: SidecarSettings
) -> None:
    settings.asset_dir.mkdir()
    async with laid_out(blobs, settings, a_job()) as room:
        room.assets.mkdir()
        (room.assets / "file").touch()
    assert left_behind(settings) == []


async def test_what_a_container_writes_after_its_answer_is_removed_too(
    blobs: FileBlobs, settings: SidecarSettings
) -> None:
    async def left() -> list[str]:
        return left_behind(settings)

    with loops.Clerk() as clerk:
        clerk.now(time.sleep, loops.HELD_S)  # a disk that is being flushed
        async with workspace(blobs, settings, a_job(), clerk) as room:
            assert room.is_empty()
            (room.response / "late").touch()
        await eventually(left, lambda names: names == [])


async def test_an_output_directory_that_was_found_empty_goes_with_its_job(
    blobs: FileBlobs, settings: SidecarSettings
) -> None:
    async with laid_out(blobs, settings, a_job()) as room:
        assert room.is_empty()
    assert left_behind(settings) == []


async def test_a_link_in_place_of_the_output_directory_leads_nowhere(
    blobs: FileBlobs, settings: SidecarSettings, tmp_path: Path
) -> None:
    (tmp_path / "kept").mkdir()
    async with laid_out(blobs, settings, a_job()) as room:
        room.response.rmdir()
        room.response.symlink_to(tmp_path / "kept")
        assert not room.is_empty()
    assert left_behind(settings) == []
    assert (tmp_path / "kept").is_dir()


async def test_an_output_directory_with_a_file_is_not_empty(blobs: FileBlobs, settings: SidecarSettings) -> None:
    async with laid_out(blobs, settings, a_job()) as room:
        (room.response / "file").touch()
        assert not room.is_empty()
    assert left_behind(settings) == []


async def test_assets_lie_under_their_ids_readable_to_all(blobs: FileBlobs, settings: SidecarSettings) -> None:
    ids = [str(uuid.uuid4()) for _ in range(20)]
    for asset_id in ids:
        await blobs.put(assets.key_of("acme", asset_id), asset_id.encode(), content_type="text/plain")
    async with laid_out(blobs, settings, a_job(assets=(*ids, ids[0]))) as room:
        assert {path.name: path.read_text() for path in room.assets.iterdir()} == {name: name for name in ids}
        assert {mode(path) for path in room.assets.iterdir()} == {0o644}
        assert mode(room.assets) == 0o777


async def test_a_missing_asset_fails_the_attempt(blobs: FileBlobs, settings: SidecarSettings) -> None:
    await blobs.put(assets.key_of("somebody-else", ASSET), b"secret", content_type="text/plain")
    assert await failure(blobs, settings, a_job(assets=(ASSET,))) == "Internal error while downloading assets"
    assert left_behind(settings) == []


@pytest.mark.parametrize("forged", ["../../etc/passwd", "", "..", "/etc/passwd", f"{ASSET}/../x"])
async def test_an_id_that_is_no_uuid_never_becomes_a_path(
    blobs: FileBlobs, settings: SidecarSettings, forged: str
) -> None:
    assert await failure(blobs, settings, a_job(id=forged)) == "Internal error while preparing for inference"
    assert await failure(blobs, settings, a_job(assets=(forged,))) == "Internal error while downloading assets"
    assert left_behind(settings) == []


async def test_a_body_from_the_blob_store_comes_as_a_file(blobs: FileBlobs, settings: SidecarSettings) -> None:
    await blobs.put("inputs/acme/1", b"large", content_type="application/octet-stream")
    async with laid_out(blobs, settings, a_job(body=b"", body_key="inputs/acme/1")) as room:
        assert isinstance(room.body, Path)
        assert room.body.read_bytes() == b"large"
        assert mode(room.scratch) == 0o700
    assert left_behind(settings) == []


async def test_a_body_of_a_few_mib_stays_in_memory(blobs: FileBlobs, settings: SidecarSettings) -> None:
    await blobs.put("inputs/acme/1", b"large", content_type="application/octet-stream")
    async with laid_out(blobs, settings, a_job(body=b"", body_key="inputs/acme/1", blob_bytes=5)) as room:
        assert room.body == b"large"
        assert left_behind(settings) == [room.response.name]


async def test_a_body_that_is_longer_than_the_accepted_one_was_altered(
    blobs: FileBlobs, settings: SidecarSettings
) -> None:
    await blobs.put("inputs/acme/1", b"larger", content_type="application/octet-stream")
    with pytest.raises(BodyAltered):
        await enter(blobs, settings, a_job(body=b"", body_key="inputs/acme/1", blob_bytes=5))
    assert left_behind(settings) == []


async def test_a_body_that_cannot_be_fetched_fails_the_attempt(blobs: FileBlobs, settings: SidecarSettings) -> None:
    for size_bytes in (0, 5):
        job = a_job(body=b"", body_key="inputs/acme/none", blob_bytes=size_bytes)
        assert await failure(blobs, settings, job) == "Internal error while preparing for inference"
    assert left_behind(settings) == []


async def test_directories_that_cannot_be_made_fail_the_attempt(
    blobs: FileBlobs, settings: SidecarSettings, tmp_path: Path
) -> None:
    (tmp_path / "response").touch()
    assert await failure(blobs, settings, a_job()) == "Internal error while preparing for inference"
    assert left_behind(settings.model_copy(update={"response_dir": tmp_path / "none"})) == []


async def test_what_an_earlier_attempt_left_is_replaced(blobs: FileBlobs, settings: SidecarSettings) -> None:
    job = a_job()
    old = settings.response_dir / job.id
    old.mkdir(parents=True)
    (old / "stale").touch()
    async with laid_out(blobs, settings, job) as room:
        assert list(room.response.iterdir()) == []


async def test_a_planted_link_is_replaced_and_its_target_untouched(
    blobs: FileBlobs, settings: SidecarSettings, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    (target / "precious").touch()
    job = a_job()
    settings.response_dir.mkdir(parents=True)
    (settings.response_dir / job.id).symlink_to(target)
    async with laid_out(blobs, settings, job) as room:
        assert not room.response.is_symlink()
    assert (target / "precious").exists()
    assert mode(target) == 0o700


class SlowBlobs(FileBlobs):
    """Its downloads never end; `asked` tells that one began."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, secret=b"s")
        self.asked = asyncio.Event()

    async def download(self, key: str, path: Path) -> None:
        self.asked.set()
        await asyncio.Event().wait()


async def test_a_workspace_that_is_cancelled_at_any_step_leaves_nothing_behind(
    blobs: FileBlobs, settings: SidecarSettings
) -> None:
    async def fill() -> None:
        async with laid_out(blobs, settings, a_job()) as room:
            (room.response / "file").touch()
            await asyncio.sleep(0)

    for steps in range(12):
        async with asyncio.TaskGroup() as group:
            task = group.create_task(fill())
            for _ in range(steps):
                await asyncio.sleep(0.0002)
            task.cancel()
        assert left_behind(settings) == []


async def test_a_cancelled_download_leaves_nothing_behind(settings: SidecarSettings, tmp_path: Path) -> None:
    blobs = SlowBlobs(tmp_path)

    async def prepare() -> None:
        async with laid_out(blobs, settings, a_job(assets=(ASSET,))):
            raise AssertionError

    async with asyncio.TaskGroup() as group:
        task = group.create_task(prepare())
        await blobs.asked.wait()
        task.cancel()
    assert left_behind(settings) == []


async def test_the_asset_directory_is_closed_while_assets_are_written(
    settings: SidecarSettings, tmp_path: Path
) -> None:
    modes = []

    class Looking(FileBlobs):
        async def download(self, key: str, path: Path) -> None:
            modes.append(mode(path.parent))
            raise BlobsUnavailable("away")

    await failure(Looking(tmp_path, secret=b"s"), settings, a_job(assets=(ASSET,)))
    assert modes == [0o700]


def test_the_container_is_told_everything_it_may_know(settings: SidecarSettings) -> None:
    job = a_job(assets=(ASSET, VERSION_ID), poll_s=60)
    told = dict(container_headers(job, room_of(job, settings), headers_for_all(settings), 3600))
    seconds = int(told.pop("NVCF-POLL-SECONDS"))
    assert 58 <= seconds <= 60
    assert told == {
        "Content-Type": "application/json",
        "NVCF-REQID": job.id,
        "NVCF-SUB": "key-1",
        "NVCF-NCAID": "acme",
        "NVCF-FUNCTION-NAME": "echo",
        "NVCF-FUNCTION-ID": FUNCTION_ID,
        "NVCF-FUNCTION-VERSION-ID": VERSION_ID,
        "NVCF-ASSET-DIR": str(settings.asset_dir / job.id),
        "NVCF-LARGE-OUTPUT-DIR": str(settings.response_dir / job.id),
        "NVCF-MAX-RESPONSE-SIZE-BYTES": "5242880",
        "NVCF-NSPECTID": "",
        "NVCF-BACKEND": "cluster",
        "NVCF-INSTANCETYPE": "H100",
        "NVCF-REGION": "eu-1",
        "NVCF-ENV": "test",
        "NVCF-FUNCTION-ASSET-IDS": f"{ASSET},{VERSION_ID}",
        "NVCF-INVOCATION-REGION": "eu-1",
    }


def test_the_invocation_region_is_where_the_request_was_accepted(settings: SidecarSettings) -> None:
    found = dict(told(settings, region="us-2", headers=(("nvcf_invocation-region", "forged"),)))
    assert (found["NVCF-INVOCATION-REGION"], found["NVCF-REGION"]) == ("us-2", "eu-1")
    assert "forged" not in found.values()


def test_the_program_id_is_the_instances(settings: SidecarSettings) -> None:
    named = settings.model_copy(update={"nspect_id": "NSPECT-1"})
    assert dict(told(named, headers=(("nvcf-nspectid", "forged"),)))["NVCF-NSPECTID"] == "NSPECT-1"


def told(settings: SidecarSettings, budget_s: float = 3600, **given: Any) -> list[tuple[str, str]]:
    job = a_job(**given)
    return container_headers(job, room_of(job, settings), headers_for_all(settings), budget_s)


def room_of(job: Job, settings: SidecarSettings) -> Workspace:
    return Workspace(
        assets=settings.asset_dir / job.id,
        response=settings.response_dir / job.id,
        scratch_dir="unused",
        clerk=loops.Clerk(),
    )


@pytest.mark.parametrize("name", ["nvcf-ncaid", "NVCF-NCAID", "nvcf_ncaid", "NvCf-NcAiD"])
def test_a_clients_copy_of_our_headers_is_dropped(settings: SidecarSettings, name: str) -> None:
    found = told(settings, headers=((name, "victim"),))
    assert [value for key, value in found if key.lower().replace("_", "-") == "nvcf-ncaid"] == ["acme"]


def test_no_name_of_ours_can_be_a_clients(settings: SidecarSettings) -> None:
    ours = told(settings, region="us", assets=(ASSET,), passthrough=True, headers=())
    forged = tuple((name.lower(), "forged") for name, _ in ours)
    assert "forged" not in dict(told(settings, passthrough=True, headers=forged)).values()


def test_a_forged_list_of_assets_is_dropped_without_a_replacement(settings: SidecarSettings) -> None:
    names = {name.lower() for name, _ in told(settings, headers=(("nvcf-function-asset-ids", ASSET),))}
    assert "nvcf-function-asset-ids" not in names


@pytest.mark.parametrize(
    "name",
    [
        "Authorization",
        "cookie",
        "Host",
        "content-length",
        "Transfer-Encoding",
        "Upgrade",
        "TE",
        "Expect",
        "Proxy-Authorization",
        "NVCF-QUEUE-TIMEOUT-SECONDS",
        "nvcf-run-timeout-seconds",
        "X-Named",
    ],
)
def test_what_must_not_reach_the_container_does_not(settings: SidecarSettings, name: str) -> None:
    found = told(settings, headers=((name, "x"), ("Connection", "keep-alive, X-Named"), ("X-Own", "1")))
    names = [key.lower() for key, _ in found]
    assert name.lower() not in names
    assert "connection" not in names
    assert ("X-Own", "1") in found


def test_repeated_headers_stay_repeated_in_order(settings: SidecarSettings) -> None:
    found = told(settings, headers=(("X-A", "1"), ("X-B", "2"), ("X-A", "3")))
    assert found[:3] == [("X-A", "1"), ("X-B", "2"), ("X-A", "3")]


def test_a_content_type_is_added_in_compatibility_mode_only(settings: SidecarSettings) -> None:
    assert ("Content-Type", "application/json") in told(settings, headers=())
    assert "Content-Type" not in dict(told(settings, headers=(), passthrough=True))
    assert "Content-Type" not in dict(told(settings, headers=(("content-type", "image/png"),)))


@pytest.mark.parametrize(
    ("poll_s", "age_s", "budget_s", "least", "most"),
    [(60, 0.5, 3600, 58, 59), (60, 600, 3600, 0, 0), (60, -600, 3600, 60, 60), (60, 0, 7.9, 7, 7)],
)
def test_poll_seconds_are_what_is_left_in_whole_seconds(
    settings: SidecarSettings, poll_s: int, age_s: float, budget_s: float, least: int, most: int
) -> None:
    found = dict(told(settings, budget_s, poll_s=poll_s, created_at=time.time() - age_s))
    assert least <= int(found["NVCF-POLL-SECONDS"]) <= most


async def failure(blobs: FileBlobs, settings: SidecarSettings, job: Job) -> str:
    """The detail of the 500 that the attempt failed with."""
    with pytest.raises(AttemptFailed) as failed:
        await enter(blobs, settings, job)
    assert failed.value.outcome.status == 500
    return str(json.loads(failed.value.outcome.body)["detail"])


async def enter(blobs: FileBlobs, settings: SidecarSettings, job: Job) -> None:
    async with laid_out(blobs, settings, job):
        pass


@pytest.mark.parametrize("target", ["", "/"])
async def test_cookies_reach_a_container_that_is_asked_in_its_own_name(
    blobs: FileBlobs, settings: SidecarSettings, target: str
) -> None:
    job = a_job(target=target, headers=(("Cookie", "a=b"), ("Authorization", "Bearer x")))
    async with laid_out(blobs, settings, job) as room:
        names = {name for name, _ in container_headers(job, room, headers_for_all(settings), 60.0)}
    assert ("Cookie" in names) is bool(target)
    assert "Authorization" not in names
