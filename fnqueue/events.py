"""What happens to a request, as a client hears of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from fnqueue import wire
from fnqueue.errors import STATUS, ApiError, of_answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Eta:
    """How long it is likely to take until the result: half of the requests that are told this take `p50_s` seconds at
    most, nine in ten `p90_s`."""

    p50_s: float
    p90_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """It waits. `position` is 1 for the next one, 1000 for all further back, None where it is not known; `length` is
    that of the queue; `eta` is None where too little is known. Told again when the position changes, at most once a
    second."""

    position: int | None = None
    length: int | None = None
    eta: Eta | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """It runs, for the `attempt`th time. `percent` and `partial` are what its container told last, None before."""

    attempt: int
    percent: int | None = None
    partial: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """It ended: `status` is `fulfilled`, `errored` or `rejected`, `status_code` the HTTP status of its answer, `detail`
    says why there is no result."""

    status: str
    status_code: int
    detail: str | None = None

    @property
    def ok(self) -> bool:
        return self.status == "fulfilled"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamEvent:
    """One event of a streamed answer, as the function sent it. A stream goes on behind `id`."""

    data: str
    event: str = "message"
    id: str = ""

    def json(self) -> Any:
        """Raises ValueError."""
        return json.loads(self.data)


def parse(name: str, data: str) -> Queued | Running | Done | None:
    """One event of `GET /requests/{requestId}/events`; None for what is not known: a newer server may tell more."""
    if name not in ("queued", "started", "progress", "done"):
        return None
    try:
        said = wire.RequestEvent.model_validate_json(data)
    except ValidationError:
        return None
    if name == "queued":
        eta = Eta(p50_s=said.eta.p50_seconds, p90_s=said.eta.p90_seconds) if said.eta else None
        return Queued(position=said.position_in_queue, length=said.queue_length, eta=eta)
    if name == "done":
        return Done(status=said.status, status_code=said.status_code or 0, detail=said.detail)
    return Running(attempt=said.attempt or 1, percent=said.percent_complete, partial=said.partial_response)


def end_of_stream(event: StreamEvent, request_id: str) -> ApiError | None:
    """The error with which the server ended a stream; None for an event of the function's own, an `error` too."""
    if event.event != "error":
        return None
    try:
        problem = json.loads(event.data)
    except ValueError:
        return None
    if not isinstance(problem, dict) or problem.get("requestId") != request_id or "type" not in problem:
        return None
    return of_answer(int(problem.get("status", 502)), {STATUS: "errored"}, event.data.encode())
