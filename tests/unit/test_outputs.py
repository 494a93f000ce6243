from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import threading
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from broker.backends.files import FileBlobs, open_blobs
from broker.backends.parts import PARTS_AHEAD
from broker.backends.s3 import PART_BYTES
from broker.backends.s3 import open_blobs as s3_blobs
from broker.errors import BlobsUnavailable
from broker.model import Job, Outcome
from broker.ports import Blobs, Sink
from broker.settings import MIB, Settings, load
from infra.local.servers import S3
from tests.eventually import eventually
from tests.unit.container import a_job, settings_for
from workers import loops, outputs
from workers.inference import Answer, AttemptFailed
from workers.inputs import Workspace
from workers.outputs import collect


class Room:
    """A job with an output directory to fill, and what became of it."""

    def __init__(self, folder: Path, blobs: Blobs, **settings: Any) -> None:
        self.blobs = blobs
        self.job = a_job()
        self.space = Workspace(assets=folder / "a", response=folder / "r", scratch_dir=folder, clerk=loops.Clerk())
        self.out = self.space.response
        for path in (self.space.assets, self.space.response, self.space.scratch):
            path.mkdir()
        self.settings = settings_for(folder, 1, **settings)

    def write(self, name: str, content: bytes = b"x") -> Path:
        path = self.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    async def collect(self, answer: Answer | None = None, *, job: Job | None = None, left_s: float = 60) -> Outcome:
        return await collect(
            self.blobs,
            self.settings,
            job or self.job,
            answer or Answer(status=200, body=b"{}"),
            self.space,
            left_s=lambda: left_s,
        )

    async def zipped(self, answer: Answer | None = None, *, job: Job | None = None) -> dict[str, bytes]:
        """Members of the zip, in order."""
        outcome = await self.collect(answer, job=job)
        assert outcome == Outcome(status=302, blob_key=outcome.blob_key)
        assert outcome.blob_key.startswith(f"results/acme/{self.job.id}/")
        stored = await self.blobs.get(outcome.blob_key, limit_bytes=64 * MIB)
        with zipfile.ZipFile(BytesIO(stored)) as archive:
            assert archive.testzip() is None
            assert len(set(archive.namelist())) == len(archive.namelist())
            return {name: archive.read(name) for name in archive.namelist()}

    async def refused(self, answer: Answer | None = None, *, left_s: float = 60) -> str:
        with pytest.raises(AttemptFailed) as failed:
            await self.collect(answer, left_s=left_s)
        return str(json.loads(failed.value.outcome.body)["detail"])


@pytest.fixture
async def blobs(tmp_path: Path) -> AsyncIterator[FileBlobs]:
    async with open_blobs("file://", Settings(data_dir=tmp_path / "data")) as opened:
        yield opened


@pytest.fixture
def room(tmp_path: Path, blobs: FileBlobs) -> Room:
    return Room(tmp_path, blobs)


async def test_a_small_answer_stays_inline(room: Room) -> None:
    answer = Answer(status=201, headers=(("Content-Type", "text/plain"),), body=b"hi")
    outcome = await room.collect(answer)
    assert outcome == Outcome(status=201, headers=(("Content-Type", "text/plain"),), body=b"hi")


async def test_progress_partial_files_and_empty_folders_are_no_artifacts(room: Room) -> None:
    room.write("progress")
    room.write("deep/progress")
    room.write("image.png.partial")
    (room.out / "empty").mkdir()
    assert (await room.collect()).status == 200


async def test_artifacts_follow_the_response_in_order_of_path(room: Room) -> None:
    room.write("b.png", b"B")
    room.write("a/deep/c.png", b"C")
    room.write("a.png", b"A")
    room.write("progress")
    room.write("d.partial")
    got = await room.zipped(Answer(status=200, body=b"body"))
    assert list(got.items()) == [
        (f"{room.job.id}.response", b"body"),
        ("a/deep/c.png", b"C"),
        ("a.png", b"A"),
        ("b.png", b"B"),
    ]


async def test_a_spilled_answer_becomes_a_zip(room: Room) -> None:
    spilled = room.space.scratch / "response"
    spilled.write_bytes(b"y" * 3_000_000)
    got = await room.zipped(Answer(status=200, spilled=spilled))
    assert got == {f"{room.job.id}.response": b"y" * 3_000_000}


