"""Queues and requests (contract/management.md §1.11; contract/invocation.md §7)."""

from __future__ import annotations

from fnqueue.wire.fields import Wire


class QueueDepth(Wire):
    """`queue_depth` is accepted and not started; `in_flight` is started and not finished."""

    function_version_id: str
    function_name: str
    function_status: str
    queue_depth: int
    in_flight: int | None = None
    oldest_age_seconds: float | None = None


class Queues(Wire):
    function_id: str
    queues: list[QueueDepth]


class Position(Wire):
    """`position_in_queue` is 1 for the next, 0 once started, and 1000 for all further back."""

    function_id: str
    function_version_id: str
    position_in_queue: int
    queue_length: int | None = None


class Cancelled(Wire):
    request_id: str
    status: str
