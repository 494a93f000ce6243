"""Invocation in an envelope: what goes in, and what comes out."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from multidict import CIMultiDict

from api.answers import Answer
from api.envelopes import enclose
from broker.model import Outcome
from fnqueue import wire
from tests.unit.test_server import FUNCTION, NOBODYS, NOW, NVCF, VERSION, House, opened, slug

EXEC = f"{NVCF}/exec/functions/{FUNCTION}"
ID = NOBODYS
RESULT = "http://here/result"


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path) as found:
        yield found


async def post(
    house: House, envelope: Any, headers: Mapping[str, str] | None = None, *, path: str = EXEC
) -> tuple[int, Any, bytes]:
    body = envelope if isinstance(envelope, bytes) else json.dumps(envelope).encode()
    async with house.client.post(path, data=body, headers=headers) as response:
        return response.status, response.headers, await response.read()


def enclosed(status: int, body: bytes = b"", *, said: str = "fulfilled", **headers: str) -> tuple[Answer, Any]:
    marked = CIMultiDict(
        {"NVCF-REQID": ID, "NVCF-STATUS": said, **{k.replace("_", "-"): v for k, v in headers.items()}}
    )
    found = enclose(Answer(status=status, headers=marked, body=body), result_url=RESULT)
    return found, json.loads(found.body)


# -- what comes out ----------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 203, 299])
def test_every_success_of_the_function_is_200(status: int) -> None:
    found, said = enclosed(status, b'{"a":1}', Content_Type="application/json", X_Own="kept", ETag='"of-the-body"')
    assert (found.status, found.headers["Content-Type"]) == (200, "application/json")
    assert said == {"reqId": ID, "status": "fulfilled", "percentComplete": 100, "response": {"a": 1}}
    assert found.headers["X-Own"] == "kept"
    assert "ETag" not in found.headers
    wire.EnvelopeAnswer.model_validate_json(found.body)


@pytest.mark.parametrize(
    "body", [b"2.50", b'"text"', b"null", b"[123456789012345678901234567890]", '{"ü": "\\u00fc"}'.encode()]
)
def test_the_functions_json_stands_there_byte_for_byte(body: bytes) -> None:
    found, _ = enclosed(200, body)
    assert b'"response":' + body + b"}" in found.body


def test_nothing_said_is_no_response() -> None:
    found, said = enclosed(204)
    assert found.status == 200
    assert "response" not in said


@pytest.mark.parametrize("body", [b"hello", b"\xff\xfe", b'{"a": 1', b"NaN", b"[" * 100_000])
def test_an_answer_that_is_no_json_is_a_problem_that_says_where_it_is(body: bytes) -> None:
    found, said = enclosed(200, body, Content_Type="text/plain")
    assert (found.status, found.headers["Content-Type"]) == (500, "application/problem+json")
    assert (said["type"], said["requestId"]) == ("urn:fnqueue:problem-details:answer-not-json", ID)
    assert RESULT in said["detail"]
    assert found.headers["NVCF-STATUS"] == "fulfilled"


def test_a_large_answer_is_a_reference() -> None:
    found, said = enclosed(302, Location="http://blobs/1.zip")
    assert (found.status, said["responseReference"], said["percentComplete"]) == (200, "http://blobs/1.zip", 100)
    assert "Location" not in found.headers


@pytest.mark.parametrize("said", ["pending-evaluation", "in-progress"])
def test_what_is_not_done_is_202(said: str) -> None:
    found, envelope = enclosed(202, said=said, Location="http://again", Retry_After="1")
    assert found.status == 202
    assert envelope == {"reqId": ID, "status": said}
    assert (found.headers["Location"], found.headers["Retry-After"]) == ("http://again", "1")


def test_progress_is_told() -> None:
    _, envelope = enclosed(202, b'{"so": "far"}', said="in-progress", NVCF_PERCENT_COMPLETE="40")
    assert (envelope["percentComplete"], envelope["response"]) == (40, {"so": "far"})


@pytest.mark.parametrize("status", [400, 404, 410, 500, 504])
def test_a_failure_stays_what_it_was(status: int) -> None:
    marked = CIMultiDict({"NVCF-REQID": ID, "NVCF-STATUS": "errored"})
    answer = Answer(status=status, headers=marked, body=b"as it was")
    assert enclose(answer, result_url=RESULT) is answer


# -- what goes in ------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [{"a": [1, 2.5, "ü"]}, [], "text", 0, False, {"requestBody": {}}, 10**30])
async def test_the_function_is_given_the_request_body_as_json(house: House, content: Any) -> None:
    sent = NOW | {"Content-Type": "text/plain", "Accept-Encoding": "gzip", "X-Mine": "1"}
    status, _, body = await post(house, {"requestBody": content}, sent)
    assert (status, json.loads(body)["status"]) == (202, "pending-evaluation")
    job = await house.finish()
    assert json.loads(job.body) == content
    own = {name: value for name, value in job.headers if name.startswith(("Content", "Accept-E", "X-"))}
    assert own == {"Content-Type": "application/json", "X-Mine": "1"}


async def test_an_envelope_never_asks_for_a_stream(house: House) -> None:
    await post(house, {"requestBody": {}}, NOW | {"Accept": "text/event-stream"})
    job = await house.finish()
    assert not job.passthrough
    assert "Accept" not in dict(job.headers)


@pytest.mark.parametrize(
    ("envelope", "named"),
    [
        (b"{", "body"),
        (b"", "body"),
        (b"[]", "body"),
        ({}, "requestBody"),
        ({"requestBody": None}, "requestBody"),
        (b'{"requestBody": NaN}', "requestBody"),
        (b'{"requestBody": 1e999}', "requestBody"),
        (b'{"requestBody": "\\ud800"}', ""),
        ({"requestBody": {}, "requestHeader": {"pollDurationSeconds": -1}}, "pollDurationSeconds"),
        ({"requestBody": {}, "requestHeader": {"pollDurationSeconds": 3601}}, "pollDurationSeconds"),
        ({"requestBody": {}, "requestHeader": {"pollDurationSeconds": 1.5}}, "pollDurationSeconds"),
        ({"requestBody": {}, "requestHeader": {"inputAssetReferences": ["x"]}}, "inputAssetReferences"),
        ({"requestBody": {}, "requestHeader": {"inputAssetReferences": "x"}}, "inputAssetReferences"),
    ],
)
async def test_a_bad_envelope_is_400_that_names_the_field(house: House, envelope: Any, named: str) -> None:
    status, _, body = await post(house, envelope, NOW)
    assert status == 400
    assert slug(body) in ("blank", "bad-request")
    assert named in json.loads(body)["detail"]
    assert await house.queued() == 0


async def test_an_asset_that_is_not_there_is_404(house: House) -> None:
    envelope = {"requestBody": {}, "requestHeader": {"inputAssetReferences": [NOBODYS.upper()]}}
    status, _, body = await post(house, envelope, NOW)
    assert status == 404
    assert NOBODYS in json.loads(body)["detail"]


async def test_a_result_can_be_asked_for_in_both_ways(house: House) -> None:
    _, headers, body = await post(house, {"requestBody": {}}, NOW, path=f"{EXEC}/versions/{VERSION}")
    request_id = json.loads(body)["reqId"]
    assert headers["Location"] == f"{house.url}{NVCF}/exec/status/{request_id}"
    await house.finish(Outcome(status=201, body=b'{"made": true}'))
    async with house.client.get(f"{NVCF}/exec/status/{request_id}") as response:
        assert response.status == 200
        assert (await response.json())["response"] == {"made": True}
    async with house.client.get(f"{NVCF}/pexec/status/{request_id}") as response:
        assert (response.status, await response.read()) == (201, b'{"made": true}')


async def test_an_answer_that_is_no_json_can_be_read_where_the_problem_says(house: House) -> None:
    _, headers, _ = await post(house, {"requestBody": {}}, NOW)
    await house.finish(Outcome(status=200, body=b"plain"))
    async with house.client.get(f"{NVCF}/exec/status/{headers['NVCF-REQID']}") as response:
        problem = await response.json(content_type="application/problem+json")
    async with house.client.get(problem["detail"].rpartition(" ")[2]) as response:
        assert await response.read() == b"plain"


async def test_still_queued_is_504_for_who_asks_for_it(house: House) -> None:
    status, headers, body = await post(
        house, {"requestBody": {}}, {"NVCF-POLL-SECONDS": "1", "nvcf-feature-enable-gateway-timeout": "true"}
    )
    assert (status, headers["NVCF-STATUS"], body) == (504, "errored", b"")


async def test_a_bad_envelope_gives_its_memory_back(tmp_path: Path) -> None:
    async with opened(tmp_path, inflight_body_bytes=5 * 1024 * 1024) as house:
        for _ in range(3):
            assert (await post(house, b"[" + b" " * (3 * 1024 * 1024), NOW))[0] == 400


async def test_the_envelope_says_how_long_to_wait_and_asking_for_an_answer_at_once_overrules_it(house: House) -> None:
    shortly = {"requestBody": {}, "requestHeader": {"pollDurationSeconds": 0}}
    assert (await post(house, shortly, {"NVCF-POLL-SECONDS": "60"}))[0] == 202
    at_length = {"requestBody": {}, "requestHeader": {"pollDurationSeconds": 3600}}
    assert (await post(house, at_length, NOW))[1]["Preference-Applied"] == "respond-async"
