"""Rate limits: what text means, who takes from what, and what callers are told."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from api import headers
from api.limits import Pace
from api.server import serving
from broker import functions, limits
from broker.backends.codec import pack, unpack
from broker.backends.memory.counters import MemoryCounters
from broker.errors import BadRequest, ConfigurationError, NotFound, RateLimited, StoreUnavailable
from broker.functions import Definition
from broker.limits import RateLimiter
from broker.model import Principal, Quota, Rate, RateLimit, Taken, Version, Window
from broker.ports import Broker
from broker.settings import ApiSettings
from tests.eventually import eventually
from tests.unit.test_server import FUNCTION, INVOKE, NOW, NVCF, VERSION, House, caller, opened, slug

SECOND, MINUTE, HOUR, DAY = 1, 60, 3600, 86_400
PLAIN = Version(
    id="v", function_id="f", account="owner", name="n", inference_url="/", container_image="i", created_at=1.0
)
ME = Principal(account="acme", subject="me", scopes=frozenset())
OWNER = Principal(account="owner", subject="o", scopes=frozenset())
LIMIT = f"{NVCF}/ratelimit/functions/{FUNCTION}/versions/{VERSION}"
GET = f"{NVCF}/functions/{FUNCTION}/versions/{VERSION}"
WHOLE: dict[str, Any] = {
    "rateLimit": "100-S, 500-H",
    "exemptedNcaIds": ["free"],
    "perNcaIdRate": {"big": "1000-S", "small": "1-M, 5-D"},
    "perUserRate": "10-S",
    "syncCheck": True,
}


# -- text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("100-S", [(100, SECOND)]),
        ("1-M", [(1, MINUTE)]),
        ("10-S,500-H", [(10, SECOND), (500, HOUR)]),
        (" 10-s ,  7-d ", [(10, SECOND), (7, DAY)]),
        ("4-D, 3-H, 2-M, 1-S", [(4, DAY), (3, HOUR), (2, MINUTE), (1, SECOND)]),
        ("1000000000-D", [(1_000_000_000, DAY)]),
        ("007-S", [(7, SECOND)]),
    ],
)
def test_rates_are_read(text: str, rates: Sequence[tuple[int, int]]) -> None:
    assert limits.parse_rates(text, field="x") == tuple(Rate(limit=limit, window_s=span) for limit, span in rates)


NO_RATES = """||100|100-|-S|0-S|-1-S|1.5-S|100-W|100-SS|100 - S|100-S,|,100-S|100-S;1-M|1-S, 2-S|1-S, 2-M, 3-s|0x1-S|
1000000001-S|99999999999999999999999999999999999999999999999999999999999999999999999999999999-S|\u0661-S"""


@pytest.mark.parametrize("text", NO_RATES.split("|"))
def test_what_is_not_a_rate_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadRequest) as refused:
        limits.parse_rates(text, field="rateLimit.perUserRate")
    assert refused.value.field == "rateLimit.perUserRate"
    assert str(refused.value).startswith("rateLimit.perUserRate: ")
    assert len(str(refused.value)) < 200


def test_rates_are_written_as_they_are_read() -> None:
    assert limits.format_rates(limits.parse_rates("500-h,10-S", field="x")) == "500-H, 10-S"
    assert limits.format_rates(()) == ""


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"rates": None}, "rateLimit"),
        ({"rates": None, "exempted": ["a"]}, "rateLimit"),
        ({"rates": None, "exempted": ["a"], "per_user": "1-S"}, "rateLimit.exemptedNcaIds"),
        ({"rates": "1-S", "exempted": [str(at) for at in range(33)]}, "rateLimit.exemptedNcaIds"),
        ({"rates": "1-S", "exempted": [""]}, "rateLimit.exemptedNcaIds"),
        ({"rates": None, "per_account": {str(at): "1-S" for at in range(33)}}, "rateLimit.perNcaIdRate"),
        ({"rates": "1-S", "exempted": ["a"], "per_account": {"a": "1-S"}}, "rateLimit.perNcaIdRate"),
        ({"rates": None, "per_account": {"a": "1-S", "b": "x"}}, "rateLimit.perNcaIdRate.b"),
        ({"rates": "1-X"}, "rateLimit.rateLimit"),
        ({"rates": "1-S", "per_user": ""}, "rateLimit.perUserRate"),
    ],
)
def test_a_bad_combination_names_its_field(given: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as refused:
        limits.define(**given)
    assert refused.value.field == field


@pytest.mark.parametrize(
    "given", [{"rates": "1-S"}, {"rates": None, "per_user": "1-S"}, {"rates": None, "per_account": {"a": "1-S"}}]
)
def test_any_one_of_the_three_rates_is_enough(given: dict[str, Any]) -> None:
    assert isinstance(limits.define(**given), RateLimit)


def test_a_version_keeps_its_rate_limit_in_the_store_and_older_rows_have_none() -> None:
    limit = limits.define(rates="5-S", exempted=["a"], per_account={"b": "1-M, 2-D"}, per_user="1-S", sync_check=True)
    version = replace(PLAIN, rate_limit=limit)
    assert unpack(Version, pack(version)) == version
    older = json.loads(pack(version))
    del older["rate_limit"]
    assert unpack(Version, json.dumps(older)) == PLAIN


# -- who takes from what -----------------------------------------------------------------------

BOTH = limits.define(rates="5-S, 9-H", exempted=["free"], per_account={"big": "70-S"}, per_user="2-M")


@pytest.mark.parametrize(
    ("account", "limit", "taken"),
    [
        ("acme", None, {}),
        ("acme", limits.define(rates="5-S, 9-H"), {"a:acme second": 5, "a:acme hour": 9}),
        ("acme", BOTH, {"a:acme second": 5, "a:acme hour": 9, "u:acme:me user-minute": 2}),
        ("big", BOTH, {"a:big second": 70, "u:big:me user-minute": 2}),
        ("free", BOTH, {"u:free:me user-minute": 2}),
        ("free", limits.define(rates="5-S", exempted=["free"]), {}),
        ("acme", limits.define(rates=None, per_account={"big": "1-S"}), {}),
    ],
)
def test_the_rates_that_hold_for_a_caller(account: str, limit: RateLimit | None, taken: Mapping[str, int]) -> None:
    windows = limits.windows(replace(ME, account=account), replace(PLAIN, rate_limit=limit))
    assert {f"{window.counter} {window.policy}": window.rate.limit for window in windows} == taken


class Away:
    """Counters that cannot be reached, or must not be."""

    def __init__(self) -> None:
        self.asked = 0

    async def take(self, partition: str, windows: Sequence[Window]) -> Taken:
        self.asked += 1
        raise StoreUnavailable("the counters are away")


def over(broker: Broker, counters: Away | MemoryCounters, **settings: Any) -> RateLimiter:
    return RateLimiter(replace(broker, counters=counters, settings=broker.settings.model_copy(update=settings)))


async def test_no_store_is_asked_where_no_rate_holds(memory_broker: Broker) -> None:
    away = Away()
    limiter = over(memory_broker, away, rate_limit_unreachable="closed")
    assert await limiter.take(ME, PLAIN) == limits.UNLIMITED
    assert (
        await limiter.take(
            replace(ME, account="big"), replace(PLAIN, rate_limit=limits.define(rates="1-S", exempted=["big"]))
        )
        == limits.UNLIMITED
    )
    assert away.asked == 0


async def test_unreachable_counters_let_pass_when_open_and_say_so_once(
    memory_broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    limiter = over(memory_broker, Away())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            limits.require(await limiter.take(ME, replace(PLAIN, rate_limit=BOTH)))
    assert [record.message for record in caplog.records] == ["rate_limits_unreachable"]


async def test_unreachable_counters_refuse_when_closed(memory_broker: Broker) -> None:
    with pytest.raises(StoreUnavailable):
        await over(memory_broker, Away(), rate_limit_unreachable="closed").take(ME, replace(PLAIN, rate_limit=BOTH))


async def test_each_account_and_each_user_has_counts_of_its_own(memory_broker: Broker) -> None:
    limiter = RateLimiter(memory_broker)
    version = replace(PLAIN, rate_limit=limits.define(rates="2-D", per_user="1-D"))

    async def granted(account: str, subject: str) -> bool:
        return (await limiter.take(replace(ME, account=account, subject=subject), version)).granted

    assert [await granted("a", "x"), await granted("a", "x")] == [True, False]
    assert [await granted("a", "y"), await granted("a", "z")] == [True, False]
    assert await granted("b", "x")


def test_a_refusal_names_what_is_used_up_and_when_to_come_again() -> None:
    quotas = (
        Quota(policy="second", rate=Rate(limit=5, window_s=1), remaining=3, reset_s=0.5),
        Quota(policy="hour", rate=Rate(limit=9, window_s=3600), remaining=0, reset_s=12.5),
        Quota(policy="user-minute", rate=Rate(limit=2, window_s=60), remaining=0, reset_s=3.0),
    )
    with pytest.raises(RateLimited, match="9 per hour and 2 per minute and user") as refused:
        limits.require(Taken(granted=False, quotas=quotas))
    assert refused.value.retry_after_s == 12.5
    assert headers.rate_limit(quotas) == {
        "RateLimit-Policy": '"second";q=5;w=1, "hour";q=9;w=3600, "user-minute";q=2;w=60',
        "RateLimit": '"second";r=3;t=1, "hour";r=0;t=13, "user-minute";r=0;t=3',
    }
    assert headers.rate_limit(()) == {}


# -- set ---------------------------------------------------------------------------------------


async def test_only_the_owner_sets_and_only_what_exists(memory_broker: Broker) -> None:
    definition = Definition(name="echo", inference_url="/", container_image="i", rate_limit=BOTH)
    version = await functions.create(memory_broker, OWNER, definition)
    assert version.rate_limit == BOTH
    with pytest.raises(NotFound):
        await limits.set_rate_limit(memory_broker, ME, version.function_id, version.id, None)
    with pytest.raises(NotFound):
        await limits.set_rate_limit(memory_broker, OWNER, version.function_id, PLAIN.id, None)
    changed = await limits.set_rate_limit(memory_broker, OWNER, version.function_id, version.id, None)
    assert changed == replace(version, rate_limit=None)


# -- over HTTP ---------------------------------------------------------------------------------


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path, queue_limit=100) as found:
        yield found


async def limited(house: House, **limit: Any) -> None:
    async with house.client.put(LIMIT, json=limit) as response:
        assert (response.status, await response.read()) == (204, b"")


async def shown(house: House) -> Any:
    async with house.client.get(GET) as response:
        return (await response.json())["function"].get("rateLimit")


async def test_a_function_is_created_with_a_rate_limit_and_shows_it(house: House) -> None:
    definition = {"name": "f", "inferenceUrl": "/", "containerImage": "i", "rateLimit": WHOLE}
    async with house.client.post(f"{NVCF}/functions", json=definition) as response:
        assert response.status == 200
        assert (await response.json())["function"]["rateLimit"] == WHOLE


async def test_a_rate_limit_is_replaced_whole_and_cleared(house: House) -> None:
    assert await shown(house) is None
    await limited(house, **WHOLE)
    assert await shown(house) == WHOLE
    await limited(house, rateLimit={"perUserRate": "1-s"})
    assert await shown(house) == {"perUserRate": "1-S"}
    for _ in range(2):
        async with house.client.delete(LIMIT) as response:
            assert response.status == 204
    assert await shown(house) is None


@pytest.mark.parametrize(
    ("limit", "named"),
    [
        ({}, "rateLimit"),
        ({"rateLimit": "fast"}, "rateLimit.rateLimit"),
        ({"rateLimit": 5}, "rateLimit"),
        ({"rateLimit": "1-S", "perNcaIdRate": {"a": "2-S, 3-S"}}, "rateLimit.perNcaIdRate.a"),
        ({"rateLimit": "1-S", "exemptedNcaIds": [str(at) for at in range(33)]}, "exemptedNcaIds"),
    ],
)
async def test_a_bad_rate_limit_is_refused_and_changes_nothing(house: House, limit: Any, named: str) -> None:
    async with house.client.put(LIMIT, json=limit) as response:
        problem = await response.json()
    assert response.status == 400
    assert named in problem["detail"]
    assert await shown(house) is None


async def test_a_rate_limit_is_its_owners_and_needs_the_scope(house: House) -> None:
    async with caller(house, "other") as stranger, stranger.put(LIMIT, json=WHOLE) as response:
        assert response.status == 404
    async with caller(house, "default", "invoke_function") as lacking, lacking.delete(LIMIT) as response:
        assert response.status == 403


async def test_beyond_the_limit_is_429_before_anything_happens(house: House) -> None:
    await limited(house, rateLimit="2-D, 50-H")
    for left in (1, 0):
        status, found, _ = await house.invoke(NOW)
        assert status == 202
        assert found["RateLimit-Policy"] == '"day";q=2;w=86400, "hour";q=50;w=3600'
        assert found["RateLimit"].startswith(f'"day";r={left};t=')
    status, found, body = await house.invoke(NOW)
    problem = json.loads(body)
    assert (status, problem["type"]) == (429, "urn:fnqueue:problem-details:rate-limited")
    assert found["Content-Type"] == "application/problem+json"
    assert "2 per day" in problem["detail"]
    assert DAY - 60 < int(found["Retry-After"]) <= DAY * 1.02
    assert found["RateLimit"].startswith(f'"day";r=0;t={found["Retry-After"]}, "hour";r=48;t=')
    assert "NVCF-REQID" not in found
    assert await house.queued() == 2


async def test_an_unlimited_function_says_nothing_of_limits(house: House) -> None:
    _, found, _ = await house.invoke(NOW)
    assert not {"RateLimit", "RateLimit-Policy"} & set(found)


async def test_a_full_queue_and_a_rate_limit_are_told_apart(tmp_path: Path) -> None:
    async with opened(tmp_path, queue_limit=1) as house:
        await limited(house, rateLimit="2-D")
        assert [(await house.invoke(NOW))[0], (await house.invoke(NOW))[0]] == [202, 429]
        assert slug((await house.invoke(NOW))[2]) == "rate-limited"
        await limited(house, rateLimit="5-D")
        assert slug((await house.invoke(NOW))[2]) == "queue-full"


async def test_what_could_never_run_does_not_count(house: House) -> None:
    await limited(house, rateLimit="1-D")
    assert (await house.invoke(NOW | {"NVCF-POLL-SECONDS": "x"}))[0] == 400
    assert (await house.invoke(NOW))[0] == 202


@pytest.mark.parametrize("_repeat", range(3))
async def test_two_front_ends_grant_exactly_the_limit(house: House, _repeat: int) -> None:
    """Over one store, as replicas are."""
    await limited(house, rateLimit="20-D")
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving(house.broker, _settings(house)))
        second = await stack.enter_async_context(aiohttp.ClientSession(url, headers=house.client.headers))

        async def invoke(client: aiohttp.ClientSession) -> int:
            async with client.post(INVOKE, data=b"{}", headers=NOW) as response:
                return response.status

        statuses = await asyncio.gather(*(invoke(client) for client in (house.client, second) for _ in range(30)))
    assert (statuses.count(202), statuses.count(429)) == (20, 40)
    assert await house.queued() == 20


async def test_a_change_reaches_the_other_front_end_within_a_second(house: House) -> None:
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving(house.broker, _settings(house)))
        second = await stack.enter_async_context(aiohttp.ClientSession(url, headers=house.client.headers))

        async def policy() -> str:
            async with second.post(INVOKE, data=b"{}", headers=NOW) as response:
                return response.headers.get("RateLimit-Policy", "")

        assert await policy() == ""
        await limited(house, rateLimit="1000-S")
        await eventually(policy, lambda seen: seen == '"second";q=1000;w=1', within_s=1.5)


def _settings(house: House) -> Any:
    return house.broker.settings


# -- management calls --------------------------------------------------------------------------


async def statuses_of(client: aiohttp.ClientSession, path: str, count: int) -> list[tuple[int, str, str]]:
    async def get() -> tuple[int, str, str]:
        async with client.get(path) as response:
            return response.status, response.headers.get("Retry-After", ""), await response.text()

    return list(await asyncio.gather(*(get() for _ in range(count))))


async def test_too_many_management_calls_of_an_account_are_told_to_slow_down(tmp_path: Path) -> None:
    async with opened(tmp_path, account_calls_per_s=5, function_calls_per_s=0) as house:
        answers = await statuses_of(house.client, f"{NVCF}/functions", 40)
        refused = [answer for answer in answers if answer[0] != 200]
        assert 5 <= len(answers) - len(refused) < 40
        status, retry_after, text = refused[0]
        problem = json.loads(text)
        assert (status, retry_after in ("1", "2")) == (429, True)
        assert problem["type"] == "urn:nv-boot:problem-details:too-many-requests"
        assert problem["detail"] == "slow down: more than 5 management calls per second for this account"
        async with caller(house, "other") as other, other.get(f"{NVCF}/functions") as response:
            assert response.status == 200


async def test_calls_about_one_function_are_counted_beside(tmp_path: Path) -> None:
    async with opened(tmp_path, account_calls_per_s=0, function_calls_per_s=5) as house:
        answers = await statuses_of(house.client, GET, 40)
        assert {status for status, _, _ in answers} == {200, 429}
        assert {status for status, _, _ in await statuses_of(house.client, f"{NVCF}/functions", 40)} == {200}
        async with caller(house, "other") as stranger, stranger.get(GET) as response:
            assert response.status == 404


async def test_invoking_is_not_at_the_pace_of_management(tmp_path: Path) -> None:
    async with opened(tmp_path, account_calls_per_s=1, queue_limit=100) as house:
        invoked = await asyncio.gather(*(house.invoke(NOW) for _ in range(20)))
        assert {status for status, _, _ in invoked} == {202}
        listed = await statuses_of(house.client, f"{NVCF}/assets", 20)
        assert {status for status, _, _ in listed} == {200}


async def test_an_account_a_function_or_a_version_may_have_a_pace_of_its_own(tmp_path: Path) -> None:
    paces = f"default=0, other = 3, {VERSION.upper()}=4"
    async with opened(tmp_path, account_calls_per_s=1, function_calls_per_s=0, paces=paces) as house:
        assert {status for status, _, _ in await statuses_of(house.client, f"{NVCF}/functions", 40)} == {200}
        _, _, text = next(each for each in await statuses_of(house.client, GET, 40) if each[0] == 429)
        assert json.loads(text)["detail"] == "slow down: more than 4 management calls per second for this function"
        async with caller(house, "other") as other:
            assert {status for status, _, _ in await statuses_of(other, f"{NVCF}/functions", 3)} == {200}


@pytest.mark.parametrize("paces", ["acme", "acme=", "=5", "acme=many", "acme=-1"])
def test_a_pace_that_cannot_be_read_says_so(paces: str) -> None:
    with pytest.raises(ConfigurationError, match="FNQUEUE_PACES"):
        Pace(ApiSettings(paces=paces))


async def test_who_acts_for_an_account_keeps_that_accounts_pace(tmp_path: Path) -> None:
    async with opened(tmp_path, account_calls_per_s=0, function_calls_per_s=0, paces="partner=2") as house:
        assert {status for status, _, _ in await statuses_of(house.client, f"{NVCF}/functions", 20)} == {200}
        mirrored = await statuses_of(house.client, f"{NVCF}/accounts/partner/functions", 20)
        assert {status for status, _, _ in mirrored} == {200, 429}


async def test_zero_is_no_limit(tmp_path: Path) -> None:
    async with opened(tmp_path, account_calls_per_s=0, function_calls_per_s=0) as house:
        assert {status for status, _, _ in await statuses_of(house.client, GET, 300)} == {200}
