"""A route and what is said of it: one declaration that serves and documents.

A `Door` is for whom; its `get`, `post` … make the operation. `takes` is the model of the body, `object` for any bytes;
`gives` is the model of the answer, none for 204. The rest is read off the handler: its name names the operation, its
module the group, its docstring the description.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Literal, TypedDict, TypeVar, Unpack

from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import BaseModel

from api.auth import Guarded, at_pace, guarded
from api.front import Front

H = TypeVar("H", bound=Callable[..., Any])
JSON = "application/json"
FORM = "application/x-www-form-urlencoded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One that is not in the path. `schema` is JSON Schema."""

    name: str
    where: Literal["query", "header"]
    description: str
    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer that is no problem. `model` None with a `media` is content of any kind; `headers` are described."""

    status: int | Literal["default"]
    description: str
    media: str = ""
    model: type[BaseModel] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class Facts(TypedDict, total=False):
    """What an operation says of itself where it is not as most are."""

    takes: type[BaseModel] | type[object]
    media: str  # of the body that is a model, where it is not JSON
    gives: type[BaseModel]
    status: int  # of success, where it is not 200, or 204 without `gives`
    parameters: Sequence[Parameter]
    replies: Sequence[Reply]  # in place of the one that follows from `gives`
    errors: Sequence[int]  # beside those that follow from the rest
    name: str  # where one handler serves two paths


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """`path` is as the router takes it. `scopes`: the caller needs one of them; none is needed where it is empty."""

    method: str
    path: str
    serve: Handler
    name: str
    group: str
    summary: str
    description: str
    scopes: tuple[str, ...]
    takes: type[BaseModel] | type[object] | None
    media: str
    replies: tuple[Reply, ...]
    parameters: tuple[Parameter, ...]
    errors: tuple[int, ...]

    def route(self) -> web.RouteDef:
        return web.route(self.method, self.path, self.serve) if self.method != "GET" else web.get(self.path, self.serve)


class Door(Generic[H]):
    """Makes operations for those who hold one of `scopes`; `admit` puts the check before a handler."""

    def __init__(self, admit: Callable[[H], Handler], *scopes: str) -> None:
        self._admit = admit
        self._scopes = scopes

    def get(self, path: str, handler: H, summary: str, **facts: Unpack[Facts]) -> Operation:
        return self._operation("GET", path, handler, summary, facts)

    def post(self, path: str, handler: H, summary: str, **facts: Unpack[Facts]) -> Operation:
        return self._operation("POST", path, handler, summary, facts)

    def put(self, path: str, handler: H, summary: str, **facts: Unpack[Facts]) -> Operation:
        return self._operation("PUT", path, handler, summary, facts)

    def patch(self, path: str, handler: H, summary: str, **facts: Unpack[Facts]) -> Operation:
        return self._operation("PATCH", path, handler, summary, facts)

    def delete(self, path: str, handler: H, summary: str, **facts: Unpack[Facts]) -> Operation:
        return self._operation("DELETE", path, handler, summary, facts)

    def _operation(self, method: str, path: str, handler: H, summary: str, facts: Facts) -> Operation:
        group = handler.__module__.rpartition(".")[2]
        return Operation(
            method=method,
            path=path,
            serve=self._admit(handler),
            name=facts.get("name") or f"{group}_{handler.__name__}",
            group=group,
            summary=summary,
            description=inspect.getdoc(handler) or "",
            scopes=self._scopes,
            takes=facts.get("takes"),
            media=facts.get("media", JSON),
            replies=tuple(facts.get("replies") or [_success(facts)]),
            parameters=tuple(facts.get("parameters", ())),
            errors=tuple(facts.get("errors", ())),
        )


Unguarded = Callable[[Front, web.Request], Any]


def open_to_all(front: Front) -> Door[Unguarded]:
    return Door(lambda handler: partial(handler, front))


def scoped(front: Front, *scopes: str, paced: bool = True, delegates: bool = False) -> Door[Guarded]:
    """For callers that hold one of `scopes`; their principal is the handler's third argument. `paced`: and that keep
    the pace of management calls. `delegates`: also for those with a delegated token."""
    return Door(
        lambda handler: guarded(front, at_pace(handler) if paced else handler, *scopes, delegates=delegates), *scopes
    )


def known(front: Front, *scopes: str) -> Door[Guarded]:
    """For any good credential that keeps the pace of management calls, where the handler asks for one of `scopes`
    itself: which, depends on the account that it is about."""
    return Door(lambda handler: guarded(front, at_pace(handler)), *scopes)


def checking_itself(front: Front, *scopes: str) -> Door[Unguarded]:
    """For handlers that ask for the scope themselves, in an order of their own."""
    return Door(lambda handler: partial(handler, front), *scopes)


def _success(facts: Facts) -> Reply:
    gives = facts.get("gives")
    if gives is None:
        return Reply(status=facts.get("status", 204), description="Done; there is nothing to say.")
    described = (gives.__doc__ or "").partition("\n")[0]  # its own: `inspect.getdoc` would give pydantic's
    return Reply(status=facts.get("status", 200), description=described or "Done.", media=JSON, model=gives)
