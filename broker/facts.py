"""What can be found out about the servers behind us, and what is to be said of it.

None stands for what nobody told: a server that is away, or one that keeps it to itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line for an operator: of `server`, what `name` is. `advice` says what it should be and why, and `mend` is a
    command that makes it so. `needed` tells that the configured durability profile cannot be kept like this, and
    `unknown` that nobody could say."""

    server: str
    name: str
    level: Level
    value: str
    advice: str = ""
    mend: str = ""
    needed: bool = False
    unknown: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts:
    """Of Redis. `config` is what CONFIG GET tells, None where that is not permitted; `skew_s` is how far its clock is
    ahead of ours. `address` names it without credentials. `sentinels`: how many of those before it know the primary,
    and how many there are; None without. `default_user` are the rights of the user `default` as ACL rules, None where
    they may not be asked for, and '' where nobody did."""

    kind: str
    address: str = ""
    fault: str = ""
    version: str = ""
    config: Mapping[str, str] | None = None
    skew_s: float | None = None
    replicas: int | None = None
    sentinels: tuple[int, int] | None = None
    used_bytes: int | None = None
    writes_kept: bool | None = None
    default_user: str | None = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    name: str
    running: bool
    memory_alarm: bool
    disk_alarm: bool
    partitioned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueInfo:
    """One queue as the management API shows it. `policy` is what all policies together make of it; None of a queue so
    young that the API does not tell yet."""

    name: str
    kind: str
    members: int
    online: int
    policy: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueFacts:
    """Of RabbitMQ. AMQP tells `version`, `dead_letters`, and `blocked`: whether it confirmed no message, as under an
    alarm; None when that was not tried. The rest needs the management API; `management` says why it did not answer, ""
    if it did. `policies` are the definitions by name of those that are for queues named as ours are."""

    kind: str
    address: str = ""
    fault: str = ""
    version: str = ""
    dead_letters: int | None = None
    blocked: bool | None = None
    management: str = "not configured"
    nodes: tuple[Node, ...] | None = None
    queues: tuple[QueueInfo, ...] | None = None
    policies: Mapping[str, Mapping[str, object]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobFacts:
    """Of the blob store. `missing`: the bucket or folder is not there yet. `signed_url` is "" when an upload and a
    download by signed URL worked, else what went wrong; None when it was not tried. `free_bytes` is of the disk behind
    a folder."""

    kind: str
    address: str = ""
    fault: str = ""
    missing: bool = False
    server: str = ""
    skew_s: float | None = None
    signed_url: str | None = None
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    store: StoreFacts
    queue: QueueFacts
    blobs: BlobFacts
