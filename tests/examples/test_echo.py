"""The echo sample, over HTTP."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.examples.conftest import Sample, StartSample

TIMEOUT_S = 30.0
MIB = 1024 * 1024


@pytest.fixture(scope="module")
async def echo(start_sample: StartSample) -> AsyncIterator[Sample]:
    async with start_sample("echo") as sample:
        yield sample


async def post(sample: Sample, body: Any) -> tuple[int, dict[str, Any]]:
    async with sample.http.post("/echo", json=body) as response:
        return response.status, await response.json()


async def wait_until_running(sample: Sample, count: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while (await (await sample.http.get("/health")).json())["running"] != count:
            pass


async def test_a_message_is_said_back_once_and_at_once(echo: Sample) -> None:
    assert await post(echo, {"message": "hello"}) == (200, {"echo": "hello"})


async def test_a_message_is_repeated_with_spaces_between(echo: Sample) -> None:
    assert await post(echo, {"message": "blåbær 🫐", "repeats": 3}) == (200, {"echo": "blåbær 🫐 blåbær 🫐 blåbær 🫐"})


async def test_the_answer_comes_after_the_delay(echo: Sample) -> None:
    started_at = time.monotonic()
    assert await post(echo, {"message": "late", "delay": 0.3}) == (200, {"echo": "late"})
    assert time.monotonic() - started_at >= 0.3


async def test_delays_pass_side_by_side(echo: Sample) -> None:
    started_at = time.monotonic()
    answers = await asyncio.gather(*(post(echo, {"message": "x", "delay": 5}) for _ in range(20)))
    assert {status for status, _ in answers} == {200}
    assert time.monotonic() - started_at < 60  # one after another: 100 s


async def test_the_largest_message_is_said_back(echo: Sample) -> None:
    status, body = await post(echo, {"message": "é" * (MIB // 2)})
    assert (status, len(body["echo"])) == (200, MIB // 2)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "message"),
        ({"message": 7}, "message"),
        ({"message": "x" * (MIB + 1)}, "message"),
        ({"message": "\ud800"}, "message"),
        ({"message": "x", "repeats": 0}, "repeats"),
        ({"message": "x", "repeats": 1001}, "repeats"),
        ({"message": "x", "repeats": 1.5}, "repeats"),
        ({"message": "x", "repeats": True}, "repeats"),
        ({"message": "x", "repeats": None}, "repeats"),
        ({"message": "x", "delay": -1}, "delay"),
        ({"message": "x", "delay": 3601}, "delay"),
        ({"message": "x", "delay": float("nan")}, "delay"),
        ({"message": "x", "delay": "1"}, "delay"),
        ({"message": "x" * MIB, "repeats": 1000}, "repeats"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
async def test_a_bad_field_is_refused_by_name(echo: Sample, body: dict[str, Any], field: str) -> None:
    status, answer = await post(echo, body)
    assert status == 422
    assert field in answer["error"]


@pytest.mark.parametrize("body", [b"", b"hello", b"[1]", b'"text"', b"\xff\xfe", b"[" * 100_000])
async def test_a_body_that_is_no_json_object_is_refused(echo: Sample, body: bytes) -> None:
    async with echo.http.post("/echo", data=body) as response:
        assert response.status == 400
        assert "JSON" in (await response.json())["error"]


async def test_a_body_past_the_limit_is_refused_before_it_is_sent(echo: Sample) -> None:
    headers = {"Content-Length": str(100 * MIB), "Expect": "100-continue"}
    async with echo.http.post("/echo", data=b"x" * (100 * MIB), headers=headers) as response:
        assert response.status == 413
        assert "bytes" in (await response.json())["error"]


async def test_a_body_of_undeclared_length_is_cut_off_at_the_limit(echo: Sample) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(8):
            yield b"x" * MIB

    async with echo.http.post("/echo", data=endless()) as response:
        assert response.status == 413


async def test_work_stops_when_the_client_leaves(start_sample: StartSample) -> None:
    async with start_sample("echo") as sample:
        async with aiohttp.ClientSession(sample.url) as leaving:
            request = asyncio.create_task(leaving.post("/echo", json={"message": "x", "delay": 600}))
            await wait_until_running(sample, 1)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
        await wait_until_running(sample, 0)


async def test_a_running_request_is_finished_after_sigterm(start_sample: StartSample) -> None:
    async with start_sample("echo") as sample:
        request = asyncio.create_task(post(sample, {"message": "last words", "delay": 0.5}))
        await wait_until_running(sample, 1)
        assert await sample.terminate() == 0
        assert await request == (200, {"echo": "last words"})
