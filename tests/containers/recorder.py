"""A container for tests: it writes down every attempt before it answers, and misbehaves when asked to.

POST / with JSON, every field optional:
    id       what to write down; the request's own id otherwise
    delay_s  answer only then; a caller that leaves meanwhile is written down as `aborted`
    die      true: exit in the middle of the answer
    cured    path of a file: the same, unless it exists
    gate     path of a file: answer only when it exists
    crowd    answer only when so many are here that asked for one, and then always
    progress list of [gate, text]: once that file exists, make the text the progress file
    secret   name of a secret: answer with a digest of its value as `secret`
    say      text: a line of it on standard output, before anything else
Written to the file RECORD, one line each: `start <id>`, `done <id>`, `aborted <id>`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

from aiohttp import web

RECORD = Path(os.environ["RECORD"])

here = 0
complete = asyncio.Event()


def write(line: str) -> None:
    """One write to a file opened for appending is whole, whoever else writes."""
    descriptor = os.open(RECORD, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


async def run(request: web.Request) -> web.StreamResponse:
    order: dict[str, Any] = await request.json()
    name = order.get("id") or request.headers["NVCF-REQID"]
    write(f"start {name}")
    if order.get("say"):
        print(order["say"], flush=True)
    try:
        if order.get("die") or not os.path.exists(order.get("cured", "/")):  # noqa: ASYNC240  a look is quick
            await die(request)
        for gate, text in order.get("progress", []):
            await opened(gate)
            tell_progress(Path(request.headers["NVCF-LARGE-OUTPUT-DIR"]), text)
        await asyncio.sleep(order.get("delay_s", 0))
        if order.get("gate"):
            await opened(order["gate"])
        if order.get("crowd"):
            await crowded(order["crowd"])
    except asyncio.CancelledError:
        write(f"aborted {name}")
        raise
    write(f"done {name}")
    told = {"id": name, "pid": os.getpid(), "headers": dict(request.headers)}
    if order.get("secret"):
        told["secret"] = digest(order["secret"])
    return web.json_response(told)


def digest(name: str) -> str:
    value = json.loads(Path(os.environ["NVCF_SECRETS_FILE"]).read_bytes()).get(name)
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def tell_progress(folder: Path, text: str) -> None:
    """Renamed into place, so that nobody reads half of it."""
    (folder / "progress.partial").write_text(text)
    (folder / "progress.partial").rename(folder / "progress")


async def opened(gate: str) -> None:
    while not os.path.exists(gate):  # noqa: ASYNC110, ASYNC240  nobody announces a file, and a look is quick
        await asyncio.sleep(0.01)


async def crowded(size: int) -> None:
    global here  # noqa: PLW0603  one number of one process
    here += 1
    if here >= size:
        complete.set()
    await complete.wait()


async def die(request: web.Request) -> None:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b"half an answer")
    os.kill(os.getpid(), signal.SIGKILL)


async def health(_: web.Request) -> web.Response:
    return web.Response()


def main() -> None:
    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.router.add_post("/", run)
    app.router.add_get("/health", health)
    web.run_app(
        app, host=os.environ["HOST"], port=int(os.environ["PORT"]), handler_cancellation=True, print=lambda _: None
    )


if __name__ == "__main__":
    main()
