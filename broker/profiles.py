"""What a durability profile asks of the servers, and what an operator should know of them (PROTOCOL §2.3, §2.5).

Pure: facts in, findings out. Only how a server is configured decides whether a profile is kept, never the state it is
in: a process that did not start because a replica is away would make an outage of a failover.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from broker.errors import ConfigurationError
from broker.facts import BlobFacts, Facts, Finding, Level, QueueFacts, QueueInfo, StoreFacts
from broker.settings import MIB, Settings

POLICY = "fnqueue-versions"
PATTERN = r"^fnq\.v\."
DEAD = "fnq.dead"
# Limits are exact in Redis; those of the queues stand behind them, with room for what overshoots.
ROOM = 1.25
UNLIMITED_BYTES = 1024 * MIB  # of a version, where no setting limits them: what a broker has to bear
# A delivery may stay open this much longer than the longest run.
LONGER_S = 300.0
SKEW_S = 5.0
# S3 refuses signatures that are further off.
SKEW_SIGNED_S = 900.0
FULL = 0.9
LEAST_SENTINELS = 3
LOW_DISK_BYTES = 1024 * MIB
UNKNOWN = "unknown"

# What user `default` of Redis may (docs/decisions/0055); nothing may be taken from it again.
_WHOLE = "~* &* +@all"
_WHOLE_RULES = frozenset(_WHOLE.split())
_TAKEN = re.compile(r"(?:^| )-")

_OK, _WARN, _FAIL = Level.OK, Level.WARN, Level.FAIL
_ASSERT = "or set FNQUEUE_PROFILE_ASSERTED=true if you know that it is"


def judge(facts: Facts, settings: Settings, *, run_timeout_s: float) -> tuple[Finding, ...]:
    """Everything worth a line, in order. `run_timeout_s` is the longest that a sidecar lets an attempt run."""
    return (*store(facts.store, settings), *queue(facts.queue, settings, run_timeout_s), *blobs(facts.blobs, settings))


def refuse(findings: Sequence[Finding], settings: Settings) -> None:
    """Raises ConfigurationError, which names each wrong setting and how to mend it, unless the profile is kept as far
    as these tell."""
    wrong = [finding for finding in findings if finding.needed and finding.level is _FAIL]
    if wrong:
        raise ConfigurationError(f"not profile {settings.profile}: {'; '.join(sentence(each) for each in wrong)}")


def sentence(finding: Finding) -> str:
    parts = (f"{finding.server} {finding.name} is {finding.value}", finding.advice)
    mend = f" (mend: {finding.mend})" if finding.mend else ""
    return ", ".join(part for part in parts if part) + mend


def queue_policy(settings: Settings) -> dict[str, object]:
    """What the queues of versions need, as a policy."""
    return {
        "overflow": "reject-publish",
        "max-length": int(settings.queue_limit * ROOM),
        "max-length-bytes": int((settings.version_bytes or UNLIMITED_BYTES) * ROOM),
        "delivery-limit": 20,
        "dead-letter-exchange": DEAD,
        "dead-letter-strategy": "at-least-once",
    }


# -- Redis -------------------------------------------------------------------------------------


def store(facts: StoreFacts, settings: Settings) -> Iterator[Finding]:
    if facts.kind != "redis":
        yield _in_memory("store", settings)
        return
    if facts.sentinels is not None:
        yield _sentinels(*facts.sentinels)
    if facts.fault:
        yield _away("redis", facts.fault, f"redis-cli {facts.address} PING")
        return
    yield _version("redis", facts.version, least=(6, 2), tested=(7, 0))
    yield _skew("redis", facts.skew_s)
    strict = settings.profile != "A"
    replicated = settings.profile in ("C", "D")
    setting = _Setting(facts, settings)
    fsync = ("always",) if settings.profile == "B" else ("always", "everysec")
    yield setting.finding("appendonly", "must be yes, or a restart forgets everything", "yes", needed=strict)
    yield setting.finding("appendfsync", f"must be {' or '.join(fsync)}", fsync[0], good=fsync, needed=strict)
    yield setting.finding(
        "maxmemory-policy", "must be noeviction, or results vanish when memory is short", "noeviction", needed=strict
    )
    if replicated:
        yield setting.finding(
            "min-replicas-to-write",
            "must be at least 1, or a primary that was cut off takes what will be lost",
            "1",
            good=lambda value: value.isdecimal() and int(value) >= 1,
            needed=True,
        )
        yield setting.finding(
            "min-replicas-max-lag",
            "must be from 1 to 10",
            "10",
            good=lambda value: value.isdecimal() and 1 <= int(value) <= 10,
            needed=True,
        )
        yield _replicas(facts)
        yield Finding(
            server="redis",
            name="replicas awaited",
            level=_OK,
            value=f"{settings.store_replicas}, or {settings.durable_replicas} when one is away for longer than "
            f"{settings.store_failover_s:g} s",
        )
    if facts.default_user != "":
        yield _default_user(facts, strict=strict)
    yield from _redis_state(facts)


class _Setting:
    """Findings about what CONFIG GET tells."""

    def __init__(self, facts: StoreFacts, settings: Settings) -> None:
        self._facts = facts
        self._asserted = settings.profile_asserted

    def finding(
        self, name: str, advice: str, wanted: str, *, good: Sequence[str] | Callable[[str], bool] = (), needed: bool
    ) -> Finding:
        value = (self._facts.config or {}).get(name)
        cli = f"redis-cli {self._facts.address}"
        if value is None:
            return _unknown(
                "redis",
                name,
                needed=needed,
                asserted=self._asserted,
                advice=f"{advice}; it may not be read here",
                mend=f"{cli} CONFIG GET {name}",
            )
        right = good(value) if callable(good) else value in (good or (wanted,))
        return Finding(
            server="redis",
            name=name,
            level=_OK if right else (_FAIL if needed else _WARN),
            value=value,
            advice="" if right else advice,
            mend="" if right else f"{cli} CONFIG SET {name} {wanted} && {cli} CONFIG REWRITE",
            needed=needed,
        )


def _default_user(facts: StoreFacts, *, strict: bool) -> Finding:
    """No profile stands and falls with it: fewer rights may do for what we write, and only some may ask."""
    advice = f"needs {_WHOLE}, off or on: by its rights the append-only file is read back, and what it may not is lost"
    cli = f"redis-cli {facts.address} ACL"
    if facts.default_user is None:
        return _unknown(
            "redis",
            "user default",
            needed=False,
            asserted=False,
            advice=f"{advice}; it may not be asked for here",
            mend=f"{cli} GETUSER default",
        )
    right = set(facts.default_user.split()) >= _WHOLE_RULES and not _TAKEN.search(facts.default_user)
    return Finding(
        server="redis",
        name="user default",
        level=_OK if right else (_FAIL if strict else _WARN),
        value=facts.default_user,
        advice="" if right else advice,
        mend="" if right else f"{cli} SETUSER default {_WHOLE} && {cli} SAVE  # or its line in the ACL file",
    )


def _replicas(facts: StoreFacts) -> Finding:
    count = facts.replicas
    return Finding(
        server="redis",
        name="replicas",
        level=_WARN if count is None or count == 1 else (_OK if count >= 2 else _FAIL),
        value=UNKNOWN if count is None else str(count),
        advice="" if count and count >= 2 else "should be 2, each with appendonly yes of its own",
        mend="" if count and count >= 2 else "redis-cli -h REPLICA REPLICAOF PRIMARY PORT",
        unknown=count is None,
    )


def _sentinels(knowing: int, given: int) -> Finding:
    right = knowing == given >= LEAST_SENTINELS
    return Finding(
        server="redis",
        name="sentinels",
        level=_OK if right else _WARN,
        value=f"{knowing} of {given} know the primary",
        advice="" if right else f"at least {LEAST_SENTINELS} must, or the loss of one host leaves no majority",
    )


def _redis_state(facts: StoreFacts) -> Iterator[Finding]:
    if facts.writes_kept is False:
        yield Finding(
            server="redis",
            name="append-only file",
            level=_FAIL,
            value="not written",
            advice="its disk is full or broken, and it takes no writes",
            mend=f"redis-cli {facts.address} INFO persistence",
        )
    most = int((facts.config or {}).get("maxmemory", "0"))
    if facts.used_bytes is None:
        return
    near = most > 0 and facts.used_bytes >= FULL * most
    bound = f" of {most // MIB} MiB" if most else ", no limit"
    yield Finding(
        server="redis",
        name="memory",
        level=_WARN if near else _OK,
        value=f"{facts.used_bytes // MIB} MiB{bound}",
        advice="it takes no requests when it is full" if near else "",
        mend=f"redis-cli {facts.address} CONFIG SET maxmemory {2 * most}" if near else "",
    )


# -- RabbitMQ ----------------------------------------------------------------------------------


def queue(facts: QueueFacts, settings: Settings, run_timeout_s: float) -> Iterator[Finding]:
    if facts.kind != "rabbitmq":
        yield _in_memory("queue", settings)
        return
    if facts.fault:
        yield _away("rabbitmq", f"{facts.address}: {facts.fault}", "rabbitmq-diagnostics check_port_connectivity")
        return
    yield replace(_version("rabbitmq", facts.version, least=(3, 10), tested=(3, 10)), needed=settings.profile != "A")
    yield _management(facts)
    yield from _nodes(facts, settings)
    yield _partitions(facts, settings)
    yield _consumer_timeout(facts, run_timeout_s)
    yield from _policy(facts, settings)
    yield from _queues(facts, settings)
    yield _dead_letters(facts)
    yield _alarms(facts)


def _management(facts: QueueFacts) -> Finding:
    return Finding(
        server="rabbitmq",
        name="management API",
        level=_WARN if facts.management else _OK,
        value=facts.management or "answers",
        advice="set FNQUEUE_QUEUE_MANAGEMENT_URL, or much of RabbitMQ stays unknown" if facts.management else "",
        mend="rabbitmq-plugins enable rabbitmq_management" if facts.management else "",
    )


def _nodes(facts: QueueFacts, settings: Settings) -> Iterator[Finding]:
    replicated = settings.profile in ("C", "D")
    advice = "a cluster of at least 3 is needed, or the loss of one host stops it"
    if facts.nodes is None:
        yield _unknown(
            "rabbitmq",
            "nodes",
            needed=replicated,
            asserted=settings.profile_asserted,
            advice=advice if replicated else "",
            mend="rabbitmqctl cluster_status",
        )
        return
    few = replicated and len(facts.nodes) < 3
    yield Finding(
        server="rabbitmq",
        name="nodes",
        level=_FAIL if few else _OK,
        value=str(len(facts.nodes)),
        advice=advice if few else "",
        mend="rabbitmqctl join_cluster rabbit@FIRST" if few else "",
        needed=replicated,
    )
    for node in facts.nodes:
        if not node.running or node.partitioned:
            yield Finding(
                server="rabbitmq",
                name=f"node {node.name}",
                level=_FAIL,
                value="partitioned" if node.running else "down",
                advice="it must be started again" if node.running else "it is not running",
                mend=f"rabbitmqctl -n {node.name} cluster_status",
            )


def _partitions(facts: QueueFacts, settings: Settings) -> Finding:
    if _numbers(facts.version) >= (4, 3):
        return Finding(server="rabbitmq", name="partition strategy", level=_OK, value="none needed from 4.3 on")
    if facts.nodes is not None and len(facts.nodes) == 1:
        return Finding(server="rabbitmq", name="partition strategy", level=_OK, value="none needed by one node")
    return _unknown(
        "rabbitmq",
        "partition strategy",
        needed=settings.profile in ("C", "D"),
        asserted=settings.profile_asserted,
        advice="rabbitmq.conf of every node of a cluster must have cluster_partition_handling = pause_minority; no API "
        "tells",
        mend="rabbitmqctl eval 'application:get_env(rabbit, cluster_partition_handling).'",
    )


def _consumer_timeout(facts: QueueFacts, run_timeout_s: float) -> Finding:
    """RabbitMQ's default of 30 minutes closes the channel under a job that runs for longer."""
    least_ms = int((run_timeout_s + LONGER_S) * 1000)
    told = [each.policy.get("consumer-timeout") for each in facts.queues or () if each.policy is not None]
    times_ms = [time for time in told if isinstance(time, int)]
    if not times_ms:
        return _unknown(
            "rabbitmq",
            "consumer time-out",
            needed=False,
            asserted=False,
            advice=f"rabbitmq.conf must have consumer_timeout = {least_ms} or more; no API tells",
            mend="rabbitmqctl eval 'application:get_env(rabbit, consumer_timeout).'",
        )
    short = min(times_ms) < least_ms
    return Finding(
        server="rabbitmq",
        name="consumer time-out",
        level=_FAIL if short else _OK,
        value=f"{min(times_ms)} ms",
        advice=f"must be at least {least_ms} ms, the run time-out of sidecars and some" if short else "",
        mend="set consumer-timeout in the policy of the queues" if short else "",
    )


