"""A container for tests: it answers with a stream of events, numbered from 0, `data: <number> <padding>`.

POST / with JSON, every field optional:
    count       how many events
    size_bytes  of each event's padding
    pause_s     after each event
    gates       {number: path of a file}: send that event only when the file exists
    ids         true: every event has its number as its ID
    at          true: every event tells when it was sent, by this machine's monotonic clock
    die         number of the event before which to exit
Written to the file RECORD, one line each: `start <request>`, `sent <request>` for every hundredth event,
`done <request>`, `aborted <request>`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

from aiohttp import web

RECORD = Path(os.environ["RECORD"])


def write(line: str) -> None:
    """One write to a file opened for appending is whole, whoever else writes."""
    descriptor = os.open(RECORD, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


async def stream(request: web.Request) -> web.StreamResponse:
    order: dict[str, Any] = await request.json()
    name = request.headers["NVCF-REQID"]
    write(f"start {name}")
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    try:
        await response.prepare(request)
        for number in range(order.get("count", 10)):
            await send(response, order, number, name)
    except (asyncio.CancelledError, ConnectionError):
        write(f"aborted {name}")
        raise
    write(f"done {name}")
    return response


async def send(response: web.StreamResponse, order: dict[str, Any], number: int, name: str) -> None:
    if gate := order.get("gates", {}).get(str(number)):
        await opened(gate)
    if order.get("die") == number:
        os.kill(os.getpid(), signal.SIGKILL)
    own = f"id: {number}\n" if order.get("ids") else ""
    at = f" {time.monotonic()}" if order.get("at") else ""
    await response.write(f"{own}data: {number}{at} {'x' * order.get('size_bytes', 0)}\n\n".encode())
    if number % 100 == 99:
        write(f"sent {name}")
    if order.get("pause_s"):
        await asyncio.sleep(order["pause_s"])


async def opened(gate: str) -> None:
    while not os.path.exists(gate):  # noqa: ASYNC110, ASYNC240  nobody announces a file, and a look is quick
        await asyncio.sleep(0.01)


async def health(_: web.Request) -> web.Response:
    return web.Response()


def main() -> None:
    app = web.Application()
    app.router.add_post("/", stream)
    app.router.add_get("/health", health)
    web.run_app(
        app, host=os.environ["HOST"], port=int(os.environ["PORT"]), handler_cancellation=True, print=lambda _: None
    )


if __name__ == "__main__":
    main()
