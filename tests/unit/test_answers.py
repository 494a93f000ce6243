from __future__ import annotations

import json
from dataclasses import replace

import pytest

from api.answers import Answer, answer, phases, timed_out
from broker.model import Attempt, AttemptEnd, Outcome, Progress, Record, RequestState, Timings

ID = "0655fbd8-96c2-4a19-b877-4d42dfeceedf"
STATUS_URL = f"http://here/v2/nvcf/pexec/status/{ID}"
RECORD = Record(
    id=ID,
    account="a",
    function_id="f",
    version_id="v",
    state=RequestState.QUEUED,
    created_at=0.0,
    deadline_at=10.0,
)
OK = Outcome(status=200, headers=(("Content-Type", "text/plain"),), body=b"hi")


def answered(state: RequestState, outcome: Outcome | None = None, *, reason: str = "") -> Answer:
    record = replace(RECORD, state=state, outcome=outcome, reason=reason)
    return answer(record, status_url=STATUS_URL, download_url=lambda key, name: f"http://blobs/{key}?as={name}")


@pytest.mark.parametrize(
    ("state", "status"), [(RequestState.QUEUED, "pending-evaluation"), (RequestState.RUNNING, "in-progress")]
)
def test_an_unfinished_request_is_202_and_says_where_to_look(state: RequestState, status: str) -> None:
    pending = answered(state)
    assert (pending.status, pending.body) == (202, b"")
    assert dict(pending.headers) == {
        "NVCF-REQID": ID,
        "NVCF-STATUS": status,
        "Access-Control-Expose-Headers": "nvcf-reqid",
        "Location": STATUS_URL,
        "Retry-After": "1",
    }


@pytest.mark.parametrize("partial", [b'{"text":"half"}', b"null"])
def test_progress_is_told_with_what_is_done_so_far(partial: bytes) -> None:
    told = Progress(percent=0, partial=partial)
    record = replace(RECORD, state=RequestState.RUNNING, progress=told)
    pending = answer(record, status_url=STATUS_URL, download_url=lambda *_: "")
    assert (pending.status, pending.body) == (202, partial)
    assert (pending.headers["NVCF-PERCENT-COMPLETE"], pending.headers["Content-Type"]) == ("0", "application/json")
    assert (pending.headers["NVCF-STATUS"], pending.headers["Retry-After"]) == ("in-progress", "1")


@pytest.mark.parametrize(
    ("code", "status"), [(200, "fulfilled"), (201, "fulfilled"), (399, "fulfilled"), (400, "errored"), (503, "errored")]
)
def test_a_finished_request_is_the_containers_answer(code: int, status: str) -> None:
    delivered = answered(RequestState.FULFILLED, replace(OK, status=code))
    assert (delivered.status, delivered.body) == (code, b"hi")
    assert delivered.headers["NVCF-STATUS"] == status
    assert delivered.headers["NVCF-REQID"] == ID
    assert delivered.headers["Content-Type"] == "text/plain"


def test_a_finished_request_is_never_202_which_would_be_polled_for_ever() -> None:
    delivered = answered(RequestState.FULFILLED, replace(OK, status=202))
    assert (delivered.status, delivered.headers["NVCF-STATUS"]) == (200, "fulfilled")


def test_a_container_cannot_speak_in_our_name() -> None:
    forged = (
        ("nvcf_reqid", "forged"),
        ("Set_Cookie", "a=b"),
        ("NVCF-REQID", "forged"),
        ("nvcf-status", "forged"),
        ("Set-Cookie", "a=b"),
        ("Location", "http://evil"),
        ("Transfer-Encoding", "chunked"),
        ("Content-Length", "999"),
        ("Access-Control-Allow-Origin", "http://evil"),
    )
    delivered = answered(RequestState.FULFILLED, replace(OK, headers=forged))
    assert dict(delivered.headers) == {
        "NVCF-REQID": ID,
        "NVCF-STATUS": "fulfilled",
        "Access-Control-Expose-Headers": "nvcf-reqid",
    }


def test_repeated_headers_and_exposed_names_of_the_container_are_kept() -> None:
    own = (("X-A", "1"), ("X-A", "2"), ("Access-Control-Expose-Headers", "x-a"))
    delivered = answered(RequestState.FULFILLED, replace(OK, headers=own))
    assert delivered.headers.getall("X-A") == ["1", "2"]
    assert delivered.headers.getall("Access-Control-Expose-Headers") == ["nvcf-reqid, x-a"]


