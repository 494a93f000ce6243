from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
from aiohttp import web
from pydantic import BaseModel, ValidationError

from api import problems
from broker import errors
from fnqueue import wire

UPSTREAM = "urn:nv-boot:problem-details:"
OURS = "urn:fnqueue:problem-details:"


def body_of(response: web.Response) -> dict[str, Any]:
    assert isinstance(response.body, bytes)
    parsed: dict[str, Any] = json.loads(response.body)
    return parsed


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (errors.BadRequest("x"), 400, UPSTREAM + "bad-request"),
        (errors.StateConflict("x"), 400, UPSTREAM + "bad-request"),
        (errors.PayloadTooLarge("x", limit_bytes=5), 413, OURS + "payload-too-large"),
        (errors.IdempotencyKeyReused("x"), 422, OURS + "idempotency-key-reused"),
        (errors.Unauthenticated("x"), 401, UPSTREAM + "unauthorized"),
        (errors.Forbidden("x"), 403, UPSTREAM + "forbidden"),
        (errors.NotFound("x"), 404, UPSTREAM + "not-found"),
        (errors.RequestExpired("x"), 404, OURS + "result-expired"),
        (errors.NotConfigured("x"), 400, UPSTREAM + "bad-request"),
        (errors.AlreadyExists("x"), 409, UPSTREAM + "conflict"),
        (errors.AlreadyFinished("x"), 409, UPSTREAM + "conflict"),
        (errors.RevisionConflict("x"), 409, UPSTREAM + "conflict"),
        (errors.QueueFull("x"), 429, OURS + "queue-full"),
        (errors.RateLimited("x"), 429, OURS + "rate-limited"),
        (errors.TooManyRequests("x"), 429, UPSTREAM + "too-many-requests"),
        (errors.Overloaded("x"), 503, OURS + "overloaded"),
        (errors.StoreUnavailable("x"), 503, OURS + "unavailable"),
        (errors.QueueMissing("x"), 503, OURS + "unavailable"),
        (problems.WrongMethod("GET"), 405, OURS + "method-not-allowed"),
        (problems.BodyTooSlow("x"), 408, OURS + "body-timeout"),
    ],
)
def test_every_error_has_its_status_and_type(error: Exception, status: int, kind: str) -> None:
    response = problems.response(error)
    assert response.status == status
    assert response.headers["Content-Type"] == "application/problem+json"
    problem = body_of(response)
    assert (problem["status"], problem["type"], problem["detail"]) == (status, kind, str(error))
    assert problem["title"]


def test_no_error_of_the_core_but_a_wrong_setting_is_internal() -> None:
    classes = [found for _, found in inspect.getmembers(errors, inspect.isclass) if issubclass(found, Exception)]
    unknown = [found for found in classes if problems.kind_of(found.__new__(found)) is problems.INTERNAL]
    assert unknown == [errors.ConfigurationError, errors.FnqueueError]


def test_an_unexpected_error_says_nothing_of_the_inside() -> None:
    response = problems.response(RuntimeError("password=hunter2"))
    assert response.status == 500
    assert body_of(response) == {"type": OURS + "internal", "title": "Internal Server Error", "status": 500}


def test_unauthenticated_names_the_scheme() -> None:
    assert problems.response(errors.Unauthenticated("x")).headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("error", [errors.QueueFull("x", retry_after_s=1.2), errors.Unavailable("x", retry_after_s=2)])
def test_try_later_says_when(error: Exception) -> None:
    assert problems.response(error).headers["Retry-After"] == "2"


def test_a_wrong_method_names_the_right_ones() -> None:
    assert problems.response(problems.WrongMethod("GET,HEAD")).headers["Allow"] == "GET,HEAD"


def test_members_are_there_only_when_known() -> None:
    problem = body_of(problems.response(errors.NotFound("x"), instance="/a", request_id="r"))
    assert (problem["instance"], problem["requestId"]) == ("/a", "r")
    assert not {"instance", "requestId", "outcome"} & body_of(problems.response(errors.NotFound("x"))).keys()


def test_a_refusal_that_may_run_after_all_says_so() -> None:
    assert body_of(problems.response(errors.Unavailable("x", outcome_unknown=True)))["outcome"] == "unknown"


def test_bytes_that_are_not_text_do_not_break_the_answer() -> None:
    assert body_of(problems.response(errors.BadRequest("bad \udcff")))["detail"] == "bad ?"


def test_validation_names_object_field_value_and_message() -> None:
    class CreateThing(BaseModel):
        count: int
        names: list[int]

    with pytest.raises(ValidationError) as invalid:
        CreateThing.model_validate({"count": "many", "names": [1, "x" * 1000]})
    refused = problems.faults(invalid.value)
    first, second = str(refused).removeprefix("Validation failed: ").split("; ")
    assert first.startswith('object createThing, field count, rejected value "many": ')
    assert second.startswith("object createThing, field names.1, rejected value ")
    assert second.count("x") == problems.MAX_REJECTED - 1
    assert refused.field == "count"
    assert body_of(problems.response(refused))["type"] == "about:blank"


def test_a_rule_about_a_whole_object_names_its_field() -> None:
    with pytest.raises(ValidationError) as invalid:
        wire.CreateFunction.model_validate({"name": "f", "inferenceUrl": "/", "helmChart": "oci://x/y"})
    refused = problems.faults(invalid.value)
    assert refused.field == "helmChart"
    assert "object createFunction, field helmChart: " in str(refused)


SECRET = "hunter2"


@pytest.mark.parametrize(
    "fields",
    [
        {"secrets": SECRET},
        {"secrets": [SECRET]},
        {"secrets": [{"name": SECRET + "!", "value": SECRET}]},
        {"secrets": [{"name": "a", "value": 1234567}, {"name": "a"}]},
        {"secrets": [{"name": "a", "value": [SECRET]}]},
        {"secrets": [{"name": "a", "value": SECRET * 10_000}]},
        {"secrets": [{"value": SECRET}]},
        {"secrets": [{"name": "a", "value": {"deep": SECRET}}], "name": None},
        {"containerEnvironment": [{"key": "A", "value": SECRET + "\x00"}]},
        {"containerEnvironment": [{"value": SECRET}]},
        {"containerArgs": [SECRET]},
        {"models": [{"secret": SECRET}]},
    ],
)
def test_no_secret_is_repeated(fields: dict[str, Any]) -> None:
    body = {"name": "f", "inferenceUrl": "/", "containerImage": "i", **fields}
    with pytest.raises(ValidationError) as invalid:
        wire.CreateFunction.model_validate_json(json.dumps(body))
    refused = problems.faults(invalid.value)
    assert "Validation failed" in str(refused)
    assert SECRET not in str(refused)
    assert "1234567" not in str(refused)


def test_what_is_not_json_is_not_repeated() -> None:
    with pytest.raises(ValidationError) as invalid:
        wire.CreateFunction.model_validate_json('{"secrets": [{"name": "a", "value": "hunter2"')
    refused = problems.faults(invalid.value)
    assert body_of(problems.response(refused))["type"] == UPSTREAM + "bad-request"
    assert SECRET not in str(refused)


def test_a_flood_of_faults_is_cut() -> None:
    class Thing(BaseModel):
        names: list[int]

    with pytest.raises(ValidationError) as invalid:
        Thing.model_validate({"names": ["x"] * 100})
    assert str(problems.faults(invalid.value)).endswith("and 80 more")
