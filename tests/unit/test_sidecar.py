"""The sidecar over the memory back ends, before a real container on the loopback."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import logging
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web

from broker import assets
from broker.activity import merged
from broker.backends.files import FileBlobs, open_blobs
from broker.backends.memory.catalog import MemoryCatalog
from broker.backends.memory.counters import MemoryCounters
from broker.backends.memory.dead_letters import MemoryDeadLetters
from broker.backends.memory.instance_logs import MemoryInstanceLogs
from broker.backends.memory.queue import MemoryQueue
from broker.backends.memory.results import MemoryResults
from broker.backends.memory.streams import MemoryStreams
from broker.backends.memory.upkeep import MemoryUpkeep
from broker.backends.memory.webhooks import MemoryWebhooks
from broker.errors import ConfigurationError, StoreUnavailable
from broker.keyring import Keyring
from broker.model import (
    NO_TIMINGS,
    AttemptEnd,
    Draft,
    Instance,
    InstanceStatus,
    Job,
    Lease,
    Outcome,
    Record,
    RequestState,
    Timings,
    Verdict,
)
from broker.ports import Broker, Delivery
from broker.settings import MIB, SidecarSettings
from tests.eventually import eventually
from tests.unit.container import VERSION_ID, Container, Handler, a_job, answer, container, keeping, settings_for
from workers.health import NeverReady
from workers.sidecar import serve

ASSET = "5b9b7d1e-6a0c-4f43-9d57-3f6f1f1d2e44"


class LendingQueue(MemoryQueue):
    """Keeps every delivery that it lent, so that a test can end the loan as a lost connection would."""

    def __init__(self) -> None:
        super().__init__()
        self.loans: list[Delivery] = []

    def lend(self, version_id: str, borrower: Any) -> Any:
        loan = super().lend(version_id, borrower)
        if loan is not None:
            self.loans.append(loan)
        return loan


class Store(MemoryResults):
    """Its `settle` is away while `away` is set; `refused` counts how often that was seen. `offset_s` moves its
    clock; `broken` makes claims fail as a bug would; `claims` counts them. Renewals go nowhere unless `renewing`."""

    def __init__(self, settings: SidecarSettings) -> None:
        self.offset_s = 0.0
        super().__init__(settings, now=lambda: time.time() + self.offset_s)
        self.away = False
        self.renewing = True
        self.broken = 0
        self.claims = 0
        self.refused = asyncio.Event()

    async def settle(
        self, lease: Lease, job: Job, state: RequestState, outcome: Outcome, timings: Timings = NO_TIMINGS
    ) -> RequestState:
        if self.away:
            self.refused.set()
            raise StoreUnavailable("the store is away")
        return await super().settle(lease, job, state, outcome, timings)

    async def renew(self, lease: Lease, *, lease_s: float) -> RequestState:
        if not self.renewing:
            raise StoreUnavailable("the store is away")
        return await super().renew(lease, lease_s=lease_s)

    async def claim(self, job: Job, *, worker: str, lease_s: float, max_attempts: int, token: str = "") -> Any:
        self.claims += 1
        if self.broken:
            self.broken -= 1
            raise LookupError("a bug")
        return await super().claim(job, worker=worker, lease_s=lease_s, max_attempts=max_attempts, token=token)


class NoDownloads:
    async def download(self, key: str, path: Path) -> None:
        await asyncio.Event().wait()


@dataclass
class Rig:
    """A broker, a container, and a sidecar once `sidecar` is entered."""

    box: Container
    queue: LendingQueue
    results: Store
    catalog: MemoryCatalog
    blobs: FileBlobs
    settings: SidecarSettings
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def broker(self) -> Broker:
        return Broker(
            queue=self.queue,
            results=self.results,
            streams=MemoryStreams(self.results, self.settings),
            catalog=self.catalog,
            counters=MemoryCounters(),
            upkeep=MemoryUpkeep(self.results),
            dead_letters=MemoryDeadLetters(self.results, self.settings),
            webhooks=MemoryWebhooks(self.results, self.settings),
            instance_logs=MemoryInstanceLogs(),
            blobs=self.blobs,
            settings=self.settings,
            keyring=Keyring({}),
        )

    def set(self, **given: Any) -> None:
        self.settings = self.settings.model_copy(update=given)

    async def serve(self) -> None:
        await serve(self.broker, self.settings, self.stop)

    @asynccontextmanager
    async def sidecar(self) -> AsyncIterator[asyncio.Task[None]]:
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            task = group.create_task(self.serve())
            try:
                yield task
            finally:
                self.stop.set()

    async def submit(self, *, deadline_s: float = 60, queue_timeout_s: float = 0, copies: int = 1, **given: Any) -> Job:
        job = a_job(**given)
        draft = Draft(
            id=job.id,
            account=job.account,
            function_id=job.function_id,
            version_id=job.version_id,
            digest=job.digest,
            deadline_s=deadline_s,
            queue_timeout_s=queue_timeout_s,
            run_timeout_s=job.run_timeout_s,
        )
        record = await self.results.create(draft, queue_limit=100, watch=True)
        job = replace(
            job,
            created_at=record.created_at,
            deadline_at=record.deadline_at,
            queue_deadline_at=record.queue_deadline_at,
        )
        for _ in range(copies):
            await self.queue.publish(job, timeout_s=1)
        return job

    async def ended(self, job: Job) -> Record:
        return await self.until(job, lambda record: record.state.terminal)

    async def until(self, job: Job, satisfied: Callable[[Record], bool]) -> Record:
        async with self.results.watch(job.id) as watch:
            while True:
                record = await watch.read()
                assert record is not None
                if satisfied(record):
                    return record
                await watch.changed(0.02)

    async def run(self, **given: Any) -> Record:
        """Submit one job to a sidecar of its own, and return its end."""
        async with self.sidecar():
            return await self.ended(await self.submit(**given))

    async def nothing_left(self) -> None:
        """Neither a message nor a file of a request remains."""
        assert await self.queue.take(VERSION_ID) is None
        folders = (self.settings.asset_dir, self.settings.response_dir, Path(self.settings.scratch_dir))
        assert [path for folder in folders if folder.exists() for path in folder.iterdir()] == []


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with a_rig(tmp_path) as made:
        yield made


@asynccontextmanager
async def a_rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with container() as box:
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        settings = settings_for(tmp_path, box.port, lease_s=1, drain_s=5, scratch_dir=str(scratch))
        async with open_blobs("file://", settings) as blobs:
            queue = LendingQueue()
            await queue.declare(VERSION_ID)
            yield Rig(box, queue, Store(settings), MemoryCatalog(), blobs, settings)


class Gate:
    """A handler that answers once it is opened."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, _: web.Request) -> web.StreamResponse:
        await self.open.wait()
        return await answer(b'"done"')


def in_turn(*handlers: Handler) -> Handler:
    """The first call gets the first, and so on; the last one stays."""
    left = list(handlers)

    async def handle(request: web.Request) -> web.StreamResponse:
        return await (left.pop(0) if len(left) > 1 else left[0])(request)

    return handle


