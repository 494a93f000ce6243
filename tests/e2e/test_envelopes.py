"""Invocation in an envelope, on both families."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import aiohttp
import pytest

from tests.e2e.conftest import NVCF, Mirror, ordered, slug
from tests.house import Reply


async def enclosed(
    mirror: Mirror, envelope: Any, order: Mapping[str, Any] | None = None, *, headers: Mapping[str, str] | None = None
) -> Reply:
    path = f"{NVCF}/exec/functions/{mirror.function.id}"
    return await mirror.caller.call("POST", path, data=envelope, headers={**ordered(order or {}), **(headers or {})})


async def test_json_goes_in_and_comes_out(mirror: Mirror) -> None:
    reply = await enclosed(mirror, {"requestBody": {"a": [1, 2.5, "ü"]}}, {"status": 201})
    assert (reply.status, reply.headers["Content-Type"]) == (200, "application/json")
    assert reply.json == {
        "reqId": reply.request_id,
        "status": "fulfilled",
        "percentComplete": 100,
        "response": {"a": [1, 2.5, "ü"]},
    }


async def test_the_function_is_given_its_assets(mirror: Mirror) -> None:
    description = {"contentType": "text/plain", "description": "d"}
    asset = (await mirror.caller.call("POST", f"{NVCF}/assets", data=description)).json
    signed = {"Content-Type": "text/plain", "x-amz-meta-nvcf-asset-description": "d"}
    async with aiohttp.ClientSession() as session, session.put(asset["uploadUrl"], data=b"x", headers=signed) as put:
        assert put.status == 200
    asked = {"inputAssetReferences": [asset["assetId"]], "pollDurationSeconds": 30}
    reply = await enclosed(mirror, {"requestBody": {}, "requestHeader": asked}, {"tell": True})
    assert reply.json["response"]["assets"] == {asset["assetId"]: hashlib.sha256(b"x").hexdigest()}


async def test_what_takes_longer_is_polled_for(mirror: Mirror) -> None:
    envelope = {"requestBody": {"late": True}, "requestHeader": {"pollDurationSeconds": 1}}
    reply = await enclosed(mirror, envelope, {"delay_s": 2})
    assert (reply.status, reply.json) == (202, {"reqId": reply.request_id, "status": "in-progress"})
    again = await mirror.caller.call("GET", f"{NVCF}/exec/status/{reply.request_id}")
    assert (again.status, again.json["response"]) == (200, {"late": True})


async def test_a_large_answer_is_a_reference(mirror: Mirror) -> None:
    reply = await enclosed(mirror, {"requestBody": 1}, {"files": {"made.txt": "by the function"}})
    assert (reply.status, reply.json["status"]) == (200, "fulfilled")
    assert "response" not in reply.json
    async with aiohttp.ClientSession() as session, session.get(reply.json["responseReference"]) as response:
        archive = zipfile.ZipFile(io.BytesIO(await response.read()))
    assert json.loads(archive.read(f"{reply.request_id}.response")) == 1
    assert archive.read("made.txt") == b"by the function"


@pytest.mark.parametrize(
    ("order", "status", "kind"),
    [
        ({"status": 422, "body": b'{"error": "too warm"}'}, 422, "unprocessable-entity"),
        ({"body": b"plain"}, 500, "answer-not-json"),
    ],
)
async def test_what_is_no_json_and_what_fails_is_a_problem(
    mirror: Mirror, order: Mapping[str, Any], status: int, kind: str
) -> None:
    reply = await enclosed(mirror, {"requestBody": {}}, order)
    assert (reply.status, slug(reply), reply.json["requestId"]) == (status, kind, reply.request_id)
