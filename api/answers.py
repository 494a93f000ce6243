"""Where a request stands, as an HTTP answer (contract/invocation.md §2.2, §8.3; DESIGN §4). Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from multidict import CIMultiDict

from api import headers, problems
from broker.model import Outcome, Record, RequestState

EXPOSED = "nvcf-reqid"
POLL_AGAIN_S = "1"

# A container speaks for itself, not for this server: what it must not say in our name.
_NOT_THE_CONTAINERS = headers.HOP_BY_HOP | {"content-length", "date", "location", "server", "set-cookie"}
_ENDED_WITHOUT_ANSWER = {
    RequestState.EXPIRED: (problems.REQUEST_EXPIRED, "errored", "the request's deadline passed before it was finished"),
    RequestState.CANCELLED: (problems.REQUEST_CANCELLED, "rejected", "the request was cancelled"),
    RequestState.DEAD: (problems.REQUEST_DEAD, "errored", "the request could not be run"),
    RequestState.ABANDONED: (problems.REQUEST_REFUSED, "rejected", "the request was refused and never started"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    status: int
    headers: CIMultiDict[str]
    body: bytes = b""


def answer(record: Record, *, status_url: str, download_url: Callable[[str, str], str]) -> Answer:
    """The answer to whoever asks for this request.

    `download_url` signs a URL for a blob's key and the file name to save it under.
    """
    if not record.state.terminal:
        return _pending(record, status_url)
    if record.outcome is None or record.state in (RequestState.CANCELLED, RequestState.ABANDONED):
        return _ended(record)
    if record.outcome.blob_key:
        return _elsewhere(record, download_url(record.outcome.blob_key, f"{record.id}.zip"))
    return _delivered(record, record.outcome)


def timed_out(record: Record) -> Answer:
    """Upstream's answer to a wait that ended with the request still queued, and now removed."""
    return Answer(status=504, headers=_marked(record, "errored"))


def _pending(record: Record, status_url: str) -> Answer:
    running = record.state is RequestState.RUNNING
    found = _marked(record, "in-progress" if running else "pending-evaluation")
    found["Location"] = status_url
    found["Retry-After"] = POLL_AGAIN_S
    if record.progress is None:
        return Answer(status=202, headers=found)
    found[headers.PERCENT_COMPLETE] = str(record.progress.percent)
    found["Content-Type"] = "application/json"
    return Answer(status=202, headers=found, body=record.progress.partial)


def _ended(record: Record) -> Answer:
    kind, status, sentence = _ENDED_WITHOUT_ANSWER.get(
        record.state, (problems.REQUEST_DEAD, "errored", "the request ended without an answer")
    )
    found = _marked(record, status)
    found["Content-Type"] = problems.CONTENT_TYPE
    if kind.status == 503:
        found["Retry-After"] = POLL_AGAIN_S
    content = problems.body(kind, record.reason or sentence, requestId=record.id)
    return Answer(status=kind.status, headers=found, body=content)


def _elsewhere(record: Record, url: str) -> Answer:
    found = _marked(record, "fulfilled")
    found["Location"] = url
    return Answer(status=302, headers=found)


def _delivered(record: Record, outcome: Outcome) -> Answer:
    """The container's answer. Its 202 becomes 200: nothing more will come, and 202 would be polled for ever."""
    status = 200 if outcome.status == 202 else outcome.status
    found = _marked(record, "fulfilled" if 200 <= status < 400 else "errored")
    for name, value in outcome.headers:
        key = name.lower()
        if key == "access-control-expose-headers":
            found[headers.EXPOSE_HEADERS] = f"{found[headers.EXPOSE_HEADERS]}, {value}"
        elif key not in _NOT_THE_CONTAINERS and not key.startswith(("nvcf-", "access-control-")):
            found.add(name, value)
    return Answer(status=status, headers=found, body=outcome.body)


def _marked(record: Record, status: str) -> CIMultiDict[str]:
    return CIMultiDict({headers.REQUEST_ID: record.id, headers.STATUS: status, headers.EXPOSE_HEADERS: EXPOSED})
