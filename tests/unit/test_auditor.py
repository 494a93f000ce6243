"""The auditor over the memory back ends: what it counts, and what it mends only when it is sure."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import aiohttp
import pytest

from broker import deployments, functions
from broker.backends.files import FileBlobs
from broker.backends.memory.dead_letters import MemoryDeadLetters
from broker.backends.memory.results import MemoryResults
from broker.backends.memory.upkeep import MemoryUpkeep
from broker.connect import open_broker
from broker.errors import ConfigurationError, StoreUnavailable
from broker.functions import Definition
from broker.model import Draft, GpuSpecification, Job, Outcome, Principal, RequestState, Survey
from broker.ports import Broker, Upkeep
from broker.settings import ControllerSettings
from infra.local.process import free_port
from tests.unit.launchers import CPU
from workers.controller.auditor import OBJECT_MARGIN_S, RESTORED_AT_ONCE, Auditor, Conservation, Walk
from workers.controller.status import Status

OURS = Principal(account="ours", subject="me", scopes=frozenset())
FUNCTION = Definition(name="f", inference_url="/", container_image="i")
S = RequestState
DAY_S = 86_400.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def broker(tmp_path: Path, clock: Clock) -> AsyncIterator[Broker]:
    settings = ControllerSettings(data_dir=tmp_path)
    results = MemoryResults(settings, now=clock)
    async with open_broker(settings) as opened:
        letters = MemoryDeadLetters(results, settings)
        yield replace(opened, results=results, upkeep=MemoryUpkeep(results), dead_letters=letters)


@pytest.fixture
async def version_id(broker: Broker) -> str:
    await broker.catalog.offer([CPU], ttl_s=DAY_S)
    version = await functions.create(broker, OURS, FUNCTION)
    specification = GpuSpecification(
        id=str(uuid.uuid4()), gpu="CPU", instance_type="CPU", min_instances=0, max_instances=1
    )
    await deployments.deploy(broker, OURS, version.function_id, version.id, (specification,))
    return version.id


def auditor_of(broker: Broker, *, stray_s: float = 60.0, leads: bool = True) -> Auditor:
    return Auditor(broker, ControllerSettings(), leads=lambda: leads, stray_s=stray_s)


async def accept(broker: Broker, version_id: str, *, published: bool = True, body_key: str = "") -> Job:
    draft = Draft(
        id=str(uuid.uuid4()), account="ours", function_id="f", version_id=version_id, digest="", deadline_s=DAY_S
    )
    record = await broker.results.create(draft, queue_limit=1000, watch=False)
    job = Job(
        id=record.id,
        account="ours",
        function_id="f",
        version_id=version_id,
        subject="me",
        created_at=record.created_at,
        deadline_at=record.deadline_at,
        digest="",
        body_key=body_key,
    )
    if published:
        await broker.queue.publish(job, timeout_s=1)
    return job


async def finish(broker: Broker, job: Job, *, blob_key: str = "") -> None:
    claim = await broker.results.claim(job, worker="w", lease_s=30, max_attempts=3)
    assert claim.lease is not None
    outcome = Outcome(status=302 if blob_key else 200, blob_key=blob_key)
    await broker.results.settle(claim.lease, job, S.FULFILLED, outcome)


async def a_pass(walk: Walk) -> None:
    """From its beginning to its rest."""
    rest_s = walk._rest_s
    while True:
        await walk.step()
        if walk.pause_s() == rest_s:
            return


async def queued(broker: Broker, version_id: str) -> int:
    (load,) = await broker.results.load([version_id])
    return load.queued


# -- figures -----------------------------------------------------------------------------------


async def test_everything_accepted_is_queued_or_running_or_done_or_dead(broker: Broker, version_id: str) -> None:
    jobs = [await accept(broker, version_id) for _ in range(500)]
    for job in jobs[:100]:
        await finish(broker, job)
    for job in jobs[100:110]:
        await broker.results.claim(job, worker="w", lease_s=30, max_attempts=3)
    for job in jobs[110:115]:
        await broker.results.end(job, S.DEAD, reason="")
    await broker.results.cancel(jobs[115].id, reason="")
    assert await broker.results.abandon(jobs[116].id, version_id, reason="")
    auditor = auditor_of(broker)
    await a_pass(auditor.versions)
    await a_pass(auditor.records)
    counted = auditor.conservation
    assert counted is not None
    assert counted == Conservation(
        counted_at=counted.counted_at,
        accepted=499,
        queued=383,
        running=10,
        done=101,
        dead=5,
        waiting=383,
        taken=10,
        messages=500,
        dead_letters=0,
    )
    assert counted.balanced


async def test_records_that_cannot_be_read_show_in_the_balance(broker: Broker) -> None:
    class Garbled:
        async def survey(self, cursor: int, *, limit: int) -> Survey:
            return Survey(cursor=0, states={S.QUEUED: 3}, unreadable=2)

    auditor = auditor_of(replace(broker, upkeep=cast(Upkeep, Garbled())))
    await a_pass(auditor.records)
    assert auditor.conservation is not None
    assert (auditor.conservation.accepted, auditor.conservation.balanced) == (5, False)


async def test_a_pass_that_was_broken_off_begins_anew_and_counts_nothing_twice(broker: Broker, version_id: str) -> None:
    for _ in range(450):
        await accept(broker, version_id)

    class AwayOnce:
        asked = 0

        async def survey(self, cursor: int, *, limit: int) -> Survey:
            self.asked += 1
            if self.asked == 2:
                raise StoreUnavailable("away")
            return await broker.upkeep.survey(cursor, limit=limit)

    auditor = auditor_of(replace(broker, upkeep=cast(Upkeep, AwayOnce())))
    await auditor.records.step()
    with pytest.raises(StoreUnavailable):
        await auditor.records.step()
    await a_pass(auditor.records)
    assert auditor.conservation is not None
    assert auditor.conservation.queued == 450


async def test_passes_are_short_steps_with_a_rest_between_them(broker: Broker, version_id: str) -> None:
    for _ in range(300):
        await accept(broker, version_id)
    walk = auditor_of(broker).records
    await walk.step()
    assert walk.pause_s() < 1
    await walk.step()
    assert walk.pause_s() == ControllerSettings().audit_s


# -- queues and books --------------------------------------------------------------------------


async def test_messages_that_nobody_knows_bring_their_requests_back(
    broker: Broker, version_id: str, clock: Clock
) -> None:
    jobs = [await accept(broker, version_id) for _ in range(20)]
    results = MemoryResults(ControllerSettings(), now=clock)  # wiped
    broker = replace(broker, results=results, upkeep=MemoryUpkeep(results))
    auditor = auditor_of(broker)
    await a_pass(auditor.versions)
    assert await queued(broker, version_id) == 0  # it may only be on its way
    await a_pass(auditor.versions)
    assert await queued(broker, version_id) == auditor.mended.restored == RESTORED_AT_ONCE
    await a_pass(auditor.versions)
    assert auditor.mended.restored == RESTORED_AT_ONCE  # somebody comes for the others
    assert await broker.queue.depth(version_id) == 20
    for job in jobs:
        delivery = await broker.queue.take(version_id)
        assert delivery is not None
        assert delivery.job == job
        await finish(broker, job)
        await delivery.ack()


async def test_messages_of_requests_that_are_over_are_acknowledged(broker: Broker, version_id: str) -> None:
    jobs = [await accept(broker, version_id) for _ in range(20)]
    for job in jobs:
        assert await broker.results.abandon(job.id, version_id, reason="")  # and yet they were published
    auditor = auditor_of(broker)
    await a_pass(auditor.versions)
    await a_pass(auditor.versions)
    assert await broker.queue.depth(version_id) == 0
    assert auditor.mended.restored == 0


async def test_a_request_that_was_never_published_is_set_aside_once_nobody_can_publish_it(
    broker: Broker, version_id: str, clock: Clock
) -> None:
    job = await accept(broker, version_id, published=False)
    auditor = auditor_of(broker, stray_s=60)
    for _ in range(3):
        await a_pass(auditor.versions)
    assert await queued(broker, version_id) == 1
    clock.now += 61
    await a_pass(auditor.versions)
    assert await queued(broker, version_id) == 0  # no instance is kept for it
    record = await broker.results.read(job.id)
    assert record is not None
    assert record.state is S.QUEUED
    # Its front end was only paused: it publishes, answers 202, and the request runs.
    await broker.queue.publish(job, timeout_s=1)
    await a_pass(auditor.versions)
    await a_pass(auditor.versions)
    assert await queued(broker, version_id) == 1
    await finish(broker, job)


async def test_nothing_is_set_aside_while_messages_wait(broker: Broker, version_id: str, clock: Clock) -> None:
    await accept(broker, version_id)
    auditor = auditor_of(broker)
    for _ in range(3):
        clock.now += 600
        await a_pass(auditor.versions)
    assert auditor.mended.set_aside == 0


async def test_whoever_leads_no_more_mends_nothing(broker: Broker, version_id: str, clock: Clock) -> None:
    await accept(broker, version_id, published=False)
    key = f"inputs/ours/{uuid.uuid4()}"
    await broker.blobs.put(key, b"", content_type="text/plain")
    clock.now += 30 * DAY_S
    auditor = auditor_of(broker, leads=False)
    for _ in range(3):
        await a_pass(auditor.versions)
        await a_pass(auditor.objects)
    assert await broker.blobs.head(key) is not None
    assert auditor.mended.set_aside == auditor.mended.objects_deleted == 0


async def test_nothing_is_borrowed_from_the_queue_of_an_undeployed_version(broker: Broker, version_id: str) -> None:
    await accept(broker, version_id)
    results = MemoryResults(ControllerSettings())
    broker = replace(broker, results=results, upkeep=MemoryUpkeep(results))
    version = await broker.catalog.versions.get(version_id)
    assert version is not None
    await deployments.undeploy(broker, OURS, version.item.function_id, version_id, graceful=True)
    auditor = auditor_of(broker)
    for _ in range(3):
        await a_pass(auditor.versions)
    assert not auditor.versions.looks
    assert await queued(broker, version_id) == 0


async def test_versions_that_are_gone_are_forgotten(broker: Broker, version_id: str) -> None:
    auditor = auditor_of(broker)
    await a_pass(auditor.versions)
    assert set(auditor.versions.looks) == {version_id}
    await broker.catalog.deployments.delete(version_id)
    await a_pass(auditor.versions)
    assert not auditor.versions.looks


# -- objects -----------------------------------------------------------------------------------


async def put(broker: Broker, key: str, *, at: float) -> str:
    """With a time of change by the store's clock."""
    assert isinstance(broker.blobs, FileBlobs)
    await broker.blobs.put(key, b"bytes", content_type="text/plain")
    os.utime(broker.blobs.path(key), (at, at))
    return key


