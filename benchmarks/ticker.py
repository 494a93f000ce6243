"""The function behind `benchmarks.streams`: a stream of events, each of which tells when it was sent.

POST /tick    {"events": 100, "every_s": 0.02}  ->  data: <seconds by the machine's monotonic clock>
GET  /health
"""

from __future__ import annotations

import asyncio
import os
import time

from aiohttp import web

try:
    from uvloop import new_event_loop
except ImportError:  # no wheel for this platform: slower, otherwise the same
    from asyncio import new_event_loop  # type: ignore[assignment]  # uvloop's says Loop, a subclass


async def tick(request: web.Request) -> web.StreamResponse:
    order = await request.json()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(order["events"]):
        await response.write(f"data: {time.monotonic()}\n\n".encode())
        await asyncio.sleep(order["every_s"])
    return response


async def health(_: web.Request) -> web.Response:
    return web.Response()


def main() -> None:
    app = web.Application()
    app.add_routes([web.post("/tick", tick), web.get("/health", health)])
    port = int(os.environ["PORT"])
    web.run_app(app, host="127.0.0.1", port=port, loop=new_event_loop(), access_log=None, print=lambda _: None)


if __name__ == "__main__":
    main()
