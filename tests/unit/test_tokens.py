"""Delegated invocation tokens: what they are good for, and what ends them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from broker import accounts, authorizations, tokens
from broker.accounts import ACCOUNT_SCOPES, Authenticator, create_key
from broker.errors import Unauthenticated
from broker.limits import windows
from broker.model import ALL_RESOURCES, FunctionStatus, Principal, Rate, RateLimit
from broker.ports import Broker
from broker.tokens import Delegation
from tests.unit.test_server import FUNCTION, INVOKE, KEY, NOBODYS, NOW, NVCF, VERSION, House, opened
from tests.unit.test_tenants import ask, look

SECRET = b"s" * 32
SAID = Delegation(parent="p" * 64, client_id="c", functions=("function/f/*",), expires_at=4.5)
TOKENS = f"{NVCF}/tokens/functions"
OF_FUNCTION = f"{TOKENS}/{FUNCTION}"
OF_VERSION = f"{OF_FUNCTION}/versions/{VERSION}"
CLIENT = {"clientId": "a client"}
OTHER = "9b0e7d5e-5a0b-4a57-8a86-0d6d9d8a55aa"
OTHER_VERSION = "f8a8b2f1-4a3b-4b0c-b7a4-9d1c3f0e2a11"


# -- the text ----------------------------------------------------------------------------------


def test_a_token_says_what_was_signed() -> None:
    assert tokens.verify(SECRET, tokens.sign(SECRET, SAID)) == SAID


def test_a_token_that_was_changed_anywhere_is_none() -> None:
    token = tokens.sign(SECRET, SAID)
    for place, character in enumerate(token):
        other = "A" if character != "A" else "B"
        assert tokens.verify(SECRET, token[:place] + other + token[place + 1 :]) is None
    for wrong in ("", tokens.PREFIX, token[:-1], f"{token}=", f"{token}.", token.replace(tokens.PREFIX, "nvapi-t2.")):
        assert tokens.verify(SECRET, wrong) is None


def test_another_secret_knows_no_token_of_ours() -> None:
    assert tokens.verify(b"t" * 32, tokens.sign(SECRET, SAID)) is None


# -- what it is good for -----------------------------------------------------------------------


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path) as found:
        yield found


@asynccontextmanager
async def bearing(house: House, token: str) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(house.url, headers={"Authorization": f"Bearer {token}"} | NOW) as client:
        yield client


async def mint(client: aiohttp.ClientSession, path: str = OF_FUNCTION, body: Any = None) -> str:
    status, _, answer = await ask(client, "POST", path, body or CLIENT)
    assert status == 200, answer
    return str(json.loads(answer)["access_token"])


async def invoking(house: House, token: str, path: str = INVOKE) -> int:
    async with bearing(house, token) as client:
        return (await ask(client, "POST", path, {}))[0]


async def another_function(house: House, account: str = "default") -> None:
    [row] = await house.broker.catalog.versions.list("function_id", FUNCTION)
    other = replace(row.item, id=OTHER_VERSION, function_id=OTHER, account=account, status=FunctionStatus.ACTIVE)
    await house.broker.queue.declare(OTHER_VERSION)
    await house.broker.catalog.versions.put(other)


async def test_a_token_is_told_with_its_life_and_invokes_in_its_clients_name(house: House) -> None:
    status, _, answer = await ask(house.client, "POST", OF_FUNCTION, CLIENT)
    told = json.loads(answer)
    assert (status, sorted(told), told["expires_in"]) == (200, ["access_token", "expires_in"], 3600)
    async with bearing(house, told["access_token"]) as client:
        status, headers, _ = await ask(client, "POST", INVOKE, {})
        assert status == 202
        assert (await house.finish()).subject == "admin/a client"
        polled = await ask(client, "GET", f"{NVCF}/pexec/status/{headers['NVCF-REQID']}")
        assert (polled[0], polled[2]) == (200, b"done")
        _, headers, _ = await ask(client, "POST", INVOKE, {})
        assert (await ask(client, "DELETE", f"{NVCF}/requests/{headers['NVCF-REQID']}"))[0] == 202


@pytest.mark.parametrize("path", [OF_FUNCTION, OF_VERSION, f"/v2/orgs/default/nvcf/tokens/functions/{FUNCTION}"])
async def test_other_functions_and_their_requests_are_not_in_a_token(house: House, path: str) -> None:
    await another_function(house)
    token = await mint(house.client, path)
    assert await invoking(house, token) == 202
    elsewhere = f"{NVCF}/pexec/functions/{OTHER}"
    assert await invoking(house, token, elsewhere) == 403
    async with bearing(house, KEY) as admin, bearing(house, token) as client:
        _, headers, _ = await ask(admin, "POST", elsewhere, {})
        assert (await ask(client, "GET", f"{NVCF}/pexec/status/{headers['NVCF-REQID']}"))[0] == 403
        assert (await ask(client, "DELETE", f"{NVCF}/requests/{headers['NVCF-REQID']}"))[0] == 403
        assert (await ask(client, "POST", f"{NVCF}/pexec/functions/{NOBODYS}", {}))[0] == 404


async def test_a_token_for_one_version_is_not_good_for_its_siblings(house: House) -> None:
    token = await mint(house.client, OF_VERSION)
    [row] = await house.broker.catalog.versions.list("function_id", FUNCTION)
    await house.broker.catalog.versions.put(replace(row.item, id=OTHER_VERSION))
    assert await invoking(house, token, f"{INVOKE}/versions/{OTHER_VERSION}") == 403
    assert [await invoking(house, token) for _ in range(4)] == [202] * 4


async def test_a_token_may_name_several_functions(house: House) -> None:
    await another_function(house)
    named = [{"functionId": FUNCTION, "functionVersionId": VERSION}, {"functionId": OTHER.upper()}]
    token = await mint(house.client, TOKENS, {"functions": named, **CLIENT})
    assert await invoking(house, token) == 202
    assert await invoking(house, token, f"{NVCF}/pexec/functions/{OTHER}") == 202


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (OF_FUNCTION, {}, 400),
        (OF_FUNCTION, {"clientId": ""}, 400),
        (OF_FUNCTION, {"clientId": " "}, 400),
        (OF_FUNCTION, {"clientId": "a\r\nX: y"}, 400),
        (OF_FUNCTION, {"clientId": "\u00e9"}, 400),
        (OF_FUNCTION, {"clientId": "c" * 129}, 400),
        (TOKENS, CLIENT, 400),
        (TOKENS, {"functions": [], **CLIENT}, 400),
        (TOKENS, {"functions": [{"functionId": "f"}], **CLIENT}, 400),
        (TOKENS, {"functions": [{"functionId": FUNCTION}] * 5, **CLIENT}, 400),
        (TOKENS, {"functions": [{"functionId": FUNCTION}, {"functionId": NOBODYS}], **CLIENT}, 404),
        (TOKENS, {"functions": [{"functionId": FUNCTION, "functionVersionId": NOBODYS}], **CLIENT}, 404),
        (f"{TOKENS}/f", CLIENT, 400),
        (f"{TOKENS}/{NOBODYS}", CLIENT, 404),
        (f"{OF_FUNCTION}/versions/{NOBODYS}", CLIENT, 404),
    ],
)
async def test_what_cannot_be_delegated_is_refused(house: House, path: str, body: Any, status: int) -> None:
    assert (await ask(house.client, "POST", path, body))[0] == status


async def test_who_may_not_invoke_it_cannot_delegate_it(house: House) -> None:
    for account, scopes, resources, status in (
        ("default", ["queue_details"], ALL_RESOURCES, 403),
        ("default", ["invoke_function"], [f"function/{NOBODYS}/*"], 403),
        ("stranger", ["invoke_function"], ALL_RESOURCES, 404),
    ):
        key, _ = await create_key(house.broker, account=account, scopes=scopes, resources=resources)
        async with bearing(house, key) as client:
            assert (await ask(client, "POST", OF_FUNCTION, CLIENT))[0] == status


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", OF_FUNCTION, CLIENT),
        ("GET", f"{NVCF}/assets", None),
        ("POST", f"{NVCF}/assets", {"contentType": "text/plain", "description": "d"}),
        ("GET", f"{NVCF}/functions", None),
        ("GET", f"{NVCF}/queues/functions/{FUNCTION}", None),
        ("DELETE", f"{NVCF}/functions/{FUNCTION}/versions/{VERSION}", None),
        ("GET", f"{NVCF}/accounts/default", None),
        ("GET", f"{NVCF}/accounts/default/functions", None),
        ("GET", "/v1/keys", None),
        ("POST", "/v3/keys/get-caller-info", None),
    ],
)
async def test_a_token_of_the_admin_is_for_nothing_else(house: House, method: str, path: str, body: Any) -> None:
    async with bearing(house, await mint(house.client)) as client:
        assert (await ask(client, method, path, body))[0] == 403


async def test_a_token_is_no_key_to_be_looked_at(house: House) -> None:
    token = await mint(house.client)
    assert (await ask(house.client, "POST", "/v1/introspect", {"key": token}))[0] in (400, 404)


async def test_nobody_logs_a_token(house: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    token = await mint(house.client)
    await invoking(house, token)
    await invoking(house, token[:-1])
    assert token.rpartition(".")[2] not in caplog.text + repr([record.__dict__ for record in caplog.records])


async def test_each_client_is_a_user_of_its_own_to_rate_limits(house: House) -> None:
    authenticator = Authenticator(house.broker, admin_key=KEY)
    [row] = await house.broker.catalog.versions.list("function_id", FUNCTION)
    limited = replace(row.item, rate_limit=RateLimit(per_user=(Rate(limit=1, window_s=1),)))
    counters = set()
    for name in ("a", "b"):
        token, _ = await authenticator.delegate(KEY, client_id=name, functions=["function/f/*"], ttl_s=60)
        [window] = windows(await authenticator.authenticate(token), limited)
        counters.add(window.counter)
    assert len(counters) == 2


# -- what ends it --------------------------------------------------------------------------------


async def delegated(broker: Broker, **key: Any) -> tuple[str, float]:
    parent, _ = await create_key(broker, account="acme", **key)
    return await Authenticator(broker).delegate(parent, client_id="c", functions=["function/f/*"], ttl_s=60)


async def test_a_token_has_no_more_rights_than_its_parent_has_now(memory_broker: Broker) -> None:
    parent, key = await create_key(memory_broker, account="acme", scopes=ACCOUNT_SCOPES)
    token, _ = await Authenticator(memory_broker).delegate(parent, client_id="c", functions=["function/f/*"], ttl_s=60)
    principal = await Authenticator(memory_broker).authenticate(token)
    assert (principal.account, principal.subject) == ("acme", f"{key.id}/c")
    assert principal.scopes == {"invoke_function"}
    await accounts.authorize_key(memory_broker, key, scopes=["queue_details"], resources=[])
    principal = await Authenticator(memory_broker).authenticate(token)
    assert (principal.scopes, principal.resources) == (frozenset(), frozenset())


async def test_a_token_ends_with_its_time(memory_broker: Broker) -> None:
    parent, _ = await create_key(memory_broker, account="acme")
    authenticator = Authenticator(memory_broker)
    token, _ = await authenticator.delegate(parent, client_id="c", functions=["function/f/*"], ttl_s=-0.001)
    with pytest.raises(Unauthenticated):
        await authenticator.authenticate(token)


async def test_a_token_does_not_promise_to_outlive_its_parent(memory_broker: Broker) -> None:
    _, lives_s = await delegated(memory_broker, expires_at=time.time() + 10)
    assert 9 < lives_s <= 10


async def test_a_suspended_or_deleted_parent_ends_a_token(memory_broker: Broker) -> None:
    token, _ = await delegated(memory_broker)
    [key] = await accounts.list_keys(memory_broker, "acme")
    await accounts.suspend_key(memory_broker, key.id, suspended=True)
    with pytest.raises(Unauthenticated):
        await Authenticator(memory_broker).authenticate(token)
    await accounts.suspend_key(memory_broker, key.id, suspended=False)
    assert (await Authenticator(memory_broker).authenticate(token)).account == "acme"
    await accounts.delete_key(memory_broker, key.id)
    with pytest.raises(Unauthenticated):
        await Authenticator(memory_broker).authenticate(token)


async def test_another_admin_key_ends_the_tokens_of_the_last(memory_broker: Broker) -> None:
    first, later = (Authenticator(memory_broker, admin_key=key) for key in ("one", "two"))
    token, _ = await first.delegate("one", client_id="c", functions=["function/f/*"], ttl_s=60)
    assert (await first.authenticate(token)).subject == "admin/c"
    assert accounts.hash_token("one") not in repr(tokens.verify(secret_of(memory_broker), token))
    for authenticator in (later, Authenticator(memory_broker)):
        with pytest.raises(Unauthenticated):
            await authenticator.authenticate(token)


async def test_a_shared_function_is_lost_with_its_sharing(house: House) -> None:
    owner = Principal(account="default", subject="o", scopes=frozenset())
    key, _ = await create_key(house.broker, account="partner", scopes=["invoke_function"])
    await authorizations.replace_all(house.broker, owner, FUNCTION, "", ["partner"])
    async with bearing(house, key) as partner:
        token = await mint(partner)
    assert await invoking(house, token) == 202
    async with house.client.delete(f"{NVCF}/authorizations/functions/{FUNCTION}") as ended:
        assert ended.status == 200
    assert await invoking(house, token) == 404


async def test_a_key_for_its_own_functions_delegates_no_others(house: House) -> None:
    """Also when the function, once named, is another's."""
    key, _ = await create_key(
        house.broker, account="partner", scopes=["invoke_function"], resources=["account-functions/*"]
    )
    owner = Principal(account="default", subject="o", scopes=frozenset())
    await authorizations.replace_all(house.broker, owner, FUNCTION, "", ["partner"])
    async with bearing(house, key) as partner:
        assert (await ask(partner, "POST", OF_FUNCTION, CLIENT))[0] == 403
    token, _ = await Authenticator(house.broker).delegate(
        key, client_id="c", functions=[f"function/{FUNCTION}/*"], ttl_s=60
    )
    assert await invoking(house, token) == 403


def secret_of(broker: Broker) -> bytes:
    return broker.settings.secret_key.get_secret_value().encode()


async def test_the_page_names_the_routes(house: House) -> None:
    paths = (await look(house.client, f"{NVCF}/openapi.json"))["paths"]
    assert {TOKENS, f"{TOKENS}/{{functionId}}", f"{TOKENS}/{{functionId}}/versions/{{versionId}}"} <= paths.keys()
