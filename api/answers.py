"""Where a request stands, as an HTTP answer (contract/invocation.md §2.2, §8.3; DESIGN §4). Pure."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import lru_cache

from multidict import CIMultiDict, istr

from api import headers, problems
from broker.estimates import Estimate
from broker.model import NO_TIMINGS, Outcome, Record, RequestState
from broker.nouns import noun

# Spelled for look-ups, which a text would be each time.
_REQUEST_ID, _STATUS, _EXPOSE_HEADERS, _SERVER_TIMING = map(
    istr, (headers.REQUEST_ID, headers.STATUS, headers.EXPOSE_HEADERS, headers.SERVER_TIMING)
)
EXPOSED = "nvcf-reqid"
POLL_AGAIN_S = "1"

# Of every connection and every name of a server; both are ours.
_OURS = headers.HOP_BY_HOP | {"alt-svc", "clear-site-data", "date", "server", "strict-transport-security"}
_COOKIES = frozenset({"set-cookie", "set-cookie2"})
# A container speaks for itself, not for this server: what it must not say in our name.
_NOT_THE_CONTAINERS = _OURS | _COOKIES | {"content-length", "location", "refresh"}
_ENDED_WITHOUT_ANSWER = {
    RequestState.TIMED_OUT: (problems.RUN_TIMEOUT, "errored", "the request ran for longer than its workers allow"),
    RequestState.ERRORED: (problems.STREAM_CUT, "errored", "the answer was cut off"),
    RequestState.EXPIRED: (problems.REQUEST_EXPIRED, "errored", "the request's deadline passed before it was finished"),
    RequestState.CANCELLED: (problems.REQUEST_CANCELLED, "rejected", "the request was cancelled"),
    RequestState.DEAD: (problems.REQUEST_DEAD, "errored", "the request could not be run"),
    RequestState.ABANDONED: (problems.REQUEST_REFUSED, "rejected", "the request was refused and never started"),
}


# Whatever a worker left as their outcome.
_OURS_TO_TELL = (RequestState.CANCELLED, RequestState.ABANDONED, RequestState.TIMED_OUT)


class Speaker(Enum):
    """In whose name a container's answer is given."""

    SERVER = "server"
    CONTAINER = "container"
    CONTAINER_ON_ITS_OWN_HOST = "container on its own host"
    """Where its cookies are nobody else's."""


@noun(frozen=True, slots=True, kw_only=True)
class Pending:
    """How much longer a request is likely to take, and the most that `Retry-After` may be, in seconds."""

    estimate: Estimate | None
    longest_pause_s: float


NOT_KNOWN = Pending(estimate=None, longest_pause_s=1.0)


@noun(frozen=True, slots=True, kw_only=True)
class Answer:
    status: int
    headers: CIMultiDict[str]
    body: bytes = b""


def answer(
    record: Record,
    *,
    status_url: str,
    download_url: Callable[[str, str], str],
    speaker: Speaker = Speaker.SERVER,
    pending: Pending = NOT_KNOWN,
) -> Answer:
    """The answer to whoever asks for this request, who finds it again at `status_url` if it is not over.

    `download_url` signs a URL for a blob's key and the file name to save it under.
    """
    if not record.state.terminal:
        return _pending(record, status_url, pending)
    if record.outcome is None or record.state in _OURS_TO_TELL:
        return _ended(record)
    if record.outcome.blob_key:
        return _elsewhere(record, download_url(record.outcome.blob_key, f"{record.id}.zip"))
    return _delivered(record, record.outcome, speaker)


def begun(record: Record, head: Outcome, speaker: Speaker = Speaker.SERVER) -> Answer:
    """The status and headers of an answer whose body comes piece by piece."""
    found = _delivered(record, head, speaker)
    if head.event_stream:
        found.headers.setdefault("Cache-Control", "no-cache")
        found.headers.setdefault("X-Accel-Buffering", "no")  # nginx would keep the events to itself for a while
    return found


def told(record: Record) -> Answer:
    """To a client of a stream that has had everything: 204 makes a browser's EventSource ask no more."""
    return Answer(status=204, headers=_marked(record, "fulfilled"))


def error_event(record: Record, event_id: str) -> bytes:
    """Why a stream ended before its time, as an event."""
    said = answer(record, status_url="", download_url=lambda *_: "")
    lines = [f"id: {event_id}".encode(), b"event: error", *(b"data: " + line for line in said.body.splitlines())]
    return b"\n".join(lines) + b"\n\n"


