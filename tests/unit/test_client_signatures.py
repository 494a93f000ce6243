"""What a receiver believes, of messages that the server signs."""

from __future__ import annotations

import base64

import pytest

from broker import webhooks
from broker.model import Callback, RequestState, WebhookDelivery
from fnqueue.signatures import TOLERANCE_S, NotGenuine, verify

NOW = 1_700_000_000.0
KEYS = (b"a" * 32, b"b" * 32)
SECRETS = tuple("whsec_" + base64.b64encode(key).decode() for key in KEYS)
BODY = b'{"type":"request.fulfilled"}'
DELIVERY = WebhookDelivery(
    request_id="9a260b8a-8799-4223-9fc2-446c6b8a2eba",
    account="a",
    function_id="f",
    version_id="v",
    callback=Callback(url="https://example.com"),
    request_state=RequestState.FULFILLED,
    created_at=NOW,
    started_at=NOW,
    finished_at=NOW,
    attempts=1,
    next_at=NOW,
)
HEADERS = webhooks.headers(DELIVERY, BODY, KEYS, now=NOW)


@pytest.mark.parametrize("secret", [*SECRETS, SECRETS, ["whsec_" + base64.b64encode(b"old").decode(), SECRETS[1]]])
def test_a_message_of_the_server_is_believed(secret: str) -> None:
    assert verify(secret, HEADERS, BODY, now=NOW + TOLERANCE_S) == DELIVERY.id
    assert verify(secret, {name.upper(): value for name, value in HEADERS.items()}, BODY, now=NOW) == DELIVERY.id


@pytest.mark.parametrize(
    ("changed", "body", "at"),
    [
        ({}, BODY + b" ", NOW),
        ({"webhook-id": "msg_other"}, BODY, NOW),
        ({"webhook-timestamp": str(int(NOW) + 1)}, BODY, NOW),
        ({"webhook-timestamp": "now"}, BODY, NOW),
        ({"webhook-signature": "v1,ü v2,x"}, BODY, NOW),
        ({}, BODY, NOW + TOLERANCE_S + 1),
        ({}, BODY, NOW - TOLERANCE_S - 1),
    ],
)
def test_what_was_altered_or_is_old_is_not(changed: dict[str, str], body: bytes, at: float) -> None:
    with pytest.raises(NotGenuine):
        verify(SECRETS, {**HEADERS, **changed}, body, now=at)


def test_a_header_that_is_missing_is_named() -> None:
    with pytest.raises(NotGenuine, match="webhook-id"):
        verify(SECRETS, {}, BODY, now=NOW)


def test_a_secret_that_is_none_is_the_receivers_mistake() -> None:
    with pytest.raises(ValueError, match="whsec_") as caught:
        verify("whsec_?", HEADERS, BODY, now=NOW)
    assert not isinstance(caught.value, NotGenuine)
