"""Progress: POST /run {"steps": 4, "pause": 1} tells how far it is after each step. Knows nothing of queues."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from aiohttp import web


async def run(request: web.Request) -> web.Response:
    order = await request.json()
    steps, pause_s = int(order.get("steps", 4)), float(order.get("pause", 1))
    folder = Path(request.headers["NVCF-LARGE-OUTPUT-DIR"])
    for step in range(1, steps + 1):
        await asyncio.sleep(pause_s)
        tell(folder, 100 * step // steps, {"step": step})
    return web.json_response({"steps": steps})


def tell(folder: Path, percent: int, partial: dict[str, Any]) -> None:
    """Renamed into place, so that nobody reads half of it."""
    draft = folder / "progress.partial"
    draft.write_text(json.dumps({"progress": percent, "partialResponse": partial}))
    draft.rename(folder / "progress")


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
