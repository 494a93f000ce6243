"""JSON bodies of the management routes, in and out."""

from __future__ import annotations

from typing import TypeVar

from aiohttp import web
from pydantic import ValidationError

from api import problems
from api.front import Front
from fnqueue.wire import Wire

W = TypeVar("W", bound=Wire)


async def read(front: Front, request: web.Request, kind: type[W]) -> W:
    """The body as a `kind`. Raises what `Bodies.read` does, and BadRequest that names each field at fault."""
    held = await front.bodies.read(request)
    try:
        return kind.model_validate_json(held.body)
    except ValidationError as exc:
        raise problems.faults(exc) from None
    finally:
        held.close()


def answer(content: Wire, *, status: int = 200) -> web.Response:
    return web.Response(status=status, body=content.to_json(), content_type="application/json")