def phases(record: Record) -> dict[str, float]:
    """Where the time of a finished request went, in seconds, by the names that `Server-Timing` gives it.

    `queue` is all of its waiting, `coldstart` the part of that in which no instance was ready, `retries` what attempts
    took that came to nothing. The rest is what its worker measured of the last attempt, without our own overhead.
    """
    if not record.finished_at:
        return {}
    total_s = max(0.0, record.finished_at - record.created_at)
    spans = [each.ended_at - each.started_at for each in record.attempts]
    spent_s = sum(spans)
    retries_s = sum(spans[:-1]) if record.worker else spent_s
    timings = record.timings or NO_TIMINGS
    found = {"queue": max(0.0, total_s - spent_s)}
    if timings.cold_start_s:
        found["coldstart"] = timings.cold_start_s
    if retries_s:
        found["retries"] = retries_s
    if timings.inputs_s:
        found["input"] = timings.inputs_s
    if timings.container_s:
        found["container"] = timings.container_s
    if timings.upload_s:
        found["upload"] = timings.upload_s
    found["total"] = total_s
    return found


def timed_out(record: Record) -> Answer:
    """Upstream's answer to a wait that ended with the request still queued, and now removed."""
    return Answer(status=504, headers=_marked(record, "errored"))


def _pending(record: Record, status_url: str, pending: Pending) -> Answer:
    running = record.state is RequestState.RUNNING
    found = _marked(record, "in-progress" if running else "pending-evaluation")
    found["Location"] = status_url
    found["Retry-After"] = POLL_AGAIN_S
    if pending.estimate is not None:
        # Of those who come back then, one in ten could have come sooner.
        found["Retry-After"] = headers.retry_after(min(pending.estimate.p10_s, pending.longest_pause_s))
        found[headers.ETA] = headers.eta(pending.estimate)
    if record.progress is None:
        return Answer(status=202, headers=found)
    found[headers.PERCENT_COMPLETE] = str(record.progress.percent)
    found["Content-Type"] = "application/json"
    return Answer(status=202, headers=found, body=record.progress.partial)


def _ended(record: Record) -> Answer:
    kind, status, sentence = _ENDED_WITHOUT_ANSWER.get(
        record.state, (problems.REQUEST_DEAD, "errored", "the request ended without an answer")
    )
    if record.overslept:
        kind, status = problems.QUEUE_TIMEOUT, "rejected"
    if record.state is RequestState.TIMED_OUT and record.run_timeout_s:
        sentence = f"the request ran for longer than its limit of {record.run_timeout_s:.15g} seconds"
    found = _marked(record, status)
    found["Content-Type"] = problems.CONTENT_TYPE
    if kind.status == 503:
        found["Retry-After"] = POLL_AGAIN_S
    content = problems.body(kind, record.reason or sentence, requestId=record.id, cause=record.cause)
    return Answer(status=kind.status, headers=found, body=content)


def _elsewhere(record: Record, url: str) -> Answer:
    found = _marked(record, "fulfilled")
    found["Location"] = url
    return Answer(status=302, headers=found)


def _delivered(record: Record, outcome: Outcome, speaker: Speaker) -> Answer:
    """The container's answer. Where we speak, its 202 becomes 200: nothing more will come, and 202 would be polled for
    ever."""
    status = 200 if outcome.status == 202 and speaker is Speaker.SERVER else outcome.status
    found = _marked(record, "fulfilled" if 100 < status < 400 else "errored")
    for name, value in outcome.headers:
        if _may_say(speaker, name):
            found.add(name, value)
        elif name.lower().replace("_", "-") == "access-control-expose-headers":
            found[headers.EXPOSE_HEADERS] = f"{found[headers.EXPOSE_HEADERS]}, {value}"
    return Answer(status=status, headers=found, body=outcome.body)


@lru_cache(maxsize=1024)
def _may_say(speaker: Speaker, name: str) -> bool:
    name = name.lower().replace("_", "-")
    if name.startswith("nvcf-") or name == "access-control-expose-headers":
        return False
    if speaker is Speaker.SERVER:
        return name not in _NOT_THE_CONTAINERS and not name.startswith("access-control-")
    return name not in _OURS and (speaker is Speaker.CONTAINER_ON_ITS_OWN_HOST or name not in _COOKIES)


def _marked(record: Record, status: str) -> CIMultiDict[str]:
    found = CIMultiDict(((_REQUEST_ID, record.id), (_STATUS, status), (_EXPOSE_HEADERS, EXPOSED)))
    if record.finished_at:
        found[_SERVER_TIMING] = headers.server_timing(phases(record))
    return found
