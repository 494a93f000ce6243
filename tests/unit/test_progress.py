"""Progress files: what is read of them, what never is, and how it is reported."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.backends.memory.results import MemoryResults
from broker.errors import StoreUnavailable
from broker.model import Draft, Interest, Lease, Outcome, Progress, RequestState
from tests.eventually import eventually
from tests.unit.container import VERSION_ID, a_job, settings_for
from workers import loops
from workers.progress import LOOK_S, ProgressFile, ProgressWatch, Refused, parse

LIMIT_BYTES = 4096


def report(percent: Any = None, partial: Any = None, **more: Any) -> bytes:
    members = {"progress": percent, "partialResponse": partial, **more}
    return json.dumps({name: value for name, value in members.items() if value is not None}).encode()


# -- what a file says --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "percent", "partial"),
    [
        (b'{"id": "x", "progress": 40, "partialResponse": {"a": [1, "\xc3\xbc"]}}', 40, b'{"a":[1,"\xc3\xbc"]}'),
        (b'{"progress": 0}', 0, b"null"),
        (b"{}", 0, b"null"),
        (b'{"progress": null, "partialResponse": null}', 0, b"null"),
        (b'{"progress": 99.9, "partialResponse": {}}', 99, b"{}"),
        (b'{"progress": 101}', 100, b"null"),
        (b'{"progress": 1e300}', 100, b"null"),
        (b'{"progress": 123456789012345678901234567890}', 100, b"null"),
        (b'{"progress": -1}', 0, b"null"),
        (b' {"progress": 7}\n', 7, b"null"),
    ],
)
def test_what_a_file_says(content: bytes, percent: int, partial: bytes) -> None:
    assert parse(content) == Progress(percent=percent, partial=partial)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"7", b"null", b'{"progress": "7"}', b'{"progress": true}', b'{"progress": NaN}',
        b'{"progress": [7]}', b'{"partialResponse": []}', b'{"partialResponse": "x"}', b'{"progress": 7}}',
        b"\xff\xfe", b"[" * 5000, b'{"partialResponse": ' + b'{"a":' * 300 + b"1" + b"}" * 301,
    ],
)  # fmt: skip
def test_what_is_no_progress(content: bytes) -> None:
    with pytest.raises(Refused):
        parse(content)


# -- reading it --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "request"
    made.mkdir()
    return made


@pytest.fixture
def file(folder: Path) -> ProgressFile:
    return ProgressFile(folder, limit_bytes=LIMIT_BYTES)


def write(folder: Path, content: bytes) -> None:
    (folder / "progress").write_bytes(content)


def replace_with(folder: Path, content: bytes) -> None:
    (folder / "progress.partial").write_bytes(content)
    (folder / "progress.partial").rename(folder / "progress")


def looks(file: ProgressFile, count: int) -> Iterator[Progress | Refused | None]:
    for _ in range(count):
        try:
            yield file.news()
        except Refused as exc:
            yield exc


def settle(folder: Path) -> None:
    """As if it had been written a second ago."""
    then = time.time() - 1
    os.utime(folder / "progress", (then, then), follow_symlinks=False)


@pytest.mark.parametrize("put", [write, replace_with])
def test_each_write_is_told_once(folder: Path, file: ProgressFile, put: Any) -> None:
    assert file.news() is None
    for percent in (10, 20, 20, 15):
        put(folder, report(percent))
        os.utime(folder / "progress", ns=(0, time.time_ns() + percent))
        assert list(looks(file, 3)) == [Progress(percent=percent), None, None]


def test_a_second_write_within_a_step_of_the_clock_is_told_too(folder: Path, file: ProgressFile) -> None:
    write(folder, report(10))
    stamp = (folder / "progress").stat().st_mtime_ns
    assert file.news() == Progress(percent=10)
    write(folder, report(20))
    os.utime(folder / "progress", ns=(stamp, stamp))
    assert file.news() == Progress(percent=20)


def test_a_file_that_is_gone_says_nothing_and_one_that_comes_back_does(folder: Path, file: ProgressFile) -> None:
    write(folder, report(10))
    assert file.news() == Progress(percent=10)
    (folder / "progress").unlink()
    assert list(looks(file, 2)) == [None, None]
    write(folder, report(30))
    assert file.news() == Progress(percent=30)


def test_half_a_file_is_waited_for(folder: Path, file: ProgressFile) -> None:
    whole = report(50, {"a": "b"})
    for part in (whole[:0], whole[:10], whole[:-1]):
        write(folder, part)
        assert list(looks(file, 2)) == [None, None]
    write(folder, whole)
    assert file.news() == Progress(percent=50, partial=b'{"a":"b"}')


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"{", "not JSON"), (b"[]", "not a JSON object"), (b"x" * (LIMIT_BYTES + 1), f"larger than {LIMIT_BYTES} bytes")],
)
def test_what_stays_bad_is_refused_once_and_the_next_write_counts(
    folder: Path, file: ProgressFile, content: bytes, why: str
) -> None:
    write(folder, content)
    settle(folder)
    seen = list(looks(file, 5))
    assert [str(each) for each in seen if isinstance(each, Refused)] == [why]
    assert all(each is None or isinstance(each, Refused) for each in seen)
    write(folder, report(60))
    assert file.news() == Progress(percent=60)


def test_as_large_as_is_allowed(folder: Path, file: ProgressFile) -> None:
    write(folder, report(1).ljust(LIMIT_BYTES))
    assert file.news() == Progress(percent=1)


def test_a_link_a_pipe_a_socket_a_folder_and_a_device_are_not_read(
    tmp_path: Path, folder: Path, file: ProgressFile
) -> None:
    path = folder / "progress"
    (tmp_path / "elsewhere").write_bytes(report(99))

    def device() -> None:
        path.symlink_to("/dev/zero")

    def listen() -> None:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(os.path.relpath(path))

    def link() -> None:
        path.symlink_to(tmp_path / "elsewhere")

    def pipe() -> None:
        os.mkfifo(path)

    for plant in (link, pipe, listen, device):
        plant()
        settle(folder)
        seen = list(looks(file, 4))
        assert [str(each) for each in seen if each is not None] == ["not a regular file"]
        path.unlink()
    path.mkdir()
    settle(folder)
    assert [str(each) for each in looks(file, 4) if each is not None] == ["not a regular file"]


def test_a_directory_that_became_a_link_is_not_followed(tmp_path: Path, folder: Path, file: ProgressFile) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write(other, report(99))
    settle(other)
    folder.rmdir()
    folder.symlink_to(other)
    assert [str(each) for each in looks(file, 4) if each is not None] == ["its directory is none"]


def test_a_directory_that_is_gone_or_a_file_says_nothing(folder: Path, file: ProgressFile) -> None:
    folder.rmdir()
    assert file.news() is None
    folder.write_bytes(b"")
    assert file.news() is None


# -- reporting it ------------------------------------------------------------------------------


class Store(MemoryResults):
    """`report` is away while `away` is set; `reports` counts those that were asked for."""

    away = False
    reports = 0

    async def report(self, lease: Lease, progress: Progress, *, sequence: int) -> RequestState:
        self.reports += 1
        if self.away:
            raise StoreUnavailable("the store is away")
        return await super().report(lease, progress, sequence=sequence)

    async def leased(self) -> Lease:
        job = a_job()
        draft = Draft(
            id=job.id, account="acme", function_id=job.function_id, version_id=VERSION_ID, digest="d", deadline_s=60
        )
        await self.create(draft, queue_limit=10, watch=False)
        claim = await self.claim(job, worker="w", lease_s=60, max_attempts=3)
        assert claim.lease is not None
        return claim.lease

    async def percents(self, lease: Lease) -> list[int]:
        return [update.percent for update in await self.updates(lease.request_id, after=0, limit=1000)]

    async def told(self, lease: Lease, *percents: int) -> None:
        await eventually(lambda: self.percents(lease), lambda seen: seen == list(percents))


@pytest.fixture
async def store(tmp_path: Path) -> Store:
    return Store(settings_for(tmp_path, 1))


@pytest.fixture
async def watch(store: Store, tmp_path: Path) -> AsyncIterator[ProgressWatch]:
    settings = settings_for(tmp_path, 1, max_progress_bytes=LIMIT_BYTES)
    with loops.Clerk() as clerk:
        made = ProgressWatch(store, settings, clerk)
        async with asyncio.timeout(30), loops.beside(loops.every(made.pause_s, made.look, name="progress")):
            yield made


async def test_what_a_container_writes_is_reported_in_order(store: Store, watch: ProgressWatch, folder: Path) -> None:
    lease = await store.leased()
    async with watch.watching(lease, folder):
        told: list[int] = []
        for percent in (10, 20, 40, 30):
            told.append(percent)
            write(folder, report(percent, {"n": len(told)}))
            await store.told(lease, *told)
    updates = await store.updates(lease.request_id, after=0, limit=10)
    assert [(update.percent, update.partial) for update in updates] == [
        (10, b'{"n":1}'), (20, b'{"n":2}'), (40, b'{"n":3}'), (30, b'{"n":4}'),
    ]  # fmt: skip


async def test_rapid_writes_keep_their_order_and_the_last_one_is_never_missed(
    store: Store, watch: ProgressWatch, folder: Path
) -> None:
    lease = await store.leased()
    async with watch.watching(lease, folder):
        write(folder, report(1))
        await store.told(lease, 1)
        for percent in range(2, 101):
            replace_with(folder, report(percent))
            await asyncio.sleep(0.001)
    told = await store.percents(lease)
    assert told == sorted(set(told))
    assert (told[0], told[-1]) == (1, 100)


async def test_many_attempts_at_once_are_told_apart_by_their_folders(
    store: Store, watch: ProgressWatch, tmp_path: Path
) -> None:
    async def one(number: int) -> list[int]:
        lease, folder = await store.leased(), tmp_path / str(number)
        folder.mkdir()
        async with watch.watching(lease, folder):
            write(folder, report(number % 101, id="somebody else's"))
            await store.told(lease, number % 101)
        return await store.percents(lease)

    store_many = await asyncio.gather(*(one(number) for number in range(8)))
    assert store_many == [[number] for number in range(8)]


async def test_a_short_attempt_is_not_looked_at(store: Store, watch: ProgressWatch, folder: Path) -> None:
    lease = await store.leased()
    write(folder, report(50))
    async with watch.watching(lease, folder):
        pass
    lasting = await store.leased()
    async with watch.watching(lasting, folder):
        await store.told(lasting, 50)
    assert await store.percents(lease) == []


async def test_while_the_store_is_away_the_latest_is_kept(store: Store, watch: ProgressWatch, folder: Path) -> None:
    lease = await store.leased()
    store.away = True
    async with watch.watching(lease, folder):
        write(folder, report(10))
        await eventually(lambda: asyncio.sleep(0, store.reports), lambda seen: seen > 1)
        write(folder, report(20))
        write(folder, report(30))
        store.away = False
        await store.told(lease, 10, 30)


async def test_a_store_that_is_away_does_not_hold_up_the_result(
    store: Store, watch: ProgressWatch, folder: Path
) -> None:
    lease = await store.leased()
    async with watch.watching(lease, folder):
        write(folder, report(10))
        await store.told(lease, 10)
        store.away = True
        write(folder, report(20))
    assert await store.percents(lease) == [10]


async def test_an_attempt_that_lost_its_lease_reports_no_more(store: Store, watch: ProgressWatch, folder: Path) -> None:
    lease = await store.leased()
    async with watch.watching(replace(lease, token="another"), folder):
        write(folder, report(10))
        await eventually(lambda: asyncio.sleep(0, store.reports), lambda seen: seen == 1)
        write(folder, report(20))
        await asyncio.sleep(3 * LOOK_S)
    assert (store.reports, await store.percents(lease)) == (1, [])


async def test_nothing_is_told_once_there_is_a_result(store: Store, watch: ProgressWatch, folder: Path) -> None:
    lease = await store.leased()
    job = a_job(id=lease.request_id)
    async with watch.watching(lease, folder):
        write(folder, report(10))
        await store.told(lease, 10)
        await store.settle(lease, job, RequestState.FULFILLED, Outcome(status=200))
        write(folder, report(20))
    async with store.watch(lease.request_id, Interest.PROGRESS) as polling:
        record = await polling.read()
    assert record is not None
    assert (record.state, record.progress) == (RequestState.FULFILLED, None)
    assert await store.percents(lease) == [10]


async def test_what_is_refused_is_logged_once_with_its_request(
    store: Store, watch: ProgressWatch, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def lines() -> list[Any]:
        return [vars(line) for line in caplog.records if line.getMessage() == "progress_refused"]

    lease = await store.leased()
    async with watch.watching(lease, folder):
        with caplog.at_level(logging.WARNING):
            write(folder, b"{")
            await eventually(lambda: asyncio.sleep(0, lines()), bool)
            write(folder, report(10))
            await store.told(lease, 10)
    [line] = lines()
    assert (line["request_id"], line["cause"]) == (lease.request_id, "not JSON")


async def test_without_attempts_there_is_nothing_to_do(store: Store, tmp_path: Path) -> None:
    with loops.Clerk() as clerk:
        idle = ProgressWatch(store, settings_for(tmp_path, 1), clerk)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3 * LOOK_S):
                await idle.look()