async def test_passthrough_leaves_the_output_directory_alone(room: Room) -> None:
    room.write("a.png")
    job = a_job(id=room.job.id, passthrough=True)
    assert (await room.collect(job=job)).status == 200
    spilled = room.space.scratch / "response"
    spilled.write_bytes(b"y")
    assert list(await room.zipped(Answer(status=200, spilled=spilled), job=job)) == [f"{room.job.id}.response"]


async def test_a_failed_answer_takes_no_files_along(room: Room) -> None:
    room.write("a.png")
    assert (await room.collect(Answer(status=500, body=b"{}"))).status == 500


async def test_links_are_not_followed(room: Room, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "token").write_bytes(b"token")
    room.write("own.txt", b"own")
    (room.out / "file-link").symlink_to(secret / "token")
    (room.out / "folder-link").symlink_to(secret)
    (room.out / "environ").symlink_to("/proc/self/environ")
    (room.out / "dangling").symlink_to("/nowhere")
    (room.out / "loop").symlink_to("loop")
    (room.out / "deep").mkdir()
    (room.out / "deep" / "up").symlink_to("../../secret/token")
    assert list(await room.zipped()) == [f"{room.job.id}.response", "own.txt"]


async def test_links_alone_are_no_artifacts(room: Room) -> None:
    (room.out / "link").symlink_to("/etc/passwd")
    assert (await room.collect()).status == 200


async def test_fifos_sockets_and_devices_are_left_out(room: Room) -> None:
    os.mkfifo(room.out / "fifo")
    async with await asyncio.start_unix_server(lambda *_: None, path=room.out / "socket"):
        if os.geteuid() == 0:
            os.mknod(room.out / "zero", 0o644 | 0o020000, os.makedev(1, 5))
        assert (await asyncio.wait_for(room.collect(), 20)).status == 200


