"""A server on the loopback whose answers to a client a test writes, one after another."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from fnqueue.client import AsyncClient
from tests.eventually import eventually

REQUEST_ID = "9a260b8a-8799-4223-9fc2-446c6b8a2eba"
FUNCTION_ID = "2c1d6f0e-9f63-4a52-9a57-0b6f1f1d2e22"
ASSET_ID = "0655fbd8-96c2-4a19-b877-4d42dfeceedf"
KEY = "nvapi-test"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Heard:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Service:
    """Each call is answered by the next of `answers`; one more than there are is a failure. `heard` is what came,
    `slept` what a client made by `client` paused, which takes no time. Unless it `tells`, it has no events of requests,
    and does not note that it was asked for them."""

    url: str = ""
    tells: bool = False
    answers: deque[Handler | web.StreamResponse] = field(default_factory=deque)
    heard: list[Heard] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def will(self, *answers: Handler | web.StreamResponse) -> None:
        self.answers.extend(answers)

    def client(self, **options: Any) -> AsyncClient:
        async def sleep(seconds: float) -> None:
            self.slept.append(seconds)

        return AsyncClient(self.url, KEY, sleep=sleep, **options)

    @property
    def calls(self) -> list[str]:
        return [f"{each.method} {each.path.removeprefix('/v2/nvcf')}" for each in self.heard]

    async def heard_of(self, count: int) -> None:
        """Returns once so many calls have come."""

        async def calls() -> int:
            return len(self.heard)

        await eventually(calls, lambda seen: seen >= count, within_s=30)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path.endswith("/events") and not self.tells:
            return problem(404, "not-found")
        self.heard.append(Heard(request.method, request.raw_path, request.headers, await request.read()))
        if not self.answers:
            return web.Response(status=418, text="the test has no answer to this")
        found = self.answers.popleft()
        try:
            return found if isinstance(found, web.StreamResponse) else await found(request)
        except asyncio.CancelledError:
            self.left.set()
            raise


@asynccontextmanager
async def serving() -> AsyncIterator[Service]:
    service = Service()
    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{path:.*}", service.answer)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    service.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield service
    finally:
        await runner.cleanup()


def ended(content: Any = "done", *, status: int = 200, **headers: str) -> web.Response:
    return web.json_response(content, status=status, headers={**_named("fulfilled"), **headers})


def pending(**headers: str) -> web.Response:
    return web.Response(status=202, headers={**_named("pending-evaluation"), "Retry-After": "1", **headers})


def problem(status: int, word: str = "unavailable", **headers: str) -> web.Response:
    body = {"type": f"urn:fnqueue:problem-details:{word}", "status": status, "detail": "because"}
    return web.json_response(body, status=status, headers=headers, content_type="application/problem+json")


async def hang_up(request: web.Request) -> web.StreamResponse:
    """Without a word."""
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def never(_: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


def events(*lines: str, cut: bool = False) -> Handler:
    """An event stream of these; `cut`: the connection breaks behind them."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **_named("fulfilled")})
        await response.prepare(request)
        for line in lines:
            await response.write(line.encode())
        return await hang_up(request) if cut else response

    return answer


def event(name: str, event_id: str = "", **data: Any) -> str:
    """As `GET /requests/{requestId}/events` sends it."""
    told = json.dumps({"requestId": REQUEST_ID, "status": "in-progress", **data})
    return (f"id: {event_id}\n" if event_id else "") + f"event: {name}\ndata: {told}\n\n"


def _named(status: str) -> dict[str, str]:
    return {"NVCF-REQID": REQUEST_ID, "NVCF-STATUS": status}
