"""Webhooks: their secrets, the defaults of functions, and what became of each delivery (fnqueue's own)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aiohttp import web
from multidict import MultiMapping

from api import cursors, headers, payloads, queries
from api.definitions import instant
from api.front import Front
from broker import webhooks
from broker.egress import host_of
from broker.model import (
    Callback,
    DeliveryState,
    Principal,
    Version,
    WebhookDelivery,
    WebhookFilter,
    WebhookSecret,
    WebhookTry,
)
from fnqueue import wire

PAGE_DEFAULT = 50
PAGE_MAX = 200
STATES = tuple(state.value for state in DeliveryState)


async def callback(front: Front, principal: Principal, version: Version, arrived: MultiMapping[str]) -> Callback | None:
    """Where an invocation's end is to be told: as its headers say, or else its function. Raises BadRequest."""
    asked = headers.callback(arrived)
    if asked is None:
        return webhooks.default(version, principal.account)
    url, events = asked
    if url == headers.NO_CALLBACK:
        return None
    return await webhooks.callback(
        front.broker, front.egress, principal.account, url, events, field=headers.CALLBACK_URL
    )


async def list_secrets(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """Which there are, and until when; not the secrets."""
    found = await webhooks.list_secrets(front.broker, principal.account)
    return payloads.answer(wire.WebhookSecretList(secrets=[wire.WebhookSecret(**_secret(each)) for each in found]))


async def create_secret(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """All secrets sign each message, so that receivers can change from one to the next at a time of their own."""
    asked = await payloads.read(front, request, wire.CreateWebhookSecret)
    made, text = await webhooks.create_secret(front.broker, principal, others_expire_s=asked.others_expire_in_seconds)
    return payloads.answer(wire.WebhookSecretCreated(**_secret(made), secret=text))


async def delete_secret(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """It signs nothing from now on."""
    secret_id = headers.uuid(request.match_info["secret_id"], field="secretId")
    await webhooks.delete_secret(front.broker, principal, secret_id)
    return web.Response(status=204)


async def get_default(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """Of the caller's own function."""
    function_id = headers.uuid(request.match_info["function_id"], field="functionId")
    return _default(principal, function_id, await webhooks.get_default(front.broker, principal, function_id))


async def set_default(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """For requests of the function's own account that come without a callback, from now on."""
    function_id = headers.uuid(request.match_info["function_id"], field="functionId")
    asked = await payloads.read(front, request, wire.SetFunctionWebhook)
    wanted = await webhooks.set_default(
        front.broker, front.egress, principal, function_id, url=asked.url, events=asked.events or ()
    )
    front.versions.forget(function_id)
    return _default(principal, function_id, wanted)


async def clear_default(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """Requests that are under way keep theirs."""
    function_id = headers.uuid(request.match_info["function_id"], field="functionId")
    await webhooks.clear_default(front.broker, principal, function_id)
    front.versions.forget(function_id)
    return web.Response(status=204)


async def list_deliveries(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """Those of the caller's account that are kept still, by when they were first tried. A page looks at a bounded
    number of them, so that one with filters may be short, or empty, and have a next one."""
    query = request.query
    wanted = WebhookFilter(
        function_id=headers.uuid(query["functionId"], field="functionId") if "functionId" in query else "",
        states=frozenset(DeliveryState(state) for state in queries.choices(query, "state", STATES)),
    )
    limit = queries.integer(query, "limit", absent=PAGE_DEFAULT, least=1, most=PAGE_MAX)
    after = cursors.place(query.get("cursor", ""))
    found = await webhooks.page(front.broker, principal, wanted, limit=limit, after=after)
    return payloads.answer(
        wire.WebhookDeliveryList(
            deliveries=[wire.WebhookDelivery(**_summary(principal, each)) for each in found.deliveries],
            cursor=cursors.cursor(found.after) if found.after else None,
        )
    )


async def get_delivery(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """With its log. There is one from the end of the request on."""
    delivery = await webhooks.find(front.broker, principal, _request_id(request))
    return _detail(front, principal, delivery)


async def redeliver(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """Once more, now, whatever became of it, under the same `webhook-id`; if need be, retries begin anew."""
    delivery = await webhooks.redeliver(front.broker, principal, _request_id(request))
    return payloads.answer(wire.WebhookDelivery(**_summary(principal, delivery)), status=202)


def _request_id(request: web.Request) -> str:
    return headers.uuid(request.match_info["request_id"], field="requestId")


def _secret(secret: WebhookSecret) -> dict[str, Any]:
    return {
        "secret_id": secret.id,
        "created_at": instant(secret.created_at),
        "expires_at": instant(secret.expires_at) if secret.expires_at else None,
    }


def _default(principal: Principal, function_id: str, found: Callback | None) -> web.Response:
    return payloads.answer(
        wire.FunctionWebhook(
            function_id=function_id,
            url=_shown(principal, found.url) if found else None,
            events=list(found.events) or None if found else None,
        )
    )


def _summary(principal: Principal, delivery: WebhookDelivery) -> dict[str, Any]:
    last = delivery.tries[-1] if delivery.tries else None
    pending = delivery.state is DeliveryState.PENDING
    return {
        "request_id": delivery.request_id,
        "webhook_id": delivery.id,
        "function_id": delivery.function_id,
        "function_version_id": delivery.version_id,
        "event": delivery.event,
        "state": delivery.state.value,
        "url": _shown(principal, delivery.callback.url),
        "finished_at": instant(delivery.finished_at),
        "tries": delivery.tried,
        "last_tried_at": instant(last.at) if last else None,
        "last_status_code": last.status or None if last else None,
        "last_error": last.error or None if last else None,
        "next_at": instant(delivery.next_at) if pending else None,
    }


def _detail(front: Front, principal: Principal, delivery: WebhookDelivery) -> web.Response:
    payload = webhooks.body(delivery, public_url=front.settings.public_url).decode()
    return payloads.answer(
        wire.WebhookDeliveryDetail(**_summary(principal, delivery), log=_log(delivery.tries), payload=payload)
    )


def _log(tries: Sequence[WebhookTry]) -> list[wire.WebhookTry]:
    return [
        wire.WebhookTry(
            number=each.number,
            tried_at=instant(each.at),
            took_seconds=round(each.took_s, 3),
            status_code=each.status or None,
            error=each.error or None,
        )
        for each in tries
    ]


def _shown(principal: Principal, url: str) -> str:
    """Path and query may hold a token: whoever acts for another account is not shown them."""
    return f"{url.partition('://')[0]}://{host_of(url)}/…" if principal.super_admin else url
