"""The documentation that this server gives of itself. Open to all: it says nothing of what is stored here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import orjson
from aiohttp import web

from api.front import Front
from api.openapi import document
from api.operations import Operation

FOLDER = Path(__file__).parent.parent / "reference"
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; " + (
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Reference:
    """Describes `operations`, which may grow until the first who asks."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._operations = operations
        self._document = b""

    async def openapi(self, front: Front, request: web.Request) -> web.Response:
        """This document. Clients can be generated from it."""
        if not self._document:
            self._document = orjson.dumps(document(self._operations))
        return web.Response(body=self._document, content_type="application/json")


async def page(front: Front, request: web.Request) -> web.Response:
    """The same for readers."""
    return _file("index.html", "text/html")


async def style(front: Front, request: web.Request) -> web.Response:
    return _file("page.css", "text/css")


async def script(front: Front, request: web.Request) -> web.Response:
    return _file("page.js", "text/javascript")


def _file(name: str, media: str) -> web.Response:
    extra = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
    return web.Response(text=(FOLDER / name).read_text(), content_type=media, charset="utf-8", headers=extra)
