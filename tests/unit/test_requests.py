"""Requests as things, over HTTP: lists, receipts, limits by header."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from broker.model import Outcome
from tests.unit.test_server import FUNCTION, NOBODYS, NOW, NVCF, VERSION, House, caller, opened, slug

REQUESTS = f"{NVCF}/requests"


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path, region="eu-1") as found:
        yield found


async def look(house: House, path: str) -> Any:
    async with house.client.get(path) as response:
        body = await response.read()
        assert response.status == 200, body
        return json.loads(body)


async def refusal(house: House, path: str) -> str:
    async with house.client.get(path) as response:
        assert response.status == 400
        return str(json.loads(await response.read())["detail"])


async def listed(house: House, query: str = "") -> list[str]:
    return [each["requestId"] for each in (await look(house, REQUESTS + query))["requests"]]


# -- lists -------------------------------------------------------------------------------------


async def test_requests_are_listed_newest_first_in_pages(house: House) -> None:
    ids = [await house.submit() for _ in range(5)]
    first = await look(house, f"{REQUESTS}?limit=3")
    second = await look(house, f"{REQUESTS}?limit=3&cursor={quote(first['cursor'])}")
    assert [each["requestId"] for each in first["requests"] + second["requests"]] == ids[::-1]
    assert "cursor" not in second


async def test_an_entry_says_what_became_of_a_request(house: House) -> None:
    done, waiting = await house.submit(), await house.submit()
    await house.finish(Outcome(status=201, body=b"done"))
    newest, oldest = (await look(house, REQUESTS))["requests"]
    assert (newest["requestId"], newest["status"]) == (waiting, "queued")
    assert newest.keys() == {"requestId", "functionId", "functionVersionId", "status", "createdAt"}
    assert (oldest["requestId"], oldest["status"], oldest["statusCode"]) == (done, "fulfilled", 201)
    assert (oldest["functionId"], oldest["functionVersionId"]) == (FUNCTION, VERSION)
    assert oldest["createdAt"] <= oldest["startedAt"] <= oldest["finishedAt"]


async def test_a_list_is_narrowed_by_function_version_status_and_time(house: House) -> None:
    first = await house.submit()
    await asyncio.sleep(0.005)  # times are told in milliseconds
    second = await house.submit()
    await house.finish()
    created_at = quote((await look(house, f"{REQUESTS}/{second}"))["createdAt"])
    for query, found in {
        f"?functionId={FUNCTION}": [second, first],
        f"?functionId={NOBODYS}": [],
        f"?functionVersionId={VERSION.upper()}": [second, first],
        f"?functionVersionId={NOBODYS}": [],
        "?status=FULFILLED": [first],
        "?status=queued,fulfilled": [second, first],
        "?status=queued&status=running": [second],
        "?status=timed-out": [],
        "?createdAfter=2020-01-01T00:00:00%2B02:00": [second, first],
        "?createdAfter=2020-01-01T00:00:00+02:00": [second, first],
        "?createdBefore=2020-01-01T00:00:00Z": [],
        f"?createdBefore={created_at}": [first],
        f"?createdAfter={created_at}&createdBefore={created_at}": [],
    }.items():
        assert await listed(house, query) == found, query


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("limit=0", "limit: must be a whole number from 1 to 200"),
        ("limit=201", "limit"),
        ("limit=x", "limit"),
        ("cursor=x", "cursor"),
        ("cursor=%FF%C3", "cursor"),
        ("cursor=__________8", "cursor"),
        ("status=done", "status: must be of queued, running, fulfilled"),
        ("status=abandoned", "status"),
        ("functionId=1", "functionId"),
        ("functionVersionId=1", "functionVersionId"),
        ("createdAfter=yesterday", "createdAfter: must be a time with its offset"),
        ("createdBefore=2026-01-31T08:00:00", "createdBefore"),
        ("createdBefore=0001-01-01T00:00:00%2B14:00", "createdBefore"),
    ],
)
async def test_a_wrong_parameter_is_named(house: House, query: str, named: str) -> None:
    assert named in await refusal(house, f"{REQUESTS}?{query}")


async def test_an_account_sees_its_own_requests_only(house: House) -> None:
    mine = await house.submit()
    async with caller(house, "other") as stranger, stranger.get(REQUESTS) as response:
        assert (response.status, await response.json()) == (200, {"requests": []})
    async with caller(house, "default", "invoke_function") as colleague, colleague.get(REQUESTS) as response:
        assert [each["requestId"] for each in (await response.json())["requests"]] == [mine]
    async with caller(house, "default", "queue_details") as without, without.get(REQUESTS) as response:
        assert response.status == 403


async def test_a_super_admin_sees_an_accounts_requests(house: House) -> None:
    mine = await house.submit()
    async with caller(house, "operator", "admin:invoke_function") as admin:
        for path in ("requests", f"requests/{mine}"):
            async with admin.get(f"{NVCF}/accounts/default/{path}") as response:
                assert response.status == 200
                assert mine in await response.text()
        async with admin.get(f"{NVCF}/accounts/default/requests/{NOBODYS}") as response:
            assert "instance" not in await response.json(content_type="application/problem+json")


# -- receipts ----------------------------------------------------------------------------------


async def test_a_receipt_tells_every_attempt_and_where_the_time_went(house: House) -> None:
    request_id = await house.submit()
    delivery = await house.broker.queue.take(VERSION)
    assert delivery is not None
    claim = await house.broker.results.claim(delivery.job, worker="first", lease_s=60, max_attempts=3)
    assert claim.lease is not None
    await house.broker.results.release(claim.lease, refund=False)
    await delivery.requeue()
    await house.finish()
    receipt = await look(house, f"{REQUESTS}/{request_id}")
    assert [(each["number"], each["instanceId"], each["outcome"]) for each in receipt["attempts"]] == [
        (1, "first", "failed"),
        (2, "w", "fulfilled"),
    ]
    times = [datetime.fromisoformat(receipt[name]) for name in ("createdAt", "startedAt", "finishedAt", "deadlineAt")]
    assert times == sorted(times)
    assert receipt["attempts"][-1]["endedAt"] == receipt["finishedAt"]
    assert {"queueSeconds", "totalSeconds"} <= receipt["timings"].keys()
    assert "body" not in receipt


async def test_a_receipt_of_what_waits_has_no_attempts_and_tells_its_limits(house: House) -> None:
    limits = {"NVCF-QUEUE-TIMEOUT-SECONDS": "30", "NVCF-RUN-TIMEOUT-SECONDS": "90"}
    _, told, _ = await house.invoke(NOW | limits)
    receipt = await look(house, f"{REQUESTS}/{told['NVCF-REQID']}")
    assert (receipt["status"], receipt["attempts"], receipt["runTimeoutSeconds"]) == ("queued", [], 90)
    created_at, queue_deadline_at = (datetime.fromisoformat(receipt[name]) for name in ("createdAt", "queueDeadlineAt"))
    assert (queue_deadline_at - created_at).total_seconds() == pytest.approx(30, abs=0.01)
    assert not {"startedAt", "finishedAt", "statusCode", "timings", "reason"} & receipt.keys()
    job = await house.finish()
    assert (job.run_timeout_s, job.region) == (90, "eu-1")
    assert not any(name.startswith("NVCF-") for name, _ in job.headers)


async def test_a_result_carries_server_timing(house: House) -> None:
    request_id = await house.submit()
    async with house.client.get(f"{NVCF}/pexec/status/{request_id}", headers=NOW) as response:
        assert "Server-Timing" not in response.headers
    await house.finish()
    async with house.client.get(f"{NVCF}/pexec/status/{request_id}") as response:
        names = [part.partition(";dur=")[0] for part in response.headers["Server-Timing"].split(", ")]
    assert (names[0], names[-1]) == ("queue", "total")


# -- limits ------------------------------------------------------------------------------------


async def test_what_nobody_takes_in_time_is_answered_as_its_own_problem(house: House) -> None:
    status, told, body = await house.invoke({"NVCF-QUEUE-TIMEOUT-SECONDS": "1", "NVCF-POLL-SECONDS": "30"})
    assert (status, slug(body), told["NVCF-STATUS"]) == (504, "queue-timeout", "rejected")
    receipt = await look(house, f"{REQUESTS}/{told['NVCF-REQID']}")
    assert (receipt["status"], receipt["attempts"]) == ("expired", [])
    assert "queue timeout" in receipt["reason"]
    assert await listed(house, "?status=expired") == [told["NVCF-REQID"]]


@pytest.mark.parametrize("name", ["NVCF-QUEUE-TIMEOUT-SECONDS", "nvcf-run-timeout-seconds"])
@pytest.mark.parametrize("value", ["0", "86401", "1.5", "soon"])
async def test_a_limit_out_of_bounds_is_refused_before_anything_runs(house: House, name: str, value: str) -> None:
    status, _, body = await house.invoke({name: value})
    assert status == 400
    assert f"{name.upper()} must be given once, as 1 to 86400 whole seconds" in json.loads(body)["detail"]
    assert await house.queued() == 0


async def test_a_functions_own_limits_are_taken_kept_and_used(house: House) -> None:
    definition = {
        "name": "f", "inferenceUrl": "/", "containerImage": "i", "queueTimeout": "PT2M", "runTimeout": "PT1H0.0S",
    }  # fmt: skip
    async with house.client.post(f"{NVCF}/functions", json=definition) as response:
        made = (await response.json())["function"]
    assert (made["queueTimeout"], made["runTimeout"]) == ("PT120S", "PT3600S")
    row = await house.broker.catalog.versions.get(made["versionId"])
    assert row is not None
    assert (row.item.queue_timeout_s, row.item.run_timeout_s) == (120, 3600)
    for wrong in ("PT0S", "PT0.5S", "P31D", "30", ""):
        async with house.client.post(f"{NVCF}/functions", json={**definition, "runTimeout": wrong}) as response:
            assert response.status == 400
            assert "runTimeout" in await response.text()
