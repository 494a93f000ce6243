"""The verbs of webhooks: secrets, what is sent and when. What a store promises is in tests/contract."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from broker import functions, webhooks
from broker.egress import Egress
from broker.errors import BadRequest, NotConfigured, NotFound, StateConflict
from broker.functions import Definition
from broker.keyring import Keyring
from broker.model import (
    Callback,
    DeliveryState,
    Principal,
    RequestState,
    Timings,
    WebhookDelivery,
    WebhookSecret,
    WebhookSecrets,
)
from broker.ports import Broker
from broker.settings import SecretSettings
from broker.webhooks import Answer, judge
from tests.pages import DOCS, blocks
from tests.receiver import verify

ME = Principal(account="acme", subject="me", scopes=frozenset())
OTHER = Principal(account="other", subject="them", scopes=frozenset())
OLD, NEW = f"old:{'1a' * 32}", f"new:{'2b' * 32}"
STRICT = Egress.of(SecretSettings())
HERE = Callback(url="https://example.com/hook")

DELIVERY = WebhookDelivery(
    request_id="9a260b8a-8799-4223-9fc2-446c6b8a2eba",
    account="acme",
    function_id="f",
    version_id="v",
    callback=HERE,
    request_state=RequestState.FULFILLED,
    created_at=1_700_000_000.0,
    started_at=1_700_000_001.5,
    finished_at=1_700_000_003.25,
    attempts=1,
    status_code=200,
    timings=Timings(cold_start_s=0.0, inputs_s=0.1, container_s=1.5, upload_s=0.0),
)


@pytest.fixture
def broker(memory_broker: Broker) -> Broker:
    return replace(memory_broker, keyring=Keyring.parse(OLD))


# -- what is sent ------------------------------------------------------------------------------


def test_the_body_tells_how_the_request_ended_and_not_its_result() -> None:
    assert json.loads(webhooks.body(DELIVERY, public_url="https://q.example/")) == {
        "type": "request.fulfilled",
        "timestamp": "2023-11-14T22:13:23.250Z",
        "data": {
            "requestId": DELIVERY.request_id,
            "functionId": "f",
            "functionVersionId": "v",
            "status": "fulfilled",
            "statusCode": 200,
            "attempts": 1,
            "createdAt": "2023-11-14T22:13:20.000Z",
            "startedAt": "2023-11-14T22:13:21.500Z",
            "finishedAt": "2023-11-14T22:13:23.250Z",
            "containerSeconds": 1.5,
            "totalSeconds": 3.25,
            "resultUrl": f"https://q.example/v2/nvcf/pexec/status/{DELIVERY.request_id}",
        },
    }


def test_what_never_ran_says_why() -> None:
    expired = replace(
        DELIVERY, request_state=RequestState.EXPIRED, reason="why", started_at=0.0, status_code=0, timings=None
    )
    told = json.loads(webhooks.body(expired))
    assert told["type"] == "request.expired"
    assert told["data"]["reason"] == "why"
    assert told["data"]["resultUrl"].startswith("/v2/nvcf/")
    assert not {"startedAt", "statusCode", "containerSeconds"} & told["data"].keys()


def test_the_signature_is_that_of_the_specification() -> None:
    """Its own example: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md"""
    key = b"\x31\xfc\x92\x4c\xe6\xfe\x4f\x9b"
    content = b'{"test": 2432232314}'
    told = webhooks.headers(DELIVERY, content, [key], now=1_614_265_330.9)
    assert told["webhook-timestamp"] == "1614265330"
    assert verify("whsec_MfySTOb+T5s=", told, content, now=1_614_265_330) == {"test": 2432232314}
    with pytest.raises(ValueError, match="no signature"):
        verify("whsec_MfySTOb+T5s=", told, content + b" ", now=1_614_265_330)


def test_a_message_is_a_cloud_event_that_says_what_its_body_says() -> None:
    content = webhooks.body(DELIVERY)
    told = webhooks.headers(DELIVERY, content, [b"key"], now=1_614_265_330.9, public_url="https://q.example/")
    signed = json.loads(content)
    assert {name: value for name, value in told.items() if name.startswith("ce-")} == {
        "ce-specversion": "1.0",
        "ce-id": told["webhook-id"],
        "ce-source": "https://q.example/v2/nvcf/functions/f/versions/v",
        "ce-type": signed["type"],
        "ce-subject": signed["data"]["requestId"],
        "ce-time": signed["timestamp"],
    }
    assert webhooks.headers(DELIVERY, content, [], now=0.0)["ce-source"] == "/v2/nvcf/functions/f/versions/v"


def test_what_the_page_shows_tells_genuine_messages_from_others() -> None:
    (code,) = (block.code for block in blocks(DOCS / "webhooks.md") if block.language == "python")
    shown: dict[str, Callable[[str, Mapping[str, str], bytes], bool]] = {}
    exec(code, shown)
    is_genuine, content = shown["is_genuine"], webhooks.body(DELIVERY)
    keys = [b"another key", b"\x31\xfc\x92\x4c\xe6\xfe\x4f\x9b"]
    told = webhooks.headers(DELIVERY, content, keys, now=time.time())
    assert is_genuine("whsec_MfySTOb+T5s=", told, content)
    assert not is_genuine("whsec_MfySTOb+T5s=", told, content + b" ")
    assert not is_genuine("whsec_AAAA", told, content)
    old = webhooks.headers(DELIVERY, content, keys, now=time.time() - 3600)
    assert not is_genuine("whsec_MfySTOb+T5s=", old, content)


async def test_every_secret_that_is_good_signs(broker: Broker) -> None:
    texts = [(await webhooks.create_secret(broker, ME))[1] for _ in range(2)]
    content = webhooks.body(DELIVERY)
    told = webhooks.headers(DELIVERY, content, await webhooks.signing_keys(broker, "acme"), now=time.time())
    for text in texts:
        assert verify(text, told, content)["type"] == "request.fulfilled"
    stranger = (await webhooks.create_secret(broker, OTHER))[1]
    with pytest.raises(ValueError, match="no signature"):
        verify(stranger, told, content)


# -- when --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 204, 299])
def test_what_is_taken_is_delivered(status: int) -> None:
    assert judge(Answer(status=status), 0) == (DeliveryState.DELIVERED, 0.0)


def test_tries_come_later_and_later_and_end() -> None:
    vain = Answer(status=500)
    waits = [judge(vain, series, chance=lambda: 0.0) for series in range(len(webhooks.RETRIES_S))]
    assert waits == [(DeliveryState.PENDING, wait_s) for wait_s in webhooks.RETRIES_S]
    assert sum(webhooks.RETRIES_S) > 16 * 3600
    assert judge(vain, len(webhooks.RETRIES_S)) == (DeliveryState.FAILED, 0.0)


def test_what_failed_together_is_spread() -> None:
    _, soonest = judge(Answer(status=500), 3, chance=lambda: 1.0)
    assert soonest == pytest.approx(webhooks.RETRIES_S[3] * 0.8)


@pytest.mark.parametrize("status", [0, 301, 302, 308, 400, 401, 404, 408, 429, 500, 503])
def test_anything_else_is_tried_again(status: int) -> None:
    assert judge(Answer(status=status), 0)[0] is DeliveryState.PENDING


def test_who_asks_for_patience_is_given_it_up_to_a_point() -> None:
    assert judge(Answer(status=429, retry_after_s=120), 0) == (DeliveryState.PENDING, 120)
    assert judge(Answer(status=503, retry_after_s=1e9), 0) == (DeliveryState.PENDING, webhooks.LONGEST_RETRY_AFTER_S)
    assert judge(Answer(status=429, retry_after_s=1), 2, chance=lambda: 0.0)[1] == webhooks.RETRIES_S[2]


def test_tries_end_before_the_log_does_whatever_receivers_say() -> None:
    vain = Answer(status=503, retry_after_s=1e9)
    longest = sum(judge(vain, series, chance=lambda: 0.0)[1] for series in range(len(webhooks.RETRIES_S)))
    assert longest < SecretSettings.model_fields["webhook_ttl_s"].metadata[0].ge


@pytest.mark.parametrize("answer", [Answer(status=410), Answer(error="refused", hopeless=True)])
def test_who_is_gone_and_what_may_not_be_reached_is_given_up(answer: Answer) -> None:
    assert judge(answer, 0) == (DeliveryState.FAILED, 0.0)


# -- secrets -----------------------------------------------------------------------------------


async def test_a_secret_is_shown_once_and_kept_sealed(broker: Broker) -> None:
    made, text = await webhooks.create_secret(broker, ME)
    assert text.startswith("whsec_")
    [listed] = await webhooks.list_secrets(broker, "acme")
    assert listed == made
    assert text.removeprefix("whsec_") not in repr(await broker.catalog.webhook_secrets.get("acme"))
    assert await webhooks.list_secrets(broker, "other") == ()


async def test_a_secret_needs_a_key_to_seal_it(memory_broker: Broker) -> None:
    with pytest.raises(NotConfigured):
        await webhooks.create_secret(memory_broker, ME)


async def test_others_go_on_for_as_long_as_is_said(broker: Broker) -> None:
    first, _ = await webhooks.create_secret(broker, ME)
    await webhooks.create_secret(broker, ME, others_expire_s=3600)
    before, after = await webhooks.list_secrets(broker, "acme")
    assert (before.id, after.expires_at) == (first.id, 0.0)
    assert before.expires_at == pytest.approx(time.time() + 3600, abs=60)
    last, text = await webhooks.create_secret(broker, ME, others_expire_s=0)
    assert [each.id for each in await webhooks.list_secrets(broker, "acme")] == [last.id]
    [key] = await webhooks.signing_keys(broker, "acme")
    assert verify(text, webhooks.headers(DELIVERY, b"{}", [key], now=time.time()), b"{}") == {}


async def test_there_are_so_many_and_no_more(broker: Broker) -> None:
    made = [await webhooks.create_secret(broker, ME) for _ in range(webhooks.MAX_SECRETS)]
    with pytest.raises(StateConflict):
        await webhooks.create_secret(broker, ME)
    await webhooks.delete_secret(broker, ME, made[0][0].id)
    await webhooks.create_secret(broker, ME)


async def test_nobody_deletes_what_is_not_his(broker: Broker) -> None:
    made, _ = await webhooks.create_secret(broker, ME)
    with pytest.raises(NotFound):
        await webhooks.delete_secret(broker, OTHER, made.id)
    await webhooks.delete_secret(broker, ME, made.id)
    with pytest.raises(NotFound):
        await webhooks.delete_secret(broker, ME, made.id)


async def test_secrets_are_sealed_again_with_a_new_key_and_stay_what_they_are(broker: Broker) -> None:
    await webhooks.create_secret(broker, ME)
    before = await webhooks.signing_keys(broker, "acme")
    counted = await webhooks.rotate(replace(broker, keyring=Keyring.parse(f"{NEW},{OLD}")))
    assert (counted.resealed, counted.unopened) == (1, ())
    assert await webhooks.signing_keys(replace(broker, keyring=Keyring.parse(NEW)), "acme") == before


async def test_a_secret_that_was_moved_to_another_account_does_not_open(broker: Broker) -> None:
    made, _ = await webhooks.create_secret(broker, ME)
    moved = WebhookSecret(id=made.id, sealed=made.sealed, created_at=made.created_at)
    await broker.catalog.webhook_secrets.put(WebhookSecrets(account="other", secrets=(moved,)))
    with pytest.raises(Exception, match="does not open"):
        await webhooks.signing_keys(broker, "other")


# -- asking for one ----------------------------------------------------------------------------


async def test_a_callback_needs_a_secret_an_event_that_there_is_and_a_url_that_may_be_reached(broker: Broker) -> None:
    with pytest.raises(BadRequest, match="secret"):
        await webhooks.callback(broker, STRICT, "acme", HERE.url, (), field="x")
    await webhooks.create_secret(broker, ME)
    assert await webhooks.callback(broker, STRICT, "acme", HERE.url, (), field="x") == HERE
    asked = await webhooks.callback(broker, STRICT, "acme", HERE.url, ("dead", "fulfilled", "dead"), field="x")
    assert asked.events == ("dead", "fulfilled")
    for url, events in ((HERE.url, ("queued",)), ("https://127.0.0.1/", ())):
        with pytest.raises(BadRequest):
            await webhooks.callback(broker, STRICT, "acme", url, events, field="x")


async def test_a_functions_default_is_for_its_own_account_and_for_versions_to_come(broker: Broker) -> None:
    definition = Definition(name="f", inference_url="/", container_image="i")
    me = replace(ME, resources=frozenset({"account-functions/*"}))
    version = await functions.create(broker, me, definition)
    with pytest.raises(BadRequest, match="secret"):
        await webhooks.set_default(broker, STRICT, me, version.function_id, url=HERE.url, events=())
    await webhooks.create_secret(broker, ME)
    await webhooks.set_default(broker, STRICT, me, version.function_id, url=HERE.url, events=())
    added = await functions.add_version(broker, me, version.function_id, definition)
    assert webhooks.default(added, "acme") == HERE
    assert webhooks.default(added, "other") is None
    assert await webhooks.get_default(broker, me, version.function_id) == HERE
    await webhooks.clear_default(broker, me, version.function_id)
    assert await webhooks.get_default(broker, me, version.function_id) is None
    with pytest.raises(NotFound):
        await webhooks.set_default(broker, STRICT, OTHER, version.function_id, url=HERE.url, events=())
    with pytest.raises(NotFound):
        await webhooks.clear_default(broker, OTHER, version.function_id)
