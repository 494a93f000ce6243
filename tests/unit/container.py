"""Inference containers on the loopback whose answers a test writes."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from broker.model import Job
from broker.settings import SidecarSettings

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

VERSION_ID = "7f0b3a52-0d47-4d9e-8a3c-3f6f1f1d2e11"
FUNCTION_ID = "2c1d6f0e-9f63-4a52-9a57-0b6f1f1d2e22"


@dataclass
class Container:
    """Answers any method by `handler`, and its health check by `healthy`. `bodies` and `headers` are what it was sent;
    `called` tells that there was a call, `left` that a caller hung up."""

    port: int = 0
    healthy: bool = True
    handler: Handler = field(default=lambda _: answer(b'{"echo": 1}'))
    bodies: list[bytes] = field(default_factory=list)
    headers: list[tuple[tuple[str, str], ...]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    health_checks: int = 0
    called: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def post(self, request: web.Request) -> web.StreamResponse:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            self.bodies.append(await request.read())
            self.headers.append(tuple(request.headers.items()))
            self.paths.append(request.raw_path)
            self.called.set()
            return await self.handler(request)
        except asyncio.CancelledError:
            self.left.set()
            raise
        finally:
            self.running -= 1

    async def health(self, _: web.Request) -> web.Response:
        self.health_checks += 1
        return web.Response(status=200 if self.healthy else 503)

    def header(self, name: str) -> list[str]:
        """Values of a header of the last call, by its exact spelling."""
        return [value for key, value in self.headers[-1] if key == name]


async def answer(body: bytes, **given: Any) -> web.Response:
    return web.Response(body=body, **({"content_type": "application/json"} | given))


@asynccontextmanager
async def container() -> AsyncIterator[Container]:
    box = Container()
    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.add_routes([web.get("/health", box.health), web.route("*", "/{path:.*}", box.post)])
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    box.port = runner.addresses[0][1]
    try:
        yield box
    finally:
        await runner.cleanup()


@asynccontextmanager
async def raw_container(reply: bytes) -> AsyncIterator[int]:
    """The port of a server that answers every request with these bytes and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@dataclass
class Keeping:
    """A container that keeps its connections for the next request, for as long as `answer` says so. `opened` counts
    connections, `seen` are the requests that it read."""

    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bool]]
    port: int = 0
    opened: int = 0
    seen: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        try:
            while await self.read(reader) and await self.answer(reader, writer):
                pass
        finally:
            writer.close()

    async def read(self, reader: asyncio.StreamReader) -> bool:
        """One whole request; false if there is none any more."""
        try:
            request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            headers = dict(line.split(": ", 1) for line in lines if line)
            await reader.readexactly(int(headers.get("Content-Length", 0)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return False
        if request.startswith("POST"):
            self.seen.append(headers.get("NVCF-REQID", ""))
        return True


@asynccontextmanager
async def keeping(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bool]],
) -> AsyncIterator[Keeping]:
    box = Keeping(answer)
    server = await asyncio.start_server(box.serve, "127.0.0.1", 0)
    async with server:
        box.port = server.sockets[0].getsockname()[1]
        yield box


def settings_for(folder: Path, port: int, **given: Any) -> SidecarSettings:
    return SidecarSettings(
        **{
            "function_id": FUNCTION_ID,
            "function_version_id": VERSION_ID,
            "function_name": "echo",
            "inference_port": port,
            "inference_url": "/infer",
            "health_uri": "/health",
            "health_timeout_s": 5,
            "health_start_interval_s": 0.02,
            "health_interval_s": 0.02,
            "renew_s": 0.05,
            "beat_s": 0.05,
            "crash_backoff_s": 0.01,
            "asset_dir": folder / "assets",
            "response_dir": folder / "response",
            "data_dir": folder / "data",
            **given,
        }
    )


def a_job(**given: Any) -> Job:
    now = time.time()
    return Job(
        **{
            "id": str(uuid.uuid4()),
            "account": "acme",
            "function_id": FUNCTION_ID,
            "version_id": VERSION_ID,
            "subject": "key-1",
            "created_at": now,
            "deadline_at": now + 60,
            "digest": "d",
            "headers": (("Content-Type", "application/json"),),
            "body": b'{"message": "hi"}',
            **given,
        }
    )
