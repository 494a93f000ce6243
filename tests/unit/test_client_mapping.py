"""Many inputs at once: how many run, in which order results come, and what a failure or an early end does."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fnqueue.errors import ConnectionFailed
from fnqueue.mapping import AHEAD, Mapped, Order, mapped
from fnqueue.results import Result


def result(value: int) -> Result:
    return Result(request_id="r", status=200, headers={}, content=str(value).encode())


class Work:
    """Each value ends when it is told to; `most` is how many ran at once."""

    def __init__(self) -> None:
        self.ends: dict[int, asyncio.Future[None]] = {}
        self.running = 0
        self.most = 0
        self.cancelled: list[int] = []
        self.begun = asyncio.Condition()

    async def __call__(self, value: int) -> Result:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            async with self.begun:
                self.ends[value] = asyncio.get_running_loop().create_future()
                self.begun.notify_all()
            await self.ends[value]
            return result(value)
        except asyncio.CancelledError:
            self.cancelled.append(value)
            raise
        finally:
            self.running -= 1

    async def until(self, count: int) -> None:
        async with asyncio.timeout(30), self.begun:
            await self.begun.wait_for(lambda: len(self.ends) == count)


@given(
    concurrency=st.integers(1, 5),
    ordered=st.booleans(),
    count=st.integers(0, 30),
    seed=st.randoms(use_true_random=False),
)
def test_each_is_given_once_and_the_bounds_hold(
    concurrency: int, ordered: bool, count: int, seed: random.Random
) -> None:
    order: Order[int] = Order(concurrency=concurrency, ordered=ordered)
    running: list[int] = []
    given_: list[int] = []
    while len(given_) < count:
        while order.room and order.taken < count:
            running.append(order.take())
        assert len(running) <= concurrency
        assert order.taken - len(given_) <= AHEAD * concurrency
        order.ended(Mapped(index=running.pop(seed.randrange(len(running))), value=0))
        while (found := order.ready()) is not None:
            given_.append(found.index)
    assert sorted(given_) == list(range(count))
    assert not ordered or given_ == sorted(given_)


async def test_no_more_run_at_once_than_allowed_and_results_come_as_they_are_there() -> None:
    work = Work()
    results = mapped(range(5), work, Order(concurrency=2, ordered=False))
    first = asyncio.ensure_future(anext(results))
    await work.until(2)
    work.ends[1].set_result(None)
    assert (await first).index == 1
    rest = asyncio.ensure_future(anext(results))
    await work.until(3)
    work.ends[2].set_result(None)
    assert (await rest).index == 2
    assert work.most == 2
    await results.aclose()


async def test_in_order_an_early_result_waits() -> None:
    work = Work()
    results = mapped(range(2), work, Order(concurrency=2, ordered=True))
    first = asyncio.ensure_future(anext(results))
    await work.until(2)
    work.ends[1].set_result(None)
    await asyncio.sleep(0)
    assert not first.done()
    work.ends[0].set_result(None)
    assert [(await first).index, (await anext(results)).index] == [0, 1]
    assert [each async for each in results] == []


async def test_a_failure_is_given_and_leaves_the_others_alone() -> None:
    async def work(value: int) -> Result:
        if value == 1:
            raise ConnectionFailed("gone")
        return result(value)

    found = [each async for each in mapped(range(3), work, Order(concurrency=3, ordered=True))]
    assert [each.ok for each in found] == [True, False, True]
    assert [each.value for each in found] == [0, 1, 2]
    with pytest.raises(ConnectionFailed):
        found[1].get()


async def test_ending_early_cancels_what_runs() -> None:
    work = Work()
    results = mapped(range(100), work, Order(concurrency=3, ordered=False))
    first = asyncio.ensure_future(anext(results))
    await work.until(3)
    work.ends[0].set_result(None)
    await first
    await results.aclose()
    assert work.running == 0
    assert set(work.cancelled) <= {1, 2, 3}
    assert {1, 2} <= set(work.cancelled)


async def test_values_may_come_one_by_one_and_their_error_ends_the_map() -> None:
    async def values() -> AsyncIterator[int]:
        yield 1
        raise RuntimeError("no more")

    async def work(value: int) -> Result:
        return result(value)

    with pytest.raises(RuntimeError, match="no more"):
        async for _ in mapped(values(), work, Order(concurrency=2, ordered=False)):
            pass
