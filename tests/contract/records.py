"""What a front end publishes for a request that it has recorded."""

from __future__ import annotations

from broker.model import Job, Record


def job_of(record: Record, *, body: bytes = b"") -> Job:
    return Job(
        id=record.id,
        account=record.account,
        function_id=record.function_id,
        version_id=record.version_id,
        subject="",
        created_at=record.created_at,
        deadline_at=record.deadline_at,
        digest="",
        body=body,
        queue_deadline_at=record.queue_deadline_at,
        run_timeout_s=record.run_timeout_s,
    )
