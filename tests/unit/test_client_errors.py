"""Which error an answer is, and what it says."""

from __future__ import annotations

import json
import pickle
from datetime import UTC, datetime

import pytest

from api import problems
from fnqueue import errors
from fnqueue.errors import ApiError, Refused, RequestFailed

REQUEST_ID = "9a260b8a-8799-4223-9fc2-446c6b8a2eba"
ENDED = {"nvcf-status": "errored", "nvcf-reqid": REQUEST_ID}


def problem(word: str, status: int, **members: object) -> ApiError:
    content = json.dumps({"type": problems.OURS + word, "status": status, "detail": "because", **members}).encode()
    headers = ENDED if word in errors._ENDS else {}
    return errors.of_answer(status, headers, content)


@pytest.mark.parametrize("kind", problems.kinds(), ids=lambda kind: f"{kind.status} {kind.type}")
def test_every_problem_of_the_server_has_a_class(kind: problems.Kind) -> None:
    """Of its status, or of its own type where that tells more."""
    found = errors.of_answer(kind.status, {}, problems.body(kind, "because"))
    assert isinstance(found, Refused)
    assert (found.status, found.type, found.detail) == (kind.status, kind.type, "because")
    ended = errors.of_answer(kind.status, ENDED, problems.body(kind, "because"))
    assert isinstance(ended, RequestFailed)
    assert ended.request_id == REQUEST_ID


@pytest.mark.parametrize(
    ("word", "status", "kind"),
    [
        ("queue-full", 429, errors.QueueFull),
        ("rate-limited", 429, errors.RateLimited),
        ("account-full", 429, errors.AccountFull),
        ("unavailable", 503, errors.Unavailable),
        ("result-expired", 404, errors.ResultExpired),
        ("stream-not-kept", 410, errors.StreamNotKept),
        ("payload-too-large", 413, errors.TooLarge),
        ("idempotency-key-reused", 422, errors.IdempotencyKeyReused),
        ("internal", 500, errors.ServerFailed),
        ("body-timeout", 408, errors.InvalidRequest),
        ("request-cancelled", 410, errors.RequestCancelled),
        ("queue-timeout", 504, errors.QueueTimeout),
        ("run-timeout", 504, errors.RunTimeout),
        ("request-expired", 504, errors.RequestExpired),
        ("request-dead", 500, errors.RequestDead),
        ("request-refused", 503, errors.RequestRefused),
        ("stream-cut", 502, errors.StreamCut),
    ],
)
def test_a_kind_of_problem_is_a_class_of_its_own(word: str, status: int, kind: type[ApiError]) -> None:
    assert type(problem(word, status)) is kind


def test_an_error_of_the_function_is_told_from_one_of_the_server() -> None:
    found = errors.of_answer(422, ENDED, b'{"error": "message: must be a string"}')
    assert type(found) is errors.FunctionFailed
    assert found.detail == "message: must be a string"
    assert not found.retryable


def test_an_answer_that_is_no_problem_is_shown() -> None:
    found = errors.of_answer(502, {}, b"<html>Bad Gateway</html>")
    assert type(found) is errors.ServerFailed
    assert str(found) == "502: <html>Bad Gateway</html>"
    assert "is the URL that of such a server?" in str(errors.of_answer(404, {}, b"<html>Not Found</html>"))
    assert str(errors.of_answer(403, {}, b"<?xml?><Error>expired</Error>")) == "403: <?xml?><Error>expired</Error>"
    assert errors.of_answer(500, {}, b"").detail == ""


def test_an_error_can_be_sent_to_another_process() -> None:
    for error in (problem("queue-full", 429), problem("request-dead", 500, cause="worker-deaths")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.cause) == (type(error), str(error), error.cause)
    again = pickle.loads(pickle.dumps(errors.TimedOut("not yet", request_id=REQUEST_ID)))
    assert (str(again), again.request_id) == ("not yet", REQUEST_ID)


def test_what_a_problem_says_beside_is_kept() -> None:
    found = problem("unavailable", 503, outcome="unknown", requestId=REQUEST_ID)
    assert (found.outcome_unknown, found.request_id) == (True, REQUEST_ID)
    assert problem("request-dead", 500, cause="worker-deaths").cause == "worker-deaths"
    faulty = errors.of_answer(400, {}, b'{"detail": "Validation failed: object envelope, field requestBody: required"}')
    assert faulty.field == "requestBody"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0.0), ("17", 17.0), ("Mon, 23 Nov 2026 12:00:30 GMT", 30.0), ("Mon, 23 Nov 2026 11:00:00 GMT", 0.0)],
)
def test_retry_after_is_seconds_or_a_date(text: str, seconds: float) -> None:
    noon = datetime(2026, 11, 23, 12, tzinfo=UTC)
    assert errors.retry_after_s({"retry-after": text}, now=noon) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1", "1.5", "٣"])
def test_retry_after_that_cannot_be_read_is_none(text: str) -> None:
    assert errors.retry_after_s({"retry-after": text}) is None


def test_only_what_may_go_well_later_is_retryable() -> None:
    assert {status for status in range(400, 600) if errors.of_answer(status, {}, b"").retryable} == {
        408,
        425,
        429,
        *range(500, 600),
    }
