"""What a profile asks of the servers: facts in, findings out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from api.doctor import lines
from broker import profiles
from broker.errors import ConfigurationError
from broker.examination import examine
from broker.facts import BlobFacts, Facts, Finding, Level, Node, QueueFacts, QueueInfo, StoreFacts
from broker.settings import Settings, load
from infra.local.servers import INFRA

OK, WARN, FAIL = Level.OK, Level.WARN, Level.FAIL
CONFIG = {
    "appendonly": "yes",
    "appendfsync": "always",
    "maxmemory": "0",
    "maxmemory-policy": "noeviction",
    "min-replicas-to-write": "1",
    "min-replicas-max-lag": "10",
}
REDIS = StoreFacts(
    kind="redis",
    address="-h redis -p 6379",
    version="7.2.4",
    config=CONFIG,
    skew_s=0.1,
    replicas=2,
    used_bytes=1,
    writes_kept=True,
)
NODE = Node(name="rabbit@1", running=True, memory_alarm=False, disk_alarm=False, partitioned=False)
POLICY = profiles.queue_policy(Settings())
QUEUE = QueueInfo(name="fnq.v.1", kind="quorum", members=3, online=3, policy=POLICY)
RABBIT = QueueFacts(
    kind="rabbitmq",
    address="rabbit:5672",
    version="4.3.1",
    dead_letters=0,
    blocked=False,
    management="",
    nodes=(NODE, NODE, NODE),
    queues=(QUEUE,),
    policies={"fnqueue-versions": POLICY},
)
BUCKET = BlobFacts(kind="s3", server="AmazonS3", skew_s=0.5, signed_url="")
# Needs the management API to be told.
QUIET = replace(RABBIT, management="not configured", nodes=None, queues=None, policies=None)


def settings_of(profile: str, **given: Any) -> Settings:
    return load(Settings, profile=profile, **given)


def judged(profile: str, facts: Facts | None = None, **given: Any) -> dict[tuple[str, str], Finding]:
    facts = facts or Facts(store=REDIS, queue=RABBIT, blobs=BUCKET)
    findings = profiles.judge(facts, settings_of(profile, **given), run_timeout_s=3600)
    found = {(finding.server, finding.name): finding for finding in findings}
    assert len(found) == len(findings)
    return found


def refused(profile: str, facts: Facts, **given: Any) -> str:
    """Why, '' if it is not."""
    settings = settings_of(profile, **given)
    try:
        profiles.refuse(profiles.judge(facts, settings, run_timeout_s=3600), settings)
    except ConfigurationError as exc:
        return str(exc)
    return ""


def configured(**config: str | None) -> StoreFacts:
    changed = {name.replace("_", "-"): value for name, value in config.items()}
    return replace(REDIS, config={name: value for name, value in {**CONFIG, **changed}.items() if value is not None})


@pytest.mark.parametrize("profile", ["A", "B", "C", "D"])
def test_servers_as_they_should_be_have_nothing_against_them(profile: str) -> None:
    findings = judged(profile)
    assert {finding.level for finding in findings.values() if finding.name != "consumer time-out"} == {OK}
    assert findings["rabbitmq", "consumer time-out"].unknown
    assert not refused(profile, Facts(store=REDIS, queue=RABBIT, blobs=BUCKET))


@pytest.mark.parametrize(
    ("wrong", "profiles_refused"),
    [
        ({"appendonly": "no"}, "BCD"),
        ({"appendfsync": "everysec"}, "B"),
        ({"appendfsync": "no"}, "BCD"),
        ({"maxmemory_policy": "allkeys-lru"}, "BCD"),
        ({"min_replicas_to_write": "0"}, "CD"),
        ({"min_replicas_max_lag": "0"}, "CD"),  # which switches it off
        ({"min_replicas_max_lag": "60"}, "CD"),
        ({"appendfsync": None}, "BCD"),
    ],
)
def test_a_redis_that_is_configured_otherwise_is_named_with_what_mends_it(
    wrong: Mapping[str, str | None], profiles_refused: str
) -> None:
    [(name, value)] = wrong.items()
    facts = Facts(store=configured(**wrong), queue=RABBIT, blobs=BUCKET)
    for profile in "ABCD":
        said = refused(profile, facts)
        assert bool(said) == (profile in profiles_refused)
        if said:
            setting = name.replace("_", "-")
            assert f"not profile {profile}: redis {setting} is {value or 'unknown'}" in said
            assert f"redis-cli -h redis -p 6379 CONFIG {'SET' if value else 'GET'} {setting}" in said
            assert "\n" not in said


def test_a_redis_that_keeps_its_settings_to_itself_needs_its_operators_word() -> None:
    facts = Facts(store=replace(REDIS, config=None), queue=RABBIT, blobs=BUCKET)
    assert "FNQUEUE_PROFILE_ASSERTED=true" in refused("B", facts)
    assert not refused("B", facts, profile_asserted=True)
    finding = judged("B", facts, profile_asserted=True)["redis", "appendfsync"]
    assert (finding.level, finding.value, finding.unknown) == (WARN, "unknown", True)


def test_a_word_does_not_overrule_what_is_known_to_be_wrong() -> None:
    facts = Facts(store=configured(appendfsync="everysec"), queue=RABBIT, blobs=BUCKET)
    assert "appendfsync is everysec" in refused("B", facts, profile_asserted=True)


@pytest.mark.parametrize("profile", ["B", "C", "D"])
def test_memory_keeps_nothing(profile: str) -> None:
    facts = Facts(store=StoreFacts(kind="memory"), queue=QueueFacts(kind="memory"), blobs=BUCKET)
    said = refused(profile, facts)
    assert "store place is memory://" in said
    assert "queue place is memory://" in said


@pytest.mark.parametrize(
    ("queue", "profiles_refused", "said"),
    [
        (replace(RABBIT, nodes=(NODE,)), "CD", "nodes is 1"),
        (QUIET, "CD", "nodes is unknown"),
        (replace(RABBIT, version="3.13.7"), "CD", "partition strategy is unknown"),
        (replace(RABBIT, version="3.9.1"), "BCD", "3.10 or newer is needed"),
        (replace(RABBIT, queues=(replace(QUEUE, kind="classic"),)), "BCD", "fnq.v.1 not quorum"),
        (replace(RABBIT, queues=(replace(QUEUE, members=1, online=1),)), "CD", "rabbitmq-queues grow"),
        (replace(RABBIT, queues=(replace(QUEUE, policy={}),)), "BCD", "rabbitmqctl set_policy"),
        (replace(RABBIT, queues=(), policies={}), "BCD", "overflow is missing"),
        (replace(RABBIT, queues=(replace(QUEUE, policy=None),), policies={}), "BCD", "overflow is missing"),
        (replace(RABBIT, queues=(), policies={"p": POLICY | {"max-length": 10}}), "BCD", "max-length is 10"),
        (
            replace(RABBIT, queues=(), policies={"p": POLICY | {"max-length-bytes": 2**20}}),
            "BCD",
            "max-length-bytes is 1048576, below FNQUEUE_VERSION_BYTES",
        ),
    ],
)
def test_a_rabbitmq_that_is_configured_otherwise_is_named(queue: QueueFacts, profiles_refused: str, said: str) -> None:
    facts = Facts(store=REDIS, queue=queue, blobs=BUCKET)
    for profile in "ABCD":
        why = refused(profile, facts)
        if profile in profiles_refused:
            assert said in why
        elif profile not in "CD":  # those may miss more
            assert not why


@pytest.mark.parametrize(
    ("rights", "level"),
    [
        ("~* &* +@all", OK),
        ("-@all", FAIL),
        ("~fnq:* &* +@all", FAIL),
        ("~* +@all", FAIL),
        ("~* &* +@all -@dangerous", FAIL),
        ("~* &* +@all -flushall", FAIL),
        (None, WARN),
    ],
)
def test_a_user_default_whose_rights_do_not_do_for_a_restart_is_named(rights: str | None, level: Level) -> None:
    facts = Facts(store=replace(REDIS, default_user=rights), queue=RABBIT, blobs=BUCKET)
    for profile in "BCD":
        found = judged(profile, facts)["redis", "user default"]
        assert (found.level, found.unknown) == (level, rights is None)
        assert ("append-only" in found.advice) is (level is not OK)
        assert not refused(profile, facts), "whether a process starts must not hang on who may ask"
    assert judged("A", facts)["redis", "user default"].level is (WARN if level is FAIL else level)
    assert ("redis", "user default") not in judged("B")


def test_what_a_server_does_now_refuses_nobody_and_fails_the_doctor() -> None:
    """A process that did not start because a replica is away would make an outage of a failover."""
    ill = replace(NODE, running=False)
    full = replace(NODE, memory_alarm=True, disk_alarm=True)
    facts = Facts(
        store=replace(REDIS, replicas=0, writes_kept=False, config={**CONFIG, "maxmemory": "1000"}, used_bytes=990),
        queue=replace(
            RABBIT,
            nodes=(full, ill, replace(NODE, partitioned=True)),
            queues=(replace(QUEUE, online=2),),
            dead_letters=7,
        ),
        blobs=replace(BUCKET, skew_s=-1000.0, signed_url="refused with 403"),
    )
    assert not refused("C", facts)
    settings = settings_of("C")
    findings = profiles.judge(facts, settings, run_timeout_s=3600)
    failing = {f"{finding.server} {finding.name}" for finding in findings if finding.level is FAIL}
    assert failing == {
        "redis replicas",
        "redis append-only file",
        "rabbitmq node rabbit@1",
        "rabbitmq alarms",
        "s3 clock",
        "s3 signed URLs",
    }
    warned = {finding.name for finding in findings if finding.level is WARN}
    assert {"memory", "dead letters", "queue members online"} <= warned


@pytest.mark.parametrize("profile", ["A", "B", "C", "D"])
def test_servers_that_are_away_refuse_nobody(profile: str) -> None:
    away = Facts(
        store=StoreFacts(kind="redis", fault="it does not answer"),
        queue=QueueFacts(kind="rabbitmq", fault="it does not answer"),
        blobs=BlobFacts(kind="s3", fault="it does not answer"),
    )
    assert not refused(profile, away)
    assert [finding.level for finding in judged(profile, away).values()] == [FAIL] * 3


def test_a_queue_of_which_the_policy_is_not_told_yet_is_judged_by_what_there_is() -> None:
    young = replace(QUEUE, name="fnq.v.2", policy=None)
    for queues in ((young,), (young, QUEUE)):
        facts = Facts(store=REDIS, queue=replace(RABBIT, queues=queues), blobs=BUCKET)
        assert not refused("C", facts)
        assert judged("C", facts)["rabbitmq", "queue policy"].level is OK


@pytest.mark.parametrize(("timeout_ms", "level"), [(1_800_000, FAIL), (3_900_000, OK)])
def test_a_consumer_time_out_below_the_longest_run_is_a_fault(timeout_ms: int, level: Level) -> None:
    queue = replace(QUEUE, policy={**POLICY, "consumer-timeout": timeout_ms})
    facts = Facts(store=REDIS, queue=replace(RABBIT, queues=(queue,)), blobs=BUCKET)
    assert judged("A", facts)["rabbitmq", "consumer time-out"].level is level


@pytest.mark.parametrize(("profile", "level"), [("A", OK), ("B", OK), ("C", WARN), ("D", FAIL)])
def test_a_folder_is_one_machines(profile: str, level: Level) -> None:
    facts = Facts(store=REDIS, queue=RABBIT, blobs=BlobFacts(kind="file", address="/blobs", free_bytes=2**40))
    assert judged(profile, facts)["blobs", "place"].level is level
    assert bool(refused(profile, facts)) == (profile == "D")


def test_the_policy_is_the_one_that_our_own_servers_load() -> None:
    definitions = json.loads((INFRA / "rabbitmq" / "definitions.json").read_text())
    [policy] = definitions["policies"]
    assert (policy["name"], policy["pattern"]) == (profiles.POLICY, profiles.PATTERN)
    assert policy["definition"] == profiles.queue_policy(Settings())


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("profile", "replicas"), [("A", 0), ("B", 0), ("C", 1), ("D", 1)])
def test_profiles_with_replicas_wait_for_one(profile: str, replicas: int) -> None:
    assert settings_of(profile).durable_replicas == replicas
    assert settings_of(profile, durable_replicas=2).durable_replicas == 2


def test_a_profile_with_replicas_cannot_go_without_waiting() -> None:
    with pytest.raises(ConfigurationError, match="durable_replicas must be at least 1 in profile C"):
        settings_of("C", durable_replicas=0)


def test_the_environment_chooses_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FNQUEUE_PROFILE", "C")
    assert (Settings().profile, Settings().durable_replicas) == ("C", 1)
    monkeypatch.setenv("FNQUEUE_PROFILE", "E")
    with pytest.raises(ConfigurationError, match="FNQUEUE_PROFILE"):
        load(Settings)


# -- what people see ---------------------------------------------------------------------------


def test_each_finding_is_a_line_with_what_mends_it_below() -> None:
    facts = Facts(store=configured(appendfsync="everysec"), queue=RABBIT, blobs=BUCKET)
    findings: Sequence[Finding] = tuple(judged("B", facts).values())
    text = list(lines(findings))
    at = next(number for number, line in enumerate(text) if "appendfsync" in line)
    assert text[at].split() == ["fail", "redis", "appendfsync", "everysec"]
    assert text[at + 1].strip() == "must be always"
    assert text[at + 2].strip().startswith("$ redis-cli -h redis -p 6379 CONFIG SET appendfsync always")


async def test_looking_makes_nothing(tmp_path: Path) -> None:
    settings = load(Settings, data_dir=tmp_path / "data")
    facts = await examine(settings, probe=True)
    assert facts.blobs.missing
    assert (facts.store.kind, facts.queue.kind) == ("memory", "memory")
    assert os.listdir(tmp_path) == []
    findings = profiles.judge(facts, settings, run_timeout_s=3600)
    assert {finding.level for finding in findings} == {OK, WARN}