async def test_bodies_go_with_requests_that_cannot_start_any_more(
    broker: Broker, version_id: str, clock: Clock
) -> None:
    kept: list[str] = []
    spent: list[str] = []
    for end in (None, S.DEAD, S.EXPIRED, S.CANCELLED, S.FULFILLED):
        job = await accept(broker, version_id)
        key = await put(broker, f"inputs/ours/{job.id}", at=clock.now)
        if end is S.FULFILLED:
            await finish(broker, job)
        elif end is not None:
            await broker.results.end(job, end, reason="")
        (spent if end in (S.CANCELLED, S.FULFILLED, S.EXPIRED) else kept).append(key)
    auditor = auditor_of(broker)
    await a_pass(auditor.objects)
    assert [await broker.blobs.head(key) for key in spent] == [None, None, None]
    assert None not in [await broker.blobs.head(key) for key in kept]
    assert auditor.mended.objects_deleted == 3


async def test_the_input_of_a_dead_letter_outlives_its_record(broker: Broker, version_id: str, clock: Clock) -> None:
    job = await accept(broker, version_id)
    key = await put(broker, f"inputs/ours/{job.id}", at=clock.now)
    await broker.results.end(job, S.DEAD, reason="")
    assert await broker.dead_letters.keep(replace(job, body_key=key), size_bytes=5)
    clock.now += broker.settings.request_deadline_s + broker.settings.result_ttl_s + 2 * 3600
    await accept(broker, version_id)  # with which the store forgets the record
    assert await broker.results.glance(job.id) is None
    await a_pass(auditor_of(broker).objects)
    assert await broker.blobs.head(key) is not None
    clock.now += broker.settings.dead_letter_ttl_s
    await a_pass(auditor_of(broker).objects)
    assert await broker.blobs.head(key) is None


