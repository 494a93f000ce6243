"""Who has to wait is told for how long, by every answer that may say so."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.backends.memory.results import MemoryResults
from broker.errors import StoreUnavailable
from broker.model import (
    Deployment,
    Draft,
    GpuSpecification,
    Instance,
    InstanceStatus,
    Job,
    Outcome,
    RequestState,
    Timings,
)
from broker.outlooks import FRESH_S, Outlooks
from tests.unit.test_server import FUNCTION, NOW, NVCF, VERSION, House, opened

RUNS = 12


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """Its function has one ready slot and did something lately."""
    async with opened(tmp_path, queue_limit=1000) as running:
        await furnish(running)
        yield running


async def ran(house: House, *, run_s: float = 0.0, start_s: float = 0.0, count: int = RUNS) -> None:
    """So many requests, of which nobody at the front door heard."""
    store = house.broker.results.results  # type: ignore[attr-defined]  # Replicated's
    assert isinstance(store, MemoryResults)
    for _ in range(count):
        draft = Draft(
            id=str(uuid.uuid4()), account="a", function_id=FUNCTION, version_id=VERSION, digest="d", deadline_s=600.0
        )
        made = await store.create(draft, queue_limit=1000, watch=False)
        job = Job(
            id=made.id,
            account="a",
            function_id=FUNCTION,
            version_id=VERSION,
            subject="s",
            created_at=made.created_at,
            deadline_at=made.deadline_at,
            digest="d",
        )
        claim = await store.claim(job, worker="w", lease_s=600.0, max_attempts=3)
        entry = store.entry(job.id)
        assert claim.lease is not None
        assert entry is not None
        entry.started_at -= run_s
        timings = Timings(start_s=start_s)
        await store.settle(claim.lease, job, RequestState.FULFILLED, Outcome(status=200), timings)


async def furnish(house: House, *, run_s: float = 0.0) -> None:
    await ran(house, run_s=run_s)
    now = time.time()
    await house.broker.catalog.beat(
        Instance(
            id="i",
            function_id=FUNCTION,
            version_id=VERSION,
            account="default",
            gpu="GPU",
            instance_type="GPU",
            backend="b",
            status=InstanceStatus.RUNNING,
            created_at=now,
            updated_at=now,
        ),
        ttl_s=600,
    )


def parsed(eta: str) -> tuple[float, float]:
    p50, p90 = (part.split("=") for part in eta.split(", "))
    assert (p50[0], p90[0]) == ("p50", "p90")
    return float(p50[1]), float(p90[1])


async def get(house: House, path: str) -> dict[str, Any]:
    async with house.client.get(f"{NVCF}{path}") as response:
        assert response.status == 200
        return dict(await response.json())


async def test_every_answer_to_who_waits_says_for_how_long(house: House) -> None:
    status, headers, _ = await house.invoke(NOW)
    assert status == 202
    request_id = headers["NVCF-REQID"]
    async with house.client.get(f"{NVCF}/pexec/status/{request_id}", headers=NOW) as response:
        assert response.status == 202
        told = [parsed(headers["NVCF-ETA"]), parsed(response.headers["NVCF-ETA"])]
        assert int(response.headers["Retry-After"]) >= 1
    for path in (f"/requests/{request_id}", f"/queues/{request_id}/position"):
        eta = (await get(house, path))["eta"]
        told.append((eta["p50Seconds"], eta["p90Seconds"]))
    async with house.client.get(f"{NVCF}/requests/{request_id}/events") as response:
        async for line in response.content:
            if line.startswith(b"data:"):
                assert b'"eta":{"p50Seconds":' in line
                break
    assert all(0 <= p50_s <= p90_s for p50_s, p90_s in told)


async def test_a_result_has_no_estimate(house: House) -> None:
    request_id = await house.submit()
    await house.finish(Outcome(status=200, body=b"done"))
    async with house.client.get(f"{NVCF}/pexec/status/{request_id}") as response:
        assert (response.status, response.headers.get("NVCF-ETA")) == (200, None)
    assert "eta" not in await get(house, f"/requests/{request_id}")


async def test_what_is_not_known_is_not_told(tmp_path: Path) -> None:
    async with opened(tmp_path) as house:
        _, headers, _ = await house.invoke(NOW)
        assert (headers.get("NVCF-ETA"), headers["Retry-After"]) == (None, "1")
        request_id = headers["NVCF-REQID"]
        assert "eta" not in await get(house, f"/requests/{request_id}")
        assert "eta" not in await get(house, f"/queues/{request_id}/position")


async def test_an_answer_is_given_although_the_estimate_fails(tmp_path: Path) -> None:
    async with opened(tmp_path, failing={"line": StoreUnavailable("away")}) as house:
        await furnish(house)
        status, headers, _ = await house.invoke(NOW)
        assert (status, headers.get("NVCF-ETA")) == (202, None)


async def test_retry_after_is_when_the_first_results_would_come(tmp_path: Path) -> None:
    async with opened(tmp_path, queue_limit=1000, max_poll_pause_s=7) as house:
        await furnish(house, run_s=100.0)
        request_id = await house.submit()
        async with house.client.get(f"{NVCF}/pexec/status/{request_id}", headers=NOW) as response:
            assert response.headers["Retry-After"] == "7"
            p50_s, p90_s = parsed(response.headers["NVCF-ETA"])
            assert 80 < p50_s <= p90_s < 125


# -- one look for many -----------------------------------------------------------------------------


class Counting:
    """Starts tasks, and counts them."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    def __call__(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self.tasks.append(asyncio.get_running_loop().create_task(work))
        return self.tasks[-1]


