"""What a client can do who has read `/v2/nvcf/openapi.json` and nothing else: every path, parameter, scope, body and
answer here is looked up in the served document, and checked against it."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

import pytest
from jsonschema_rs import Draft202012Validator

from tests.e2e.conftest import MIRROR, NVCF, Site
from tests.eventually import eventually
from tests.house import Caller, Reply

JSON = "application/json"
PARTS = re.compile(r"\{(\w+)\}")
# Of what a function's author does, in the document's words.
AUTHORS = (
    "functions_create",
    "functions_get",
    "functions_delete_version",
    "clusters_list_groups",
    "deployments_create",
    "deployments_delete",
    "authorizations_replace_all",
    "limits_replace",
    "queues_of_version",
    "keys_create",
    "keys_delete",
    "keys_get",
)
USERS = ("functions_list_functions", "invocations_invoke", "queues_of_function", "queues_position")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Calls operations by the names that the document gives them."""

    document: dict[str, Any]
    caller: Caller

    def scopes(self, *names: str) -> list[str]:
        """One that is enough for each of these operations."""
        return sorted({self._find(name)[2]["x-scopes"][0] for name in names})

    def with_key(self, key: str) -> Reader:
        return replace(self, caller=self.caller.with_key(key))

    async def call(self, name: str, body: Any = None, *, expect: int | None = None, **named: str) -> Any:
        """The JSON answered; fails unless the status is the good one that is documented, or `expect`."""
        reply = await self.reply(name, body, **named)
        _, _, operation = self._find(name)
        good = expect or int(next(status for status in operation["responses"] if status.startswith("2")))
        assert reply.status == good, (name, reply)
        return json.loads(reply.body) if reply.body else None

    async def reply(self, name: str, body: Any = None, **named: str) -> Reply:
        """`named` are parameters of the path and the query."""
        method, path, operation = self._find(name)
        in_path = {each: named.pop(each) for each in PARTS.findall(path)}
        in_query = {each["name"] for each in operation.get("parameters", []) if each["in"] == "query"}
        assert set(named) <= in_query
        if body is not None:
            self._check(operation["requestBody"]["content"][JSON]["schema"], body)
        query = f"?{urlencode(named)}" if named else ""
        reply = await self.caller.call(method, path.format(**in_path) + query, data=body)
        self._check_reply(operation, reply)
        return reply

    def _find(self, name: str) -> tuple[str, str, dict[str, Any]]:
        for path, item in self.document["paths"].items():
            for method, operation in item.items():
                if operation["operationId"] == name:
                    return method.upper(), path, operation
        raise AssertionError(f"no operation is called {name}")

    def _check_reply(self, operation: dict[str, Any], reply: Reply) -> None:
        documented = operation["responses"].get(str(reply.status)) or operation["responses"]["default"]
        if "$ref" in documented:
            documented = self.document["components"]["responses"][documented["$ref"].rpartition("/")[2]]
        media = reply.headers.get("Content-Type", "").partition(";")[0]
        content = documented.get("content", {})
        if not content:
            assert reply.body == b""
        elif "*/*" not in content:
            self._check(content[media]["schema"], json.loads(reply.body))

    def _check(self, schema: dict[str, Any], value: Any) -> None:
        """Raises ValidationError."""
        Draft202012Validator({**schema, "components": self.document["components"]}).validate(value)


@pytest.fixture
async def reader(site: Site, caller: Caller) -> Reader:
    """With the operator's key; the document is served without any."""
    async with site.caller("") as nobody:
        served = await nobody.call("GET", f"{NVCF}/openapi.json")
    assert served.status == 200
    return Reader(document=served.json, caller=caller)


