"""`make stack` as a user has it: processes die under load, and everything accepted is answered once."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import psutil
import pytest

from tests.eventually import eventually
from tests.house import RECORDER, Caller, Reply
from tests.stack import Stack

INVOCATIONS = 200
AT_ONCE = 16


@pytest.fixture(scope="module")
async def stack(programs: None, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    made = Stack(tmp_path_factory.mktemp("stack"))
    try:
        yield made
    finally:
        await asyncio.to_thread(made.run, "down")


async def test_up_prints_how_to_invoke_and_the_line_works(stack: Stack) -> None:
    printed = await asyncio.to_thread(stack.run, "up")
    assert stack.url in printed
    assert stack.key in printed
    line = next(line.strip() for line in printed.splitlines() if line.strip().startswith("curl "))
    answered = await asyncio.to_thread(subprocess.check_output, ["bash", "-c", line], timeout=60)
    assert json.loads(answered) == {"echo": "hello hello"}
    assert "already running" in await asyncio.to_thread(stack.run, "up")
    assert "profile B:" in await asyncio.to_thread(stack.run, "doctor")  # which ends badly if anything fails


async def persist(call: Callable[[], Awaitable[Reply]]) -> Reply:
    """The first answer that is one: a caller repeats what was cut or put off, under the same key."""

    async def attempt() -> Reply | None:
        try:
            reply = await call()
        except (aiohttp.ClientError, TimeoutError):
            return None
        return None if reply.status in (429, 503) else reply

    reply = await eventually(attempt, lambda seen: seen is not None, within_s=100)
    assert reply is not None
    return reply


@pytest.mark.timeout(300)
async def test_two_hundred_invocations_survive_the_death_of_worker_api_and_rabbitmq(stack: Stack) -> None:
    await asyncio.to_thread(stack.run, "up")
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        caller = Caller(session, stack.url, stack.key)
        function = await caller.deploy(RECORDER, concurrency=4)
        free = asyncio.Semaphore(AT_ONCE)
        answered: dict[int, Reply] = {}

        async def invoke(number: int) -> None:
            order, key = {"id": f"order-{number}", "delay_s": 0.2}, {"Idempotency-Key": f"order-{number}"}
            async with free:
                reply = await persist(lambda: caller.invoke(function.id, order, headers=key))
                if reply.status == 202:
                    reply = await caller.result(reply.request_id, within_s=100)
                answered[number] = reply

        async def kill(after: int, find: Callable[[], psutil.Process | None]) -> None:
            async def count() -> int:
                return len(answered)

            await eventually(count, lambda seen: seen >= after, within_s=200)
            found = await eventually(lambda: asyncio.to_thread(find), lambda process: process is not None)
            assert found is not None
            found.kill()

        async with asyncio.TaskGroup() as group:
            for number in range(INVOCATIONS):
                group.create_task(invoke(number))
            group.create_task(kill(30, lambda: stack.sidecar(function.version_id)))
            group.create_task(kill(70, lambda: stack.child("api")))
            group.create_task(kill(110, lambda: stack.child("rabbitmq")))
        for number, reply in answered.items():
            assert (reply.status, reply.json["id"]) == (200, f"order-{number}")
            again = await caller.status(reply.request_id)
            assert (again.status, again.body) == (200, reply.body)
        assert len({reply.request_id for reply in answered.values()}) == INVOCATIONS
        done = stack.record.counts("done")
        starts = stack.record.counts("start")
        assert all(done[f"order-{number}"] >= 1 for number in range(INVOCATIONS))
        # Only what ran in the worker when it was killed may have been started again.
        assert sum(starts.values()) <= INVOCATIONS + 4
        await function.undeploy()


async def test_down_leaves_nothing_behind_and_can_be_repeated(stack: Stack) -> None:
    await asyncio.to_thread(stack.run, "up")
    here = str(stack.folder)
    await asyncio.to_thread(stack.run, "down")
    assert [found for found in psutil.process_iter() if mentions(found, here)] == []
    assert "not running" in await asyncio.to_thread(stack.run, "down")


def mentions(process: psutil.Process, folder: str) -> bool:
    try:
        return process.environ().get("FNQUEUE_STACK_DIR", "").startswith(folder)
    except psutil.Error:
        return False
