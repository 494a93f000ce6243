from __future__ import annotations

import asyncio

from workers.slots import Slots


async def turns(count: int = 1) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_free_slot_is_taken_at_once_and_no_more_than_there_are() -> None:
    slots = Slots(2)
    assert [slots.take() for _ in range(3)] == [True, True, False]
    slots.give()
    assert [slots.take() for _ in range(2)] == [True, False]


async def test_who_has_waited_longest_is_next_and_nobody_overtakes_him() -> None:
    slots, got = Slots(1), list[int]()

    async def wait(number: int) -> None:
        await slots.wait()
        got.append(number)

    assert slots.take()
    async with asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(wait(number))
        await turns(2)
        for count in range(1, 4):
            slots.give()
            assert not slots.take()
            await turns(2)
            assert got == list(range(count))
    slots.give()
    assert slots.take()


async def test_who_goes_while_he_waits_takes_none() -> None:
    slots = Slots(1)
    assert slots.take()
    first, second = (asyncio.ensure_future(slots.wait()) for _ in range(2))
    await turns()
    first.cancel()
    slots.give()
    await asyncio.wait_for(second, 30)
    third = asyncio.ensure_future(slots.wait())
    await turns()
    third.cancel()
    await turns(2)
    slots.give()
    assert slots.take()


async def test_who_goes_when_it_was_given_to_him_hands_it_on() -> None:
    slots = Slots(1)
    assert slots.take()
    first, second = (asyncio.ensure_future(slots.wait()) for _ in range(2))
    await turns()
    slots.give()
    first.cancel()
    await asyncio.wait_for(second, 30)
    assert first.cancelled()
    slots.give()
    assert slots.take()
