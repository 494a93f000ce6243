"""What is known of a request afterwards, and what becomes of one that is late, on both families."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.e2e.conftest import NVCF, UNKNOWN_ID, Gate, Mirror, Site, begun, idle, production_only, slug
from tests.eventually import eventually
from tests.house import RECORDER, Caller, Function, Reply

MIB = 1024 * 1024
LATE_S = 20.0


def timing(reply: Reply) -> dict[str, float]:
    """What `Server-Timing` says, in milliseconds."""
    parts = (part.partition(";dur=") for part in reply.headers["Server-Timing"].split(", "))
    return {name: float(duration) for name, _, duration in parts}


async def receipt(caller: Caller, request_id: str) -> Any:
    reply = await caller.call("GET", f"{NVCF}/requests/{request_id}")
    assert (reply.status, reply.request_id) == (200, request_id)
    return reply.json


async def listed(caller: Caller, query: str) -> list[str]:
    reply = await caller.call("GET", f"{NVCF}/requests?{query}")
    assert reply.status == 200
    return [each["requestId"] for each in reply.json["requests"]]


def billed(site: Site) -> list[dict[str, Any]]:
    """The lines of all sidecars that are marked `metering`."""
    logs = (site.record.path.parent / "data" / "instances").glob("*/sidecar.log")
    lines = (line for log in logs for line in log.read_text().splitlines() if '"metering":true' in line)
    return [json.loads(line) for line in lines]


async def test_a_result_says_where_its_time_went_and_so_does_its_receipt(mirror: Mirror) -> None:
    reply = await mirror.post(b"{}", {"delay_s": 0.2, "size_bytes": 6 * MIB})
    assert reply.status == 302
    told = timing(reply)
    assert 200 <= told["container"] < told["total"]
    assert told["upload"] > 0
    assert told["queue"] + told["container"] + told["upload"] <= told["total"] + 1
    kept = await receipt(mirror.caller, reply.request_id)
    assert (kept["status"], kept["functionId"]) == ("fulfilled", mirror.function.id)
    assert kept["timings"]["containerSeconds"] * 1000 == pytest.approx(told["container"], abs=1)
    [attempt] = kept["attempts"]
    assert (attempt["number"], attempt["outcome"]) == (1, "fulfilled")
    assert kept["createdAt"] <= attempt["startedAt"] <= attempt["endedAt"]
    again = await mirror.caller.status(reply.request_id)
    assert timing(again) == told


async def test_requests_are_found_by_function_and_status_page_by_page(mirror: Mirror) -> None:
    caller = mirror.caller
    ids = [(await mirror.post(b"{}", {"status": status})).request_id for status in (200, 500, 200)]
    function = f"functionId={mirror.function.id}"
    assert await listed(caller, f"{function}&limit=3") == ids[::-1]
    assert (await listed(caller, f"{function}&status=errored&limit=1"))[0] == ids[1]
    first = (await caller.call("GET", f"{NVCF}/requests?{function}&limit=2")).json
    assert (await listed(caller, f"{function}&limit=1&cursor={first['cursor']}")) == ids[:1]
    assert await listed(caller, f"functionId={UNKNOWN_ID}") == []


@production_only
async def test_a_strangers_request_is_one_that_never_was(mirror: Mirror, stranger: Caller) -> None:
    request_id = (await mirror.post()).request_id
    foreign, random = [await stranger.call("GET", f"{NVCF}/requests/{each}") for each in (request_id, UNKNOWN_ID)]
    assert (foreign.status, foreign.body) == (random.status, random.body)
    assert foreign.status == 404
    assert request_id not in await listed(stranger, "limit=200")


async def test_what_waits_for_too_long_ends_and_never_starts(
    site: Site, caller: Caller, recorder: Function, gate: Gate
) -> None:
    running = await begun(caller, recorder, gate.order())
    asked_at = time.monotonic()
    late = await caller.invoke(recorder.id, {}, headers={"NVCF-QUEUE-TIMEOUT-SECONDS": "1"})
    assert (late.status, slug(late), late.headers["NVCF-STATUS"]) == (504, "queue-timeout", "rejected")
    assert 1 <= time.monotonic() - asked_at < 1 + LATE_S
    kept = await receipt(caller, late.request_id)
    assert (kept["status"], kept["attempts"]) == ("expired", [])
    gate.open()
    assert (await caller.result(running)).status == 200
    await idle(caller, recorder)
    assert site.record.counts("start")[late.request_id] == 0


async def test_nobody_has_to_ask_or_work_for_a_queue_timeout(caller: Caller) -> None:
    """The function's own, without a healthy instance and without a reader; a request may bring another."""
    never = {"protocol": "HTTP", "uri": "/never", "port": 8000, "timeout": "PT1S", "expectedStatusCode": 200}
    function = await caller.deploy(RECORDER, instances=0, queueTimeout="PT1S", health=never)
    request_id, patient = [
        await caller.submit(function.id, headers=headers) for headers in ({}, {"NVCF-QUEUE-TIMEOUT-SECONDS": "600"})
    ]

    async def depth() -> int:
        return int((await caller.depth(function.id)).json["queues"][0]["queueDepth"])

    await eventually(depth, lambda found: found == 1, within_s=30)
    assert [(await receipt(caller, each))["status"] for each in (request_id, patient)] == ["expired", "queued"]
    await function.undeploy()


async def test_what_runs_for_too_long_is_cut_off(site: Site, caller: Caller, recorder: Function, gate: Gate) -> None:
    asked_at = time.monotonic()
    late = await caller.invoke(recorder.id, gate.order(), headers={"NVCF-RUN-TIMEOUT-SECONDS": "1"})
    assert (late.status, slug(late), late.headers["NVCF-STATUS"]) == (504, "run-timeout", "errored")
    assert 1 <= time.monotonic() - asked_at < 1 + LATE_S
    await site.record.saw("aborted", late.request_id)
    kept = await receipt(caller, late.request_id)
    assert (kept["status"], kept["runTimeoutSeconds"]) == ("timed-out", 1)
    assert [attempt["outcome"] for attempt in kept["attempts"]] == ["timed-out"]


@production_only
async def test_an_invocation_is_billed_once(site: Site, mirror: Mirror) -> None:
    reply = await mirror.post(b"12345", {"delay_s": 0.1}, headers={"X-Billing-Order": "17"})

    async def lines() -> list[dict[str, Any]]:
        return [line for line in billed(site) if line.get("request_id") == reply.request_id]

    [line] = await eventually(lines, lambda found: len(found) == 1)
    assert (line["event_type"], line["response_type"], line["size"]) == ("NVCF_Invocation", "FULFILLED", 5)
    assert (line["duration"], line["nca_id"], line["gpus"]) == (1, "default", 0)
    assert line["billing_headers"] == {"x-billing-order": "17"}
    beats = [each["status"] for each in billed(site) if each["event_type"] == "NVCF_Infrastructure"]
    assert beats[0] == "initializing"
