"""A container for tests that talks while it listens.

GET /ws     a WebSocket that answers text with `echo <text>` and bytes with the same bytes, and speaks the subprotocols
            `chat` and `superchat`. Text that is an order instead:
                close <code> <reason>   close it so
                die                     break the connection off
                flood <size>            send so many bytes at a time, for ever
                ping <text>             send a ping; what comes back is answered as `pong <text>`
                tell                    answer with JSON of what came with the handshake
            `?refuse=<status>` answers the handshake with that status, `?deaf=1` reads nothing.
ANY /talk   answers every piece of the body with `pong <piece>`, and `bye` at its end. X-Talk, a word of:
                early    answer 413 without reading the body
                silent   never answer
                die      break the connection off, before there is an answer
                half     the same, in the middle of one
                pour     answer for ever, and read nothing
Written to the file RECORD, if there is one: `start <name>`, and how it ended, `done <name>` with the close code for a
WebSocket, or `aborted <name>`. The name is X-Name, or the request's own id.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from typing import Any

from aiohttp import WSMsgType, web

PIECE = b"t" * 16 * 1024


class Talker:
    """`said` counts what would be written down, `poured` bytes that somebody took."""

    def __init__(self, record: str = "") -> None:
        self._record = record
        self.said: Counter[str] = Counter()
        self.poured = 0
        self.met: list[web.Request] = []

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/health", self.health)
        app.router.add_get("/ws", self.websocket)
        app.router.add_route("*", "/talk", self.talk)
        return app

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    # -- WebSockets --------------------------------------------------------------------------------

    async def websocket(self, request: web.Request) -> web.StreamResponse:
        self.met.append(request)
        if "refuse" in request.query:
            return web.Response(status=int(request.query["refuse"]), text="no", headers={"X-Why": "because"})
        name = _name(request)
        self.say(f"start {name}")
        opened = web.WebSocketResponse(protocols=("chat", "superchat"), max_msg_size=0, autoping=False)
        try:
            await opened.prepare(request)
            if "deaf" in request.query:
                await asyncio.sleep(3600)
            async for message in opened:
                await self._answer(request, opened, message)
        except (ConnectionError, asyncio.CancelledError):
            self.say(f"aborted {name}")
            raise
        self.say(f"done {name} {opened.close_code}")
        return opened

    async def _answer(self, request: web.Request, opened: web.WebSocketResponse, message: Any) -> None:
        text = message.data if message.type is WSMsgType.TEXT else ""
        order, _, rest = text.partition(" ")
        if message.type is WSMsgType.PING:
            await opened.pong(message.data)
        elif message.type is WSMsgType.PONG:
            await opened.send_str(f"pong {message.data.decode()}")
        elif message.type is WSMsgType.BINARY:
            await opened.send_bytes(message.data)
        elif order == "close":
            code, _, reason = rest.partition(" ")
            await opened.close(code=int(code), message=reason.encode())
        elif order == "die":
            assert request.transport is not None
            request.transport.abort()
        elif order == "flood":
            while True:
                await opened.send_bytes(b"f" * int(rest))
                self.poured += int(rest)
        elif order == "ping":
            await opened.ping(rest.encode())
        elif order == "tell":
            await opened.send_str(json.dumps({"path": request.raw_path, "headers": [*request.headers.items()]}))
        else:
            await opened.send_str(f"echo {text}")

    # -- bodies ------------------------------------------------------------------------------------

    async def talk(self, request: web.Request) -> web.StreamResponse:
        self.met.append(request)
        name, order = _name(request), request.headers.get("X-Talk", "")
        self.say(f"start {name}")
        try:
            response = await self._talk(request, order)
        except (ConnectionError, asyncio.CancelledError):
            self.say(f"aborted {name}")
            raise
        self.say(f"done {name}")
        return response

    async def _talk(self, request: web.Request, order: str) -> web.StreamResponse:
        assert request.transport is not None
        if order == "early":
            return web.Response(status=413, text="enough")
        if order == "silent":
            await asyncio.sleep(3600)
        if order == "die":
            request.transport.abort()
            return web.Response()
        response = web.StreamResponse(status=201, headers={"X-Mine": "1"})
        await response.prepare(request)
        if order == "half":
            await response.write(b"half an answer")
            request.transport.close()
            return response
        while order == "pour":
            await response.write(PIECE)
            self.poured += len(PIECE)
        async for piece in request.content.iter_any():
            await response.write(b"pong " + piece)
        await response.write(b"bye")
        return response

    def say(self, line: str) -> None:
        self.said[line] += 1
        if self._record:
            descriptor = os.open(self._record, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(descriptor, f"{line}\n".encode())
            finally:
                os.close(descriptor)


def _name(request: web.Request) -> str:
    return request.headers.get("X-Name") or request.headers["NVCF-REQID"]


def main() -> None:
    web.run_app(
        Talker(os.environ.get("RECORD", "")).app(),
        host=os.environ["HOST"],
        port=int(os.environ["PORT"]),
        handler_cancellation=True,
        print=lambda _: None,
    )


if __name__ == "__main__":
    main()
