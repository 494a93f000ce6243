"""An answer while it is made: POST /run {"prompt": "one two"}, word by word. Knows nothing of queues.

Events where the caller accepts `text/event-stream`, and one JSON object where it does not; with `"raw": true`, bytes.
"""

import asyncio
import json
import os

from aiohttp import web

PAUSE_S = 0.05


async def run(request: web.Request) -> web.StreamResponse:
    order = await request.json()
    words = str(order.get("prompt", "")).split()
    if "text/event-stream" not in request.headers.get("Accept", ""):
        return web.json_response({"text": " ".join(words)})
    raw = bool(order.get("raw"))
    kind = "application/octet-stream" if raw else "text/event-stream"
    response = web.StreamResponse(headers={"Content-Type": kind})
    await response.prepare(request)
    for word in words:
        await asyncio.sleep(PAUSE_S)
        await response.write(f"{word}\n".encode() if raw else event(word))
    return response


def event(word: str) -> bytes:
    """One event ends with an empty line."""
    return f"data: {json.dumps({'word': word})}\n\n".encode()


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
