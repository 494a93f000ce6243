"""All that a function may do, in one container: it writes stories. Made from docs/function-authors.md alone.

POST /run  {"words": ["once", "upon"], "pause": 0.1}  ->  {"request": "<id>", "story": "once upon"}
    "pause"      seconds a word
    "chapters"   true: each word as a file beside the answer
    "padding"    so many bytes more in the answer
    Words of assets come before those of the body. With `Accept: text/event-stream`, one event a word. More than ROOM
    stories at a time: 503, to be tried again. A story that was told is told again, and not written again.
GET  /health     503 while it loads
GET  /stats      what became of requests
GET  /chat       a WebSocket that repeats what it is told, in capitals
POST /shout      the same, with a body that may go on while it is answered
ANY  /mirror/…   201, and what was asked for

With HEALTH_PORT set, grpc.health.v1 is there too; that needs requirements.txt.
"""

import asyncio
import importlib
import json
import logging
import os
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

ROOM = 2
REMEMBERED = 100
MAX_BODY_BYTES = 64 * 1024 * 1024
LOADING_S = 0.5
FINISH_WITHIN_S = 3600.0

log = logging.getLogger("everything")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    words: list[str]
    pause_s: float
    chapters: bool
    padding_bytes: int


class Refused(Exception):
    """The text goes to the caller."""


class Stories:
    def __init__(self) -> None:
        self.stats: Counter[str] = Counter()
        self._writing = 0
        self._told: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._well_at = time.monotonic() + LOADING_S

    @property
    def well(self) -> bool:
        return time.monotonic() >= self._well_at

    async def run(self, request: web.Request) -> web.StreamResponse:
        name = request.headers["NVCF-REQID"]
        try:
            order = parse(await request.read(), asset_words(request))
        except Refused as refused:
            return web.json_response({"error": str(refused)}, status=422)
        if name in self._told:  # an earlier attempt, whose answer was lost
            return web.json_response(self._told[name])
        if self._writing >= ROOM:
            self.stats["busy"] += 1
            return web.json_response({"error": "no room"}, status=503, headers={"Retry-After": "1"})
        self._writing += 1
        try:
            return await self._answer(request, name, order)
        except asyncio.CancelledError:
            log.info("%s is not wanted any more", name)
            self.stats["stopped"] += 1
            raise
        finally:
            self._writing -= 1

    async def _answer(self, request: web.Request, name: str, order: Order) -> web.StreamResponse:
        if "text/event-stream" in request.headers.get("Accept", ""):
            return await self._stream(request, order)
        folder = Path(request.headers["NVCF-LARGE-OUTPUT-DIR"])
        for number, word in enumerate(order.words, start=1):
            await asyncio.sleep(order.pause_s)
            tell_progress(folder, 100 * number // len(order.words), {"story": " ".join(order.words[:number])})
            if order.chapters:
                write_chapter(folder, number, word)
        self.stats["finished"] += 1
        return web.json_response(self._remember(name, order))

    def _remember(self, name: str, order: Order) -> dict[str, Any]:
        story = {"request": name, "story": " ".join(order.words)}
        self._told[name] = story | ({"padding": "x" * order.padding_bytes} if order.padding_bytes else {})
        if len(self._told) > REMEMBERED:
            self._told.popitem(last=False)
        return self._told[name]

    async def _stream(self, request: web.Request, order: Order) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for word in order.words:
            await asyncio.sleep(order.pause_s)
            await response.write(f"data: {json.dumps({'word': word})}\n\n".encode())
        self.stats["finished"] += 1
        return response

    async def tell(self, _: web.Request) -> web.Response:
        return web.json_response(self.stats | {"writing": self._writing, "secrets": sorted(secrets())})

    async def health(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self.well else 503)


def parse(body: bytes, before: list[str]) -> Order:
    """Raises Refused, naming the field."""
    try:
        said = json.loads(body)
    except ValueError:
        raise Refused("the body is not JSON") from None
    words = said.get("words") if isinstance(said, dict) else None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise Refused("words: must be a list of strings")
    return Order(
        words=before + words,
        pause_s=number_of(said, "pause", 3600),
        chapters=bool(said.get("chapters")),
        padding_bytes=int(number_of(said, "padding", 32 * 1024 * 1024)),
    )


def number_of(said: dict[str, Any], field: str, most: float) -> float:
    value = said.get(field, 0)
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise Refused(f"{field}: must be a number from 0 to {most:g}")
    return float(value)


def asset_words(request: web.Request) -> list[str]:
    folder = Path(request.headers["NVCF-ASSET-DIR"])
    names = [name for name in request.headers.get("NVCF-FUNCTION-ASSET-IDS", "").split(",") if name]
    return [word for name in names for word in (folder / name).read_text().split()]


def tell_progress(folder: Path, percent: int, partial: dict[str, Any]) -> None:
    draft = folder / "progress.partial"
    draft.write_text(json.dumps({"progress": percent, "partialResponse": partial}))
    draft.rename(folder / "progress")


def write_chapter(folder: Path, number: int, word: str) -> None:
    (folder / "chapters").mkdir(exist_ok=True)
    (folder / "chapters" / f"{number}.txt").write_text(f"{word}\n")


def secrets() -> dict[str, Any]:
    file = Path(os.environ.get("NVCF_SECRETS_FILE", "/var/secrets/secrets.json"))
    return dict(json.loads(file.read_bytes())) if file.exists() else {}


async def chat(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse(protocols=["chat"])
    await socket.prepare(request)
    async for message in socket:
        if message.type is WSMsgType.TEXT:
            await socket.send_str(message.data.upper())
    return socket


async def shout(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    async for piece in request.content.iter_any():
        await response.write(piece.upper())
    return response


async def mirror(request: web.Request) -> web.Response:
    size = len(await request.read())
    seen = {"method": request.method, "path": request.path, "query": request.query_string, "bytes": size}
    return web.json_response(seen, status=201, headers={"Location": request.path, "X-Mine": "yes"})


async def serve_grpc_health(stories: Stories, port: int) -> AsyncIterator[None]:
    grpc = importlib.import_module("grpc")
    checks = importlib.import_module("grpc_health.v1.health").aio
    messages = importlib.import_module("grpc_health.v1.health_pb2")
    service = importlib.import_module("grpc_health.v1.health_pb2_grpc")
    server, servicer = grpc.aio.server(), checks.HealthServicer()
    service.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(f"{os.environ.get('HOST', '0.0.0.0')}:{port}")
    statuses = messages.HealthCheckResponse
    await servicer.set("", statuses.NOT_SERVING)

    async def follow() -> None:
        await asyncio.sleep(LOADING_S)
        await servicer.set("", statuses.SERVING)

    await server.start()
    following = asyncio.create_task(follow())
    yield
    following.cancel()
    with suppress(asyncio.CancelledError):
        await following
    await server.stop(grace=1)


def application() -> web.Application:
    stories = Stories()
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.add_routes(
        [
            web.post("/run", stories.run),
            web.get("/health", stories.health),
            web.get("/stats", stories.tell),
            web.get("/chat", chat),
            web.post("/shout", shout),
            web.route("*", "/mirror/{rest:.*}", mirror),
        ]
    )
    if port := os.environ.get("HEALTH_PORT"):
        app.cleanup_ctx.append(lambda _: serve_grpc_health(stories, int(port)))
    return app


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    web.run_app(
        application(),
        host=os.environ.get("HOST", "0.0.0.0"),
        port=int(os.environ.get("PORT", "8000")),
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=FINISH_WITHIN_S,
    )


if __name__ == "__main__":
    main()
