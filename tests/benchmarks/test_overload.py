"""A pace that waits for nobody, and what is counted of its answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from benchmarks.load import LOOPBACK
from benchmarks.overload import Seen, Stage, percentile_ms, play

Answer = Callable[[web.Request], Awaitable[web.Response]]


async def echo(request: web.Request) -> web.Response:
    return web.json_response({"echo": (await request.json())["message"]})


async def test_a_pace_asks_as_often_as_it_says_whatever_becomes_of_it() -> None:
    async def every_other(request: web.Request) -> web.Response:
        even = int((await request.json())["message"]) % 2 == 0
        return await echo(request) if even else web.Response(status=429)

    seen = await played(every_other, per_s=100.0, seconds=0.5)
    assert seen.statuses == {"200": 25, "429": 25}
    assert (len(seen.served_s), len(seen.refused_s), seen.unsent) == (25, 25, 0)


async def test_callers_ask_again_when_they_are_answered() -> None:
    seen = await played(echo, callers=2, seconds=0.2)
    assert set(seen.statuses) == {"200"}
    assert len(seen.served_s) > 2


async def test_an_answer_to_another_request_is_no_good_one() -> None:
    async def wrong(_: web.Request) -> web.Response:
        return web.json_response({"echo": "something else"})

    seen = await played(wrong, per_s=20.0, seconds=0.5)
    assert (seen.statuses, len(seen.served_s)) == ({"wrong body": 10}, 0)


async def test_a_connection_that_is_closed_is_replaced() -> None:
    async def closing(request: web.Request) -> web.Response:
        response = await echo(request)
        response.force_close()
        return response

    assert (await played(closing, per_s=20.0, seconds=0.5)).statuses == {"200": 10}


def test_percentiles_are_by_nearest_rank() -> None:
    latencies_s = [number / 1000 for number in range(1, 101)]
    assert (percentile_ms(latencies_s, 50), percentile_ms(latencies_s, 99), percentile_ms([], 99)) == (50, 99, 0)


async def played(answer: Answer, *, per_s: float = 0.0, callers: int = 0, seconds: float) -> Seen:
    async with serving(answer) as port:
        return await play(
            Stage(port=port, path="/", headers=(), seconds=seconds, delay_s=0.0, per_s=per_s, callers=callers)
        )


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[int]:
    app = web.Application()
    app.router.add_post("/", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, LOOPBACK, 0)
        await site.start()
        yield site.port
    finally:
        await runner.cleanup()