def _policy(facts: QueueFacts, settings: Settings) -> Iterator[Finding]:
    wanted = queue_policy(settings)
    mend = f"rabbitmqctl set_policy --apply-to queues {POLICY} '{PATTERN}' '{json.dumps(wanted)}'"
    if facts.policies is None:
        yield _unknown("rabbitmq", "queue policy", needed=False, asserted=False, advice="", mend=mend)
        return
    versions = [each.policy for each in facts.queues or () if each.name.startswith("fnq.v.")]
    # Without queues that are known yet, what the policies together would make of one.
    together = {key: value for policy in facts.policies.values() for key, value in policy.items()}
    effective = [policy for policy in versions if policy is not None] or [together]
    faults = sorted({fault for policy in effective for fault in _policy_faults(policy, wanted, settings)})
    needed = settings.profile != "A"
    yield Finding(
        server="rabbitmq",
        name="queue policy",
        level=_FAIL if faults else _OK,
        value=", ".join(faults) or ", ".join(sorted(facts.policies)),
        advice="limits and dead letters are set by it" if faults else "",
        mend=mend if faults else "",
        needed=needed,
    )


def _policy_faults(policy: Mapping[str, object], wanted: Mapping[str, object], settings: Settings) -> Iterator[str]:
    for name in ("overflow", "dead-letter-exchange", "dead-letter-strategy"):
        if policy.get(name) != wanted[name]:
            yield f"{name} is {policy.get(name, 'missing')}"
    if "delivery-limit" not in policy:
        yield "delivery-limit is missing"
    for name, setting in (("max-length", "queue_limit"), ("max-length-bytes", "version_bytes")):
        most, least = policy.get(name), int(getattr(settings, setting))
        if not isinstance(most, int):
            yield f"{name} is missing"
        elif most < least:
            yield f"{name} is {most}, below FNQUEUE_{setting.upper()}"