async def test_results_stay_unless_another_one_stands(broker: Broker, version_id: str, clock: Clock) -> None:
    job, running = await accept(broker, version_id), await accept(broker, version_id)
    mine = await put(broker, f"results/ours/{job.id}/{uuid.uuid4()}.zip", at=clock.now)
    late = await put(broker, f"results/ours/{job.id}/{uuid.uuid4()}.zip", at=clock.now)
    early = await put(broker, f"results/ours/{running.id}/{uuid.uuid4()}.zip", at=clock.now)
    await finish(broker, job, blob_key=mine)
    await broker.results.claim(running, worker="w", lease_s=30, max_attempts=3)
    await a_pass(auditor_of(broker).objects)
    assert await broker.blobs.head(late) is None
    assert await broker.blobs.head(mine) is not None
    assert await broker.blobs.head(early) is not None


async def test_without_a_record_objects_are_kept_until_nothing_can_name_them(broker: Broker, clock: Clock) -> None:
    settings = broker.settings
    body_s = settings.request_deadline_s + OBJECT_MARGIN_S
    result_s = body_s + settings.result_ttl_s
    ages = {
        "inputs/a/b/{}": body_s,
        "results/a/{}/" + str(uuid.uuid4()) + ".zip": result_s,
        "doctor/{}": OBJECT_MARGIN_S,
    }
    for form, age_s in ages.items():
        old = await put(broker, form.format(uuid.uuid4()), at=clock.now - age_s - 1)
        young = await put(broker, form.format(uuid.uuid4()), at=clock.now - age_s + 60)
        await a_pass(auditor_of(broker).objects)
        assert await broker.blobs.head(old) is None
        assert await broker.blobs.head(young) is not None


