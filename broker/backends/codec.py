"""Nouns to bytes and back, versioned. What one release writes, the next one reads.

Unknown fields are dropped and missing ones take their defaults, so that old and new processes can share servers
during a rolling update.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
import types
from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import orjson

from broker.model import Callback, Channel, Job, Outcome

T = TypeVar("T")

VERSION = 1
# Seconds; the year 5138.
_NEVER = 1e11
_UUID = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
# What may be a part of a key.
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}"
_NAMES = re.compile(f"{_UUID.pattern} {_NAME} {_NAME}")
_BODY_KEY = re.compile(f"({_NAME}) inputs/\\1/{_NAME}")
_WORD = re.compile(r"[!-~]{1,4096}")


class Unreadable(ValueError):
    """Bytes that no release of ours wrote."""


def pack(item: Any) -> bytes:
    """Any noun of `broker.model` without bytes fields, as JSON."""
    return orjson.dumps(item)


def unpack(kind: type[T], raw: bytes | str) -> T:
    """The noun that `pack` wrote. Raises Unreadable."""
    try:
        item: T = _build(kind, orjson.loads(raw))
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise Unreadable(f"not a {kind.__name__}") from exc
    return item


def pack_job(job: Job) -> tuple[bytes, bytes]:
    """Envelope and body: the envelope holds everything but the body, which stays as the client sent it, and what has
    its default."""
    fields = {
        name: value
        for name, value, usual in zip(_JOB_FIELDS, _job_fields(job), _JOB_DEFAULTS, strict=True)
        if value != usual
    }
    fields["v"] = VERSION
    return orjson.dumps(fields), job.body


def unpack_job(envelope: bytes | str, body: bytes) -> Job:
    """Raises Unreadable."""
    try:
        fields = orjson.loads(envelope)
        if fields.pop("v") != VERSION:
            raise Unreadable("written by another release")
        fields["headers"] = tuple([(str(name), str(value)) for name, value in fields["headers"]])
        fields["assets"] = tuple(map(str, fields["assets"]))
        if fields.get("channel") is not None:
            fields["channel"] = _build(Channel, fields["channel"])
        if fields.get("callback") is not None:
            fields["callback"] = _build(Callback, fields["callback"])
        if not fields.keys() <= _JOB_NAMES:
            fields = {name: fields[name] for name in _JOB_FIELDS if name in fields}
        job = Job(body=body, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise Unreadable("not a job") from exc
    if not all(map(isinstance, _typed_fields(job), _JOB_KINDS)) or not _possible(job):
        raise Unreadable("not a job")
    return job


def _possible(job: Job) -> bool:
    """Whether a front end can have written it. What is not could not be claimed, or not be counted, and its message
    would come again and again."""
    times = (job.created_at, job.deadline_at, job.queue_deadline_at, job.run_timeout_s)
    return (
        min(times) >= 0
        and max(times) < _NEVER
        and _NAMES.fullmatch(f"{job.id} {job.account} {job.version_id}") is not None
        and (not job.assets or all(map(_UUID.fullmatch, job.assets)))
        and (job.callback is None or all(map(_WORD.fullmatch, (job.callback.url, *job.callback.events))))
        and (not job.body_key or _BODY_KEY.fullmatch(f"{job.account} {job.body_key}") is not None)
    )


def pack_outcome(outcome: Outcome) -> bytes:
    """One line of JSON, then the body as it is."""
    # Releases that know no streams read what has four members.
    streamed = (True,) if outcome.streamed else ()
    head = orjson.dumps([VERSION, outcome.status, outcome.headers, outcome.blob_key, *streamed])
    return head + b"\n" + outcome.body


def unpack_outcome(raw: bytes) -> Outcome:
    """Raises Unreadable."""
    head, _, body = raw.partition(b"\n")
    try:
        _, status, headers, blob_key, *streamed = orjson.loads(head)
        return Outcome(
            status=int(status),
            headers=tuple([(str(name), str(value)) for name, value in headers]),
            body=body,
            blob_key=str(blob_key),
            streamed=bool(streamed and streamed[0]),
        )
    except (ValueError, TypeError) as exc:
        raise Unreadable("not an outcome") from exc


_JOB_FIELDS = tuple(f.name for f in dataclasses.fields(Job) if f.name != "body")
_JOB_NAMES = frozenset(_JOB_FIELDS)
# Of what is left out of an envelope; releases of before read none without its headers and assets.
_JOB_DEFAULTS = tuple(
    dataclasses.MISSING if f.name in ("headers", "assets") else f.default
    for f in dataclasses.fields(Job)
    if f.name != "body"
)
_JOB_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "id": str,
    "account": str,
    "function_id": str,
    "version_id": str,
    "subject": str,
    "created_at": (int, float),
    "deadline_at": (int, float),
    "digest": str,
    "body_key": str,
    "body_sha256": str,
    "passthrough": bool,
    "poll_s": int,
    "queue_deadline_at": (int, float),
    "run_timeout_s": (int, float),
    "region": str,
    "method": str,
    "target": str,
    "streaming": bool,
    "channel": (Channel, types.NoneType),
    "blob_bytes": int,
    "callback": (Callback, types.NoneType),
}

_JOB_KINDS = tuple(_JOB_TYPES.values())
# Hundreds of thousands of times a minute, and three times as fast as by name.
_job_fields = operator.attrgetter(*_JOB_FIELDS)
_typed_fields = operator.attrgetter(*_JOB_TYPES)


@functools.cache
def _fields(kind: type) -> Mapping[str, Any]:
    """Its types by name; a class of `broker.model` never changes, and looking them up costs 100 µs."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _build(kind: Any, value: Any) -> Any:  # noqa: PLR0911  one return per shape reads best
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        fields = _fields(kind)
        return kind(**{name: _build(fields[name], part) for name, part in value.items() if name in fields})
    origin = get_origin(kind)
    if origin is tuple:
        parts = get_args(kind)
        if len(parts) == 2 and parts[1] is Ellipsis:
            return tuple(_build(parts[0], part) for part in value)
        return tuple(_build(part, item) for part, item in zip(parts, value, strict=True))
    if origin in (Union, types.UnionType):
        inner = [part for part in get_args(kind) if part is not type(None)]
        return None if value is None else _build(inner[0], value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    if kind is float and isinstance(value, int):
        return float(value)
    if isinstance(kind, type) and not isinstance(value, kind):
        raise TypeError(f"{value!r} is not a {kind.__name__}")
    return value