async def test_one_look_serves_all_who_ask(house: House) -> None:
    record = await house.broker.results.read(await house.submit())
    assert record is not None
    spawn = Counting()
    outlooks = Outlooks(house.broker, spawn)
    began = asyncio.get_running_loop().time()
    found = await asyncio.gather(*(outlooks.estimate(record) for _ in range(100)))
    assert None not in found
    looks = 1 + (asyncio.get_running_loop().time() - began) // FRESH_S
    assert len(spawn.tasks) <= looks


async def test_a_request_that_ended_or_is_of_no_version_asks_nobody(house: House) -> None:
    record = await house.broker.results.read(await house.submit())
    assert record is not None
    spawn = Counting()
    outlooks = Outlooks(house.broker, spawn)
    assert await outlooks.estimate(replace(record, state=RequestState.FULFILLED)) is None
    assert await outlooks.estimate(replace(record, version_id="")) is None
    assert spawn.tasks == []


async def test_so_many_versions_are_remembered_and_no_more(house: House) -> None:
    record = await house.broker.results.read(await house.submit())
    assert record is not None
    outlooks = Outlooks(house.broker, Counting(), most=3)
    for number in range(10):
        await outlooks.estimate(replace(record, version_id=str(number)))
    assert list(outlooks._versions) == ["7", "8", "9"]


async def test_a_deployment_that_may_grow_is_counted_on_after_a_start_was_seen(tmp_path: Path) -> None:
    async with opened(tmp_path, queue_limit=1000) as house:
        await ran(house, run_s=1.0, start_s=20.0)
        record = await house.broker.results.read(await house.submit())
        assert record is not None
        assert await Outlooks(house.broker, Counting()).estimate(record) is None
        await house.broker.catalog.deployments.put(
            Deployment(
                id="d",
                function_id=FUNCTION,
                version_id=VERSION,
                account="default",
                specifications=(
                    GpuSpecification(id="s", gpu="GPU", instance_type="GPU", min_instances=0, max_instances=4),
                ),
                created_at=1.0,
                updated_at=1.0,
            )
        )
        found = await Outlooks(house.broker, Counting()).estimate(record)
        assert found is not None
        assert found.p50_s == pytest.approx(21, rel=0.2)
