"""Names on the broker, and what a message of ours looks like."""

from __future__ import annotations

import uuid

from broker.backends.codec import Unreadable, unpack_job
from broker.backends.rabbitmq import wire
from broker.backends.rabbitmq.wire import Message
from broker.model import Job
from broker.signatures import NotOurs, Signatures

DEAD = "fnq.dead"  # the exchange and its queue
ENVELOPE = "fnq"  # the header that holds all of a job but its body
SIGNATURE = "fnq-signature"
RESIDENCE_S = 60.0  # how long past its deadline a message may stay; the undertaker's sweep comes first
MAX_EXPIRATION_MS = 2**32 - 1
# What RabbitMQ writes of each.
_OF_A_DEATH = {"count": int, "exchange": str, "queue": str, "reason": str, "routing-keys": list}


def queue_name(version_id: str) -> str:
    return f"fnq.v.{version_id}" if version_id else DEAD


def exchange_name(version_id: str) -> str:
    """It leads to the version's queue and to no other."""
    return f"fnq.x.{version_id}"


def properties(job: Job, envelope: bytes, signature: str) -> bytes:
    """Persistent, and named after the request: a returned message is matched by its id."""
    headers = {ENVELOPE: envelope, SIGNATURE: signature.encode()} if signature else {ENVELOPE: envelope}
    return wire.properties(
        headers,
        content_type="application/octet-stream",
        expiration=_expiration_ms(job),
        message_id=job.id,
        app_id="fnqueue",
    )


def _expiration_ms(job: Job) -> str:
    """Both times are the store's, so no clock of ours is in it."""
    residence_s = max(0.0, job.deadline_at - job.created_at + RESIDENCE_S)
    return str(min(MAX_EXPIRATION_MS, int(residence_s * 1000)))


def read(message: Message, version_id: str, signatures: Signatures) -> Job:
    """Raises Unreadable, or NotOurs for what this deployment did not sign as it is."""
    headers = message.headers
    envelope = headers.get(ENVELOPE)
    if not isinstance(envelope, str | bytes):
        raise Unreadable("not a job")
    job = unpack_job(envelope, message.body)
    if version_id and job.version_id != version_id:
        raise Unreadable("another version's job")
    raw = envelope.encode() if isinstance(envelope, str) else envelope
    signatures.check(job.version_id, headers.get(SIGNATURE), raw, message.body)
    if signatures and message.message_id != job.id:
        raise NotOurs("it was altered after it was signed")
    return job


def claims_to_be(message: Message) -> Job | None:
    """A job of which nothing but its id may be used, and that is no more than a claim; None if there is not even
    one."""
    try:
        request_id = str(uuid.UUID(message.message_id))
    except ValueError:
        return None
    return Job(
        id=request_id,
        account="",
        function_id="",
        version_id="",
        subject="",
        created_at=0.0,
        deadline_at=0.0,
        digest="",
    )


def death(message: Message) -> str:
    """RabbitMQ puts the newest death first."""
    headers = message.headers
    deaths = headers.get("x-death")
    newest = deaths[0] if isinstance(deaths, list) and deaths else None
    reason = newest.get("reason") if isinstance(newest, dict) else headers.get("x-first-death-reason")
    return reason if isinstance(reason, str) else ""


def can_die(message: Message) -> bool:
    """Whether it can be dead-lettered: RabbitMQ 3.10 adds to the deaths that a message brings along, and its whole
    queue falls over those that it did not write itself."""
    deaths = message.headers.get("x-death", [])
    return isinstance(deaths, list) and all(
        isinstance(each, dict) and all(isinstance(each.get(name), kind) for name, kind in _OF_A_DEATH.items())
        for each in deaths
    )