def _queues(facts: QueueFacts, settings: Settings) -> Iterator[Finding]:
    if facts.queues is None:
        yield _unknown("rabbitmq", "queues", needed=False, asserted=False, advice="", mend="rabbitmqctl list_queues")
        return
    classic = [each for each in facts.queues if each.kind not in ("quorum", "")]
    yield Finding(
        server="rabbitmq",
        name="queue types",
        level=_FAIL if classic else _OK,
        value=f"{_first(classic)} not quorum" if classic else f"{len(facts.queues)} quorum queues",
        advice="only quorum queues are replicated and flushed" if classic else "",
        mend=f"rabbitmqctl delete_queue {classic[0].name}" if classic else "",
        needed=settings.profile != "A",
    )
    replicated = settings.profile in ("C", "D")
    thin = [each for each in facts.queues if each.members < 3] if replicated else []
    if replicated:
        yield Finding(
            server="rabbitmq",
            name="queue members",
            level=_FAIL if thin else _OK,
            value=f"{_first(thin)} on fewer than 3 nodes" if thin else f"at least 3 of each of {len(facts.queues)}",
            advice="they were declared when the cluster was smaller" if thin else "",
            mend="rabbitmq-queues grow NODE all --queue-pattern '^fnq\\.'" if thin else "",
            needed=True,
        )
    away = [each for each in facts.queues if each.online < each.members]
    if away:
        yield Finding(
            server="rabbitmq",
            name="queue members online",
            level=_WARN,
            value=f"{_first(away)} without all of them",
            advice="a node is down, or lags behind",
            mend="rabbitmq-queues check_if_node_is_quorum_critical",
        )


