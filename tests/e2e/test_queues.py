"""Where a request stands, and how it is taken out again, on both families (contract/invocation.md §7)."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from tests.e2e.conftest import NVCF, UNKNOWN_ID, Gate, Mirror, Site, begun, idle, is_running, production_only, slug
from tests.eventually import eventually
from tests.house import RECORDER, Caller, Function, Reply


@pytest.fixture(autouse=True)
async def leaves_it_idle(caller: Caller, recorder: Function) -> AsyncIterator[None]:
    await idle(caller, recorder)
    yield
    await idle(caller, recorder)


async def positions(caller: Caller, request_ids: Sequence[str]) -> list[int]:
    return [(await caller.position(request_id)).json["positionInQueue"] for request_id in request_ids]


async def positions_become(caller: Caller, request_ids: Sequence[str], expected: list[int]) -> None:
    await eventually(lambda: positions(caller, request_ids), lambda seen: seen == expected)


async def depth_becomes(caller: Caller, function: Function, waiting: int, running: int) -> None:
    """As the function and its version say alike. A result is to be had a moment before its slot is counted free."""
    for path in (function.id, f"{function.id}/versions/{function.version_id}"):

        async def look(path: str = path) -> Reply:
            return await caller.call("GET", f"{NVCF}/queues/functions/{path}")

        def right(reply: Reply) -> bool:
            [queue] = reply.json["queues"]
            return (queue["queueDepth"], queue["inFlight"]) == (waiting, running)

        reply = await eventually(look, right)
        [queue] = reply.json["queues"]
        assert (reply.status, reply.json["functionId"]) == (200, function.id)
        assert queue["functionVersionId"] == function.version_id
        assert (queue["functionName"], queue["functionStatus"]) == ("under-test", "ACTIVE")


# -- length and position -----------------------------------------------------------------------


async def test_length_and_positions_stay_exact_while_jobs_end_out_of_order_and_are_cancelled(
    caller: Caller, tmp_path: Path
) -> None:
    function = await caller.deploy(RECORDER, concurrency=3)
    gates: dict[str, Gate] = {}

    async def submit() -> str:
        gate = Gate(tmp_path / str(uuid.uuid4()))
        request_id = await caller.submit(function.id, gate.order())
        gates[request_id] = gate
        return request_id

    running, waiting = [await submit() for _ in range(3)], [await submit() for _ in range(6)]
    await positions_become(caller, running, [0, 0, 0])
    chance = random.Random(7)  # the same order every time
    while running:
        assert await positions(caller, waiting) == list(range(1, len(waiting) + 1))
        await depth_becomes(caller, function, len(waiting), len(running))
        if len(waiting) in (5, 3):
            cancelled = waiting.pop(chance.randrange(len(waiting)))
            assert (await caller.cancel(cancelled)).status == 202
            continue
        ended = running.pop(chance.randrange(len(running)))
        gates[ended].open()
        assert (await caller.result(ended)).status == 200
        if waiting:
            running.append(waiting.pop(0))
            await positions_become(caller, running, [0] * len(running))
    await depth_becomes(caller, function, 0, 0)
    await function.undeploy()


async def test_a_waiting_request_is_told_its_place_and_how_many_there_are(
    caller: Caller, recorder: Function, gate: Gate
) -> None:
    first = await begun(caller, recorder, gate.order())
    second, third = [await caller.submit(recorder.id, gate.order()) for _ in range(2)]
    for request_id, place in ((first, 0), (second, 1), (third, 2)):
        reply = await caller.position(request_id.upper())
        assert (reply.status, reply.headers["Content-Type"].partition(";")[0]) == (200, "application/json")
        told = reply.json
        assert told.pop("queueLength") == 2
        assert told == {
            "functionId": recorder.id,
            "functionVersionId": recorder.version_id,
            "positionInQueue": place,
        }
    oldest = (await caller.depth(recorder.id)).json["queues"][0]["oldestAgeSeconds"]
    assert 0 <= oldest < 30
    gate.open()
    assert (await caller.result(third)).status == 200


async def test_a_request_that_has_ended_has_no_place_before_it(caller: Caller, mirror: Mirror) -> None:
    done = await mirror.post()
    assert (await caller.position(done.request_id)).json["positionInQueue"] == 0


async def test_a_function_that_is_not_deployed_has_no_queue(caller: Caller) -> None:
    function = await caller.deploy(RECORDER, instances=0)
    await depth_becomes(caller, function, 0, 0)
    await function.undeploy()
    for path in (function.id, f"{function.id}/versions/{function.version_id}"):
        reply = await caller.call("GET", f"{NVCF}/queues/functions/{path}")
        assert (reply.status, slug(reply)) == (404, "not-found")


async def test_without_an_instance_requests_wait_in_order(caller: Caller) -> None:
    function = await caller.deploy(RECORDER, instances=0)
    ids = [await caller.submit(function.id) for _ in range(5)]
    assert await positions(caller, ids) == [1, 2, 3, 4, 5]
    await depth_becomes(caller, function, 5, 0)
    assert (await caller.cancel(ids[0])).status == 202
    assert (await caller.cancel(ids[3])).status == 202
    assert await positions(caller, [ids[1], ids[2], ids[4]]) == [1, 2, 3]
    await function.undeploy()


# -- cancel ------------------------------------------------------------------------------------


async def test_a_cancelled_request_that_waits_never_starts(
    site: Site, caller: Caller, recorder: Function, gate: Gate
) -> None:
    await begun(caller, recorder, gate.order())
    name = str(uuid.uuid4())
    request_id = await caller.submit(recorder.id, {"id": name})
    after = await caller.submit(recorder.id)
    for _ in range(2):
        reply = await caller.cancel(request_id)
        assert (reply.status, reply.json) == (202, {"requestId": request_id, "status": "cancelled"})
        assert reply.request_id == request_id
    assert await positions(caller, [after]) == [1]
    gate.open()
    assert (await caller.result(after)).status == 200
    assert site.record.counts("start")[name] == 0
    await is_cancelled(caller, request_id)


async def is_cancelled(caller: Caller, request_id: str) -> None:
    gone = await caller.status(request_id)
    assert (gone.status, gone.headers["NVCF-STATUS"], slug(gone)) == (410, "rejected", "request-cancelled")
    assert gone.json["requestId"] == gone.request_id == request_id


async def test_a_cancelled_request_that_runs_is_aborted_in_the_function(
    site: Site, caller: Caller, recorder: Function, gate: Gate
) -> None:
    name = str(uuid.uuid4())
    request_id = await begun(caller, recorder, gate.order(id=name))
    await site.record.saw("start", name)
    assert (await caller.cancel(request_id)).status == 202
    await site.record.saw("aborted", name)
    await is_cancelled(caller, request_id)
    next_one = await caller.invoke(recorder.id, {"id": "next"})  # its slot is free again
    assert (next_one.status, site.record.counts("done")[name]) == (200, 0)


async def test_who_waits_for_a_request_that_is_cancelled_is_told(
    caller: Caller, recorder: Function, gate: Gate
) -> None:
    request_id = await begun(caller, recorder, gate.order())
    waiting = asyncio.create_task(caller.status(request_id, wait_s=30))
    await asyncio.wait([waiting], timeout=0.2)
    await caller.cancel(request_id)
    reply = await asyncio.wait_for(waiting, 20)
    assert (reply.status, slug(reply)) == (410, "request-cancelled")


@pytest.mark.parametrize("status", [200, 500])
async def test_a_request_that_has_ended_cannot_be_cancelled(caller: Caller, mirror: Mirror, status: int) -> None:
    done = await mirror.post(b"done", {"status": status})
    refused = await caller.cancel(done.request_id)
    assert (refused.status, slug(refused)) == (409, "conflict")
    assert (await caller.status(done.request_id)).body == done.body


async def test_a_hundred_cancels_at_random_leave_nothing_behind(site: Site, caller: Caller, recorder: Function) -> None:
    chance = random.Random(11)
    for _ in range(25):
        names = [str(uuid.uuid4()) for _ in range(4)]
        ids = [await caller.submit(recorder.id, {"id": name, "delay_s": 0.01}) for name in names]
        for number in chance.sample(range(4), 4):
            assert (await caller.cancel(ids[number])).status in (202, 409)
        ended = [await caller.status(request_id) for request_id in ids]
        assert {reply.status for reply in ended} <= {200, 410}
        for name, reply in zip(names, ended, strict=True):
            assert site.record.counts("start")[name] <= 1
            assert reply.status == 410 or site.record.counts("done")[name] == 1


# -- whose it is -------------------------------------------------------------------------------


def routes(request_id: str) -> list[tuple[str, str]]:
    return [
        ("GET", f"{NVCF}/queues/{request_id}/position"),
        ("DELETE", f"{NVCF}/requests/{request_id}"),
        ("GET", f"{NVCF}/pexec/status/{request_id}"),
    ]


def told(reply: Reply) -> tuple[int, dict[str, str], bytes]:
    return reply.status, {name: value for name, value in reply.headers.items() if name != "Date"}, reply.body


async def test_ids_that_were_never_given_all_read_alike(caller: Caller) -> None:
    for number in range(3):
        first, second = [
            told(await caller.call(*routes(request_id)[number])) for request_id in (UNKNOWN_ID, str(uuid.uuid4()))
        ]
        assert first == second
        assert first[0] == 404


@production_only
async def test_a_foreign_request_reads_like_one_that_never_was(
    caller: Caller, recorder: Function, stranger: Caller, gate: Gate
) -> None:
    running = await begun(caller, recorder, gate.order())
    waiting = await caller.submit(recorder.id, gate.order())
    for request_id in (running, waiting):
        for foreign, nobodys in zip(routes(request_id), routes(str(uuid.uuid4())), strict=True):
            assert told(await stranger.call(*foreign)) == told(await stranger.call(*nobodys))
    await is_running(caller, running)
    assert await positions(caller, [waiting]) == [1]
    for path in (recorder.id, f"{recorder.id}/versions/{recorder.version_id}"):
        assert (await stranger.call("GET", f"{NVCF}/queues/functions/{path}")).status == 404


@production_only
async def test_queues_are_for_keys_with_their_scope(site: Site, recorder: Function) -> None:
    async with site.caller(await site.new_key("default", "invoke_function")) as other:
        for path in (f"functions/{recorder.id}", f"{UNKNOWN_ID}/position"):
            refused = await other.call("GET", f"{NVCF}/queues/{path}")
            assert (refused.status, slug(refused)) == (403, "forbidden")
            assert "queue_details" in refused.json["detail"]
