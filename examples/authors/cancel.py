"""Work that stops when nobody wants it any more, and is finished after SIGTERM. Knows nothing of queues.

POST /run    {"steps": 50}  ->  {"steps": 50}, after a tenth of a second each, in a thread, as a model runs
GET  /stats  {"running": 0, "finished": 1, "stopped": 1}
"""

import asyncio
import os
import threading
import time
from collections import Counter

from aiohttp import web

STEP_S = 0.1
# Longer than any request: what is left then is cut off.
FINISH_WITHIN_S = 3600.0

stats = Counter(running=0, finished=0, stopped=0)


async def run(request: web.Request) -> web.Response:
    steps = int((await request.json()).get("steps", 50))
    unwanted = threading.Event()
    try:
        done = await asyncio.to_thread(work, steps, unwanted)
    finally:
        unwanted.set()  # aiohttp cancels this coroutine when the connection is closed; a thread has to be told
    return web.json_response({"steps": done})


def work(steps: int, unwanted: threading.Event) -> int:
    stats["running"] += 1
    for step in range(steps):
        if unwanted.is_set():
            stats.update(running=-1, stopped=1)
            return step
        time.sleep(STEP_S)
    stats.update(running=-1, finished=1)
    return steps


async def tell(_: web.Request) -> web.Response:
    return web.json_response(stats)


async def health(_: web.Request) -> web.Response:
    return web.Response()


def main() -> None:
    app = web.Application()
    app.add_routes([web.post("/run", run), web.get("/stats", tell), web.get("/health", health)])
    web.run_app(
        app,
        host=os.environ.get("HOST", "0.0.0.0"),
        port=int(os.environ.get("PORT", "8000")),
        handler_cancellation=True,
        shutdown_timeout=FINISH_WITHIN_S,
    )


if __name__ == "__main__":
    main()
