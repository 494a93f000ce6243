"""Functions: what a definition becomes, who sees it, and which version an invocation gets."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from broker import accounts, authorizations, deployments, functions
from broker.accounts import Limits
from broker.errors import BadRequest, Forbidden, NotFound, StateConflict
from broker.functions import CallableVersions, Change, Definition, ModelChange
from broker.model import (
    FunctionStatus,
    Gpu,
    GpuSpecification,
    Health,
    LlmConfig,
    Model,
    Principal,
    Priority,
    Rate,
    RateLimit,
    Version,
)
from broker.ports import Broker
from broker.revisions import edit

OURS = Principal(account="ours", subject="me", scopes=frozenset())
THEIRS = Principal(account="theirs", subject="them", scopes=frozenset())
ECHO = Definition(name="echo", inference_url="/echo", container_image="fnqueue/echo:latest")
CHAT = replace(ECHO, function_type="LLM", models=(Model(name="m", llm=LlmConfig(uris=("/v1",), tokenizer="t")),))
UNKNOWN = "00000000-0000-4000-8000-000000000000"


async def turn(broker: Broker, version: Version, status: FunctionStatus) -> Version:
    changed = await edit(broker.catalog.versions, version.id, lambda stored: replace(stored, status=status))
    assert changed is not None
    return changed


async def two_versions(broker: Broker, *statuses: FunctionStatus) -> list[Version]:
    first = await functions.create(broker, OURS, ECHO)
    second = await functions.add_version(broker, OURS, first.function_id, ECHO)
    pairs = zip((first, second), statuses, strict=True)
    return [await turn(broker, version, status) for version, status in pairs]


# -- create ------------------------------------------------------------------------------------


async def test_a_new_function_is_inactive_and_carries_its_defaults(memory_broker: Broker) -> None:
    version = await functions.create(memory_broker, OURS, ECHO)
    assert version.status is FunctionStatus.INACTIVE
    assert version.account == "ours"
    assert version.description == "echo"
    assert version.health == Health(protocol="HTTP", uri="/v2/health/ready", port=8000)
    assert await functions.get(memory_broker, OURS, version.function_id, version.id) == version


@pytest.mark.parametrize(
    ("definition", "health"),
    [
        (replace(ECHO, health_uri="/ready"), Health(uri="/ready")),
        (replace(ECHO, inference_port=9000), Health(port=9000)),
        (replace(ECHO, inference_url="/gRPC"), Health(protocol="gRPC")),
        (replace(ECHO, health_uri="/ready", health=Health(uri="/well", port=1)), Health(uri="/well", port=1)),
    ],
)
async def test_health_is_derived_where_it_is_not_given(
    memory_broker: Broker, definition: Definition, health: Health
) -> None:
    assert (await functions.create(memory_broker, OURS, definition)).health == health


async def test_names_need_not_be_unique(memory_broker: Broker) -> None:
    first = await functions.create(memory_broker, OURS, ECHO)
    second = await functions.create(memory_broker, OURS, ECHO)
    assert first.function_id != second.function_id


async def test_a_function_is_llm_in_all_its_versions_or_in_none(memory_broker: Broker) -> None:
    plain = await functions.create(memory_broker, OURS, ECHO)
    llm = await functions.create(memory_broker, OURS, CHAT)
    for function_id, other in ((plain.function_id, CHAT), (llm.function_id, ECHO)):
        with pytest.raises(BadRequest, match="LLM"):
            await functions.add_version(memory_broker, OURS, function_id, other)
    assert (await functions.add_version(memory_broker, OURS, llm.function_id, CHAT)).models == CHAT.models


async def test_the_quota_counts_versions_and_refuses_functions(memory_broker: Broker) -> None:
    await accounts.create_account(memory_broker, "ours", Limits(max_functions=2))
    first = await functions.create(memory_broker, OURS, ECHO)
    await functions.create(memory_broker, THEIRS, ECHO)
    await functions.add_version(memory_broker, OURS, first.function_id, ECHO)
    with pytest.raises(StateConflict, match="2"):
        await functions.create(memory_broker, OURS, ECHO)
    third = await functions.add_version(memory_broker, OURS, first.function_id, ECHO)
    for version in (first, third):
        await functions.delete_version(memory_broker, OURS, version.function_id, version.id)
    await functions.create(memory_broker, OURS, ECHO)


async def test_a_version_is_added_to_ones_own_function_only(memory_broker: Broker) -> None:
    first = await functions.create(memory_broker, OURS, ECHO)
    second = await functions.add_version(memory_broker, OURS, first.function_id, ECHO)
    assert second.function_id == first.function_id
    assert second.id != first.id
    with pytest.raises(NotFound):
        await functions.add_version(memory_broker, THEIRS, first.function_id, ECHO)


# -- sharing -----------------------------------------------------------------------------------


async def test_a_remembered_sharing_is_forgotten_within_a_second(memory_broker: Broker) -> None:
    now = [0.0]
    callables = CallableVersions(memory_broker, now=lambda: now[0])
    version = await turn(memory_broker, await functions.create(memory_broker, OURS, ECHO), FunctionStatus.ACTIVE)
    await accounts.create_key(memory_broker, account="theirs")
    await authorizations.replace_all(memory_broker, OURS, version.function_id, version.id, ["theirs"])
    assert await callables.pick(THEIRS, version.function_id) == version
    await authorizations.clear(memory_broker, OURS, version.function_id, version.id)
    assert await callables.pick(THEIRS, version.function_id) == version
    now[0] = 1.01
    with pytest.raises(NotFound):
        await callables.pick(THEIRS, version.function_id)
    assert await callables.pick(OURS, version.function_id) == version


async def test_what_is_remembered_for_one_caller_is_nobody_elses(memory_broker: Broker) -> None:
    callables = CallableVersions(memory_broker)
    version = await turn(memory_broker, await functions.create(memory_broker, OURS, ECHO), FunctionStatus.ACTIVE)
    narrow = replace(OURS, resources=frozenset({f"function/{UNKNOWN}/*"}))
    await callables.pick(OURS, version.function_id)
    for _ in range(2):
        assert callables.known(OURS, version.function_id) == version
        assert callables.known(OURS, version.function_id, version.id) == version
        assert callables.known(OURS, version.function_id, UNKNOWN) is None
        assert callables.known(THEIRS, version.function_id) is None
        assert callables.known(narrow, version.function_id) is None


async def test_a_key_for_other_functions_is_refused_and_not_told_they_are_unknown(memory_broker: Broker) -> None:
    version = await turn(memory_broker, await functions.create(memory_broker, OURS, ECHO), FunctionStatus.ACTIVE)
    narrow = replace(OURS, resources=frozenset({f"function/{UNKNOWN}/*"}))
    with pytest.raises(Forbidden):
        await CallableVersions(memory_broker).pick(narrow, version.function_id)


# -- looking -----------------------------------------------------------------------------------


async def test_foreign_and_unknown_are_told_apart_nowhere(memory_broker: Broker) -> None:
    version = await functions.create(memory_broker, OURS, ECHO)
    told = set()
    for principal, function_id, version_id in (
        (THEIRS, version.function_id, version.id),
        (OURS, version.function_id, UNKNOWN),
        (OURS, UNKNOWN, version.id),
    ):
        with pytest.raises(NotFound) as refused:
            await functions.get(memory_broker, principal, function_id, version_id)
        told.add(str(refused.value))
    assert len(told) == 1


async def test_lists_hold_one_entry_per_own_version(memory_broker: Broker) -> None:
    first = await functions.create(memory_broker, OURS, ECHO)
    second = await functions.add_version(memory_broker, OURS, first.function_id, ECHO)
    await functions.create(memory_broker, THEIRS, ECHO)
    assert await functions.list_functions(memory_broker, OURS) == [first, second]
    assert await functions.list_versions(memory_broker, OURS, first.function_id) == [first, second]
    with pytest.raises(NotFound):
        await functions.list_versions(memory_broker, THEIRS, first.function_id)


async def test_visibility_filters_and_an_unknown_one_is_refused(memory_broker: Broker) -> None:
    version = await functions.create(memory_broker, OURS, ECHO)
    assert await functions.list_functions(memory_broker, OURS, visibility=["Private", "public"]) == [version]
    assert await functions.list_functions(memory_broker, OURS, visibility=[""]) == [version]
    assert await functions.list_functions(memory_broker, OURS, visibility=["public"]) == []
    with pytest.raises(BadRequest):
        await functions.list_functions(memory_broker, OURS, visibility=["secret"])


# -- update ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", FunctionStatus)
async def test_tags_and_rate_limit_change_in_every_status(memory_broker: Broker, status: FunctionStatus) -> None:
    before, after = RateLimit(rates=(Rate(limit=1, window_s=1),)), RateLimit(per_user=(Rate(limit=2, window_s=60),))
    made = await functions.create(memory_broker, OURS, replace(ECHO, tags=("old",), rate_limit=before))
    version = await turn(memory_broker, made, status)
    change = Change(tags=("new",))
    changed = await functions.update(memory_broker, OURS, version.function_id, version.id, change)
    assert changed == replace(version, tags=("new",))
    limited = Change(rate_limit=after)
    changed = await functions.update(memory_broker, OURS, version.function_id, version.id, limited)
    assert changed == replace(version, tags=("new",), rate_limit=after)


async def test_nobody_updates_a_foreign_version(memory_broker: Broker) -> None:
    version = await functions.create(memory_broker, OURS, ECHO)
    with pytest.raises(NotFound):
        await functions.update(memory_broker, THEIRS, version.function_id, version.id, Change(tags=("x",)))


async def test_limits_of_a_model_and_priority_are_the_whole_functions(memory_broker: Broker) -> None:
    first = await functions.create(memory_broker, OURS, CHAT)
    second = await functions.add_version(memory_broker, OURS, first.function_id, replace(CHAT, tags=("kept",)))
    change = Change(
        tags=("mine",),
        models=(ModelChange(name="m", token_rate_limit="5-W", routing_method="random"),),
        priority=Priority(default=3),
    )
    await functions.update(memory_broker, OURS, first.function_id, first.id, change)
    for version, tags in ((first, ("mine",)), (second, ("kept",))):
        changed = await functions.get(memory_broker, OURS, version.function_id, version.id)
        (model,) = changed.models
        assert model.llm == LlmConfig(uris=("/v1",), tokenizer="t", token_rate_limit="5-W", routing_method="random")
        assert (changed.tags, changed.priority) == (tags, Priority(default=3))


@pytest.mark.parametrize(
    ("definition", "change", "field"),
    [
        (ECHO, Change(models=(ModelChange(name="m"),)), "modelUpdates"),
        (ECHO, Change(priority=Priority(default=1)), "llmInvocationConfig"),
        (CHAT, Change(models=(ModelChange(name="n"),)), "modelUpdates"),
    ],
)
async def test_an_update_that_does_not_fit_names_its_field(
    memory_broker: Broker, definition: Definition, change: Change, field: str
) -> None:
    version = await functions.create(memory_broker, OURS, definition)
    with pytest.raises(BadRequest) as refused:
        await functions.update(memory_broker, OURS, version.function_id, version.id, change)
    assert refused.value.field == field


# -- delete ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", FunctionStatus)
async def test_a_version_is_deleted_in_every_status_and_once(memory_broker: Broker, status: FunctionStatus) -> None:
    version = await turn(memory_broker, await functions.create(memory_broker, OURS, ECHO), status)
    await functions.delete_version(memory_broker, OURS, version.function_id, version.id)
    for verb in (functions.get, functions.delete_version):
        with pytest.raises(NotFound):
            await verb(memory_broker, OURS, version.function_id, version.id)


async def test_deleting_a_version_undeploys_it_at_once(memory_broker: Broker) -> None:
    await memory_broker.catalog.offer([Gpu(name="CPU", instance_type="CPU", backend="local", capacity=1)], ttl_s=60)
    version = await functions.create(memory_broker, OURS, ECHO)
    wanted = GpuSpecification(id="", gpu="CPU", instance_type="", min_instances=1, max_instances=1)
    await deployments.deploy(memory_broker, OURS, version.function_id, version.id, [wanted])
    await functions.delete_version(memory_broker, OURS, version.function_id, version.id)
    row = await memory_broker.catalog.deployments.get(version.id)
    assert row is not None
    assert (row.item.undeployed, row.item.draining) == (True, False)


async def test_nobody_deletes_a_foreign_version(memory_broker: Broker) -> None:
    version = await functions.create(memory_broker, OURS, ECHO)
    with pytest.raises(NotFound):
        await functions.delete_version(memory_broker, THEIRS, version.function_id, version.id)
    assert await functions.get(memory_broker, OURS, version.function_id, version.id) == version


# -- pick --------------------------------------------------------------------------------------

S = FunctionStatus


async def test_any_callable_version_is_picked_as_often_as_another(memory_broker: Broker) -> None:
    first, second = await two_versions(memory_broker, S.ACTIVE, S.DEGRADING)
    picks = Counter([(await functions.pick_callable(memory_broker, OURS, first.function_id)).id for _ in range(1000)])
    assert set(picks) == {first.id, second.id}
    assert min(picks.values()) > 400


async def test_only_callable_versions_are_picked(memory_broker: Broker) -> None:
    first, second = await two_versions(memory_broker, S.DEPLOYING, S.ACTIVE)
    for _ in range(20):
        assert await functions.pick_callable(memory_broker, OURS, first.function_id) == second


async def test_a_named_version_is_the_one_picked(memory_broker: Broker) -> None:
    first, second = await two_versions(memory_broker, S.ACTIVE, S.ACTIVE)
    for _ in range(20):
        assert await functions.pick_callable(memory_broker, OURS, first.function_id, second.id) == second


@pytest.mark.parametrize("status", [S.INACTIVE, S.DEPLOYING, S.ERROR, S.DELETED])
async def test_what_is_not_callable_is_not_found(memory_broker: Broker, status: FunctionStatus) -> None:
    version = await turn(memory_broker, await functions.create(memory_broker, OURS, ECHO), status)
    for version_id in ("", version.id):
        with pytest.raises(NotFound):
            await functions.pick_callable(memory_broker, OURS, version.function_id, version_id)


async def test_a_function_that_lost_its_instances_is_a_conflict(memory_broker: Broker) -> None:
    version, _ = await two_versions(memory_broker, S.DEGRADED, S.INACTIVE)
    with pytest.raises(StateConflict, match="DEGRADED"):
        await functions.pick_callable(memory_broker, OURS, version.function_id)


async def test_a_foreign_function_is_told_like_an_unknown_one(memory_broker: Broker) -> None:
    version, _ = await two_versions(memory_broker, S.DEGRADED, S.ACTIVE)
    told = set()
    for principal, function_id in ((THEIRS, version.function_id), (OURS, UNKNOWN)):
        with pytest.raises(NotFound) as refused:
            await functions.pick_callable(memory_broker, principal, function_id)
        told.add(str(refused.value))
    assert len(told) == 1


# -- the cache ---------------------------------------------------------------------------------


async def test_a_found_version_is_remembered_for_a_second(memory_broker: Broker) -> None:
    now = 0.0
    callables = CallableVersions(memory_broker, now=lambda: now)
    version = await turn(memory_broker, await functions.create(memory_broker, OURS, ECHO), S.ACTIVE)
    assert await callables.pick(OURS, version.function_id) == version
    await turn(memory_broker, version, S.INACTIVE)
    now = 0.99
    assert await callables.pick(OURS, version.function_id) == version
    now = 1.01
    with pytest.raises(NotFound):
        await callables.pick(OURS, version.function_id)


async def test_a_version_is_callable_as_soon_as_it_is_active(memory_broker: Broker) -> None:
    callables = CallableVersions(memory_broker)
    first, second = await two_versions(memory_broker, S.ACTIVE, S.DEPLOYING)
    await callables.pick(OURS, first.function_id)
    with pytest.raises(NotFound):
        await callables.pick(OURS, first.function_id, second.id)
    second = await turn(memory_broker, second, S.ACTIVE)
    assert await callables.pick(OURS, first.function_id, second.id) == second


async def test_forgetting_makes_a_write_count_at_once(memory_broker: Broker) -> None:
    callables = CallableVersions(memory_broker)
    version = await turn(memory_broker, await functions.create(memory_broker, OURS, ECHO), S.ACTIVE)
    await callables.pick(OURS, version.function_id)
    await turn(memory_broker, version, S.INACTIVE)
    callables.forget(version.function_id)
    with pytest.raises(NotFound):
        await callables.pick(OURS, version.function_id)


async def test_what_is_remembered_is_still_hidden_from_others(memory_broker: Broker) -> None:
    callables = CallableVersions(memory_broker)
    version = await turn(memory_broker, await functions.create(memory_broker, OURS, ECHO), S.ACTIVE)
    await callables.pick(OURS, version.function_id)
    with pytest.raises(NotFound):
        await callables.pick(THEIRS, version.function_id)
