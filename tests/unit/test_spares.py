from __future__ import annotations

import os
import stat
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from broker.backends.files import FileBlobs, open_blobs
from broker.model import Job
from broker.settings import Settings, SidecarSettings
from tests.eventually import eventually
from tests.unit.container import a_job, settings_for
from workers import loops
from workers.inputs import Workspace, workspace
from workers.spares import Spares


class Disk:
    """Where the jobs of one sidecar have their directories, `most` of which may be spare."""

    def __init__(self, blobs: FileBlobs, settings: SidecarSettings, clerk: loops.Clerk, *, most: int = 2) -> None:
        self.spares = Spares(clerk, most=most)
        self._blobs, self._settings, self._clerk = blobs, settings, clerk

    def job(self, job: Job | None = None) -> AbstractAsyncContextManager[Workspace]:
        return workspace(self._blobs, self._settings, job or a_job(), self._clerk, self.spares)

    async def one_done(self) -> Path:
        """The directory of a job that was answered and left nothing in it."""
        async with self.job() as room:
            assert room.is_empty()
        return room.response

    async def there(self) -> list[str]:
        return sorted(os.listdir(self._settings.response_dir))


@pytest.fixture
async def disk(tmp_path: Path) -> AsyncIterator[Disk]:
    async with open_disk(tmp_path) as opened:
        yield opened
    assert os.listdir(tmp_path / "response") == []


@asynccontextmanager
async def open_disk(folder: Path) -> AsyncIterator[Disk]:
    settings = settings_for(folder, 1)
    async with open_blobs("file://", Settings(data_dir=folder / "data")) as blobs:
        with loops.Clerk() as clerk:
            disk = Disk(blobs, settings, clerk)
            yield disk
            disk.spares.close()


async def test_the_next_job_gets_the_directory_under_its_own_name(disk: Disk) -> None:
    old = await disk.one_done()
    kept = old.stat().st_ino
    async with disk.job() as room:
        assert room.response.stat().st_ino == kept
        assert stat.S_IMODE(room.response.stat().st_mode) == 0o777
        assert await disk.there() == [room.response.name]


async def test_jobs_that_run_at_the_same_time_share_nothing(disk: Disk) -> None:
    await disk.one_done()
    async with disk.job() as first, disk.job() as second:
        assert first.response.stat().st_ino != second.response.stat().st_ino
        (first.response / "file").touch()
        assert second.is_empty()


async def test_what_is_written_too_late_reaches_no_other_job(disk: Disk) -> None:
    old = await disk.one_done()
    (old / "late").write_text("of another")
    async with disk.job() as room:
        assert list(room.response.iterdir()) == []
        assert not old.exists()
        assert await disk.there() == [room.response.name]


async def test_a_link_in_place_of_a_spare_leads_nowhere(disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    old = await disk.one_done()
    old.rmdir()
    old.symlink_to(tmp_path / "precious")
    async with disk.job() as room:
        assert not room.response.is_symlink()
        (room.response / "file").touch()
    assert list((tmp_path / "precious").iterdir()) == []


async def test_a_spare_that_was_closed_to_others_is_not_used(disk: Disk) -> None:
    (await disk.one_done()).chmod(0o700)
    async with disk.job() as room:
        assert stat.S_IMODE(room.response.stat().st_mode) == 0o777


async def test_a_spare_that_vanished_is_missed_by_nobody(disk: Disk) -> None:
    (await disk.one_done()).rmdir()
    async with disk.job() as room:
        assert list(room.response.iterdir()) == []


async def test_what_an_earlier_attempt_left_is_replaced_all_the_same(disk: Disk, tmp_path: Path) -> None:
    await disk.one_done()
    job = a_job()
    (tmp_path / "response" / job.id).mkdir()
    (tmp_path / "response" / job.id / "stale").touch()
    async with disk.job(job) as room:
        assert list(room.response.iterdir()) == []
        assert await disk.there() == [job.id]


async def test_a_job_that_is_run_again_keeps_its_directory_to_itself(disk: Disk) -> None:
    job = a_job()
    await disk.one_done()
    for _ in range(2):
        async with disk.job(job) as room:
            assert room.is_empty()
            async with disk.job() as other:
                assert other.response.stat().st_ino != room.response.stat().st_ino
            assert room.response.is_dir()


async def test_only_a_directory_that_was_found_empty_is_kept(disk: Disk) -> None:
    async with disk.job():
        pass  # no good answer came
    async with disk.job() as room:
        (room.response / "file").touch()
        assert not room.is_empty()
    assert await disk.there() == []


async def test_no_more_are_kept_than_there_may_be(disk: Disk) -> None:
    async with disk.job() as first, disk.job() as second, disk.job() as third:
        assert all(room.is_empty() for room in (first, second, third))
    assert len(await disk.there()) == 2


async def test_spares_that_nobody_takes_are_removed(disk: Disk) -> None:
    late = await disk.one_done()
    (late / "late").touch()
    await eventually(disk.there, lambda names: names == [])
    await disk.one_done()
    await eventually(disk.there, lambda names: names == [])


async def test_a_slow_disk_is_left_to_the_clerk(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, 1)
    async with open_blobs("file://", Settings(data_dir=tmp_path / "data")) as blobs:
        with loops.Clerk() as clerk:
            clerk.now(time.sleep, loops.HELD_S)  # a disk that is being flushed
            disk = Disk(blobs, settings, clerk)
            assert clerk.patient
            old = await disk.one_done()
            async with disk.job() as room:
                assert not old.exists()
                assert room.is_empty()
            disk.spares.close()
    assert os.listdir(tmp_path / "response") == []
