"""Who is blamed for what died: the payload, the worker, or nobody."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from broker.model import Crash, Instance, InstanceStatus, Job, Lease, RequestState, Verdict
from tests.eventually import eventually
from tests.unit.container import VERSION_ID, Handler, keeping
from tests.unit.test_sidecar import Gate, Rig, a_rig, crash, in_turn, never, ok


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with a_rig(tmp_path) as made:
        made.set(instance_id="one", max_attempts=1, crash_backoff_s=0)
        yield made


async def held(rig: Rig, instance_id: str = "one") -> list[Crash]:
    return await rig.catalog.crashes(VERSION_ID, instance_id)


async def reported(rig: Rig) -> Instance | None:
    return next(iter(await rig.catalog.instances(VERSION_ID)), None)


async def in_quarantine(rig: Rig) -> Instance:
    found = await eventually(lambda: reported(rig), lambda report: report is not None and report.quarantined)
    assert found is not None
    return found


async def waits(rig: Rig, job: Job) -> None:
    """It is given to somebody else, if there is anybody."""
    record = await rig.results.read(job.id)
    assert record is not None
    assert (record.state, record.attempt) == (RequestState.QUEUED, 0)


def dies_with(*poisonous: bytes) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await (crash if await request.read() in poisonous else ok)(request)

    return handle


# -- the worker ----------------------------------------------------------------------------------


async def test_an_instance_on_which_three_payloads_die_takes_no_more_and_says_so(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.box.handler = crash
    async with rig.sidecar():
        killed = [await rig.ended(await rig.submit()) for _ in range(2)]
        last = await rig.submit()
        report = await in_quarantine(rig)
        killed.append(await rig.until(last, lambda record: bool(record.attempts)))
        following = await rig.submit()
        checks = rig.box.health_checks
        await eventually(lambda: checked(rig), lambda seen: seen >= checks + 3)  # it is well, and stays shut out
        await waits(rig, following)
        assert len(rig.box.bodies) == 3
    assert report.status is InstanceStatus.ERRORED
    assert report.error.startswith("quarantined: 3 different requests in a row died here: ")
    assert all(record.id in report.error for record in killed)
    [line] = [line for line in caplog.records if line.message == "instance_quarantined"]
    assert line.levelno == logging.ERROR


async def test_a_payload_that_kills_again_and_again_condemns_nobody(rig: Rig) -> None:
    rig.set(max_attempts=5)
    rig.box.handler = dies_with(b"poison")
    async with rig.sidecar():
        record = await rig.ended(await rig.submit(body=b"poison"))
        assert (record.state, record.attempt) == (RequestState.DEAD, 5)
        assert (await rig.ended(await rig.submit())).state is RequestState.FULFILLED
        assert await held(rig) == []


async def test_an_answer_ends_the_row(rig: Rig) -> None:
    rig.box.handler = dies_with(b"poison")
    async with rig.sidecar():
        for body in (b"poison", b"poison", b"harmless") * 3:
            await rig.ended(await rig.submit(body=body))
        assert len(rig.box.bodies) == 9
        assert await held(rig) == []


async def test_what_one_crash_takes_along_condemns_nobody(rig: Rig) -> None:
    rig.set(max_request_concurrency=8)
    all_here = asyncio.Event()

    async def crash_together(request: web.Request) -> web.StreamResponse:
        if rig.box.running == 8:
            all_here.set()
        await all_here.wait()
        return await crash(request)

    rig.box.handler = crash_together
    async with rig.sidecar():
        for job in [await rig.submit() for _ in range(8)]:
            assert (await rig.ended(job)).state is RequestState.DEAD
        assert len(await held(rig)) == 8
        rig.box.handler = ok
        assert (await rig.ended(await rig.submit())).state is RequestState.FULFILLED


async def test_quarantine_outlives_the_sidecar_and_not_its_instance(rig: Rig) -> None:
    rig.box.handler = crash
    async with rig.sidecar():
        for _ in range(3):
            await rig.submit()
        await in_quarantine(rig)
    rig.box.handler = ok
    rig.stop = asyncio.Event()
    async with rig.sidecar():
        await in_quarantine(rig)
        job = await rig.submit()
        checks = rig.box.health_checks
        await eventually(lambda: checked(rig), lambda seen: seen >= checks + 3)
        await waits(rig, job)
    rig.set(instance_id="its successor")
    rig.stop = asyncio.Event()
    async with rig.sidecar():
        assert (await rig.ended(job)).state is RequestState.FULFILLED


async def test_sidecars_that_die_with_different_requests_condemn_their_instance(rig: Rig) -> None:
    """Whoever gets the requests next says with whom they were lost; here one that lives, of another instance."""
    rig.set(max_attempts=3, instance_id="another")
    jobs = []
    for number in range(3):
        job = await rig.submit()
        claim = await rig.results.claim(job, worker="one", lease_s=1, max_attempts=3)
        assert claim.verdict is Verdict.GRANTED
        rig.results.offset_s += 2  # its sidecar was killed, and came back as what it was
        jobs.append(job)
        assert len(await held(rig)) == 0, number
    async with rig.sidecar():
        for job in jobs:
            await rig.ended(job)
    assert {crash.request_id for crash in await held(rig)} == {job.id for job in jobs}
    rig.set(instance_id="one")
    rig.stop = asyncio.Event()
    async with rig.sidecar():
        await in_quarantine(rig)


async def test_what_is_running_in_quarantine_is_finished(rig: Rig) -> None:
    rig.set(max_request_concurrency=2)
    gate = Gate()
    rig.box.handler = in_turn(gate, crash)
    async with rig.sidecar():
        long = await rig.submit()
        await rig.box.called.wait()
        for _ in range(3):
            await rig.submit()
        await in_quarantine(rig)
        gate.open.set()
        assert (await rig.ended(long)).state is RequestState.FULFILLED
        assert (await in_quarantine(rig)).status is InstanceStatus.ERRORED


async def test_a_kept_connection_that_is_cut_is_held_against_nobody(rig: Rig) -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        return False

    async with keeping(cut) as box:
        rig.set(inference_port=box.port, health_port=rig.box.port, keep_connections=True, max_attempts=2)
        async with rig.sidecar():
            job = await rig.submit()
            assert (await rig.ended(job)).attempt == 2
            assert len(await held(rig)) == 1  # the second attempt had a connection to itself


async def test_quarantine_can_be_switched_off(rig: Rig) -> None:
    rig.set(quarantine_crashes=0)
    rig.box.handler = crash
    async with rig.sidecar():
        for _ in range(4):
            assert (await rig.ended(await rig.submit())).state is RequestState.DEAD
    assert await held(rig) == []


async def test_who_asks_whether_it_is_ready_is_told_of_the_quarantine(rig: Rig) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    rig.set(status_port=port)
    rig.box.handler = crash
    async with rig.sidecar(), aiohttp.ClientSession() as http:
        for _ in range(3):
            await rig.submit()
        await in_quarantine(rig)
        async with http.get(f"http://127.0.0.1:{port}/v1/health/ready") as response:
            assert response.status == 503
            assert json.loads(await response.read())["status"].startswith("quarantined: ")


# -- nobody --------------------------------------------------------------------------------------


async def test_leases_that_ran_out_while_the_servers_were_away_were_no_deaths(rig: Rig) -> None:
    """The broker gave the message to another worker when it was back, and that one could ask first."""
    rig.set(max_attempts=4)
    rig.box.handler = never
    job = await rig.submit()
    for attempt in (1, 2):  # as often as workers may die
        rig.results.renewing = False
        async with rig.sidecar():
            await rig.box.called.wait()
            lease = await taken_over(rig, job)
            assert lease.attempt == attempt + 1
            rig.results.renewing = True
            await rig.box.left.wait()
        await begin_again(rig, lease)
    rig.box.handler = ok
    async with rig.sidecar():
        assert (await rig.ended(job)).state is RequestState.FULFILLED


async def test_a_result_that_came_too_late_for_its_lease_tells_of_no_death(rig: Rig) -> None:
    rig.set(max_attempts=4)
    job = await rig.submit()
    for _ in range(2):
        rig.results.away, rig.results.renewing = True, False
        async with rig.sidecar():
            await rig.results.refused.wait()
            lease = await taken_over(rig, job)
            rig.results.away = False
        rig.results.renewing = True
        await begin_again(rig, lease)
    async with rig.sidecar():
        assert (await rig.ended(job)).state is RequestState.FULFILLED


async def taken_over(rig: Rig, job: Job) -> Lease:
    rig.results.offset_s += 2
    claim = await rig.results.claim(job, worker="other", lease_s=30, max_attempts=4)
    lease: Lease | None = claim.lease
    assert lease is not None
    return lease


async def begin_again(rig: Rig, lease: Lease) -> None:
    """The other worker gives it back unspent, and this one is started once more."""
    await rig.results.release(lease, refund=True)
    rig.stop = asyncio.Event()
    for event in (rig.box.called, rig.box.left, rig.results.refused):
        event.clear()


async def test_a_drain_that_its_pod_asked_for_costs_no_attempt(rig: Rig) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    rig.set(status_port=port, drain_s=0.1)
    rig.box.handler = never
    async with rig.sidecar() as task:
        job = await rig.submit()
        await rig.box.called.wait()
        async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}/v1/drain") as response:
            assert response.status == 200
        await task
    record = await rig.results.read(job.id)
    assert record is not None
    assert (record.state, record.attempt) == (RequestState.QUEUED, 0)
    claim = await rig.results.claim(job, worker="other", lease_s=30, max_attempts=1)
    assert (claim.verdict, claim.lost) == (Verdict.GRANTED, None)
    assert await held(rig) == []


async def test_a_container_that_ends_during_a_drain_is_held_against_nobody(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    dying = asyncio.Event()

    async def die(request: web.Request) -> web.StreamResponse:
        await dying.wait()
        return await crash(request)

    rig.box.handler = die
    async with rig.sidecar() as task:
        await rig.submit()
        await rig.box.called.wait()
        rig.stop.set()
        await eventually(lambda: logged(caplog), lambda names: "draining" in names)
        dying.set()
        await task
    assert await held(rig) == []


async def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records]


async def checked(rig: Rig) -> int:
    return rig.box.health_checks
