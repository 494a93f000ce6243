"""The verbs of a webhook: ask for one, its secrets, what is sent and when, the log of deliveries, and asking again.

Each end of a request that has a callback is one message. It is signed as Standard Webhooks says, by every secret of the
request's account that is good at the time, and sent until its receiver takes it, refuses it for good, or all tries are
used up. Whatever becomes of it, the request stays as it ended.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import random
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import orjson

from broker.egress import Egress
from broker.errors import BadRequest, ConfigurationError, NotFound, StateConflict
from broker.invocations import owns_id
from broker.keyring import Rotation, Sealed
from broker.model import (
    Callback,
    DeliveryState,
    Principal,
    RequestState,
    Version,
    WebhookDelivery,
    WebhookFilter,
    WebhookPage,
    WebhookSecret,
    WebhookSecrets,
)
from broker.ports import Broker
from broker.revisions import edit
from broker.visibility import Family, check_request, find_function, is_covered

EVENTS = tuple(state.value for state in RequestState if state.terminal and state is not RequestState.ABANDONED)
"""The ends that can be told, as receipts name them; in a message, behind `request.`."""

UNKNOWN = "no such webhook delivery"
UNKNOWN_SECRET = "no such webhook secret"  # noqa: S105  a sentence
# All sign each message, in one header.
MAX_SECRETS = 5

# After the first, at once: Standard Webhooks' proposal, but for its last days.
RETRIES_S = (5.0, 60.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0)
# A receiver may ask for more patience, up to this.
LONGEST_RETRY_AFTER_S = 6 * 3600.0
_GONE = 410
_JITTER = 0.2
_PREFIX = "whsec_"
_SECRET_BYTES = 32


# -- asking for one ----------------------------------------------------------------------------


async def callback(
    broker: Broker, egress: Egress, account: str, url: str, events: Sequence[str], *, field: str
) -> Callback:
    """One that may be kept. Raises BadRequest: the URL is not one that may be reached, or nothing could be signed."""
    if unknown := [event for event in events if event not in EVENTS]:
        raise BadRequest(f"{field}: no event {unknown[0][:50]!r}; there are {', '.join(EVENTS)}", field=field)
    checked = egress.check_url(url, field=field)
    if not await list_secrets(broker, account):
        raise BadRequest(
            f"{field}: the account has no webhook secret to sign with; make one with: fnqueue webhooks secrets create",
            field=field,
        )
    return Callback(url=checked, events=tuple(dict.fromkeys(events)))


def default(version: Version, account: str) -> Callback | None:
    """That of the function, for an invocation by its own account: others have secrets and a log of their own."""
    return version.callback if version.account == account else None


async def get_default(broker: Broker, principal: Principal, function_id: str) -> Callback | None:
    """Raises NotFound, Forbidden."""
    family = await find_function(broker, principal, function_id, changing=False)
    return max(family.versions, key=lambda version: version.created_at).callback


async def set_default(
    broker: Broker, egress: Egress, principal: Principal, function_id: str, *, url: str, events: Sequence[str]
) -> Callback:
    """For all versions of the caller's function, and those that it will have. Idempotent: a call that failed half-way
    is repeated. Raises NotFound, Forbidden, StateConflict: it is public; and as `callback`."""
    family = await find_function(broker, principal, function_id)
    wanted = await callback(broker, egress, principal.account, url, events, field="url")
    await _give(broker, family, wanted)
    return wanted


async def clear_default(broker: Broker, principal: Principal, function_id: str) -> None:
    """Raises NotFound, Forbidden, StateConflict: it is public."""
    await _give(broker, await find_function(broker, principal, function_id), None)


# -- secrets -----------------------------------------------------------------------------------


async def create_secret(
    broker: Broker, principal: Principal, *, others_expire_s: float | None = None
) -> tuple[WebhookSecret, str]:
    """One more, and its text, which is kept nowhere else but sealed; the others sign for `others_expire_s` more, None:
    as long as they did. Raises NotConfigured, and StateConflict when there are MAX_SECRETS."""
    secret_id, now = str(uuid.uuid4()), time.time()
    text = _PREFIX + base64.b64encode(os.urandom(_SECRET_BYTES)).decode()
    sealed = broker.keyring.seal(text.encode(), *_bound(principal.account, secret_id))
    made = WebhookSecret(id=secret_id, sealed=sealed, created_at=now)

    def add(stored: WebhookSecrets) -> WebhookSecrets:
        before = _good(stored, now)
        if len(before) >= MAX_SECRETS:
            raise StateConflict(f"the account has {MAX_SECRETS} webhook secrets already; delete some")
        if others_expire_s is not None:
            until = now + others_expire_s
            before = [replace(each, expires_at=min(each.expires_at or until, until)) for each in before]
        return replace(stored, secrets=(*before, made))

    none_yet = WebhookSecrets(account=principal.account, secrets=())
    await edit(broker.catalog.webhook_secrets, principal.account, add, missing=none_yet)
    return made, text


async def list_secrets(broker: Broker, account: str) -> Sequence[WebhookSecret]:
    """Those that sign now, the newest last."""
    row = await broker.catalog.webhook_secrets.get(account)
    return _good(row.item, time.time()) if row else ()


async def delete_secret(broker: Broker, principal: Principal, secret_id: str) -> None:
    """It signs nothing more. Raises NotFound."""
    removed = False

    def remove(stored: WebhookSecrets) -> WebhookSecrets:
        nonlocal removed
        left = tuple(each for each in stored.secrets if each.id != secret_id)
        removed = len(left) < len(stored.secrets)
        return replace(stored, secrets=left)

    await edit(broker.catalog.webhook_secrets, principal.account, remove)
    if not removed:
        raise NotFound(UNKNOWN_SECRET)


async def rotate(broker: Broker) -> Rotation:
    """As `secrets.rotate`, for those of webhooks."""
    total = Rotation()
    for row in await broker.catalog.webhook_secrets.list():
        total += await _rotate(broker, row.item.account)
    return total


async def signing_keys(broker: Broker, account: str) -> list[bytes]:
    """For whoever sends. Raises ConfigurationError: one does not open."""
    keys = []
    for secret in await list_secrets(broker, account):
        text = broker.keyring.open(secret.sealed, *_bound(account, secret.id)).decode()
        try:
            keys.append(base64.b64decode(text.removeprefix(_PREFIX), validate=True))
        except binascii.Error as exc:
            raise ConfigurationError("a stored webhook secret is none") from exc
    return keys


# -- what is sent, and when --------------------------------------------------------------------


def body(delivery: WebhookDelivery, *, public_url: str = "") -> bytes:
    """The same for each try: it tells how the request ended, and where its result is to be had, by those who may."""
    data = {
        "requestId": delivery.request_id,
        "functionId": delivery.function_id,
        "functionVersionId": delivery.version_id,
        "status": delivery.request_state.value,
        "statusCode": delivery.status_code or None,
        "reason": delivery.reason or None,
        "attempts": delivery.attempts,
        "createdAt": _instant(delivery.created_at),
        "startedAt": _instant(delivery.started_at) if delivery.started_at else None,
        "finishedAt": _instant(delivery.finished_at),
        "containerSeconds": round(delivery.timings.container_s, 3) if delivery.timings else None,
        "totalSeconds": round(delivery.finished_at - delivery.created_at, 3),
        "resultUrl": f"{public_url.rstrip('/')}/v2/nvcf/pexec/status/{delivery.request_id}",
    }
    kept = {name: value for name, value in data.items() if value is not None}
    return orjson.dumps({"type": delivery.event, "timestamp": _instant(delivery.finished_at), "data": kept})


def headers(
    delivery: WebhookDelivery, content: bytes, keys: Sequence[bytes], *, now: float, public_url: str = ""
) -> dict[str, str]:
    """What Standard Webhooks wants beside the body: one signature by each key, all good for this moment. And what makes
    it an event in the binary mode of CloudEvents 1.0, of which nothing is signed that the body does not say."""
    timestamp = str(int(now))
    source = f"/v2/nvcf/functions/{delivery.function_id}/versions/{delivery.version_id}"
    signed = b".".join((delivery.id.encode(), timestamp.encode(), content))
    signatures = (base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode() for key in keys)
    return {
        "Content-Type": "application/json",
        "webhook-id": delivery.id,
        "webhook-timestamp": timestamp,
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
        "ce-specversion": "1.0",
        "ce-id": delivery.id,
        "ce-source": public_url.rstrip("/") + source,
        "ce-type": delivery.event,
        "ce-subject": delivery.request_id,
        "ce-time": _instant(delivery.finished_at),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a receiver said. `status` 0 is none, and `error` says why; `hopeless`: it would be the same another time."""

    status: int = 0
    error: str = ""
    retry_after_s: float = 0.0
    hopeless: bool = False


