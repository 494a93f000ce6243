"""Queues and requests (contract/management.md §1.11; contract/invocation.md §7)."""

from __future__ import annotations

from datetime import datetime

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


class Times(Wire):
    """Of `count` requests, in seconds; the percentiles to about a tenth of what they are."""

    count: int
    mean_seconds: float
    p50_seconds: float
    p90_seconds: float
    p99_seconds: float


class ActivityMinute(Wire):
    """What ended in the minute from `starts_at` on. `ends` counts requests by status, `attempts` are what they took
    together. `wait` is from acceptance to the start of the last attempt, `run` from there to the result, and
    `cold_start` the part of a wait in which no instance was ready, told once for each instance."""

    starts_at: datetime
    ends: dict[str, int]
    attempts: int
    wait: Times | None = None
    run: Times | None = None
    cold_start: Times | None = None


class Activity(Wire):
    """`minutes` are those that something ended in, oldest first; the last may not be over. `until` is the end of the
    present one."""

    function_id: str
    function_version_id: str
    until: datetime
    minutes: list[ActivityMinute]
