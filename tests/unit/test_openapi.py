"""The table of routes as a document."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from aiohttp import ClientSession
from pydantic import SecretStr

from api.app import make_app, operations
from api.front import Front
from api.openapi import document, path_of
from api.operations import open_to_all
from api.routes import health
from api.server import serving
from broker.accounts import SCOPES
from broker.backends.files import ROUTE as BLOBS
from broker.ports import Broker
from broker.settings import ApiSettings

# No operation asks anything of its front end before it serves.
DESCRIBED = operations(cast("Front", None))
DOCUMENT = document(DESCRIBED)


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for value in part.values():
            yield from references(value)
    elif isinstance(part, list):
        for value in part:
            yield from references(value)


@pytest.fixture
async def client(memory_broker: Broker, tmp_path: Path) -> AsyncIterator[ClientSession]:
    settings = ApiSettings(port=0, data_dir=tmp_path, admin_key=SecretStr("k"))
    async with serving(memory_broker, settings) as url, ClientSession(url) as session:
        yield session


async def test_every_route_but_the_signed_urls_the_mirrors_and_the_dashboard_is_documented(
    memory_broker: Broker,
) -> None:
    app = make_app(Front.over(memory_broker, ApiSettings()))
    described = {(each.method, re.sub(r":[^{}]*", "", each.path)) for each in DESCRIBED}
    served = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource}
    undocumented = {(method, path) for method, path in served - described if method != "HEAD"}
    mirrors = ("/v2/orgs/{org}/", "/v2/nvcf/accounts/{for_account}/")  # the same under other prefixes
    own = ("/dashboard",)  # the page's own, which changes with it
    assert {path for _, path in undocumented if not path.startswith((*mirrors, *own))} <= {BLOBS + "{key}"}
    assert described <= served


def test_each_operation_has_a_name_of_its_own_and_a_summary() -> None:
    names = [operation.name for operation in DESCRIBED]
    assert len(set(names)) == len(names)
    assert all(operation.summary for operation in DESCRIBED)


def test_a_path_and_method_are_described_once() -> None:
    described = [(operation.method, path_of(operation)) for operation in DESCRIBED]
    assert len(set(described)) == len(described)


def test_every_scope_that_is_asked_for_can_be_had() -> None:
    assert {scope for operation in DESCRIBED for scope in operation.scopes} <= set(SCOPES)


def test_every_reference_leads_somewhere() -> None:
    for reference in references(DOCUMENT):
        part: Any = DOCUMENT
        for step in reference.removeprefix("#/").split("/"):
            part = part[step]
        assert part


def test_a_description_is_what_the_declaration_says() -> None:
    created = DOCUMENT["paths"]["/v2/nvcf/functions"]["post"]
    assert created["operationId"] == "functions_create"
    assert created["x-scopes"] == ["register_function"]
    assert created["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/CreateFunction"
    }
    assert set(created["responses"]) == {"200", "400", "401", "403", "408", "409", "413", "429", "503"}


def test_names_on_the_wire_are_those_of_the_document() -> None:
    fields = DOCUMENT["components"]["schemas"]["CreateFunction"]
    assert {"inferenceUrl", "containerImage"} <= set(fields["properties"])
    assert set(fields["required"]) == {"name", "inferenceUrl"}


def test_a_model_that_says_nothing_of_itself_is_described_by_nobody_else() -> None:
    assert "pydantic" not in json.dumps(DOCUMENT)
    assert DOCUMENT["paths"]["/v2/nvcf/functions"]["get"]["responses"]["200"]["description"] == "Done."


def test_what_is_open_needs_no_key() -> None:
    anyone = open_to_all(cast("Front", None))
    described = document([anyone.get("/x", health.live, "x")])["paths"]["/x"]["get"]
    assert "security" not in described
    assert set(described["responses"]) == {"204"}


async def test_the_document_and_its_page_are_open(client: ClientSession) -> None:
    async with client.get("/v2/nvcf/openapi.json") as response:
        assert (response.status, response.content_type) == (200, "application/json")
        assert await response.json() == json.loads(json.dumps(DOCUMENT))
    async with client.get("/v2/nvcf/docs") as response:
        page = await response.text()
        policy = response.headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert not re.search(r"<style|<script>|\son\w+=|\sstyle=|https?://", page)
    for link in re.findall(r'(?:href|src)="([^"]+)"', page):
        async with client.get(f"/v2/nvcf/{link}") as response:
            assert response.status == 200, link
