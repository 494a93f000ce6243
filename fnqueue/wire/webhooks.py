"""Webhooks: secrets, the default of a function, and the log of deliveries (fnqueue's own)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import Field

from fnqueue.wire.fields import Wire

LONGEST_OVERLAP_S = 30 * 86_400
MOST_EVENTS = 16


class CreateWebhookSecret(Wire):
    """The account's other secrets sign for `othersExpireInSeconds` more, and for good where that is absent."""

    others_expire_in_seconds: Annotated[float, Field(ge=0, le=LONGEST_OVERLAP_S, allow_inf_nan=False)] | None = None


class WebhookSecret(Wire):
    """One that signs, until `expiresAt` if it has an end. Its text is not shown again."""

    secret_id: str
    created_at: datetime
    expires_at: datetime | None = None


class WebhookSecretList(Wire):
    """Those that sign now, the newest last."""

    secrets: list[WebhookSecret]


class WebhookSecretCreated(WebhookSecret):
    """With its text, `whsec_…`, which is shown here and nowhere else."""

    secret: str


class SetFunctionWebhook(Wire):
    """Of the ends in `events` the URL is told; of all, where that is absent or empty."""

    url: Annotated[str, Field(min_length=1, max_length=2048)]
    events: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=MOST_EVENTS)] | None = None


class FunctionWebhook(Wire):
    """Where the ends of a function's requests are told that bring no callback of their own; without a URL, nowhere."""

    function_id: str
    url: str | None = None
    events: list[str] | None = None


class WebhookTry(Wire):
    """`statusCode` is that of the receiver's answer; `error` says what was wrong."""

    number: int
    tried_at: datetime
    took_seconds: float
    status_code: int | None = None
    error: str | None = None


class WebhookDelivery(Wire):
    """`state` is `pending`, `delivered` or `failed`: given up. `webhookId` is what the receiver knows it by, `tries`
    how often it was sent, the last time with `lastStatusCode` or `lastError`; a pending one is sent again at
    `nextAt`."""

    request_id: str
    webhook_id: str
    function_id: str
    function_version_id: str
    event: str
    state: str
    url: str
    finished_at: datetime
    tries: int
    last_tried_at: datetime | None = None
    last_status_code: int | None = None
    last_error: str | None = None
    next_at: datetime | None = None


class WebhookDeliveryList(Wire):
    """The latest first. `cursor` asks for the next page, which may be empty; without one this is the last."""

    deliveries: list[WebhookDelivery]
    cursor: str | None = None


class WebhookDeliveryDetail(WebhookDelivery):
    """With the log of its latest tries, and the body that is sent, as text."""

    log: list[WebhookTry]
    payload: str | None = None