def _dead_letters(facts: QueueFacts) -> Finding:
    if facts.dead_letters is None:
        return Finding(
            server="rabbitmq",
            name="dead letters",
            level=_WARN,
            value=f"no queue {DEAD}",
            advice="the first api or controller that starts makes it",
        )
    waiting = facts.dead_letters > 0
    return Finding(
        server="rabbitmq",
        name="dead letters",
        level=_WARN if waiting else _OK,
        value=f"{facts.dead_letters} waiting",
        advice="a controller takes them; does one run?" if waiting else "",
    )


def _alarms(facts: QueueFacts) -> Finding:
    ringing = [
        f"{kind} of {node.name}"
        for node in facts.nodes or ()
        for kind, rings in (("memory", node.memory_alarm), ("disk", node.disk_alarm))
        if rings
    ]
    if ringing or facts.blocked:
        return Finding(
            server="rabbitmq",
            name="alarms",
            level=_FAIL,
            value=", ".join(ringing) or "it confirms no message",
            advice="it takes no messages until there is room",
            mend="rabbitmq-diagnostics alarms",
        )
    if facts.nodes is None and facts.blocked is None:
        return _unknown(
            "rabbitmq", "alarms", needed=False, asserted=False, advice="", mend="rabbitmq-diagnostics alarms"
        )
    return Finding(server="rabbitmq", name="alarms", level=_OK, value="none")


# -- the blob store ----------------------------------------------------------------------------