async def crash(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    await asyncio.Event().wait()
    raise AssertionError


async def never(_: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


# -- what is left of a job ---------------------------------------------------------------------


async def ends_well(rig: Rig) -> None:
    await rig.ended(await rig.submit())


async def answers_more_than_is_kept_inline(rig: Rig) -> None:
    rig.box.handler = lambda _: answer(bytes(6 * MIB))
    await rig.ended(await rig.submit())


async def has_its_body_in_the_blob_store(rig: Rig) -> None:
    body = bytes(MIB)
    await rig.blobs.put("inputs/a/b", body, content_type="application/octet-stream")
    await rig.ended(
        await rig.submit(
            body=b"", body_key="inputs/a/b", body_sha256=hashlib.sha256(body).hexdigest(), blob_bytes=len(body)
        )
    )


async def misses_its_body(rig: Rig) -> None:
    await rig.ended(await rig.submit(body=b"", body_key="inputs/a/none", body_sha256="0" * 64, blob_bytes=1))


async def is_cancelled(rig: Rig) -> None:
    rig.box.handler = never
    rig.box.called.clear()
    job = await rig.submit()
    await rig.box.called.wait()
    await rig.results.cancel(job.id, reason="not wanted")
    await rig.ended(job)


async def runs_out_of_time(rig: Rig) -> None:
    rig.box.handler = never
    await rig.ended(await rig.submit(run_timeout_s=0.05))


async def loses_its_container(rig: Rig) -> None:
    rig.box.handler = in_turn(crash, lambda _: answer(b"{}"))
    await rig.ended(await rig.submit())


@pytest.mark.parametrize(
    "end",
    [
        ends_well,
        answers_more_than_is_kept_inline,
        has_its_body_in_the_blob_store,
        misses_its_body,
        is_cancelled,
        runs_out_of_time,
        loses_its_container,
    ],
)
async def test_nothing_refers_to_a_job_that_is_over(rig: Rig, end: Callable[[Rig], Awaitable[None]]) -> None:
    """Or its body would be kept until cyclic garbage is looked for, which is seldom."""
    rig.set(crash_backoff_s=0)
    gc.collect()
    others = jobs()
    gc.disable()
    try:
        async with rig.sidecar():
            for _ in range(3):
                await end(rig)
        rig.queue.loans.clear()
        assert jobs() == others
    finally:
        gc.enable()


def jobs() -> set[str]:
    """By ID, those that are in memory."""
    return {found.id for found in gc.get_objects() if isinstance(found, Job)}


# -- one job -----------------------------------------------------------------------------------


async def test_a_job_is_run_settled_and_acknowledged(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    record = await rig.run()
    assert record.state is RequestState.FULFILLED
    assert record.outcome == Outcome(status=200, headers=(("Content-Type", "application/json"),), body=b'{"echo": 1}')
    assert rig.box.bodies == [b'{"message": "hi"}']
    assert rig.box.header("NVCF-REQID") == [record.id]
    await rig.nothing_left()
    [line] = [vars(found) for found in caplog.records if found.getMessage() == "invocation"]
    assert (line["request_id"], line["attempt"], line["status"], line["state"]) == (record.id, 1, 200, "fulfilled")


async def test_an_error_of_the_container_is_a_result_in_the_contracts_words(rig: Rig) -> None:
    rig.box.handler = lambda _: answer(b'{"error": "bad shape"}', status=422, headers={"X-Own": "1"})
    record = await rig.run()
    assert (record.state, record.attempt) == (RequestState.ERRORED, 1)
    assert record.outcome is not None
    assert record.outcome.status == 422
    assert json.loads(record.outcome.body)["detail"] == "bad shape"
    assert len(rig.box.bodies) == 1


async def test_passthrough_keeps_an_error_of_the_container(rig: Rig) -> None:
    rig.box.handler = lambda _: answer(b"mine", status=503, headers={"X-Own": "1"})
    record = await rig.run(passthrough=True)
    assert record.state is RequestState.ERRORED
    assert record.outcome is not None
    assert (record.outcome.status, record.outcome.body) == (503, b"mine")
    assert ("X-Own", "1") in record.outcome.headers


async def test_what_is_not_http_is_errored_and_the_sidecar_goes_on(rig: Rig) -> None:
    async def garbage(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(b"garbage\r\n\r\n")
        return await never(request)

    rig.box.handler = in_turn(garbage, lambda _: answer(b"{}"))
    async with rig.sidecar():
        first = await rig.ended(await rig.submit())
        second = await rig.ended(await rig.submit())
    assert (first.state, second.state) == (RequestState.ERRORED, RequestState.FULFILLED)
    assert first.outcome is not None
    assert b"urn:inference-connection:" in first.outcome.body


async def test_assets_lie_where_the_container_is_told(rig: Rig) -> None:
    async def read_asset(request: web.Request) -> web.StreamResponse:
        folder = Path(request.headers["NVCF-ASSET-DIR"])
        return await answer((folder / request.headers["NVCF-FUNCTION-ASSET-IDS"]).read_bytes())

    await rig.blobs.put(assets.key_of("acme", ASSET), b"picture", content_type="image/png")
    rig.box.handler = read_asset
    record = await rig.run(assets=(ASSET,))
    assert record.outcome is not None
    assert record.outcome.body == b"picture"
    await rig.nothing_left()


async def test_a_missing_asset_is_an_error_and_the_container_is_not_called(rig: Rig) -> None:
    record = await rig.run(assets=(ASSET,))
    assert record.state is RequestState.ERRORED
    assert record.outcome is not None
    assert b"Internal error while downloading assets" in record.outcome.body
    assert rig.box.bodies == []
    await rig.nothing_left()


async def test_a_body_from_the_blob_store_reaches_the_container(rig: Rig) -> None:
    await rig.blobs.put("inputs/acme/x", b"l" * 1_000_000, content_type="application/octet-stream")
    record = await rig.run(body=b"", body_key="inputs/acme/x")
    assert record.state is RequestState.FULFILLED
    assert rig.box.bodies == [b"l" * 1_000_000]
    await rig.nothing_left()


@pytest.mark.parametrize("blob_bytes", [0, 6, 7])
async def test_a_body_that_was_changed_in_the_blob_store_is_never_run(rig: Rig, blob_bytes: int) -> None:
    await rig.blobs.put("inputs/acme/x", b"another", content_type="application/octet-stream")
    digest = hashlib.sha256(b"signed").hexdigest()
    record = await rig.run(body=b"", body_key="inputs/acme/x", body_sha256=digest, blob_bytes=blob_bytes)
    assert (record.state, record.attempt) == (RequestState.DEAD, 1)
    assert record.reason == "its body in the blob store was changed after it was accepted"
    assert rig.box.bodies == []
    await rig.nothing_left()


async def test_a_body_that_is_what_was_signed_is_run(rig: Rig) -> None:
    await rig.blobs.put("inputs/acme/x", b"signed", content_type="application/octet-stream")
    digest = hashlib.sha256(b"signed").hexdigest()
    record = await rig.run(body=b"", body_key="inputs/acme/x", body_sha256=digest)
    assert record.state is RequestState.FULFILLED
    assert rig.box.bodies == [b"signed"]


@pytest.mark.parametrize("status", [200, 500])
async def test_a_body_in_the_blob_store_goes_once_its_request_has_a_result(rig: Rig, status: int) -> None:
    await rig.blobs.put("inputs/acme/x", b"large", content_type="application/octet-stream")
    rig.box.handler = lambda _: answer(b"{}", status=status)
    await rig.run(body=b"", body_key="inputs/acme/x")
    assert await rig.blobs.head("inputs/acme/x") is None


async def test_a_body_in_the_blob_store_goes_with_a_request_that_was_cancelled(rig: Rig) -> None:
    await rig.blobs.put("inputs/acme/x", b"large", content_type="application/octet-stream")
    job = await rig.submit(body=b"", body_key="inputs/acme/x")
    await rig.results.cancel(job.id, reason="not wanted")
    async with rig.sidecar():
        await rig.ended(await rig.submit())  # behind it
    assert await rig.blobs.head("inputs/acme/x") is None
    assert rig.box.bodies == [b'{"message": "hi"}']


async def test_a_body_in_the_blob_store_goes_with_a_request_that_is_cancelled_while_it_runs(rig: Rig) -> None:
    await rig.blobs.put("inputs/acme/x", b"large", content_type="application/octet-stream")
    rig.box.handler = Gate()
    async with rig.sidecar():
        job = await rig.submit(body=b"", body_key="inputs/acme/x")
        await rig.box.called.wait()
        await rig.results.cancel(job.id, reason="not wanted")
        await rig.box.left.wait()
    assert await rig.blobs.head("inputs/acme/x") is None


async def test_a_body_in_the_blob_store_stays_for_the_next_attempt(rig: Rig) -> None:
    await rig.blobs.put("inputs/acme/x", b"large", content_type="application/octet-stream")
    rig.box.handler = in_turn(crash, lambda _: answer(b"{}"))
    record = await rig.run(body=b"", body_key="inputs/acme/x")
    assert (record.state, record.attempt) == (RequestState.FULFILLED, 2)
    assert rig.box.bodies == [b"large", b"large"]


async def test_a_blob_store_that_is_slow_to_delete_delays_no_other_job(rig: Rig) -> None:
    go_on = asyncio.Event()

    class Slow(FileBlobs):
        async def delete(self, key: str) -> bool:
            await go_on.wait()
            return await super().delete(key)

    rig.blobs = Slow(rig.settings.data_dir, secret=b"s")
    await rig.blobs.ping()
    await rig.blobs.put("inputs/acme/x", b"large", content_type="application/octet-stream")
    async with rig.sidecar():
        for _ in range(5):
            await rig.ended(await rig.submit(body=b"", body_key="inputs/acme/x"))
        assert await rig.blobs.head("inputs/acme/x") is not None
        go_on.set()
    assert await rig.blobs.head("inputs/acme/x") is None
    await rig.nothing_left()


async def test_artifacts_become_a_zip_in_the_blob_store(rig: Rig) -> None:
    async def draw(request: web.Request) -> web.StreamResponse:
        (Path(request.headers["NVCF-LARGE-OUTPUT-DIR"]) / "a.png").write_bytes(b"png")
        return await answer(b"{}", status=201)

    rig.box.handler = draw
    record = await rig.run()
    assert record.state is RequestState.FULFILLED
    assert record.outcome is not None
    assert record.outcome.status == 302
    assert record.outcome.blob_key.startswith(f"results/acme/{record.id}/")
    assert await rig.blobs.head(record.outcome.blob_key) is not None
    await rig.nothing_left()


async def test_a_fault_of_our_own_is_an_error_and_the_next_job_runs(rig: Rig, tmp_path: Path) -> None:
    class Broken(FileBlobs):
        async def download(self, key: str, path: Path) -> None:
            raise LookupError("a bug")

    rig.blobs = Broken(tmp_path / "broken", secret=b"s")
    async with rig.sidecar():
        first = await rig.ended(await rig.submit(body=b"", body_key="inputs/acme/x"))
        second = await rig.ended(await rig.submit())
    assert (first.state, second.state) == (RequestState.ERRORED, RequestState.FULFILLED)
    assert first.outcome is not None
    assert b"Internal error while making inference request" in first.outcome.body


async def test_a_fault_outside_of_the_attempt_gives_the_message_back(rig: Rig) -> None:
    rig.results.broken = 1
    record = await rig.run()
    assert (record.state, record.attempt) == (RequestState.FULFILLED, 1)
    await rig.nothing_left()


async def test_no_more_jobs_run_at_once_than_there_are_slots(rig: Rig) -> None:
    rig.set(max_request_concurrency=3)
    gate = Gate()
    rig.box.handler = gate
    async with rig.sidecar():
        jobs = [await rig.submit() for _ in range(9)]
        await eventually(lambda: running(rig), lambda calls: calls == 3)
        gate.open.set()
        records = [await rig.ended(job) for job in jobs]
    assert {record.state for record in records} == {RequestState.FULFILLED}
    assert rig.box.most_running == 3


# -- the lease ---------------------------------------------------------------------------------


async def test_a_cancel_aborts_the_container_call(rig: Rig) -> None:
    rig.set(renew_s=60, lease_s=200)  # so that only the hint can be in time
    rig.box.handler = never
    async with rig.sidecar():
        job = await rig.submit()
        await rig.box.called.wait()
        await rig.results.cancel(job.id, reason="by its caller")
        await rig.box.left.wait()
    assert (await rig.ended(job)).state is RequestState.CANCELLED
    await rig.nothing_left()


async def test_a_job_that_was_cancelled_in_the_queue_never_starts(rig: Rig) -> None:
    job = await rig.submit()
    await rig.results.cancel(job.id, reason="by its caller")
    async with rig.sidecar():
        await rig.ended(await rig.submit())
    assert len(rig.box.bodies) == 1
    await rig.nothing_left()


async def test_a_lease_that_another_worker_took_aborts_the_container_call(rig: Rig) -> None:
    rig.set(renew_s=0.3)
    rig.box.handler = in_turn(never, lambda _: answer(b'"second"'))
    async with rig.sidecar():
        job = await rig.submit()
        await rig.box.called.wait()
        rig.results.offset_s = 10  # this worker was frozen for as long as its lease lasts
        claim = await rig.results.claim(job, worker="other", lease_s=30, max_attempts=3)
        assert claim.lease is not None
        await rig.box.left.wait()
        outcome = Outcome(status=200, body=b'"other"')
        await rig.results.settle(claim.lease, job, RequestState.FULFILLED, outcome)
        await rig.ended(await rig.submit())
    record = await rig.ended(job)
    assert (record.attempt, record.outcome) == (2, outcome)
    assert len(rig.box.bodies) == 2
    await rig.nothing_left()


async def test_the_lease_is_kept_for_as_long_as_the_container_works(rig: Rig) -> None:
    rig.set(renew_s=0.1)
    gate = Gate()
    rig.box.handler = gate
    async with rig.sidecar():
        job = await rig.submit()
        await rig.box.called.wait()
        await asyncio.sleep(1.3)  # past the lease: nothing announces that nothing happened
        assert (await rig.results.claim(job, worker="other", lease_s=1, max_attempts=3)).verdict is Verdict.HELD
        gate.open.set()
        assert (await rig.ended(job)).attempt == 1


async def test_a_job_that_another_worker_runs_is_left_to_it_and_its_message_ends(rig: Rig) -> None:
    job = await rig.submit()
    claim = await rig.results.claim(job, worker="other", lease_s=30, max_attempts=3)
    assert claim.lease is not None
    async with rig.sidecar():
        await eventually(lambda: looked(rig), lambda loans: loans == 1)
        await rig.results.settle(claim.lease, job, RequestState.FULFILLED, Outcome(status=200))
        await rig.ended(await rig.submit())
    assert len(rig.box.bodies) == 1
    await rig.nothing_left()


async def test_a_job_whose_worker_died_runs_when_its_lease_ends(rig: Rig) -> None:
    job = await rig.submit()
    await rig.results.claim(job, worker="dead", lease_s=0.1, max_attempts=3)
    async with rig.sidecar():
        record = await rig.ended(job)
    assert (record.state, record.attempt) == (RequestState.FULFILLED, 2)


async def test_a_held_job_does_not_keep_others_from_the_slot_for_longer_than_a_lease(rig: Rig) -> None:
    held = await rig.submit()
    claim = await rig.results.claim(held, worker="other", lease_s=3, max_attempts=3)
    assert claim.lease is not None
    behind = await rig.submit()
    async with rig.sidecar():
        async with asyncio.timeout(20):
            while not (await rig.results.read(behind.id) or fail()).state.terminal:
                await rig.results.renew(claim.lease, lease_s=3)
                await asyncio.sleep(0.02)
        await rig.results.settle(claim.lease, held, RequestState.FULFILLED, Outcome(status=200))
        await rig.ended(await rig.submit())
    assert len(rig.box.bodies) == 2
    await rig.nothing_left()


# -- copies and lost connections ---------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 4])
async def test_a_message_published_ten_times_is_run_once(rig: Rig, slots: int) -> None:
    rig.set(max_request_concurrency=slots)
    async with rig.sidecar():
        job = await rig.submit(copies=10)
        record = await rig.ended(job)
        await rig.ended(await rig.submit())
    assert record.attempt == 1
    assert len(rig.box.bodies) == 2
    await rig.nothing_left()


async def test_copies_of_a_running_job_take_up_no_slot(rig: Rig) -> None:
    rig.set(max_request_concurrency=2)
    gate = Gate()
    rig.box.handler = gate
    async with rig.sidecar():
        first = await rig.submit(copies=10)
        second = await rig.submit()
        await eventually(lambda: running(rig), lambda calls: calls == 2)
        gate.open.set()
        await rig.ended(first)
        await rig.ended(second)
    assert len(rig.box.bodies) == 2
    await rig.nothing_left()


async def test_a_redelivery_of_a_running_job_is_adopted(rig: Rig) -> None:
    rig.set(max_request_concurrency=2)
    gate = Gate()
    rig.box.handler = gate
    async with rig.sidecar():
        job = await rig.submit()
        await rig.box.called.wait()
        await rig.queue.loans[0].requeue()
        await eventually(lambda: looked(rig), lambda loans: loans == 2)
        gate.open.set()
        record = await rig.ended(job)
    assert (record.state, record.attempt) == (RequestState.FULFILLED, 1)
    assert (len(rig.box.bodies), rig.results.claims) == (1, 1)
    await rig.nothing_left()


async def test_after_a_reconnect_no_more_jobs_run_than_there_are_slots(rig: Rig) -> None:
    gate = Gate()
    rig.box.handler = gate
    async with rig.sidecar():
        first = await rig.submit()
        await rig.box.called.wait()
        second = await rig.submit()
        await rig.queue.loans[0].ack()  # as if the first message had gone to another worker
        await eventually(lambda: looked(rig), lambda loans: loans == 2)
        gate.open.set()
        await rig.ended(first)
        await rig.ended(second)
    assert rig.box.most_running == 1
    await rig.nothing_left()


# -- a container that is busy ------------------------------------------------------------------


def busy(status: int = 503, retry_after: str = "1", **given: Any) -> Handler:
    return lambda _: answer(b'{"error": "busy"}', status=status, headers={"Retry-After": retry_after}, **given)


def ok(_: web.Request) -> Awaitable[web.StreamResponse]:
    return answer(b'"done"')


@pytest.mark.parametrize("status", [429, 503])
async def test_a_busy_container_is_given_the_job_again_later_at_no_cost(rig: Rig, status: int) -> None:
    rig.set(max_attempts=1)
    times: list[float] = []

    async def in_time(request: web.Request) -> web.StreamResponse:
        times.append(time.monotonic())
        return await (busy(status) if len(times) < 3 else ok)(request)

    rig.box.handler = in_time
    record = await rig.run()
    assert (record.state, record.attempt) == (RequestState.FULFILLED, 1)
    assert [later - earlier >= 1 for earlier, later in pairwise(times)] == [True, True]
    assert rig.results.claims == 3
    await rig.nothing_left()


async def test_a_refusal_without_retry_after_is_a_result(rig: Rig) -> None:
    rig.box.handler = lambda _: answer(b"{}", status=503)
    record = await rig.run()
    assert (record.state, record.attempt, len(rig.box.bodies)) == (RequestState.ERRORED, 1, 1)


async def test_a_refusal_beyond_the_deadline_is_the_result_at_once(rig: Rig) -> None:
    rig.box.handler = busy(retry_after="30")
    async with rig.sidecar():
        record = await rig.ended(await rig.submit(deadline_s=20))
    assert record.state is RequestState.ERRORED
    assert record.outcome is not None
    assert (record.outcome.status, json.loads(record.outcome.body)["detail"]) == (503, "busy")
    assert time.time() - record.created_at < 10
    await rig.nothing_left()


async def test_in_passthrough_the_caller_is_told_when_to_try_again(rig: Rig) -> None:
    rig.box.handler = busy(retry_after="7")
    record = await rig.run(passthrough=True)
    assert record.state is RequestState.ERRORED
    assert record.outcome is not None
    assert ("Retry-After", "7") in record.outcome.headers
    assert len(rig.box.bodies) == 1


@pytest.mark.parametrize("slots", [1, 3])
async def test_a_postponed_job_leaves_its_slot_to_others(rig: Rig, slots: int) -> None:
    rig.set(max_request_concurrency=slots)

    async def refuse(request: web.Request) -> web.StreamResponse:
        return await (busy(retry_after="30") if rig.box.bodies[-1] == b"refuse" else ok)(request)

    rig.box.handler = refuse
    async with rig.sidecar():
        postponed = [await rig.submit(body=b"refuse") for _ in range(slots)]
        await eventually(lambda: calls(rig), lambda count: count == slots)
        others = [await rig.submit() for _ in range(20)]
        for job in others:
            await rig.ended(job)
        [load] = await rig.results.load([VERSION_ID])
        assert (load.queued, load.running) == (slots, 0)
        for rank, job in enumerate(postponed, start=1):
            record = await rig.until(job, lambda record: record.state is RequestState.QUEUED)
            assert (await rig.results.position(record)).rank == rank
    assert rig.box.most_running <= slots
    assert len([body for body in rig.box.bodies if body == b"refuse"]) == slots  # and nobody asks again meanwhile
    given_back = [await rig.queue.take(VERSION_ID) for _ in postponed]
    assert {loan.job.id for loan in given_back if loan is not None} == {job.id for job in postponed}


async def test_a_container_that_refuses_everything_is_not_flooded(rig: Rig) -> None:
    rig.box.handler = busy(retry_after="30")
    async with rig.sidecar():
        for _ in range(30):
            await rig.submit()
        await rig.box.called.wait()
        await asyncio.sleep(1)  # nothing announces that nothing happened
        assert len(rig.box.bodies) <= 5


async def test_a_postponed_job_that_is_cancelled_never_starts_again(rig: Rig) -> None:
    rig.box.handler = busy(retry_after="30")
    async with rig.sidecar():
        job = await rig.submit()
        await eventually(
            lambda: state_of(rig, job), lambda state: state is RequestState.QUEUED and len(rig.box.bodies) == 1
        )
        await rig.results.cancel(job.id, reason="no more")
        await eventually(lambda: claims(rig), lambda count: count == 2)
    assert len(rig.box.bodies) == 1
    await rig.nothing_left()


async def test_a_drain_gives_a_postponed_job_back_and_its_time_still_counts(rig: Rig) -> None:
    rig.box.handler = in_turn(busy(retry_after="2"), ok)
    async with rig.sidecar():
        job = await rig.submit()
        await rig.box.called.wait()
        await eventually(lambda: state_of(rig, job), lambda state: state is RequestState.QUEUED)
    refused_at = time.monotonic()
    rig.stop = asyncio.Event()
    async with rig.sidecar():
        record = await rig.ended(job)
    assert (record.state, record.attempt) == (RequestState.FULFILLED, 1)
    assert time.monotonic() - refused_at > 1
    assert len(rig.box.bodies) == 2
    await rig.nothing_left()


async def calls(rig: Rig) -> int:
    return len(rig.box.bodies)


async def instance_status(rig: Rig) -> InstanceStatus | None:
    instances = await rig.catalog.instances(VERSION_ID)
    return instances[0].status if instances else None


async def claims(rig: Rig) -> int:
    return rig.results.claims


async def state_of(rig: Rig, job: Job) -> RequestState:
    return (await rig.results.read(job.id) or fail()).state


# -- the container ------------------------------------------------------------------------------


async def test_a_job_whose_container_crashed_is_run_again(rig: Rig) -> None:
    rig.box.handler = in_turn(crash, lambda _: answer(b'"second"'))
    record = await rig.run()
    assert (record.state, record.attempt) == (RequestState.FULFILLED, 2)
    await rig.nothing_left()


async def test_a_job_that_always_crashes_its_container_is_dead_after_the_last_attempt(rig: Rig) -> None:
    rig.box.handler = crash
    record = await rig.run()
    assert (record.state, record.attempt) == (RequestState.DEAD, 3)
    assert len(rig.box.bodies) == 3
    await rig.nothing_left()


@pytest.mark.parametrize("slots", [1, 8])
async def test_a_container_that_closes_idle_connections_at_any_moment_fails_no_request(rig: Rig, slots: int) -> None:
    """It may close just when the next job is sent, and then nobody can tell whether it saw it: that is an attempt."""
    chance = random.Random(slots)

    async def ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await asyncio.sleep(chance.choice([0, 0, 0, chance.uniform(0, 0.02)]))
        return chance.random() < 0.5  # else it closes without looking whether there is another one

    async with keeping(ok) as box:
        rig.set(inference_port=box.port, max_request_concurrency=slots, crash_backoff_s=0, keep_connections="always")
        async with rig.sidecar():
            records = []
            for _ in range(5):
                jobs = [await rig.submit() for _ in range(80)]
                records += [await rig.ended(job) for job in jobs]
        assert {record.state for record in records} == {RequestState.FULFILLED}
        assert {record.attempt for record in records} == {1, 2}  # so it did happen, to one job in twenty
        assert sorted(box.seen) == sorted(record.id for record in records)
    await rig.nothing_left()


async def test_a_container_that_refuses_connections_costs_no_attempt(rig: Rig) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        rig.set(inference_port=unused.getsockname()[1], health_port=rig.box.port)
    async with rig.sidecar():
        job = await rig.submit()
        await eventually(lambda: looked(rig), lambda loans: loans >= 3)
        record = await rig.results.read(job.id)
        assert record is not None
        assert record.attempt <= 1
        assert not record.state.terminal


async def test_a_container_that_restarts_is_noticed_at_once_and_gets_its_job_again(rig: Rig) -> None:
    rig.set(health_interval_s=600)

    async def restart(request: web.Request) -> web.StreamResponse:
        rig.box.healthy = False
        return await crash(request)

    rig.box.handler = in_turn(restart, ok)
    async with rig.sidecar():
        job = await rig.submit()
        other = await rig.submit()
        await eventually(lambda: instance_status(rig), lambda status: status is InstanceStatus.ERRORED)
        await eventually(lambda: state_of(rig, job), lambda state: state is RequestState.QUEUED)
        assert len(rig.box.bodies) == 1
        rig.box.healthy = True
        records = await rig.ended(job), await rig.ended(other)
    assert [record.state for record in records] == [RequestState.FULFILLED] * 2
    assert sorted(record.attempt for record in records) == [1, 2]
    await rig.nothing_left()


async def test_calls_that_were_cut_together_ask_the_container_how_it_is_together(rig: Rig) -> None:
    rig.set(max_request_concurrency=100, health_interval_s=600, max_attempts=2)
    all_here = asyncio.Event()

    async def crash_together(request: web.Request) -> web.StreamResponse:
        if rig.box.running == 100:
            all_here.set()
        await all_here.wait()
        return await (crash if len(rig.box.bodies) == 100 else ok)(request)

    rig.box.handler = crash_together
    async with rig.sidecar():
        jobs = [await rig.submit() for _ in range(100)]
        await all_here.wait()
        before = rig.box.health_checks
        assert {(await rig.ended(job)).attempt for job in jobs} == {2}
        assert rig.box.health_checks - before < 10


async def test_an_unhealthy_container_gets_no_new_work_until_it_is_well(rig: Rig) -> None:
    async with rig.sidecar():
        await rig.ended(await rig.submit())
        rig.box.healthy = False
        await eventually(lambda: rig.catalog.instances(VERSION_ID), lambda found: bool(found and found[0].error))
        job = await rig.submit()
        checks = rig.box.health_checks
        await eventually(lambda: checked(rig), lambda seen: seen >= checks + 5)
        assert len(rig.box.bodies) == 1
        [instance] = await rig.catalog.instances(VERSION_ID)
        assert instance.status is InstanceStatus.ERRORED
        rig.box.healthy = True
        assert (await rig.ended(job)).state is RequestState.FULFILLED


async def test_a_running_job_survives_its_container_being_unhealthy(rig: Rig) -> None:
    gate = Gate()
    rig.box.handler = gate
    async with rig.sidecar():
        job = await rig.submit()
        await rig.box.called.wait()
        rig.box.healthy = False
        await eventually(lambda: rig.catalog.instances(VERSION_ID), lambda found: bool(found and found[0].error))
        gate.open.set()
        assert (await rig.ended(job)).state is RequestState.FULFILLED


async def test_a_container_that_is_silent_because_it_works_is_not_ill(rig: Rig) -> None:
    """A server with one thread cannot answer its health check during a call."""
    rig.set(health_timeout_s=0.4)
    working = asyncio.Event()
    gate = Gate()

    async def work(request: web.Request) -> web.StreamResponse:
        working.set()
        return await gate(request)

    rig.box.handler = work
    async with one_thread(rig.box, working) as port:
        rig.set(health_port=port)
        async with rig.sidecar():
            job = await rig.submit()
            await working.wait()
            checks = rig.box.health_checks
            await eventually(lambda: checked(rig), lambda seen: seen >= checks + 3)
            [instance] = await rig.catalog.instances(VERSION_ID)
            gate.open.set()
            await rig.ended(job)
    assert (instance.status, instance.busy, instance.error) == (InstanceStatus.RUNNING, 1, "")


async def test_a_container_that_is_never_ready_ends_the_sidecar_with_what_was_checked(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "workers.health")
    rig.set(ready_timeout_s=0.1)
    rig.box.healthy = False
    with pytest.raises(NeverReady, match=r"GET http://127\.0\.0\.1:\d+/health answered 503, not 200"):
        await rig.serve()
    assert await rig.catalog.instances(VERSION_ID) == []
    [said] = [record for record in caplog.records if record.message == "container_not_ready"]
    assert "answered 503, not 200" in vars(said)["cause"]


async def test_no_job_is_taken_before_the_container_is_ready(rig: Rig) -> None:
    rig.box.healthy = False
    job = await rig.submit()
    async with rig.sidecar():
        await eventually(lambda: checked(rig), lambda seen: seen >= 3)
        [instance] = await rig.catalog.instances(VERSION_ID)
        assert (instance.status, rig.queue.loans) == (InstanceStatus.STARTING, [])
        rig.box.healthy = True
        await rig.ended(job)


# -- time --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked_s", "allowed_s"), [(0.1, 3600), (0, 0.1), (60, 0.1)])
async def test_an_attempt_that_takes_too_long_is_cut_off(rig: Rig, asked_s: float, allowed_s: float) -> None:
    rig.set(run_timeout_s=allowed_s)
    rig.box.handler = never
    record = await rig.run(run_timeout_s=asked_s)
    assert record.state is RequestState.TIMED_OUT
    assert record.status_code == 504
    await asyncio.wait_for(rig.box.left.wait(), 20)
    await rig.nothing_left()


async def test_an_answer_that_stops_after_its_head_is_cut_off_at_the_deadline(rig: Rig) -> None:
    async def stall(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "5"})
        await response.prepare(request)
        await response.write(b"{")
        await asyncio.Event().wait()
        raise AssertionError

    rig.box.handler = stall
    async with rig.sidecar():
        record = await rig.ended(await rig.submit(deadline_s=1))
        assert (record.state, record.attempt) == (RequestState.EXPIRED, 1)
        assert record.finished_at - record.deadline_at < 5
        await rig.box.left.wait()
        rig.box.handler = ok
        assert (await rig.ended(await rig.submit())).state is RequestState.FULFILLED


async def test_a_container_that_ends_in_the_middle_of_its_answer_three_times_over_is_no_end_of_the_worker(
    rig: Rig,
) -> None:
    async def break_off(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "5"})
        await response.prepare(request)
        await response.write(b"{")
        return await crash(request)

    rig.box.handler = break_off
    async with rig.sidecar():
        record = await rig.ended(await rig.submit())
        assert (record.state, record.attempt) == (RequestState.DEAD, 3)
        rig.box.handler = ok
        assert (await rig.ended(await rig.submit())).attempt == 1


async def test_each_attempt_has_the_whole_run_timeout(rig: Rig) -> None:
    rig.box.handler = in_turn(crash, never)
    record = await rig.run(run_timeout_s=0.3)
    assert (record.state, record.attempt) == (RequestState.TIMED_OUT, 2)
    [crashed, cut_off] = record.attempts
    assert (crashed.end, cut_off.end) == (AttemptEnd.FAILED, AttemptEnd.TIMED_OUT)
    assert cut_off.ended_at - cut_off.started_at >= 0.3


async def test_inputs_that_do_not_come_count_against_the_run_timeout(rig: Rig) -> None:
    rig.blobs = cast("FileBlobs", NoDownloads())
    record = await rig.run(run_timeout_s=0.1, assets=(ASSET,))
    assert record.state is RequestState.TIMED_OUT
    assert rig.box.bodies == []


async def test_what_missed_its_queue_timeout_never_starts(rig: Rig) -> None:
    job = await rig.submit(queue_timeout_s=5)
    rig.results.offset_s = 6
    async with rig.sidecar():
        await eventually(lambda: looked(rig), lambda loans: loans == 1)
        record = await rig.ended(job)
    assert record.overslept
    assert rig.box.bodies == []
    await rig.nothing_left()


@pytest.mark.parametrize("offset_s", [-600, 0, 600])
async def test_the_deadline_aborts_the_call_whatever_this_hosts_clock_says(rig: Rig, offset_s: float) -> None:
    rig.results.offset_s = offset_s
    rig.box.handler = never
    record = await asyncio.wait_for(rig.run(deadline_s=0.5), 20)
    assert record.state is RequestState.EXPIRED


async def test_time_spent_in_the_queue_counts_against_the_deadline(rig: Rig) -> None:
    rig.box.handler = never
    job = await rig.submit(deadline_s=3600)
    rig.results.offset_s = 3599.5
    async with rig.sidecar():
        assert (await rig.ended(job)).state is RequestState.EXPIRED


async def test_an_overdue_job_never_starts(rig: Rig) -> None:
    job = await rig.submit(deadline_s=5)
    rig.results.offset_s = 10
    async with rig.sidecar():
        await eventually(lambda: looked(rig), lambda loans: loans == 1)
        assert (await rig.ended(job)).state is RequestState.EXPIRED
    assert rig.box.bodies == []
    await rig.nothing_left()


# -- what it took ------------------------------------------------------------------------------


async def test_the_parts_of_an_attempt_are_measured(rig: Rig) -> None:
    async def work(request: web.Request) -> web.StreamResponse:
        folder = Path(request.headers["NVCF-LARGE-OUTPUT-DIR"])
        (folder / "file").write_bytes(b"x")
        await asyncio.sleep(0.05)
        return await answer(b"{}")

    rig.box.handler = work
    timings = (await rig.run()).timings
    assert timings is not None
    assert timings.container_s >= 0.05
    assert timings.inputs_s > 0
    assert timings.upload_s > 0


async def test_what_was_asked_before_any_instance_was_ready_waited_for_a_cold_start(rig: Rig) -> None:
    rig.box.healthy = False
    job = await rig.submit()
    async with rig.sidecar():
        await eventually(lambda: checked(rig), lambda seen: seen >= 3)
        rig.box.healthy = True
        cold = await rig.ended(job)
        warm = await rig.ended(await rig.submit())
    assert cold.timings is not None
    assert 0.04 < cold.timings.cold_start_s <= cold.started_at - cold.created_at
    assert warm.timings is not None
    assert warm.timings.cold_start_s == 0


async def test_an_instance_tells_once_what_its_start_took(rig: Rig) -> None:
    rig.box.healthy = False
    job = await rig.submit()
    async with rig.sidecar():
        await eventually(lambda: checked(rig), lambda seen: seen >= 3)
        rig.box.healthy = True
        for each in (job, await rig.submit()):
            await rig.ended(each)
    [minutes] = await rig.results.activity([VERSION_ID], minutes=3)
    starts, leads = (merged(getattr(minute, name) for minute in minutes) for name in ("starts", "leads"))
    assert (starts.count, leads.count) == (1, 1)
    assert starts.sum_s > 0.04


async def test_no_start_is_cold_while_another_instance_is_ready(rig: Rig) -> None:
    other = Instance(
        id="other", function_id="f", version_id=VERSION_ID, account="acme", gpu="CPU", instance_type="CPU", backend="",
        status=InstanceStatus.RUNNING, created_at=1, updated_at=1,
    )  # fmt: skip
    await rig.catalog.beat(other, ttl_s=60)
    job = await rig.submit()
    async with rig.sidecar():
        record = await rig.ended(job)
    assert record.timings is not None
    assert record.timings.cold_start_s == 0


def metered(caplog: pytest.LogCaptureFixture, event_type: str = "NVCF_Invocation") -> list[dict[str, Any]]:
    lines = [vars(found) for found in caplog.records if found.name == "fnqueue.metering"]
    assert all(line["metering"] for line in lines)
    return [line for line in lines if line["event_type"] == event_type]


async def test_an_invocation_is_billed_on_one_line(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rig.set(gpu="H100", gpu_count=2, instance_type="NCP.GPU.H100_2x", backend="here", region="eu", account="owner")
    record = await rig.run(
        headers=(("X-Billing-Project", "p1"), ("x-billing-USER", "u"), ("X-Other", "o")), subject="key-9"
    )
    [line] = metered(caplog)
    told = {
        "request_id": record.id, "sub": "key-9", "nca_id": "acme", "owner_nca_id": "owner", "size": 11, "duration": 1,
        "response_type": "FULFILLED", "gpus": 2, "gpu_type": "H100", "instance_type": "NCP.GPU.H100_2x",
        "backend": "here", "region": "eu", "billing_headers": {"x-billing-project": "p1", "x-billing-user": "u"},
        "function_id": record.function_id, "function_version_id": VERSION_ID, "attempt": 1, "status": 200,
    }  # fmt: skip
    assert {name: line[name] for name in told} == told
    assert line["function_id"] == rig.settings.function_id


async def test_retries_are_billed_once_and_told_apart(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rig.box.handler = in_turn(crash, lambda _: answer(b"no", status=500))
    record = await rig.run()
    [line] = metered(caplog)
    assert (line["request_id"], line["response_type"], line["attempt"]) == (record.id, "ERRORED", 2)
    given_up = [vars(found) for found in caplog.records if found.getMessage() == "attempt_given_up"]
    assert [(found["public"], found["attempt"]) for found in given_up] == [(True, 1)]


async def test_a_cancelled_run_is_billed_for_what_it_took(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rig.box.handler = never
    async with rig.sidecar():
        job = await rig.submit()
        await rig.box.called.wait()
        await rig.results.cancel(job.id, reason="")
        await asyncio.wait_for(rig.box.left.wait(), 20)
    [line] = metered(caplog)
    assert (line["request_id"], line["response_type"], line["state"]) == (job.id, "ERRORED", "cancelled")


async def test_what_is_cancelled_after_its_container_was_lost_is_billed(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rig.set(crash_backoff_s=60)
    rig.box.handler = crash
    async with rig.sidecar():
        job = await rig.submit()
        await rig.box.called.wait()
        rig.box.healthy = False
        await eventually(lambda: rig.catalog.instances(VERSION_ID), lambda found: bool(found and found[0].error))
        await rig.results.cancel(job.id, reason="")
        rig.box.healthy = True
        await eventually(lambda: busy_slots(rig), lambda found: not found)
    assert [line["state"] for line in metered(caplog)] == ["cancelled"]


async def test_a_worker_that_lost_its_request_bills_nothing(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """It slept through its lease, and another one ended the request."""
    caplog.set_level(logging.INFO)
    gate = Gate()
    rig.box.handler = gate
    rig.set(lease_s=0.2, renew_s=0.05)
    async with rig.sidecar():
        job = await rig.submit()
        await rig.box.called.wait()
        rig.results.renewing = False
        await asyncio.sleep(0.3)
        claim = await rig.results.claim(job, worker="another", lease_s=60, max_attempts=3)
        assert claim.lease is not None
        await rig.results.settle(claim.lease, job, RequestState.FULFILLED, Outcome(status=200))
        gate.open.set()
        await eventually(lambda: busy_slots(rig), lambda found: not found)
    assert metered(caplog) == []


async def busy_slots(rig: Rig) -> int:
    return sum(instance.busy for instance in await rig.catalog.instances(VERSION_ID))


async def test_what_no_worker_ran_is_not_billed(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    job = await rig.submit()
    await rig.results.cancel(job.id, reason="")
    async with rig.sidecar():
        await eventually(lambda: looked(rig), lambda loans: loans == 1)
    assert metered(caplog) == []


async def test_the_instance_itself_is_metered_from_before_it_is_ready(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await rig.run()
    lines = metered(caplog, "NVCF_Infrastructure")
    assert [line["status"] for line in lines] == ["initializing", "initializing", "ready"]
    assert lines[0]["duration"] < lines[-1]["duration"]
    assert {line["nca_id"] for line in lines} == {rig.settings.account}


# -- the store ---------------------------------------------------------------------------------


async def test_a_result_is_kept_until_the_store_is_back(rig: Rig) -> None:
    rig.results.away = True
    async with rig.sidecar():
        job = await rig.submit()
        await rig.results.refused.wait()
        assert await rig.queue.take(VERSION_ID) is None
        rig.results.away = False
        record = await rig.ended(job)
    assert (record.state, record.attempt) == (RequestState.FULFILLED, 1)
    assert len(rig.box.bodies) == 1
    await rig.nothing_left()


async def test_a_result_that_cannot_be_stored_before_the_drain_ends_is_run_again(rig: Rig) -> None:
    rig.set(drain_s=0.1)
    rig.results.away = True
    async with rig.sidecar():
        job = await rig.submit()
        await rig.results.refused.wait()
    rig.results.away = False
    assert (await rig.until(job, lambda _: True)).state is RequestState.QUEUED
    rig.stop.clear()
    async with rig.sidecar():
        record = await rig.ended(job)
    assert (record.state, record.attempt) == (RequestState.FULFILLED, 1)


# -- the end -----------------------------------------------------------------------------------


async def test_a_drain_finishes_what_runs_and_takes_nothing_new(rig: Rig) -> None:
    gate = Gate()
    rig.box.handler = gate
    async with rig.sidecar() as task:
        running = await rig.submit()
        await rig.box.called.wait()
        waiting = await rig.submit()
        rig.stop.set()
        gate.open.set()
        await task
    assert (await rig.ended(running)).state is RequestState.FULFILLED
    assert (await rig.until(waiting, lambda _: True)).state is RequestState.QUEUED
    assert await rig.queue.take(VERSION_ID) is not None
    assert await rig.catalog.instances(VERSION_ID) == []


async def test_what_a_drain_cannot_finish_is_handed_back_at_no_cost(rig: Rig) -> None:
    rig.set(drain_s=0.1)
    rig.box.handler = in_turn(never, lambda _: answer(b"{}"))
    async with rig.sidecar():
        job = await rig.submit()
        await rig.box.called.wait()
    await asyncio.wait_for(rig.box.left.wait(), 20)
    record = await rig.until(job, lambda _: True)
    assert (record.state, record.attempt) == (RequestState.QUEUED, 0)
    rig.stop.clear()
    async with rig.sidecar():
        assert (await rig.ended(job)).attempt == 1
    await rig.nothing_left()


async def test_a_drain_does_not_wait_for_a_job_that_another_worker_holds(rig: Rig) -> None:
    job = await rig.submit()
    await rig.results.claim(job, worker="other", lease_s=60, max_attempts=3)
    async with rig.sidecar() as task:
        await eventually(lambda: looked(rig), lambda loans: loans == 1)
        rig.stop.set()
        async with asyncio.timeout(20):
            await task
    assert await rig.queue.take(VERSION_ID) is not None


async def test_a_cancelled_sidecar_hands_its_jobs_back(rig: Rig) -> None:
    rig.box.handler = never
    async with rig.sidecar() as task:
        job = await rig.submit()
        await rig.box.called.wait()
        task.cancel()
    assert task.cancelled()
    assert (await rig.until(job, lambda _: True)).state is RequestState.QUEUED
    assert await rig.queue.take(VERSION_ID) is not None
    assert await rig.catalog.instances(VERSION_ID) == []


async def test_a_sidecar_stopped_before_its_container_was_ready_just_ends(rig: Rig) -> None:
    rig.box.healthy = False
    async with rig.sidecar() as task:
        await eventually(lambda: checked(rig), lambda seen: seen >= 1)
        rig.stop.set()
        await task


# -- what it tells -----------------------------------------------------------------------------


async def test_an_instance_reports_its_slots_and_how_many_are_busy(rig: Rig) -> None:
    rig.set(max_request_concurrency=2, instance_id="one", gpu="H100")
    gate = Gate()
    rig.box.handler = gate
    async with rig.sidecar():
        job = await rig.submit()
        [instance] = await eventually(
            lambda: rig.catalog.instances(VERSION_ID), lambda found: bool(found and found[0].busy)
        )
        gate.open.set()
        await rig.ended(job)
    assert (instance.id, instance.gpu, instance.slots, instance.busy) == ("one", "H100", 2, 1)
    assert instance.status is InstanceStatus.RUNNING


async def test_the_status_server_tells_live_from_ready(rig: Rig) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    rig.set(status_port=port)
    rig.box.healthy = False
    async with rig.sidecar(), aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:

        async def status(path: str) -> int:
            try:
                async with http.get(path) as response:
                    return response.status
            except aiohttp.ClientConnectorError:
                return 0

        assert await eventually(lambda: status("/v1/health/live"), bool) == 200
        assert await status("/v1/health/ready") == 503
        rig.box.healthy = True
        await eventually(lambda: status("/v1/health/ready"), lambda seen: seen == 200)


async def test_who_asks_for_a_drain_is_answered_when_no_job_runs(rig: Rig) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    rig.set(status_port=port)
    gate = Gate()
    rig.box.handler = gate

    async def drain() -> int:
        async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}/v1/drain") as response:
            return response.status

    async with rig.sidecar() as task:
        running = await rig.submit()
        await rig.box.called.wait()
        hooks = [asyncio.create_task(drain()) for _ in range(2)]
        await rig.stop.wait()
        waiting = await rig.submit()
        assert not any(hook.done() for hook in hooks)
        gate.open.set()
        assert await asyncio.gather(*hooks) == [200, 200]
        await task
    assert (await rig.ended(running)).state is RequestState.FULFILLED
    assert (await rig.until(waiting, lambda _: True)).state is RequestState.QUEUED


async def test_a_status_port_that_is_taken_is_a_bad_setting(rig: Rig) -> None:
    rig.set(status_port=rig.box.port)
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        rig.set(status_port=taken.getsockname()[1])
        with pytest.raises(ConfigurationError, match="status_port"):
            await rig.serve()


async def looked(rig: Rig) -> int:
    return len(rig.queue.loans)


async def checked(rig: Rig) -> int:
    return rig.box.health_checks


async def running(rig: Rig) -> int:
    return rig.box.running


def fail() -> Record:
    raise AssertionError("the record is gone")


@asynccontextmanager
async def one_thread(box: Container, working: asyncio.Event) -> AsyncIterator[int]:
    """The port of a health check that answers only while the container does not work."""

    async def health(request: web.Request) -> web.StreamResponse:
        box.health_checks += 1
        return await (never(request) if working.is_set() and box.running else answer(b"{}"))

    app = web.Application()
    app.add_routes([web.get("/health", health)])
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
