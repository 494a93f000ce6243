"""What a function is given with a request: POST /run tells it back. Knows nothing of queues."""

import json
import os
from pathlib import Path
from typing import Any

from aiohttp import web

MAX_BODY_BYTES = 6 * 1024 * 1024  # aiohttp takes 1 MiB unless told otherwise


async def run(request: web.Request) -> web.Response:
    body = await request.read()
    return web.json_response(
        {
            "body": body.decode(errors="replace"),
            "headers": {name: value for name, value in request.headers.items() if name.upper().startswith("NVCF-")},
            "assets": assets(request),
            "secrets": sorted(secrets()),
            "function": os.environ.get("NVCF_FUNCTION_NAME", ""),
        }
    )


def assets(request: web.Request) -> dict[str, int]:
    """Name and size. Without assets there is no folder."""
    folder = Path(request.headers["NVCF-ASSET-DIR"])
    names = request.headers.get("NVCF-FUNCTION-ASSET-IDS", "").split(",")
    return {name: (folder / name).stat().st_size for name in names if name}


def secrets() -> dict[str, Any]:
    """Read anew each time, because the file is replaced when they change."""
    file = Path(os.environ.get("NVCF_SECRETS_FILE", "/var/secrets/secrets.json"))
    return dict(json.loads(file.read_bytes())) if file.exists() else {}


async def health(_: web.Request) -> web.Response:
    return web.Response()


def main() -> None:
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.add_routes([web.post("/run", run), web.get("/health", health)])
    web.run_app(app, host=os.environ.get("HOST", "0.0.0.0"), port=int(os.environ.get("PORT", "8000")))


if __name__ == "__main__":
    main()