def judge(answer: Answer, series: int, *, chance: Callable[[], float] = random.random) -> tuple[DeliveryState, float]:
    """What a try leads to that `series` others went before: the state, and of a pending one after how many seconds
    the next. `chance` gives 0 to 1, and spreads what failed together."""
    if 200 <= answer.status < 300:
        return DeliveryState.DELIVERED, 0.0
    if answer.hopeless or answer.status == _GONE or series >= len(RETRIES_S):
        return DeliveryState.FAILED, 0.0
    wait_s = RETRIES_S[series] * (1 - _JITTER * chance())
    return DeliveryState.PENDING, max(wait_s, min(answer.retry_after_s, LONGEST_RETRY_AFTER_S))


# -- the log -----------------------------------------------------------------------------------


async def find(broker: Broker, principal: Principal, request_id: str) -> WebhookDelivery:
    """The caller's. Raises NotFound, Forbidden (the key's resources do not cover its function)."""
    delivery = await broker.webhooks.read(request_id) if owns_id(broker, principal, request_id) else None
    if delivery is None or delivery.account != principal.account:
        raise NotFound(UNKNOWN)
    await check_request(broker, principal, delivery)
    return delivery


async def page(
    broker: Broker, principal: Principal, wanted: WebhookFilter, *, limit: int, after: int = 0
) -> WebhookPage:
    """Those of the caller's account, as `Webhooks.page`, but for those of functions that the key's resources do not
    cover."""
    found = await broker.webhooks.page(principal.account, wanted, limit=limit, after=after)
    covered = [one for one in found.deliveries if await is_covered(broker, principal, one)]
    return replace(found, deliveries=tuple(covered))


