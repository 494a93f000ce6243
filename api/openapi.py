"""The OpenAPI 3.1 document of the operations that are served: from their models, their parameters and their scopes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, Literal, TypeGuard, cast

from pydantic import BaseModel
from pydantic.alias_generators import to_camel
from pydantic.json_schema import models_json_schema

from api import problems
from api.operations import JSON, Operation, Parameter, Reply
from fnqueue.wire import Problem

Json = dict[str, Any]
Mode = Literal["validation", "serialization"]
Schemas = Mapping[tuple[type[BaseModel], Mode], Json]

BEARER = "bearer"
OCTETS = "application/octet-stream"
_IN_PATH = re.compile(r"\{(\w+)(?::[^{}]*)?\}")
_SCHEMAS = "#/components/schemas/{model}"


def document(operations: Sequence[Operation]) -> Json:
    made, definitions = models_json_schema(
        sorted(_models(operations), key=lambda found: (found[0].__name__, found[1])), ref_template=_SCHEMAS
    )
    schemas = cast("Schemas", made)
    paths: dict[str, Json] = {}
    for operation in operations:
        item = paths.setdefault(path_of(operation), {})
        item[operation.method.lower()] = _describe(operation, schemas)
    statuses = sorted({status for operation in operations for status in errors_of(operation)})
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "fnqueue",
            "version": version("fnqueue"),
            "description": "The durable invocation queue for GPU functions that speaks the NVCF API.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": group} for group in dict.fromkeys(operation.group for operation in operations)],
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "responses": {_problem_name(status): _problem(status, schemas) for status in statuses},
            "securitySchemes": {BEARER: {"type": "http", "scheme": "bearer", "description": "An API key (nvapi-…)."}},
        },
    }


def path_of(operation: Operation) -> str:
    """Without the router's patterns, and with the names that a client would use: `/functions/{functionId}`."""
    return _IN_PATH.sub(lambda found: "{" + to_camel(found[1]) + "}", operation.path)


def errors_of(operation: Operation) -> list[int]:
    """The problems that an operation can end in, by what it needs."""
    found = {*operation.errors}
    if operation.scopes:
        found |= {401, 403, 429, 503}
    if _in_path(operation):
        found |= {400, 404}
    if operation.parameters:
        found |= {400}
    if operation.takes is not None:
        found |= {400, 408, 413, 503}
    if operation.scopes and operation.method != "GET":
        found |= {409}
    return sorted(found)


def _models(operations: Iterable[Operation]) -> set[tuple[type[BaseModel], Mode]]:
    found: set[tuple[type[BaseModel], Mode]] = {(Problem, "serialization")}
    for operation in operations:
        if _is_model(operation.takes):
            found.add((operation.takes, "validation"))
        found |= {(reply.model, "serialization") for reply in operation.replies if reply.model is not None}
    return found


def _is_model(takes: type[object] | None) -> TypeGuard[type[BaseModel]]:
    return takes is not None and issubclass(takes, BaseModel)


def _describe(operation: Operation, schemas: Schemas) -> Json:
    described: Json = {
        "operationId": operation.name,
        "tags": [operation.group],
        "summary": operation.summary,
        "description": operation.description,
        "parameters": [*_in_path(operation), *(_parameter(each) for each in operation.parameters)],
        "requestBody": _body(operation, schemas),
        "responses": {
            **{str(reply.status): _reply(reply, schemas) for reply in operation.replies},
            **{
                str(status): {"$ref": f"#/components/responses/{_problem_name(status)}"}
                for status in errors_of(operation)
            },
        },
    }
    if operation.scopes:
        described["security"] = [{BEARER: []}]
        described["x-scopes"] = list(operation.scopes)
        needs = " or ".join(f"`{scope}`" for scope in operation.scopes)
        described["description"] = f"{operation.description}\n\nNeeds the scope {needs}.".strip()
    return {name: value for name, value in described.items() if value}


def _in_path(operation: Operation) -> list[Json]:
    return [
        {
            "name": to_camel(name),
            "in": "path",
            "required": True,
            "schema": {"type": "string", "minLength": 1}
            | ({"format": "uuid"} if name.endswith("_id") and name not in _NO_UUIDS else {}),
        }
        for name in _IN_PATH.findall(operation.path)
    ]


def _parameter(parameter: Parameter) -> Json:
    return {
        "name": parameter.name,
        "in": parameter.where,
        "description": parameter.description,
        "schema": dict(parameter.schema),
    }


def _body(operation: Operation, schemas: Schemas) -> Json:
    if operation.takes is None:
        return {}
    if not _is_model(operation.takes):
        return {"content": {JSON: {"schema": {}}, OCTETS: {"schema": {}}}}
    return {"required": True, "content": {operation.media: {"schema": schemas[operation.takes, "validation"]}}}


def _reply(reply: Reply, schemas: Schemas) -> Json:
    described: Json = {"description": reply.description}
    if reply.headers:
        described["headers"] = {name: _header(text) for name, text in reply.headers.items()}
    if reply.media:
        schema = {} if reply.model is None else schemas[reply.model, "serialization"]
        described["content"] = {reply.media: {"schema": schema}}
    return described


def _problem_name(status: int) -> str:
    return HTTPStatus(status).phrase.title().replace(" ", "").replace("-", "")


def _problem(status: int, schemas: Schemas) -> Json:
    """`type` tells the kinds of one status apart."""
    types = sorted({kind.type for kind in problems.kinds() if kind.status == status})
    described: Json = {
        "description": "; ".join([HTTPStatus(status).phrase, *(f"`{each}`" for each in types)]),
        "content": {problems.CONTENT_TYPE: {"schema": schemas[Problem, "serialization"]}},
    }
    if status in _PROBLEM_HEADERS:
        described["headers"] = {name: _header(text) for name, text in _PROBLEM_HEADERS[status].items()}
    return described


def _header(text: str) -> Json:
    return {"description": text, "schema": {"type": "string"}}


_NO_UUIDS = frozenset({"nca_id"})
_AGAIN = {"Retry-After": "Seconds after which the same request may succeed."}
_PROBLEM_HEADERS = {401: {"WWW-Authenticate": "`Bearer`."}, 429: _AGAIN, 503: _AGAIN}
