"""A function that has room for one request at a time, whatever it is sent. Knows nothing of queues.

POST /run {"seconds": 1} is 503 with `Retry-After` while another one runs.
"""

import asyncio
import os

from aiohttp import web

BUSY = {"Retry-After": "1"}

room = asyncio.Lock()


async def run(request: web.Request) -> web.Response:
    seconds = float((await request.json()).get("seconds", 1))
    if room.locked():
        return web.json_response({"error": "no room at the moment"}, status=503, headers=BUSY)
    async with room:
        await asyncio.sleep(seconds)
    return web.json_response({"seconds": seconds})


async def health(_: web.Request) -> web.Response:
    return web.Response()


def main() -> None:
    app = web.Application()
    app.add_routes([web.post("/run", run), web.get("/health", health)])
    web.run_app(
        app,
        host=os.environ.get("HOST", "0.0.0.0"),
        port=int(os.environ.get("PORT", "8000")),
        handler_cancellation=True,
    )


if __name__ == "__main__":
    main()
