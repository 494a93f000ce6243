"""Which version gets a call that names the function only, and who decides it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from broker import authorizations, functions, rollouts
from broker.backends.codec import pack, unpack
from broker.errors import BadRequest, Forbidden, NotFound, StateConflict
from broker.functions import CallableVersions, Definition
from broker.model import EVERYONE, FunctionStatus, Principal, Version
from broker.ports import Broker
from broker.revisions import edit
from broker.visibility import Family

OURS = Principal(account="ours", subject="me", scopes=frozenset())
THEIRS = Principal(account="theirs", subject="them", scopes=frozenset())
ECHO = Definition(name="echo", inference_url="/echo", container_image="fnqueue/echo:latest")
S = FunctionStatus


def versions(*weights: float | None) -> list[Version]:
    return [
        Version(
            id=str(number),
            function_id="f",
            account="ours",
            name="n",
            inference_url="/",
            container_image="i",
            created_at=number,
            status=S.ACTIVE,
            weight=weight,
        )
        for number, weight in enumerate(weights)
    ]


async def made(broker: Broker, *statuses: FunctionStatus) -> list[Version]:
    first = await functions.create(broker, OURS, ECHO)
    found = [first] + [await functions.add_version(broker, OURS, first.function_id, ECHO) for _ in statuses[1:]]
    return [await turn(broker, version, status) for version, status in zip(found, statuses, strict=True)]


async def turn(broker: Broker, version: Version, status: FunctionStatus) -> Version:
    changed = await edit(broker.catalog.versions, version.id, lambda stored: replace(stored, status=status))
    assert changed is not None
    return changed


async def picks(callables: CallableVersions, version: Version, times: int = 4000) -> Counter[str]:
    return Counter([(await callables.pick(OURS, version.function_id)).id for _ in range(times)])


# -- shares --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "callable_now", "expected"),
    [
        ((None, None), (0, 1), [50, 50]),
        ((None, 5), (0, 1), [95, 5]),
        ((None, None, 5), (0, 1, 2), [47.5, 47.5, 5]),
        ((95, 5, None), (0, 1, 2), [95, 5, 0]),
        ((20, 20), (0, 1), [50, 50]),
        ((60, 40), (1,), [100]),
        ((None, 5), (1,), [100]),
        ((None, 0), (0, 1), [100, 0]),
        ((None, 0), (1,), [0]),
        # The third was left nothing, and does not inherit what the first cannot take.
        ((60, 40, None), (1, 2), [100, 0]),
        ((100, None), (1,), [0]),
    ],
)
def test_shares_follow_the_weights_of_what_can_be_called(
    weights: tuple[float | None, ...], callable_now: tuple[int, ...], expected: list[float]
) -> None:
    family = versions(*weights)
    found = rollouts.shares(Family(versions=family), [family[position] for position in callable_now])
    assert found == pytest.approx(expected)


async def test_a_canary_gets_its_part_of_the_calls(memory_broker: Broker) -> None:
    stable, canary = await made(memory_broker, S.ACTIVE, S.ACTIVE)
    await rollouts.set_weights(memory_broker, OURS, stable.function_id, {canary.id: 5})
    counted = await picks(CallableVersions(memory_broker), stable)
    assert 100 <= counted[canary.id] <= 320
    assert counted.total() == 4000


async def test_without_weights_all_get_as_much(memory_broker: Broker) -> None:
    first, second = await made(memory_broker, S.ACTIVE, S.ACTIVE)
    await rollouts.set_weights(memory_broker, OURS, first.function_id, {first.id: 1})
    await rollouts.set_weights(memory_broker, OURS, first.function_id, {})
    counted = await picks(CallableVersions(memory_broker), first)
    assert min(counted[first.id], counted[second.id]) > 1700


async def test_a_weight_of_nothing_leaves_only_calls_by_version(memory_broker: Broker) -> None:
    first, second = await made(memory_broker, S.ACTIVE, S.ACTIVE)
    await rollouts.set_weights(memory_broker, OURS, first.function_id, {second.id: 0})
    callables = CallableVersions(memory_broker)
    assert await picks(callables, first, 200) == {first.id: 200}
    assert (await callables.pick(OURS, first.function_id, second.id)).id == second.id
    await turn(memory_broker, first, S.INACTIVE)
    callables.forget(first.function_id)
    with pytest.raises(NotFound, match="weights are 0"):
        await callables.pick(OURS, first.function_id)
    assert (await callables.pick(OURS, first.function_id, second.id)).id == second.id


async def test_a_new_weight_is_felt_by_every_front_end_within_a_second(memory_broker: Broker) -> None:
    now = [0.0]
    first, second = await made(memory_broker, S.ACTIVE, S.ACTIVE)
    callables = CallableVersions(memory_broker, now=lambda: now[0])
    assert len(await picks(callables, first, 200)) == 2
    await rollouts.set_weights(memory_broker, OURS, first.function_id, {second.id: 100})
    now[0] = 1.01
    assert await picks(callables, first, 200) == {second.id: 200}


async def test_a_version_that_is_added_or_deleted_needs_no_new_weights(memory_broker: Broker) -> None:
    first, canary = await made(memory_broker, S.ACTIVE, S.ACTIVE)
    await rollouts.set_weights(memory_broker, OURS, first.function_id, {canary.id: 20})
    third = await functions.add_version(memory_broker, OURS, first.function_id, ECHO)
    await turn(memory_broker, third, S.ACTIVE)
    found = {version.id: share for version, share in await rollouts.get(memory_broker, OURS, first.function_id)}
    assert found == {first.id: 40.0, canary.id: 20.0, third.id: 40.0}
    await functions.delete_version(memory_broker, OURS, first.function_id, canary.id)
    found = {version.id: share for version, share in await rollouts.get(memory_broker, OURS, first.function_id)}
    assert found == {first.id: 50.0, third.id: 50.0}


# -- setting -------------------------------------------------------------------------------------


async def test_weights_are_replaced_as_a_whole_and_shown(memory_broker: Broker) -> None:
    first, second = await made(memory_broker, S.ACTIVE, S.DEPLOYING)
    await rollouts.set_weights(memory_broker, OURS, first.function_id, {first.id: 10})
    told = await rollouts.set_weights(memory_broker, OURS, first.function_id, {second.id: 5})
    assert [(version.weight, share) for version, share in told] == [(None, 100.0), (5, 0.0)]
    assert await rollouts.get(memory_broker, OURS, first.function_id) == told


async def test_weights_change_nothing_else(memory_broker: Broker) -> None:
    [version] = await made(memory_broker, S.DEGRADING)
    [(written, _)] = await rollouts.set_weights(memory_broker, OURS, version.function_id, {version.id: 1})
    assert written == replace(version, weight=1)


async def test_weights_that_make_no_sense_are_refused(memory_broker: Broker) -> None:
    first, second = await made(memory_broker, S.ACTIVE, S.ACTIVE)
    for weights in ({first.id: 60, second.id: 41}, {"unknown": 1}):
        with pytest.raises(BadRequest, match="weights"):
            await rollouts.set_weights(memory_broker, OURS, first.function_id, weights)
    assert [version.weight for version, _ in await rollouts.get(memory_broker, OURS, first.function_id)] == [None, None]
    await rollouts.set_weights(memory_broker, OURS, first.function_id, {first.id: 33.3, second.id: 66.7})


async def test_only_the_owner_sets_and_sees_weights(memory_broker: Broker) -> None:
    [version] = await made(memory_broker, S.ACTIVE)
    narrow = replace(OURS, resources=frozenset({f"function/{version.function_id}/{version.id}"}))
    for principal, refusal in ((THEIRS, NotFound), (narrow, Forbidden)):
        with pytest.raises(refusal):
            await rollouts.set_weights(memory_broker, principal, version.function_id, {})
        with pytest.raises(refusal):
            await rollouts.get(memory_broker, principal, version.function_id)
    admin = replace(OURS, super_admin=True)
    await authorizations.replace_all(memory_broker, admin, version.function_id, "", [EVERYONE])
    with pytest.raises(StateConflict):
        await rollouts.set_weights(memory_broker, OURS, version.function_id, {})
    assert len(await rollouts.get(memory_broker, OURS, version.function_id)) == 1


def test_a_version_that_was_stored_before_there_were_weights_has_none() -> None:
    [version] = versions(None)
    assert unpack(Version, pack(version).replace(b',"weight":null', b"")) == version
    [weighed] = versions(2)
    assert unpack(Version, pack(weighed)) == weighed