async def redeliver(broker: Broker, principal: Principal, request_id: str) -> WebhookDelivery:
    """Send it once more, now, with the same ID and to the same URL, and begin the retries anew. Raises as `find`."""
    delivery = await find(broker, principal, request_id)
    again = await broker.webhooks.again(delivery.request_id)
    if again is None:
        raise NotFound(UNKNOWN)
    return again


async def _give(broker: Broker, family: Family, wanted: Callback | None) -> None:
    for version in family.versions:
        await edit(broker.catalog.versions, version.id, lambda stored: replace(stored, callback=wanted))


def _good(stored: WebhookSecrets, now: float) -> list[WebhookSecret]:
    return [each for each in stored.secrets if not each.expires_at or each.expires_at > now]


async def _rotate(broker: Broker, account: str) -> Rotation:
    counted = Rotation()

    def reseal(stored: WebhookSecrets) -> WebhookSecrets:
        nonlocal counted
        texts, counted = broker.keyring.rotate(
            Sealed(label=f"{account}/webhook {secret.id}", text=secret.sealed, bound=_bound(account, secret.id))
            for secret in stored.secrets
        )
        resealed = [replace(secret, sealed=text) for secret, text in zip(stored.secrets, texts, strict=True)]
        return replace(stored, secrets=tuple(resealed))

    await edit(broker.catalog.webhook_secrets, account, reseal)
    return counted


def _bound(account: str, secret_id: str) -> tuple[str, ...]:
    return ("webhook-secret", account, secret_id)


def _instant(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
