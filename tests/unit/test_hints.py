from __future__ import annotations

import asyncio

from broker.backends.hints import Hints, Watch

_LONG_S = 60.0


async def test_who_hears_nothing_waits_no_longer_than_he_said() -> None:
    alarms, loop = Hints().alarms, asyncio.get_running_loop()
    late, soon, at_once = (Watch(alarms) for _ in range(3))
    began = loop.time()
    waiting = asyncio.create_task(late.changed(_LONG_S))
    await asyncio.sleep(0)  # so that an earlier one comes behind a later one
    assert [await watch.changed(wait_s) for watch, wait_s in ((soon, 0.1), (at_once, 0.0))] == [False, False]
    assert loop.time() - began >= 0.1 - 0.001  # uvloop counts in milliseconds
    assert not waiting.done()
    late.tell()
    assert await waiting


async def test_who_is_told_or_leaves_is_not_kept() -> None:
    hints = Hints()
    told, leaves = Watch(hints.alarms), Watch(hints.alarms)
    waiting = [asyncio.create_task(watch.changed(_LONG_S)) for watch in (told, leaves)]
    await asyncio.sleep(0)
    assert len(hints.alarms) == 2
    told.tell()
    waiting[1].cancel()
    await asyncio.wait(waiting)
    assert waiting[0].result()
    assert waiting[1].cancelled()
    assert len(hints.alarms) == 0
    assert not await leaves.changed(0.0)
