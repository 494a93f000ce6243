"""What the examples for function authors do when their process is told to stop, or their caller leaves."""

from __future__ import annotations

import asyncio

from tests.eventually import eventually
from tests.examples.conftest import Sample, StartSample

TIMEOUT_S = 60.0


async def test_a_thread_is_finished_after_sigterm(start_sample: StartSample) -> None:
    async def running(sample: Sample) -> int:
        return int((await (await sample.http.get("/stats")).json())["running"])

    async with start_sample("authors/cancel.py") as sample:
        request = asyncio.create_task(sample.http.post("/run", json={"steps": 10}))
        await eventually(lambda: running(sample), lambda seen: seen == 1)
        assert await sample.terminate() == 0
        assert await (await request).json() == {"steps": 10}


async def test_plain_python_finishes_after_sigterm_what_runs(start_sample: StartSample) -> None:
    async with start_sample("authors/plain.py") as sample:
        request = asyncio.create_task(sample.http.post("/run", json={"steps": 10}, headers={"NVCF-REQID": "r1"}))
        assert await next_line(sample) == "r1: 10 steps"
        assert await sample.terminate() == 0
        assert await (await request).json() == {"steps": 10}


async def test_plain_python_notices_that_its_caller_has_left(start_sample: StartSample) -> None:
    async with start_sample("authors/plain.py") as sample:
        request = asyncio.create_task(sample.http.post("/run", json={"steps": 6000}, headers={"NVCF-REQID": "r1"}))
        assert await next_line(sample) == "r1: 6000 steps"
        request.cancel()
        assert (await next_line(sample)).startswith("r1: nobody wants it any more")


async def next_line(sample: Sample) -> str:
    assert sample.process.stdout is not None
    async with asyncio.timeout(TIMEOUT_S):
        return (await sample.process.stdout.readline()).decode().rstrip()