@pytest.mark.parametrize("kind", ["gone", "link", "file"])
async def test_an_output_directory_that_is_no_longer_one_holds_nothing(room: Room, tmp_path: Path, kind: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").touch()
    room.out.rmdir()
    if kind == "link":
        room.out.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        room.out.touch()
    assert (await room.collect()).status == 200


async def test_names_are_safe_on_every_system_and_distinct(room: Room) -> None:
    for name in ("a\\b", "a:b", "c\nd", "..\\..\\evil", "C:evil", "\u202egnp.exe", "caf\u00e9.png"):
        room.write(name)
    (room.out / os.fsdecode(b"bad-\xff")).touch()
    room.write(f"{room.job.id}.response", b"impostor")
    got = await room.zipped()
    assert got[f"{room.job.id}.response"] == b"{}"
    assert sorted(list(got)[1:]) == sorted(
        [
            ".._.._evil",
            "C_evil",
            "_gnp.exe",
            "a_b",
            "a_b~2",
            "bad-\ufffd",
            "caf\u00e9.png",
            "c_d",
            f"{room.job.id}.response~2",
        ]
    )


async def test_too_many_files_are_refused(room: Room) -> None:
    for number in range(outputs.MAX_ARTIFACTS + 1):
        (room.out / str(number)).touch()
    assert await room.refused() == f"There are more than {outputs.MAX_ARTIFACTS} files beside the answer"


async def test_folders_too_deep_are_refused(room: Room) -> None:
    room.write("/".join(["d"] * (outputs.MAX_DEPTH + 1)) + "/file")
    assert "folders in each other" in await room.refused()


async def test_too_many_bytes_are_refused_also_when_the_file_is_sparse(tmp_path: Path, blobs: FileBlobs) -> None:
    room = Room(tmp_path, blobs, max_artifact_bytes=2 * MIB)
    os.truncate(room.write("huge"), 10**12)
    assert await room.refused() == f"The answer and its files are larger than {2 * MIB} bytes"


async def test_a_zip_that_cannot_be_written_fails_the_attempt(room: Room) -> None:
    room.write("a.png")
    room.space.scratch.rmdir()
    room.space.scratch.touch()
    assert await room.refused() == "Internal error while making inference request"


class FlakyBlobs(FileBlobs):
    """Its uploads fail `failures` times."""

    def __init__(self, folder: Path, failures: float) -> None:
        super().__init__(folder, secret=b"s")
        self.failures = failures

    async def upload(self, key: str, write: Callable[[Sink], None], *, content_type: str, scratch: Path) -> None:
        assert content_type == "application/zip"
        self.failures -= 1
        if self.failures >= 0:
            raise BlobsUnavailable("away")
        await super().upload(key, write, content_type=content_type, scratch=scratch)


async def test_an_upload_is_repeated_while_there_is_time(tmp_path: Path) -> None:
    blobs = FlakyBlobs(tmp_path / "blobs", failures=1)
    await blobs.ping()
    room = Room(tmp_path, blobs)
    room.write("a.png")
    assert "a.png" in await room.zipped()


async def test_an_upload_that_has_no_time_left_fails_the_attempt(tmp_path: Path) -> None:
    room = Room(tmp_path, FlakyBlobs(tmp_path / "blobs", failures=float("inf")))
    room.write("a.png")
    assert "could not be stored" in await room.refused(left_s=0.1)


async def test_a_cancelled_packing_stops(room: Room, tmp_path: Path) -> None:
    os.truncate(room.write("huge"), 10**12)
    room.settings = room.settings.model_copy(update={"max_artifact_bytes": 10**13})
    drafts = tmp_path / "data" / "blobs" / "drafts"

    async def begun() -> bool:
        return bool(list(drafts.iterdir()))

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        task = group.create_task(room.collect())
        await eventually(begun, bool)
        task.cancel()
    assert task.cancelled()
    assert not await begun()


async def test_two_attempts_never_write_to_the_same_place(room: Room) -> None:
    room.write("a.png")
    assert (await room.collect()).blob_key != (await room.collect()).blob_key


# -- a container that goes on writing ------------------------------------------------------------


class Meddling(FileBlobs):
    """Calls `meddle` before each of the first writes of a zip."""

    def __init__(self, folder: Path, meddle: Callable[[], object], times: int) -> None:
        super().__init__(folder, secret=b"s")
        self.left = [meddle] * times

    async def upload(self, key: str, write: Callable[[Sink], None], *, content_type: str, scratch: Path) -> None:
        def meddled(sink: Sink) -> None:
            write(Meddled(sink, self.left))

        await super().upload(key, meddled, content_type=content_type, scratch=scratch)


class Meddled:
    def __init__(self, sink: Sink, left: list[Callable[[], object]]) -> None:
        self.sink = sink
        self.left = left

    def write(self, data: bytes, /) -> int:
        if self.left:
            self.left.pop()()
        return self.sink.write(data)

    def flush(self) -> None:
        self.sink.flush()


async def meddled(tmp_path: Path, meddle: Callable[[Room], object], *, times: int = 1) -> dict[str, bytes]:
    """The zip of `a` and of `b/c`, whose directory is meddled with while it is written."""
    rooms: list[Room] = []
    meddling = Meddling(tmp_path / "blobs", lambda: meddle(rooms[0]), times)
    await meddling.ping()
    rooms.append(Room(tmp_path, meddling))
    rooms[0].write("a", b"a" * 3 * MIB)
    rooms[0].write("b/c", b"c")
    return await rooms[0].zipped(Answer(status=200, body=b""))


def files(got: dict[str, bytes]) -> dict[str, int]:
    return {name: len(content) for name, content in got.items() if not name.endswith(".response")}


async def test_a_file_that_grows_for_ever_ends_where_it_ended_when_it_was_opened(tmp_path: Path) -> None:
    def grow(room: Room) -> None:
        with (room.out / "a").open("ab") as file:
            file.write(os.urandom(MIB))

    got = files(await meddled(tmp_path, grow, times=1000))
    assert 4 * MIB <= got["a"] < 10 * MIB


async def test_a_file_that_shrinks_or_vanishes_ends_where_it_ends(tmp_path: Path) -> None:
    def shrink(room: Room) -> None:
        os.truncate(room.out / "a", 5)
        shutil.rmtree(room.out / "b")

    assert files(await meddled(tmp_path, shrink)) == {"a": 5}


async def test_a_file_that_becomes_a_link_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "c").write_bytes(b"token")

    def swap(room: Room) -> None:
        for name, target in (("a", "secret/c"), ("b", "secret")):
            (room.out / name).rename(tmp_path / f"old-{name}")
            (room.out / name).symlink_to(tmp_path / target)

    assert files(await meddled(tmp_path, swap)) == {}


