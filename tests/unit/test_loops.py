from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest

from broker.errors import StoreUnavailable
from workers import loops


class Steps:
    """A step that fails or succeeds as written down; `done` is set when the script is at its end."""

    def __init__(self, *script: Exception | str) -> None:
        self.script = list(script)
        self.done = asyncio.Event()

    async def __call__(self) -> str:
        if not self.script:
            self.done.set()
            return ""
        now = self.script.pop(0)
        if isinstance(now, Exception):
            raise now
        return now


async def run_through(steps: Steps) -> None:
    async with asyncio.timeout(20), loops.beside(loops.every(0.001, steps, name="sweep")):
        await steps.done.wait()


async def test_a_failing_step_does_not_end_the_loop() -> None:
    await run_through(Steps(ValueError("bug"), StoreUnavailable("away"), "fine"))


async def test_a_streak_of_failures_is_logged_once_and_its_end_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    away = StoreUnavailable("away")
    await run_through(Steps(away, away, away, "fine", "fine", away, "fine"))
    events = [record.getMessage() for record in caplog.records if record.name == "workers.loops"]
    assert events == ["loop_failing", "loop_recovered", "loop_failing", "loop_recovered"]
    assert vars(caplog.records[0])["loop"] == "sweep"


async def test_a_cancelled_loop_ends() -> None:
    async with loops.together() as group:
        task = group.create_task(loops.every(0.001, Steps(), name="sweep"))
        await asyncio.sleep(0)
        task.cancel()
    assert task.cancelled()


async def test_insist_repeats_until_it_has_a_result() -> None:
    away = StoreUnavailable("away")
    assert await loops.insist(Steps(away, away, "there"), on=StoreUnavailable, name="claim") == "there"


async def test_insist_raises_what_it_was_not_told_to_outlast() -> None:
    with pytest.raises(ValueError, match="bug"):
        await loops.insist(Steps(ValueError("bug")), on=StoreUnavailable, name="claim")


async def test_guard_turns_a_bug_into_a_fault_and_logs_it(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(loops.Fault) as fault:
        await loops.guard(Steps(KeyError("bug"))(), request_id="r")
    assert isinstance(fault.value.__cause__, KeyError)
    assert caplog.records[0].exc_info
    assert vars(caplog.records[0])["request_id"] == "r"


async def test_guard_lets_expected_errors_and_cancellation_through() -> None:
    with pytest.raises(StoreUnavailable):
        await loops.guard(Steps(StoreUnavailable("away"))(), expected=(StoreUnavailable,))
    with pytest.raises(asyncio.CancelledError):
        await loops.guard(raising(asyncio.CancelledError()))


async def test_beside_ends_its_work_with_the_body() -> None:
    ended = asyncio.Event()
    async with loops.beside(forever(ended)):
        await asyncio.sleep(0)
    assert ended.is_set()


async def test_beside_raises_an_error_of_its_work_into_the_body_as_it_is() -> None:
    cause = ValueError("cause")
    ended = asyncio.Event()
    with pytest.raises(KeyError) as raised:
        async with loops.beside(raising(KeyError("stop"), cause)):
            await forever(ended)
    assert ended.is_set()
    assert raised.value.__cause__ is cause


async def test_beside_raises_an_error_of_the_body_as_it_is() -> None:
    ended = asyncio.Event()
    with pytest.raises(KeyError):
        async with loops.beside(forever(ended)):
            await raising(KeyError("stop"))
    assert ended.is_set()


async def test_beside_passes_a_cancellation_on() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        async with loops.beside(forever(ended)):
            await asyncio.Event().wait()

    async with loops.together() as group:
        task = group.create_task(work())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
    assert task.cancelled()
    assert ended.is_set()


async def test_either_returns_with_the_first_and_cancels_the_rest() -> None:
    ended = asyncio.Event()
    await loops.either(asyncio.sleep(0), forever(ended))
    assert ended.is_set()


async def test_either_raises_what_the_first_raised() -> None:
    ended = asyncio.Event()
    with pytest.raises(KeyError):
        await loops.either(raising(KeyError("stop")), forever(ended))
    assert ended.is_set()


async def test_a_cancelled_wait_for_a_thread_ends_after_the_thread() -> None:
    stop, at_work, finished = threading.Event(), asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def work() -> None:
        loop.call_soon_threadsafe(at_work.set)
        assert stop.wait(5)
        finished.set()

    async with loops.together() as group:
        task = group.create_task(loops.in_thread(work, stop=stop.set))
        await at_work.wait()
        task.cancel()
    assert task.cancelled()
    assert finished.is_set()


async def test_a_clerk_answers_each_with_what_its_own_work_returned_or_raised() -> None:
    with loops.Clerk() as clerk:
        works = [clerk.run(int, text) for text in ("1", "x", "3")]
        first, second, third = await asyncio.gather(*works, return_exceptions=True)
    assert (first, third) == (1, 3)
    assert isinstance(second, ValueError)


async def test_a_clerk_takes_what_came_while_it_was_at_work_in_one_turn() -> None:
    begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    done: list[int] = []

    def slow() -> None:
        loop.call_soon_threadsafe(begun.set)
        assert go_on.wait(5)

    with loops.Clerk() as clerk:
        async with loops.together() as group:
            group.create_task(clerk.run(slow))
            await begun.wait()
            for number in range(10):
                group.create_task(clerk.run(done.append, number))
            await asyncio.sleep(0)
            go_on.set()
    assert done == list(range(10))


async def test_a_cancelled_wait_for_a_clerk_ends_after_the_work() -> None:
    begun, go_on, finished = asyncio.Event(), threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def work() -> None:
        loop.call_soon_threadsafe(begun.set)
        assert go_on.wait(5)
        finished.set()

    with loops.Clerk() as clerk:
        async with loops.together() as group:
            task = group.create_task(clerk.run(work))
            await begun.wait()
            task.cancel()
            loop.call_later(0.01, go_on.set)
        assert task.cancelled()
        assert finished.is_set()
        assert await clerk.run(int, "1") == 1


async def test_what_was_slow_on_the_loop_is_the_clerks_from_then_on() -> None:
    here = threading.get_ident()

    def slow() -> int:
        time.sleep(loops.HELD_S)  # a disk that is being flushed
        return threading.get_ident()

    with loops.Clerk() as clerk:
        assert await clerk.soon(slow) == here
        assert clerk.patient
        assert await clerk.soon(threading.get_ident) != here


async def test_what_only_waited_for_its_turn_now_and_then_stays_on_the_loop() -> None:
    with loops.Clerk() as clerk:
        for _ in range(3):
            clerk.now(time.sleep, 2 * loops.QUICK_S)
        assert not clerk.patient


async def raising(error: BaseException, cause: Exception | None = None) -> None:
    await asyncio.sleep(0)
    raise error from cause


async def forever(ended: asyncio.Event) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        ended.set()
