"""A sample function: says a message back, repeated, after a delay. Knows nothing of queues.

    POST /echo    {"message": "hello", "repeats": 2, "delay": 0.5}  ->  {"echo": "hello hello"}
    GET  /health  {"status": "ok", "running": 0}

`delay` is in seconds. A client that hangs up during the delay stops the work; SIGTERM lets it finish.
"""

import argparse
import asyncio
import json
import logging
import os
from dataclasses import dataclass
from typing import Any

from aiohttp import web

try:
    from uvloop import new_event_loop
except ImportError:  # no wheel for this platform: slower, otherwise the same
    from asyncio import new_event_loop  # type: ignore[assignment]  # uvloop's says Loop, a subclass

MAX_REPEATS = 1000
MAX_DELAY_S = 3600.0
MAX_MESSAGE_BYTES = 1024 * 1024
MAX_ECHO_BYTES = 64 * 1024 * 1024
# JSON may spell one byte of the message as six: \u0061.
MAX_BODY_BYTES = 6 * MAX_MESSAGE_BYTES + 1024

log = logging.getLogger("echo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    message: str
    repeats: int
    delay_s: float


class Refused(Exception):
    """The request cannot be served as it stands; `status` and the text go to the client."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Echo:
    """The two routes, and how many requests are running now."""

    def __init__(self) -> None:
        self._running = 0

    async def post(self, http: web.Request) -> web.Response:
        try:
            request = parse(await read_body(http))
        except Refused as refused:
            return answer({"error": str(refused)}, status=refused.status)
        await self._delay(request.delay_s)
        return answer({"echo": " ".join([request.message] * request.repeats)})

    async def health(self, _: web.Request) -> web.Response:
        return answer({"status": "ok", "running": self._running})

    async def _delay(self, delay_s: float) -> None:
        if not delay_s:
            return
        self._running += 1
        try:
            await asyncio.sleep(delay_s)
        except asyncio.CancelledError:
            log.info("client left, echo stopped")
            raise
        finally:
            self._running -= 1


async def read_body(http: web.Request) -> bytes:
    """The whole body. Raises: Refused (413) past MAX_BODY_BYTES, unread where its length is declared."""
    if (http.content_length or 0) <= MAX_BODY_BYTES:
        try:
            return await http.read()
        except web.HTTPRequestEntityTooLarge:
            pass
    raise Refused(413, f"the body is larger than {MAX_BODY_BYTES} bytes")


def parse(body: bytes) -> Request:
    """Raises: Refused, naming the field (400: not a JSON object; 422: a field is missing or out of range)."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(fields, dict):
        raise Refused(400, "the body is not a JSON object")
    request = Request(
        message=parse_message(fields.get("message")),
        repeats=parse_repeats(fields.get("repeats", 1)),
        delay_s=parse_delay(fields.get("delay", 0)),
    )
    if (len(request.message.encode()) + 1) * request.repeats > MAX_ECHO_BYTES:
        raise Refused(422, f"message times repeats: the answer would be larger than {MAX_ECHO_BYTES} bytes")
    return request


def parse_message(value: Any) -> str:
    if not isinstance(value, str):
        raise Refused(422, "message: must be a string")
    try:
        length_bytes = len(value.encode())
    except UnicodeEncodeError:
        raise Refused(422, "message: holds half of a surrogate pair, which is not text") from None
    if length_bytes > MAX_MESSAGE_BYTES:
        raise Refused(422, f"message: must be at most {MAX_MESSAGE_BYTES} bytes")
    return value


def parse_repeats(value: Any) -> int:
    # type() and not isinstance(): true and false are ints to Python.
    if type(value) is not int or not 1 <= value <= MAX_REPEATS:
        raise Refused(422, f"repeats: must be a whole number from 1 to {MAX_REPEATS}")
    return value


def parse_delay(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= MAX_DELAY_S:
        raise Refused(422, f"delay: must be a number of seconds from 0 to {MAX_DELAY_S:g}")
    return float(value)


def answer(body: dict[str, Any], *, status: int = 200) -> web.Response:
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return web.Response(body=data, status=status, content_type="application/json")


def application() -> web.Application:
    echo = Echo()
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.add_routes([web.post("/echo", echo.post), web.get("/health", echo.health)])
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="Echo, as an ordinary HTTP server.")
    parser.add_argument("--host", default=os.environ.get("HOST", "127.0.0.1"))
    parser.add_argument("--port", type=int, default=int(os.environ.get("PORT", "8000")))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    web.run_app(
        application(),
        host=options.host,
        port=options.port,
        loop=new_event_loop(),
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=MAX_DELAY_S,
    )


if __name__ == "__main__":
    main()