def blobs(facts: BlobFacts, settings: Settings) -> Iterator[Finding]:
    if facts.kind != "s3":
        yield from _folder(facts, settings)
        return
    if facts.fault:
        yield _away("s3", facts.fault, f"curl -sS -o /dev/null -w '%{{http_code}}\\n' {facts.address}")
        return
    if facts.missing:
        yield _not_yet("s3", "bucket")
        return
    yield Finding(server="s3", name="reachable", level=_OK, value=facts.server or "yes")
    skew = _skew("s3", facts.skew_s)
    if facts.skew_s is not None and abs(facts.skew_s) >= SKEW_SIGNED_S:
        skew = replace(skew, level=_FAIL, advice="S3 refuses signatures that are 15 minutes off")
    yield skew
    if facts.signed_url is not None:
        yield Finding(
            server="s3",
            name="signed URLs",
            level=_FAIL if facts.signed_url else _OK,
            value=facts.signed_url or "upload and download work",
            advice="clients use them; public_endpoint in FNQUEUE_BLOBS_URL is the host that they are signed for"
            if facts.signed_url
            else "",
        )


def _folder(facts: BlobFacts, settings: Settings) -> Iterator[Finding]:
    strict, shared = settings.profile == "D", settings.profile == "C"
    yield Finding(
        server="blobs",
        name="place",
        level=_FAIL if strict or facts.fault else (_WARN if shared else _OK),
        value=facts.fault or f"the folder {facts.address}",
        advice="must be s3://" if strict else ("must be on storage that outlives any one host" if shared else ""),
        mend="FNQUEUE_BLOBS_URL=s3://…" if strict else "",
        needed=strict,
    )
    if facts.missing:
        yield _not_yet("blobs", "folder")
    if facts.free_bytes is not None:
        low = facts.free_bytes < LOW_DISK_BYTES
        yield Finding(
            server="blobs",
            name="disk",
            level=_WARN if low else _OK,
            value=f"{facts.free_bytes // MIB} MiB free",
            advice="large bodies and results need room" if low else "",
        )


# -- pieces ------------------------------------------------------------------------------------


def _in_memory(server: str, settings: Settings) -> Finding:
    strict = settings.profile != "A"
    return Finding(
        server=server,
        name="place",
        level=_FAIL if strict else _WARN,
        value="memory://",
        advice="everything in it ends with the process",
        mend="FNQUEUE_QUEUE_URL=amqp://…" if server == "queue" else "FNQUEUE_STORE_URL=redis://…",
        needed=strict,
    )


def _not_yet(server: str, name: str) -> Finding:
    return Finding(server=server, name=name, level=_WARN, value="missing", advice="the first process that may makes it")


def _away(server: str, fault: str, mend: str) -> Finding:
    return Finding(server=server, name="reachable", level=_FAIL, value="no", advice=fault, mend=mend)


def _unknown(server: str, name: str, *, needed: bool, asserted: bool, advice: str, mend: str) -> Finding:
    """What nobody could tell is right only on somebody's word."""
    missing = needed and not asserted
    return Finding(
        server=server,
        name=name,
        level=_FAIL if missing else _WARN,
        value=UNKNOWN,
        advice=f"{advice}; {_ASSERT}" if missing else advice,
        mend=mend,
        needed=needed,
        unknown=True,
    )


def _version(server: str, version: str, *, least: tuple[int, int], tested: tuple[int, int]) -> Finding:
    if not version:
        return _unknown(server, "version", needed=False, asserted=False, advice="", mend="")
    old, untested = _numbers(version) < least, _numbers(version) < tested
    need = ".".join(str(number) for number in least)
    return Finding(
        server=server,
        name="version",
        level=_FAIL if old else (_WARN if untested else _OK),
        value=version,
        advice=f"{need} or newer is needed" if old else ("it was not tested with one so old" if untested else ""),
    )


def _numbers(version: str) -> tuple[int, ...]:
    """Of `3.10.8` or `4.3.0-rc.1`, the first two."""
    parts = version.split(".")[:2]
    return tuple(int(part) for part in parts) if all(part.isdecimal() for part in parts) else ()


def _skew(server: str, skew_s: float | None) -> Finding:
    if skew_s is None:
        return _unknown(server, "clock", needed=False, asserted=False, advice="", mend="date -u")
    off = abs(skew_s) > SKEW_S
    return Finding(
        server=server,
        name="clock",
        level=_WARN if off else _OK,
        value=f"{skew_s:+.1f} s from this host's",
        advice="set both by NTP" if off else "",
        mend="timedatectl set-ntp true" if off else "",
    )


def _first(queues: Sequence[QueueInfo]) -> str:
    more = f" and {len(queues) - 1} more" if len(queues) > 1 else ""
    return f"{queues[0].name}{more}"