async def test_a_function_lives_from_create_to_delete_by_the_document_alone(reader: Reader) -> None:
    author_account, partner_account = f"author-{uuid.uuid4().hex[:8]}", f"partner-{uuid.uuid4().hex[:8]}"

    async def key_for(account: str, *operations: str) -> dict[str, Any]:
        rights = {"policies": [{"scopes": reader.scopes(*operations)}]}
        made: dict[str, Any] = await reader.call("keys_create", {"authorizations": rights, "nca_id": account})
        return made

    key = await key_for(author_account, *AUTHORS)
    author = reader.with_key(key["value"])
    partner = reader.with_key((await key_for(partner_account, *USERS))["value"])

    # Create
    definition = {"name": "by-the-book", "inferenceUrl": "/", "containerImage": MIRROR, "healthUri": "/health"}
    function = (await author.call("functions_create", definition))["function"]
    of = {"functionId": function["id"], "versionId": function["versionId"]}

    # Deploy, on what is on offer
    async def offers() -> list[Any]:
        return [
            (group["name"], gpu["name"], instance_type["name"])
            for group in (await author.call("clusters_list_groups"))["clusterGroups"]
            for gpu in group["gpus"]
            for instance_type in gpu["instanceTypes"]
            if gpu["name"] == "CPU"
        ]

    [(backend, gpu, instance_type)] = await eventually(offers, bool, within_s=60)
    wanted = {"backend": backend, "gpu": gpu, "instanceType": instance_type, "minInstances": 1, "maxInstances": 1}
    await author.call("deployments_create", {"deploymentSpecifications": [wanted]}, **of)

    async def status() -> str:
        return str((await author.call("functions_get", **of))["function"]["status"])

    await eventually(status, lambda seen: seen == "ACTIVE", within_s=60)

    # Share
    assert (await partner.call("functions_list_functions", visibility="authorized"))["functions"] == []
    await partner.call("invocations_invoke", {"any": "thing"}, functionId=function["id"], expect=404)
    parties = {"authorizedParties": [{"ncaId": partner_account}]}
    await author.call("authorizations_replace_all", parties, functionId=function["id"])
    (shown,) = (await partner.call("functions_list_functions", visibility="authorized"))["functions"]
    assert (shown["id"], shown["ownedByDifferentAccount"], "containerImage" in shown) == (function["id"], True, False)

    # Limit, and invoke
    await author.call("limits_replace", {"rateLimit": "2-H"}, **of)

    async def limited() -> bool:
        return "rateLimit" in (await author.call("functions_get", **of))["function"]

    await eventually(limited, bool)

    async def invoke() -> Reply:
        return await partner.reply("invocations_invoke", {"any": "thing"}, functionId=function["id"])

    # A front end may remember for a second with whom it was not shared.
    answered = await eventually(invoke, lambda reply: reply.status != 404)
    for reply in (answered, await invoke()):
        assert (reply.status, reply.json) == (200, {"any": "thing"})
    refused = await partner.reply("invocations_invoke", {}, functionId=function["id"])
    assert refused.status == 429
    assert int(refused.headers["Retry-After"]) > 0
    assert (await partner.call("queues_position", requestId=answered.request_id))["positionInQueue"] == 0

    # Read queues
    (queue,) = (await author.call("queues_of_version", **of))["queues"]
    assert (queue["queueDepth"], queue["functionStatus"]) == (0, "ACTIVE")
    assert (await partner.call("queues_of_function", functionId=function["id"]))["queues"] == [queue]

    # Rotate the key: a new one with the rights of the old, which then goes
    rights = (await author.call("keys_get", keyId=key["id"]))["authorizations"]
    successor = await author.call("keys_create", {"authorizations": rights})
    author = author.with_key(successor["value"])
    await author.call("keys_delete", keyId=key["id"])
    retired = reader.with_key(key["value"])

    async def with_the_old_key() -> int:
        return (await retired.reply("functions_get", **of)).status

    await eventually(with_the_old_key, lambda seen: seen == 401)

    # Delete
    undeployed = (await author.call("deployments_delete", **of))["function"]
    assert undeployed["status"] == "INACTIVE"
    await author.call("functions_delete_version", **of)
    await author.call("functions_get", **of, expect=404)