def test_a_large_result_is_elsewhere() -> None:
    elsewhere = answered(RequestState.FULFILLED, Outcome(status=302, blob_key="results/a/1.zip"))
    assert (elsewhere.status, elsewhere.body) == (302, b"")
    assert elsewhere.headers["Location"] == f"http://blobs/results/a/1.zip?as={ID}.zip"
    assert elsewhere.headers["NVCF-STATUS"] == "fulfilled"


@pytest.mark.parametrize(
    ("state", "code", "slug", "status"),
    [
        (RequestState.EXPIRED, 504, "request-expired", "errored"),
        (RequestState.TIMED_OUT, 504, "run-timeout", "errored"),
        (RequestState.CANCELLED, 410, "request-cancelled", "rejected"),
        (RequestState.DEAD, 500, "request-dead", "errored"),
        (RequestState.ABANDONED, 503, "request-refused", "rejected"),
        (RequestState.ERRORED, 502, "stream-cut", "errored"),
    ],
)
def test_an_end_without_an_answer_is_a_problem(state: RequestState, code: int, slug: str, status: str) -> None:
    ended = answered(state, reason="because")
    problem = json.loads(ended.body)
    assert ended.status == problem["status"] == code
    assert problem["type"] == f"urn:fnqueue:problem-details:{slug}"
    assert (problem["detail"], problem["requestId"]) == ("because", ID)
    assert ended.headers["NVCF-STATUS"] == status
    assert ended.headers["Content-Type"] == "application/problem+json"


def test_an_expired_attempt_is_answered_with_what_its_sidecar_said() -> None:
    assert answered(RequestState.EXPIRED, replace(OK, status=504)).body == b"hi"


def test_a_request_that_nobody_took_in_time_was_rejected() -> None:
    record = replace(RECORD, state=RequestState.EXPIRED, queue_deadline_at=5.0, finished_at=5.0, reason="because")
    ended = answer(record, status_url=STATUS_URL, download_url=lambda key, name: "")
    assert (ended.status, ended.headers["NVCF-STATUS"]) == (504, "rejected")
    assert json.loads(ended.body)["type"] == "urn:fnqueue:problem-details:queue-timeout"


@pytest.mark.parametrize(("limit_s", "said"), [(30.0, "its limit of 30 seconds"), (0.0, "its workers allow")])
def test_a_request_that_ran_for_too_long_says_so(limit_s: float, said: str) -> None:
    record = replace(RECORD, state=RequestState.TIMED_OUT, attempt=1, run_timeout_s=limit_s, outcome=OK)
    ended = answer(record, status_url=STATUS_URL, download_url=lambda key, name: "")
    problem = json.loads(ended.body)
    assert (ended.status, ended.headers["NVCF-STATUS"]) == (504, "errored")
    assert problem["type"] == "urn:fnqueue:problem-details:run-timeout"
    assert said in problem["detail"]


def test_a_result_tells_where_its_time_went() -> None:
    lost = Attempt(number=1, worker="a", started_at=102.0, ended_at=105.0, end=AttemptEnd.LOST)
    last = Attempt(number=2, worker="b", started_at=106.0, ended_at=110.0, end=AttemptEnd.FULFILLED)
    record = replace(
        RECORD,
        state=RequestState.FULFILLED,
        outcome=OK,
        created_at=100.0,
        finished_at=110.0,
        worker="b",
        attempts=(lost, last),
        timings=Timings(cold_start_s=1.5, inputs_s=0.25, container_s=3.5),
    )
    assert phases(record) == {
        "queue": 3.0,
        "coldstart": 1.5,
        "retries": 3.0,
        "input": 0.25,
        "container": 3.5,
        "total": 10.0,
    }
    told = answer(record, status_url=STATUS_URL, download_url=lambda key, name: "").headers["Server-Timing"]
    assert told.startswith("queue;dur=3000, coldstart;dur=1500, retries;dur=3000, ")
    assert list(phases(record)) == [part.partition(";")[0] for part in told.split(", ")]


def test_an_unfinished_request_tells_no_times() -> None:
    assert phases(replace(RECORD, state=RequestState.RUNNING, started_at=1.0)) == {}


def test_a_cancelled_request_shows_no_result() -> None:
    assert answered(RequestState.CANCELLED, OK).status == 410


def test_upstreams_time_out_is_empty() -> None:
    given_up = timed_out(RECORD)
    assert (given_up.status, given_up.body, given_up.headers["NVCF-STATUS"]) == (504, b"", "errored")
    assert given_up.headers["NVCF-REQID"] == ID
