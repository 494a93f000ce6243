"""A container for tests: it answers what it is told to, and tells what it got.

Any method and path. The header X-Mirror holds a JSON object, every field optional:
    delay_s     wait that long first
    busy_until  unix time: before it, answer 503 with Retry-After
    gate        path of a file: the same while it does not exist
    retry_after value of that header; 1 otherwise
    files       {name: text}: write these into the output directory
    linger_s    and then wait that long
    raw         base64: send just these bytes, then close the connection
    status      of the answer; 200 otherwise
    headers     [[name, value], ...] of the answer
    body        base64 of the answer; otherwise the request's own body comes back with its Content-Type
    size_bytes  answer with so many bytes
    seed        of random bytes, which do not get smaller
    tell        true: answer with JSON of what came: method, path, headers, body (base64), assets ({name: sha256})
    digest      true: answer with JSON of the body: size_bytes, sha256; it may be of any size
    stream      [count, size_bytes]: answer with so many pieces of so many bytes, without saying how long it will be
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web


async def mirror(request: web.Request) -> web.StreamResponse:
    order: dict[str, Any] = json.loads(request.headers.get("X-Mirror", "{}"))
    if order.get("digest"):
        return await digest(request)
    if "stream" in order:
        return await stream(request, *order["stream"])
    body = await request.read()
    await asyncio.sleep(order.get("delay_s", 0))
    if time.time() < order.get("busy_until", 0) or not Path(order.get("gate", "/")).exists():  # noqa: ASYNC240  quick
        return web.json_response({"error": "busy"}, status=503, headers={"Retry-After": order.get("retry_after", "1")})
    write(Path(request.headers.get("NVCF-LARGE-OUTPUT-DIR", "/nowhere")), order.get("files", {}))
    await asyncio.sleep(order.get("linger_s", 0))
    if "raw" in order:
        assert request.transport is not None
        request.transport.write(base64.b64decode(order["raw"]))
        request.transport.close()
        return web.Response()
    return answer(request, order, body)


async def digest(request: web.Request) -> web.Response:
    found, size_bytes = hashlib.sha256(), 0
    async for piece in request.content.iter_any():
        found.update(piece)
        size_bytes += len(piece)
    return web.json_response({"size_bytes": size_bytes, "sha256": found.hexdigest()})


async def stream(request: web.Request, count: int, size_bytes: int) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
    await response.prepare(request)
    for number in range(count):
        await response.write(bytes([number % 256]) * size_bytes)
    return response


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def answer(request: web.Request, order: dict[str, Any], body: bytes) -> web.Response:
    if order.get("tell"):
        return web.json_response(tell(request, body))
    content = base64.b64decode(order["body"]) if "body" in order else body
    if "size_bytes" in order:
        size_bytes = order["size_bytes"]
        content = random.Random(order["seed"]).randbytes(size_bytes) if "seed" in order else b"m" * size_bytes
    response = web.Response(status=order.get("status", 200), body=content)
    response.headers["Content-Type"] = request.headers.get("Content-Type", "application/octet-stream")
    for name, value in order.get("headers", []):
        if name.lower() == "content-type":
            response.headers.popall(name)
        response.headers.add(name, value)
    return response


def tell(request: web.Request, body: bytes) -> dict[str, Any]:
    folder = Path(request.headers.get("NVCF-ASSET-DIR", "/nowhere"))
    return {
        "method": request.method,
        "path": request.raw_path,
        "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in request.raw_headers],
        "body": base64.b64encode(body).decode(),
        "assets": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*")},
        "named": {name.lower(): request.headers.getall(name) for name in request.headers},
    }


async def grpc_health(_: web.Application) -> AsyncIterator[None]:
    """The standard service, where the launcher says."""
    from grpc import aio  # noqa: PLC0415  only where it is asked for
    from grpc_health.v1 import health_pb2_grpc  # noqa: PLC0415
    from grpc_health.v1.health import aio as service  # noqa: PLC0415

    server = aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(service.HealthServicer(), server)
    server.add_insecure_port(f"{os.environ['HOST']}:{os.environ['HEALTH_PORT']}")
    await server.start()
    yield
    await server.stop(0)


async def health(_: web.Request) -> web.Response:
    return web.Response()


def main() -> None:
    app = web.Application(client_max_size=64 * 1024 * 1024, handler_args={"auto_decompress": False})
    if "HEALTH_PORT" in os.environ:
        app.cleanup_ctx.append(grpc_health)
    else:
        app.router.add_get("/health", health)
    app.router.add_route("*", "/{path:.*}", mirror)
    web.run_app(app, host=os.environ["HOST"], port=int(os.environ["PORT"]), print=lambda _: None)


if __name__ == "__main__":
    main()
