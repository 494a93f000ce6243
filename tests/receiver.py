"""A receiver of webhooks on the loopback. It checks signatures as the specification of Standard Webhooks says, in words
and code of its own."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_TOLERANCE_S = 300


def verify(secret: str, headers: Mapping[str, str], body: bytes, *, now: float | None = None) -> dict[str, Any]:
    """The payload. Raises ValueError where a receiver must refuse it."""
    if abs((time.time() if now is None else now) - int(headers["webhook-timestamp"])) > _TOLERANCE_S:
        raise ValueError("too old or too new")
    key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    message = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    good = hmac.new(key, message, hashlib.sha256).digest()
    for signature in headers["webhook-signature"].split(" "):
        version, _, text = signature.partition(",")
        if version == "v1" and hmac.compare_digest(base64.b64decode(text, validate=True), good):
            payload: dict[str, Any] = json.loads(body)
            return payload
    raise ValueError("no signature is good")


@dataclass(frozen=True, slots=True)
class Came:
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Receiver:
    """What came, in order. Each is answered by the next of `answers`, and 204 once there are none left."""

    url: str = ""
    came: list[Came] = field(default_factory=list)
    answers: deque[Handler | int] = field(default_factory=deque)

    def payloads(self, secret: str) -> list[dict[str, Any]]:
        """All that came. Raises ValueError as `verify`."""
        return [verify(secret, each.headers, each.body) for each in self.came]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.came.append(Came(request.path_qs, headers, await request.read()))
        answer = self.answers.popleft() if self.answers else 204
        return web.Response(status=answer) if isinstance(answer, int) else await answer(request)


@asynccontextmanager
async def receiving(*, tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", receiver._answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    receiver.url = f"{'https' if tls else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield receiver
    finally:
        await runner.cleanup()
