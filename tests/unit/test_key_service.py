"""Keys and accounts over HTTP: shapes, limits, and what nobody may give or see."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yarl

from broker.accounts import ACCOUNT_SCOPES, SCOPES, create_key
from tests.unit.test_server import FUNCTION, KEY, NVCF, VERSION, House, opened
from tests.unit.test_tenants import ask, look, session

KEYS = "/v1/keys"
ACCOUNTS = f"{NVCF}/accounts"
EVERYTHING = [{"id": "*", "type": "account-functions"}, {"id": "*", "type": "authorized-functions"}]


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path, keys_per_owner=2, max_functions=1) as found:
        yield found


def wish(*scopes: str, **given: Any) -> dict[str, Any]:
    policy = {"aud": "s", "auds": ["s"], "product": "nv-cloud-functions", "scopes": list(scopes or ["list_functions"])}
    resources = {} if given.get("resources") is None else {"resources": given["resources"]}
    others = {name: value for name, value in given.items() if name != "resources"}
    return {"description": "a key", "authorizations": {"policies": [policy | resources]}, **others}


def within(days: float) -> str:
    return (datetime.now(UTC) + timedelta(days=days)).isoformat()


async def made(client: aiohttp.ClientSession, body: Any) -> Any:
    status, _, answer = await ask(client, "POST", KEYS, body)
    assert status == 200, answer
    return json.loads(answer)


async def refused(client: aiohttp.ClientSession, body: Any) -> int:
    return (await ask(client, "POST", KEYS, body))[0]


async def works(house: House, token: str) -> int:
    async with aiohttp.ClientSession(house.url, headers={"Authorization": f"Bearer {token}"}) as client:
        return (await ask(client, "GET", f"{NVCF}/functions"))[0]


# -- keys --------------------------------------------------------------------------------------


async def test_a_key_is_shown_once_and_works(house: House) -> None:
    key = await made(house.client, wish(resources=EVERYTHING, expires_at=within(1), audience_service_ids=["s"]))
    assert key["value"].startswith("nvapi-")
    assert await works(house, key["value"]) == 200
    shown = await look(house.client, f"{KEYS}/{key['id']}")
    assert shown == {name: value for name, value in key.items() if name != "value"}
    assert shown["hint"].endswith(key["value"][-3:])
    assert (shown["status"], shown["owner_type"], shown["owner_id"]) == ("ACTIVE", "USER", "default")
    assert shown["audience_service_ids"] == ["s"]
    [policy] = shown["authorizations"]["policies"]
    assert (policy["scopes"], policy["resources"]) == (["list_functions"], EVERYTHING)
    [listed] = (await look(house.client, KEYS))["keys"]
    assert "authorizations" not in listed
    assert key["value"] not in json.dumps([shown, listed])


@pytest.mark.parametrize(
    "body",
    [
        {},
        wish(expires_at=within(-1)),
        wish(expires_at=within(366)),
        wish(expires_at="soon"),
        wish("fly"),
        wish(description="no/slash"),
        wish(description="x" * 65),
        wish(resources=[{"id": "*", "type": "function"}]),
        wish(resources=[{"id": f"{FUNCTION}/x", "type": "function"}]),
        {"authorizations": {"policies": []}},
        {"authorizations": {"policies": [{"scopes": []}]}},
        {"authorizations": {"policies": [{"scopes": ["list_functions"]}] * 2}},
        wish(resources=[{"id": f"{FUNCTION}/{VERSION}", "type": "function"}] * 30),
    ],
)
async def test_bad_wishes_are_400_and_make_no_key(house: House, body: Any) -> None:
    assert await refused(house.client, body) == 400
    assert (await look(house.client, KEYS))["keys"] == []


async def test_an_owner_may_have_so_many_valid_keys(house: House) -> None:
    first = await made(house.client, wish())
    await made(house.client, wish())
    assert await refused(house.client, wish()) == 400
    assert len((await look(house.client, KEYS))["keys"]) == 2
    async with house.client.post(KEYS, json=wish(), headers={"Key-Owner-Id": "else@where"}) as other:
        assert (other.status, (await other.json())["owner_id"]) == (200, "else@where")
    assert (await ask(house.client, "DELETE", f"{KEYS}/{first['id']}"))[0] == 204
    await made(house.client, wish())


async def test_rights_are_replaced_and_not_in_a_hurry(house: House) -> None:
    key = await made(house.client, wish())
    at = f"{KEYS}/{key['id']}/authorizations"
    status, _, body = await ask(house.client, "PUT", at, wish("queue_details", resources=[]))
    assert status == 200
    assert json.loads(body)["authorizations"]["policies"][0]["scopes"] == ["queue_details"]
    assert json.loads(body)["authorizations"]["policies"][0]["resources"] == []
    assert await works(house, key["value"]) == 403
    status, told, _ = await ask(house.client, "PUT", at, wish())
    assert (status, told["Retry-After"]) == (429, "3")


async def test_a_suspended_key_is_refused_until_it_is_activated(house: House) -> None:
    key = await made(house.client, wish())
    at = f"{KEYS}/{key['id']}/status"
    assert (await ask(house.client, "PUT", at, {"status": "suspended"}))[0] == 200
    assert (await look(house.client, f"{KEYS}/{key['id']}"))["status"] == "SUSPENDED"
    assert await works(house, key["value"]) == 401
    assert (await ask(house.client, "PUT", at, {"status": "EXPIRED"}))[0] == 400
    assert (await ask(house.client, "PUT", at, {"status": "ACTIVE"}))[0] == 200


async def test_nobody_gives_a_right_that_he_lacks(house: House) -> None:
    one = f"function/{FUNCTION}/{VERSION}"
    async with session(house, "acme", "manage_keys", "list_functions", resources=(one,)) as client:
        mine = [{"id": f"{FUNCTION}/{VERSION}", "type": "function"}]
        assert await refused(client, wish("list_functions", resources=mine)) == 200
        assert await refused(client, wish("list_functions", resources=EVERYTHING)) == 403
        assert await refused(client, wish("list_functions")) == 403
        assert await refused(client, wish("delete_function", resources=mine)) == 403
        assert await refused(client, wish("admin:list_functions", resources=mine)) == 403
        assert await refused(client, wish("list_functions", resources=mine, nca_id="default")) == 403
    async with session(house, "acme") as client:
        assert await refused(client, wish("list_functions")) == 403


async def test_a_weak_manager_cannot_bring_a_strong_key_back(house: House) -> None:
    _, strong = await create_key(house.broker, account="acme", scopes=["account_setup"])
    async with session(house, "acme", "manage_keys") as client:
        at = f"{KEYS}/{strong.id}/status"
        assert (await ask(client, "PUT", at, {"status": "SUSPENDED"}))[0] == 200
        assert (await ask(client, "PUT", at, {"status": "ACTIVE"}))[0] == 403


async def test_an_operator_makes_another_accounts_first_key(house: House) -> None:
    key = await made(house.client, wish("list_functions", "manage_keys", nca_id="acme"))
    assert key["nca_id"] == "acme"
    assert [k["id"] for k in (await look(house.client, f"{KEYS}?nca_id=acme"))["keys"]] == [key["id"]]
    assert (await look(house.client, KEYS))["keys"] == []


async def test_a_valid_key_can_be_looked_into_by_its_account(house: House) -> None:
    key = await made(house.client, wish(nca_id="acme"))
    status, _, body = await ask(house.client, "POST", "/v1/introspect", {"key": key["value"]})
    assert (status, json.loads(body)["key_id"], json.loads(body)["nca_id"]) == (200, key["id"], "acme")
    async with session(house, "other", "manage_keys") as stranger:
        foreign = await ask(stranger, "POST", "/v1/introspect", {"key": key["value"]})
        random = await ask(stranger, "POST", "/v1/introspect", {"key": "nvapi-x"})
    assert (foreign[0], foreign[2]) == (404, random[2])
    await ask(house.client, "PUT", f"{KEYS}/{key['id']}/status", {"status": "SUSPENDED"})
    assert (await ask(house.client, "POST", "/v1/introspect", {"key": key["value"]}))[0] == 404


async def test_ngcs_clients_learn_the_org_of_a_key(house: House) -> None:
    token, key = await create_key(house.broker, account="acme")
    async with aiohttp.ClientSession(house.url) as anybody:
        async with anybody.post("/v3/keys/get-caller-info", data={"credentials": token}) as response:
            assert response.status == 200
            told = await response.json()
        assert (told["type"], told["orgName"], told["keyId"]) == ("SERVICE_KEY", "acme", key.id)
        assert told["products"] == ["nv-cloud-functions"]
        for form in ({"credentials": "nvapi-wrong"}, {}, {str(n): "x" for n in range(99)}):
            async with anybody.post("/v3/keys/get-caller-info", data=form) as response:
                assert response.status == (400 if len(form) > 16 else 401)


# -- accounts ----------------------------------------------------------------------------------


async def test_an_account_is_made_read_changed_and_deleted(house: House) -> None:
    asked = {"name": "acme-corp", "maxFunctionsAllowed": 7, "adminClientId": "c"}
    status, _, body = await ask(house.client, "POST", f"{ACCOUNTS}/acme", asked)
    account = json.loads(body)["account"]
    assert (status, account["ncaId"], account["name"], account["maxFunctionsAllowed"]) == (200, "acme", "acme-corp", 7)
    shown = (await look(house.client, f"{ACCOUNTS}/acme"))["account"]
    assert (shown["currentNumberFunctions"], shown["maxTelemetriesAllowed"], shown["clientIds"]) == (0, 25, ["c"])
    assert [each["ncaId"] for each in (await look(house.client, ACCOUNTS))["cloudAccounts"]] == ["acme"]
    status, _, body = await ask(house.client, "PATCH", f"{ACCOUNTS}/acme", {"maxTelemetriesAllowed": 50})
    assert (status, json.loads(body)["account"]["maxTelemetriesAllowed"]) == (200, 50)
    assert json.loads(body)["account"]["maxFunctionsAllowed"] == 7
    token, _ = await create_key(house.broker, account="acme")
    assert (await ask(house.client, "DELETE", f"{ACCOUNTS}/acme"))[0] == 204
    assert await works(house, token) == 401
    assert (await ask(house.client, "DELETE", f"{ACCOUNTS}/acme"))[0] == 404
    assert (await ask(house.client, "GET", f"{ACCOUNTS}/acme"))[0] == 404


@pytest.mark.parametrize("again", [("acme", {"name": "acme-corp"}), ("other", {"name": "other", "adminClientId": "c"})])
async def test_an_account_and_a_client_are_there_once(house: House, again: tuple[str, Any]) -> None:
    await ask(house.client, "POST", f"{ACCOUNTS}/acme", {"name": "acme-corp", "adminClientId": "c"})
    assert (await ask(house.client, "POST", f"{ACCOUNTS}/{again[0]}", again[1]))[0] == 409


@pytest.mark.parametrize(
    ("account", "body"),
    [
        ("acme", {}),
        ("acme", {"name": "abc"}),
        ("acme", {"name": "-acme"}),
        ("acme", {"name": "acme-corp", "maxFunctionsAllowed": -1}),
        ("acme", {"name": "acme-corp", "maxTelemetriesAllowed": 26}),
        ("acme", {"name": "acme-corp", "maxRegistryCredentialsAllowed": 26}),
        ("-acme", {"name": "acme-corp"}),
    ],
)
async def test_bad_accounts_are_400(house: House, account: str, body: Any) -> None:
    assert (await ask(house.client, "POST", f"{ACCOUNTS}/{account}", body))[0] == 400


@pytest.mark.parametrize(
    "body", [{}, {"maxFunctionsAllowed": None}, {"maxFunctionsAllowed": -1}, {"maxTelemetriesAllowed": 51}]
)
async def test_bad_changes_of_an_account_are_400(house: House, body: Any) -> None:
    await ask(house.client, "POST", f"{ACCOUNTS}/acme", {"name": "acme-corp"})
    assert (await ask(house.client, "PATCH", f"{ACCOUNTS}/acme", body))[0] == 400


async def test_an_account_with_functions_or_given_ones_stays(house: House) -> None:
    await ask(house.client, "POST", f"{ACCOUNTS}/default", {"name": "default"})
    assert (await ask(house.client, "DELETE", f"{ACCOUNTS}/default"))[0] == 400
    await ask(house.client, "POST", f"{ACCOUNTS}/acme", {"name": "acme-corp"})
    shared = f"{NVCF}/authorizations/functions/{FUNCTION}"
    assert (await ask(house.client, "POST", shared, {"authorizedParties": [{"ncaId": "acme"}]}))[0] == 200
    assert (await ask(house.client, "DELETE", f"{ACCOUNTS}/acme"))[0] == 400
    await ask(house.client, "DELETE", shared)
    assert (await ask(house.client, "DELETE", f"{ACCOUNTS}/acme"))[0] == 204


async def test_the_quota_counts_versions_and_stops_new_functions_only(house: House) -> None:
    definition = {"name": "echo", "inferenceUrl": "/", "containerImage": "i"}
    assert (await ask(house.client, "POST", f"{NVCF}/functions", definition))[0] == 400
    assert (await ask(house.client, "POST", f"{NVCF}/functions/{FUNCTION}/versions", definition))[0] == 200
    shown = (await look(house.client, f"{ACCOUNTS}/default"))["account"]
    assert (shown["maxFunctionsAllowed"], shown["currentNumberFunctions"]) == (1, 2)
    await ask(house.client, "POST", f"{ACCOUNTS}/default", {"name": "default", "maxFunctionsAllowed": 3})
    assert (await ask(house.client, "POST", f"{NVCF}/functions", definition))[0] == 200
    assert (await ask(house.client, "POST", f"{NVCF}/functions", definition))[0] == 400


async def test_account_setup_is_for_ones_own_account_and_admin_for_all(house: House) -> None:
    await ask(house.client, "POST", f"{ACCOUNTS}/other", {"name": "other"})
    async with session(house, "acme", "account_setup") as own:
        assert (await ask(own, "POST", f"{ACCOUNTS}/acme", {"name": "acme-corp"}))[0] == 200
        assert [each["ncaId"] for each in (await look(own, ACCOUNTS))["cloudAccounts"]] == ["acme"]
        for method, body in (("GET", None), ("PATCH", {"name": "mine"}), ("DELETE", None)):
            assert (await ask(own, method, f"{ACCOUNTS}/other", body))[0] == 403
    async with session(house, "acme", "admin:list_accounts") as reader:
        assert len((await look(reader, ACCOUNTS))["cloudAccounts"]) == 2
        assert (await ask(reader, "GET", f"{ACCOUNTS}/other"))[0] == 200
        assert (await ask(reader, "PATCH", f"{ACCOUNTS}/other", {"name": "mine"}))[0] == 403


async def test_no_key_gets_an_operators_scopes_unasked(house: House) -> None:
    _, key = await create_key(house.broker, account="acme")
    assert set(key.scopes) == set(ACCOUNT_SCOPES)
    assert not any(scope.startswith("admin:") or scope == "account_setup" for scope in key.scopes)
    assert set(ACCOUNT_SCOPES) < set(SCOPES)


async def test_the_new_routes_ask_for_a_credential_and_a_scope(house: House) -> None:
    paths = [
        ("POST", KEYS), ("GET", KEYS), ("GET", f"{KEYS}/{FUNCTION}"), ("DELETE", f"{KEYS}/{FUNCTION}"),
        ("PUT", f"{KEYS}/{FUNCTION}/status"), ("PUT", f"{KEYS}/{FUNCTION}/authorizations"), ("POST", "/v1/introspect"),
        ("GET", ACCOUNTS), ("POST", f"{ACCOUNTS}/acme"), ("GET", f"{ACCOUNTS}/acme"), ("PATCH", f"{ACCOUNTS}/acme"),
        ("DELETE", f"{ACCOUNTS}/acme"), ("GET", f"{ACCOUNTS}/acme/functions"),
        ("GET", f"{NVCF}/authorizations/functions/{FUNCTION}"),
    ]  # fmt: skip
    async with aiohttp.ClientSession(house.url) as nobody, session(house, "acme", "invoke_function") as somebody:
        for method, path in paths:
            assert (await ask(nobody, method, path))[0] == 401, (method, path)
            assert (await ask(somebody, method, path))[0] == 403, (method, path)


async def test_names_that_no_account_can_have_are_400(house: House) -> None:
    for name in ("%ff", "%00", "a%2Fb", "%ED%A0%80", "x" * 65, "*"):
        for method, path in (
            ("GET", f"{ACCOUNTS}/{name}"),
            ("DELETE", f"{ACCOUNTS}/{name}"),
            ("GET", f"{ACCOUNTS}/{name}/functions"),
            ("GET", f"{KEYS}?nca_id={name}"),
        ):
            async with house.client.request(method, yarl.URL(house.url + path, encoded=True)) as response:
                assert response.status == 400, (method, path)
    assert (await ask(house.client, "GET", f"{KEYS}?nca_id="))[0] == 400
    for body in (wish(nca_id="*"), wish(expires_at="0001-01-01T00:00:00+14:00"), wish(expires_at=9e99)):
        assert await refused(house.client, body) == 400
    share = f"{NVCF}/authorizations/functions/{FUNCTION}"
    for raw in (b'{"authorizedParties":[{"ncaId":"\\ud800"}]}', b'{"authorizedParties":[{"ncaId":"\xff"}]}'):
        async with house.client.post(share, data=raw) as response:
            assert response.status == 400


async def test_no_rejected_key_is_echoed(house: House) -> None:
    for path, body in ((KEYS, {"key": KEY, "authorizations": KEY}), ("/v1/introspect", {"key": KEY * 99})):
        _, _, answer = await ask(house.client, "POST", path, body)
        assert KEY.encode() not in answer
