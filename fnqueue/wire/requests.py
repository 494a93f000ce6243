"""Requests as things: lists, receipts and events (fnqueue's own)."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from fnqueue.wire.fields import Wire
from fnqueue.wire.queues import Eta


class Cancelled(Wire):
    request_id: str
    status: str


class RequestSummary(Wire):
    """`status` is `queued`, `running`, `fulfilled`, `errored`, `expired`, `timed-out`, `cancelled` or `dead`, and
    `statusCode` that of its answer; `startedAt` is when its last attempt began. `cause` says what a dead one died of,
    and `redrivenAs` names the request that it was started again as. One that a wiped store has not seen again names no
    function."""

    request_id: str
    function_id: str | None = None
    function_version_id: str | None = None
    status: str
    status_code: int | None = None
    reason: str | None = None
    cause: str | None = None
    redriven_as: str | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None


class RequestList(Wire):
    """Newest first. `cursor` asks for the next page, which may be empty; without one this is the last."""

    requests: list[RequestSummary]
    cursor: str | None = None


class RequestAttempt(Wire):
    """`outcome` is `running`, `lost` (its worker fell silent), `failed` (its container did), `returned` (given back,
    and not counted), or the status of the request that ended with it. `reason` says why it came to nothing, where its
    worker could tell."""

    number: int
    instance_id: str
    outcome: str
    reason: str | None = None
    started_at: datetime
    ended_at: datetime | None = None


class RequestTimings(Wire):
    """Where the time went. `queueSeconds` is all of its waiting, `coldStartSeconds` the part of that in which no
    instance was ready; `retriesSeconds` went to attempts that came to nothing. The rest is of the last attempt."""

    queue_seconds: float
    cold_start_seconds: float | None = None
    retries_seconds: float | None = None
    input_seconds: float | None = None
    container_seconds: float | None = None
    upload_seconds: float | None = None
    total_seconds: float


class RequestReceipt(RequestSummary):
    """All that is known of one request. `queueDeadlineAt` is until when its first attempt had to begin,
    `runTimeoutSeconds` how long each may take; `timings` come with its end, `eta` before it, where it is known."""

    deadline_at: datetime
    queue_deadline_at: datetime | None = None
    run_timeout_seconds: float | None = None
    attempts: list[RequestAttempt]
    timings: RequestTimings | None = None
    eta: Eta | None = None


class RequestEvent(Wire):
    """Data of one event of a request: `queued`, `started`, `progress` or `done`.

    `status` is as in `NVCF-STATUS`. `queued` has a place as in `Position`, unless it is not known; `started` and
    `progress` the number of the attempt; `queued` and `started` an `eta`, where it is known; `done` the HTTP status
    under which `location` has the result, and in `detail` why there is none.
    """

    request_id: str
    status: str
    position_in_queue: int | None = None
    queue_length: int | None = None
    eta: Eta | None = None
    attempt: int | None = None
    percent_complete: int | None = None
    partial_response: dict[str, Any] | None = None
    status_code: int | None = None
    location: str | None = None
    detail: str | None = None