async def test_what_is_not_ours_to_judge_stays(broker: Broker, clock: Clock) -> None:
    keys = [
        f"assets/ours/{uuid.uuid4()}",
        f"other/{uuid.uuid4()}",
        "inputs/ours/not-an-id",
        f"results/ours/{uuid.uuid4()}/readme.txt",
    ]
    for key in keys:
        await put(broker, key, at=clock.now - 365 * DAY_S)
    await a_pass(auditor_of(broker).objects)
    assert None not in [await broker.blobs.head(key) for key in keys]


# -- the status ---------------------------------------------------------------------------------


async def test_the_status_shows_what_was_counted_and_mended(broker: Broker, version_id: str) -> None:
    await accept(broker, version_id)
    status, port = Status(broker), free_port()
    settings = ControllerSettings(status_port=port)
    async with status.shown(settings), aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:

        async def facts() -> dict[str, object]:
            async with client.get("/v1/conservation") as answer:
                assert answer.status == 200
                found: dict[str, object] = await answer.json()
                return found

        assert await facts() == {"leads": False, "conservation": None, "mended": None}
        auditor = auditor_of(broker)
        status.figures.leads(auditor)
        assert (await facts())["conservation"] is None
        await a_pass(auditor.records)
        shown = (await facts())["conservation"]
        assert isinstance(shown, dict)
        assert (shown["accepted"], shown["queued"], shown["balanced"]) == (1, 1, True)
        assert all(isinstance(figure, int | float) for figure in shown.values()), "no tenant is named"
        async with client.get("/v1/health/live") as answer:
            assert answer.status == 200
        with pytest.raises(ConfigurationError, match="status_port"):
            async with Status(broker).shown(settings):
                pass