async def test_a_directory_that_is_rewritten_all_the_time_gives_valid_zips_without_what_is_not_its(
    tmp_path: Path, blobs: FileBlobs
) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "token").write_bytes(b"token")
    stop = threading.Event()

    def rewrite(room: Room) -> None:
        chance = random.Random(1)
        while not stop.is_set():
            path = room.out / chance.choice("abc")
            with suppress(OSError):
                match chance.randrange(5):
                    case 0:
                        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW), "wb") as file:
                            file.write(b"x" * chance.randrange(100_000))
                    case 1:
                        path.unlink()
                    case 2:
                        path.symlink_to(tmp_path / "secret" / "token")
                    case 3:
                        os.truncate(path, chance.randrange(100))
                    case _:
                        path.mkdir()
                        (path / "deep").write_bytes(b"x")

    room = Room(tmp_path, blobs)
    room.write("always", b"x")
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(asyncio.to_thread(rewrite, room))
        try:
            for _ in range(100):
                assert set(b"".join((await room.zipped(Answer(status=200, body=b""))).values())) <= {0, ord("x")}
        finally:
            stop.set()


# -- a real S3 server ----------------------------------------------------------------------------


async def test_an_upload_waits_for_an_s3_server_that_is_away(new_s3: Callable[[], S3], tmp_path: Path) -> None:
    server = new_s3()
    async with s3_blobs(server.url, load(Settings)) as blobs:
        await blobs.ping()
        room = Room(tmp_path, blobs, max_artifact_bytes=100 * MIB)
        room.write("a.png", os.urandom(MIB))
        room.write("b.png", os.urandom(MIB) * 30)  # more than one part
        await asyncio.to_thread(server.stop)
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            collecting = group.create_task(room.zipped())
            await asyncio.to_thread(server.start)
        assert collecting.result()["b.png"] == (room.out / "b.png").read_bytes()
        assert list(room.space.scratch.iterdir()) == []


async def test_an_s3_server_that_dies_in_the_middle_gets_all_of_it_when_it_is_back(
    new_s3: Callable[[], S3], tmp_path: Path
) -> None:
    server = new_s3()
    died = asyncio.Event()
    loop = asyncio.get_running_loop()

    class Fatal:
        """Kills the server behind the third part, once."""

        def __init__(self, sink: Sink) -> None:
            self.sink, self.size_bytes = sink, 0

        def write(self, data: bytes, /) -> int:
            self.size_bytes += len(data)
            if self.size_bytes > 3 * PART_BYTES and not died.is_set():
                server.kill()
                loop.call_soon_threadsafe(died.set)
            return self.sink.write(data)

        def flush(self) -> None:
            self.sink.flush()

    class Bucket:
        """Of `Blobs` what collecting needs."""

        async def upload(self, key: str, write: Callable[[Sink], None], **given: Any) -> None:
            await bucket.upload(key, lambda sink: write(Fatal(sink)), **given)

    async with s3_blobs(server.url, load(Settings)) as bucket:
        room = Room(tmp_path, cast("Any", Bucket()))
        room.write("b.png", os.urandom(MIB) * 100)
        async with asyncio.timeout(90), asyncio.TaskGroup() as group:
            collecting = group.create_task(room.collect())
            await died.wait()
            await asyncio.to_thread(server.start)
        copy = tmp_path / "copy.zip"
        await bucket.download(collecting.result().blob_key, copy)
        with zipfile.ZipFile(copy) as archive:
            assert archive.read("b.png") == (room.out / "b.png").read_bytes()
        assert list(room.space.scratch.iterdir()) == []


SOAK_BYTES = 300 * MIB


async def test_memory_and_scratch_stay_flat_while_a_large_result_is_stored(s3: S3, tmp_path: Path) -> None:
    process = psutil.Process()
    async with s3_blobs(s3.url, load(Settings)) as blobs:
        room = Room(tmp_path, blobs)
        block = os.urandom(MIB)
        with (room.out / "weights").open("wb") as file:
            for _ in range(SOAK_BYTES // MIB):
                file.write(block)
        before_bytes = process.memory_info().rss
        most_bytes = most_scratch_bytes = 0
        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            collecting = group.create_task(room.collect())
            while not collecting.done():
                most_bytes = max(most_bytes, process.memory_info().rss)
                parts = [path.stat().st_size for path in room.space.scratch.iterdir() if path.exists()]
                most_scratch_bytes = max(most_scratch_bytes, sum(parts))
                await asyncio.sleep(0.02)
        assert most_bytes - before_bytes < 64 * MIB
        assert 0 < most_scratch_bytes <= (PARTS_AHEAD + 2) * PART_BYTES
        assert list(room.space.scratch.iterdir()) == []
        stored = await blobs.head(collecting.result().blob_key)
        assert stored is not None
        assert SOAK_BYTES < stored.size_bytes < SOAK_BYTES * 1.01
