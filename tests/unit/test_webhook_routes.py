"""The routes of webhooks, and what invocations say about them, over real HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import SecretStr

from broker.accounts import ACCOUNT_SCOPES, create_key
from broker.model import Callback, DeliveryState, Principal, RequestState, WebhookTry
from broker.webhooks import create_secret
from tests.unit.test_server import FUNCTION, INVOKE, NOBODYS, NOW, NVCF, VERSION, House, opened

URL = "https://hooks.example/in?token=abc"
AT = f"{NVCF}/webhooks"
DEFAULT = f"{NVCF}/functions/{FUNCTION}/webhook"
ME = Principal(account="default", subject="me", scopes=frozenset())


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with opened(tmp_path, encryption_keys=SecretStr(f"k:{'1a' * 32}"), public_url="https://q.example") as made:
        yield made


@pytest.fixture
async def secret(house: House) -> str:
    return (await create_secret(house.broker, ME))[1]


async def ask(client: aiohttp.ClientSession, method: str, path: str, data: Any = None) -> tuple[int, Any]:
    async with client.request(method, path, json=data) as response:
        body = await response.read()
        return response.status, json.loads(body) if body else None


async def accepted(house: House, headers: Mapping[str, str] | None = None) -> str:
    status, told, body = await house.invoke({**NOW, **(headers or {})})
    assert status == 202, body
    return str(told["NVCF-REQID"])


async def ended(house: House, headers: Mapping[str, str] | None = None) -> str:
    """A request that ended, with its delivery taken by nobody."""
    request_id = await accepted(house, {"NVCF-CALLBACK-URL": URL} if headers is None else headers)
    await house.finish()
    return request_id


async def callback_of(house: House, request_id: str) -> Callback | None:
    delivery = await house.broker.webhooks.read(request_id)
    return delivery.callback if delivery else None


# -- invocations -------------------------------------------------------------------------------


async def test_an_invocation_says_where_its_end_is_told_and_the_container_is_not_told(
    house: House, secret: str
) -> None:
    asked = {"NVCF-CALLBACK-URL": URL, "NVCF-CALLBACK-EVENTS": "Fulfilled, dead"}
    request_id = await accepted(house, asked)
    job = await house.finish()
    assert job.callback == Callback(url=URL, events=("fulfilled", "dead"))
    assert not [name for name, _ in job.headers if "callback" in name.lower()]
    assert await callback_of(house, request_id) == job.callback


async def test_an_invocation_without_one_tells_nobody_and_carries_nothing(house: House) -> None:
    request_id = await accepted(house)
    assert (await house.finish()).callback is None
    assert await house.broker.webhooks.read(request_id) is None


@pytest.mark.parametrize(
    "headers",
    [
        {"NVCF-CALLBACK-URL": ""},
        {"NVCF-CALLBACK-URL": "not a url"},
        {"NVCF-CALLBACK-URL": "http://hooks.example/"},
        {"NVCF-CALLBACK-URL": "https://user:hunter2@hooks.example/"},
        {"NVCF-CALLBACK-URL": "https://127.0.0.1/"},
        {"NVCF-CALLBACK-URL": "https://169.254.169.254/"},
        {"NVCF-CALLBACK-URL": "https://hooks.example:6379/"},
        {"NVCF-CALLBACK-URL": f"https://hooks.example/{'x' * 2048}"},
        {"NVCF-CALLBACK-URL": URL, "NVCF-CALLBACK-EVENTS": "queued"},
        {"NVCF-CALLBACK-EVENTS": "dead"},
    ],
    ids=lambda headers: " ".join(headers.values())[:40],
)
async def test_a_callback_that_can_never_be_told_is_refused_before_anything_runs(
    house: House, secret: str, headers: Mapping[str, str]
) -> None:
    status, _, body = await house.invoke({**NOW, **headers})
    assert status == 400
    assert b"hunter2" not in body
    assert await house.queued() == 0


async def test_several_callbacks_are_refused(house: House, secret: str) -> None:
    twice = [*NOW.items(), ("NVCF-CALLBACK-URL", URL), ("NVCF-CALLBACK-URL", URL)]
    async with house.client.post(INVOKE, data=b"{}", headers=twice) as response:
        assert response.status == 400


async def test_without_a_secret_to_sign_with_a_callback_is_refused_with_what_to_do(house: House) -> None:
    status, _, body = await house.invoke({**NOW, "NVCF-CALLBACK-URL": URL})
    assert status == 400
    assert b"fnqueue webhooks secrets create" in body


async def test_a_request_is_told_where_its_function_says_unless_it_says_otherwise(house: House, secret: str) -> None:
    status, told = await ask(house.client, "PUT", DEFAULT, {"url": URL, "events": ["errored", "fulfilled"]})
    assert (status, told) == (200, {"functionId": FUNCTION, "url": URL, "events": ["errored", "fulfilled"]})
    default = Callback(url=URL, events=("errored", "fulfilled"))
    assert await callback_of(house, await ended(house, {})) == default
    other = "https://other.example/"
    assert await callback_of(house, await ended(house, {"NVCF-CALLBACK-URL": other})) == Callback(url=other)
    assert await callback_of(house, await ended(house, {"NVCF-CALLBACK-URL": "none"})) is None
    assert (await ask(house.client, "DELETE", DEFAULT))[0] == 204
    assert await callback_of(house, await ended(house, {})) is None
    assert await ask(house.client, "GET", DEFAULT) == (200, {"functionId": FUNCTION})


@pytest.mark.parametrize("data", [{}, {"url": "https://10.0.0.1/"}, {"url": URL, "events": ["sometimes"]}])
async def test_a_default_that_can_never_be_told_is_refused(house: House, secret: str, data: Any) -> None:
    assert (await ask(house.client, "PUT", DEFAULT, data))[0] == 400


# -- secrets -----------------------------------------------------------------------------------


async def test_a_secret_is_shown_once(house: House) -> None:
    status, made = await ask(house.client, "POST", f"{AT}/secrets", {})
    assert status == 200
    assert made["secret"].startswith("whsec_")
    status, listed = await ask(house.client, "GET", f"{AT}/secrets")
    assert [each["secretId"] for each in listed["secrets"]] == [made["secretId"]]
    assert "whsec_" not in json.dumps(listed)
    _, newer = await ask(house.client, "POST", f"{AT}/secrets", {"othersExpireInSeconds": 60})
    _, listed = await ask(house.client, "GET", f"{AT}/secrets")
    assert ["expiresAt" in each for each in listed["secrets"]] == [True, False]
    assert (await ask(house.client, "DELETE", f"{AT}/secrets/{made['secretId']}"))[0] == 204
    assert (await ask(house.client, "DELETE", f"{AT}/secrets/{made['secretId']}"))[0] == 404
    _, listed = await ask(house.client, "GET", f"{AT}/secrets")
    assert [each["secretId"] for each in listed["secrets"]] == [newer["secretId"]]


async def test_secrets_are_for_those_who_may_change_secrets(house: House) -> None:
    token, _ = await create_key(house.broker, account="default", scopes=["invoke_function"])
    async with aiohttp.ClientSession(house.url, headers={"Authorization": f"Bearer {token}"}) as invoker:
        for method in ("GET", "POST"):
            assert (await ask(invoker, method, f"{AT}/secrets", {}))[0] == 403


# -- the log -----------------------------------------------------------------------------------


async def test_the_log_tells_of_each_try_and_one_can_be_asked_for_again(house: House, secret: str) -> None:
    request_id = await ended(house)
    [loan], _ = await house.broker.webhooks.take(limit=10, lease_s=60)
    failed = WebhookTry(took_s=0.25, status=410, error="answered 410")
    await house.broker.webhooks.note(loan, failed, state=DeliveryState.FAILED)
    status, told = await ask(house.client, "GET", f"{AT}/deliveries/{request_id}")
    assert status == 200
    assert (told["state"], told["event"], told["url"]) == ("failed", "request.fulfilled", URL)
    assert told["webhookId"] == f"msg_{request_id.replace('-', '')}"
    [tried] = told["log"]
    assert (tried["number"], tried["statusCode"], tried["error"], tried["tookSeconds"]) == (
        1,
        410,
        "answered 410",
        0.25,
    )
    payload = json.loads(told["payload"])
    assert payload["data"]["resultUrl"] == f"https://q.example{NVCF}/pexec/status/{request_id}"
    status, again = await ask(house.client, "POST", f"{AT}/deliveries/{request_id}/redeliver")
    assert (status, again["state"], again["tries"]) == (202, "pending", 1)
    assert len((await house.broker.webhooks.take(limit=10, lease_s=60))[0]) == 1


async def test_deliveries_are_listed_page_by_page_and_by_what_became_of_them(house: House, secret: str) -> None:
    ids = []
    for _ in range(3):
        ids.append(await ended(house))
        [loan], _ = await house.broker.webhooks.take(limit=10, lease_s=60)
        await house.broker.webhooks.note(loan, WebhookTry(took_s=0.1, status=204), state=DeliveryState.DELIVERED)
    seen: list[str] = []
    cursor = ""
    while True:
        status, page = await ask(house.client, "GET", f"{AT}/deliveries?limit=2{cursor}")
        assert status == 200
        seen += [each["requestId"] for each in page["deliveries"]]
        if "cursor" not in page:
            break
        cursor = f"&cursor={page['cursor']}"
    assert seen == ids[::-1]
    for query, count in (("state=delivered", 3), ("state=failed,pending", 0), (f"functionId={NOBODYS}", 0)):
        _, page = await ask(house.client, "GET", f"{AT}/deliveries?{query}")
        assert len(page["deliveries"]) == count
    assert (await ask(house.client, "GET", f"{AT}/deliveries?state=lost"))[0] == 400


async def test_before_its_end_a_request_has_no_delivery(house: House, secret: str) -> None:
    request_id = await accepted(house, {"NVCF-CALLBACK-URL": URL})
    assert (await ask(house.client, "GET", f"{AT}/deliveries/{request_id}"))[0] == 404
    assert (await ask(house.client, "POST", f"{AT}/deliveries/{request_id}/redeliver"))[0] == 404


async def test_others_see_nothing_of_it_and_a_super_admin_not_the_whole_url(house: House, secret: str) -> None:
    request_id = await ended(house)
    await house.broker.webhooks.take(limit=10, lease_s=60)
    token, _ = await create_key(house.broker, account="other", scopes=ACCOUNT_SCOPES)
    async with aiohttp.ClientSession(house.url, headers={"Authorization": f"Bearer {token}"}) as other:
        assert (await ask(other, "GET", f"{AT}/deliveries/{request_id}"))[0] == 404
        assert (await ask(other, "POST", f"{AT}/deliveries/{request_id}/redeliver"))[0] == 404
        assert (await ask(other, "GET", f"{AT}/deliveries"))[1] == {"deliveries": []}
    token, _ = await create_key(house.broker, account="operators", scopes=[f"admin:{each}" for each in ACCOUNT_SCOPES])
    mirror = f"{NVCF}/accounts/default/webhooks/deliveries"
    async with aiohttp.ClientSession(house.url, headers={"Authorization": f"Bearer {token}"}) as operator:
        status, told = await ask(operator, "GET", f"{mirror}/{request_id}")
        assert (status, told["url"]) == (200, "https://hooks.example/…")


async def test_a_key_for_other_functions_is_refused(house: House, secret: str) -> None:
    request_id = await ended(house)
    await house.broker.webhooks.take(limit=10, lease_s=60)
    resources = (f"function/{NOBODYS}/*",)
    token, _ = await create_key(house.broker, account="default", scopes=["invoke_function"], resources=resources)
    async with aiohttp.ClientSession(house.url, headers={"Authorization": f"Bearer {token}"}) as narrow:
        assert (await ask(narrow, "GET", f"{AT}/deliveries/{request_id}"))[0] == 403
        assert (await ask(narrow, "GET", f"{AT}/deliveries"))[1] == {"deliveries": []}


async def test_a_dead_request_that_is_started_again_has_its_callback_again(house: House, secret: str) -> None:
    await accepted(house, {"NVCF-CALLBACK-URL": URL})
    delivery = await asyncio.wait_for(house.broker.queue.take(VERSION), 30)
    assert delivery is not None
    await house.broker.results.end(delivery.job, RequestState.DEAD, reason="why", cause="rejected")
    await house.broker.dead_letters.keep(delivery.job, size_bytes=2)
    status, again = await ask(house.client, "POST", f"{NVCF}/dead-letters/{delivery.job.id}/redrive", {})
    assert status == 202
    await house.finish()
    assert await callback_of(house, again["redrivenAs"]) == Callback(url=URL)
