"""What instances write."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from fnqueue.wire.fields import Wire


class LogLine(Wire):
    """`part` is `container` or `sidecar`. `at` is when it was written, or at the latest, where nobody knows better."""

    at: datetime
    instance_id: str
    part: str
    text: str


class EndedInstance(Wire):
    """An instance that was stopped or died in the last hour, and how: `cause` is one line."""

    instance_id: str
    ended_at: datetime
    cause: str


class InstanceLogs(Wire):
    """The last lines by time. `unanswered` are running instances whose logs did not come in time; `ended` those that
    are gone and whose last lines are here, newest first."""

    lines: list[LogLine]
    unanswered: list[str]
    ended: list[EndedInstance] = Field(default_factory=list)


class LogLines(Wire):
    """Data of a `lines` event: lines of one instance, oldest first, or of several, by time."""

    lines: list[LogLine]
