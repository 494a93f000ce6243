"""JSON bodies of the management routes, in and out."""

from __future__ import annotations

from typing import Protocol, TypeVar

from aiohttp import web
from pydantic import ValidationError

from api import problems
from api.front import Front
from fnqueue.wire import Wire

W = TypeVar("W", bound=Wire)

# Which models a request was read as and answered with; the tests hold the documentation to it.
READ = web.RequestKey("read", type)
ANSWERED = web.ResponseKey("answered", type)


class Answer(Protocol):
    def to_json(self) -> bytes: ...


async def read(front: Front, request: web.Request, kind: type[W]) -> W:
    """The body as a `kind`. Raises what `Bodies.read` does, and BadRequest that names each field at fault."""
    held = await front.bodies.read(request)
    try:
        return parse(request, kind, held.body)
    finally:
        held.close()


def parse(request: web.Request, kind: type[W], body: bytes) -> W:
    """The body that was read of this request. Raises BadRequest that names each field at fault."""
    request[READ] = kind
    try:
        return kind.model_validate_json(body)
    except ValidationError as exc:
        raise problems.faults(exc) from None


def answer(content: Answer, *, status: int = 200) -> web.Response:
    response = web.Response(status=status, body=content.to_json(), content_type="application/json")
    response[ANSWERED] = type(content)
    return response
