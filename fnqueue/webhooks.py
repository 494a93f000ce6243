"""`fnqueue webhooks`: what is told when requests end: by which secrets, where to, and what became of it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode

import click

from fnqueue.calls import Failed, NotYet, Server
from fnqueue.terminal import asking, server_options, table

AT = "/v2/nvcf/webhooks"
STATES = ("pending", "delivered", "failed")
EVENTS = ("fulfilled", "errored", "expired", "timed-out", "cancelled", "dead")
_PAGE = 200
_PATIENCE = 60
_PAUSE_S = 1.0


@click.group("webhooks")
def webhooks() -> None:
    """Messages that say how requests ended: their log, the secrets that sign them, and defaults of functions."""


@webhooks.command("list")
@click.option("--function", "function_id", help="Those of this function, by ID.")
@click.option("--state", "states", multiple=True, type=click.Choice(STATES), help="In this state; can be repeated.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="The most that are shown.")
@server_options
def list_command(
    url: str | None, key: str | None, as_json: bool, function_id: str | None, states: tuple[str, ...], limit: int
) -> None:
    """Show deliveries, the latest first."""
    query = {name: value for name, value in (("functionId", function_id), ("state", ",".join(states))) if value}
    with asking(url, key) as server:
        found = _listed(server, query, limit)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    heads = ("FINISHED", "REQUEST", "EVENT", "STATE", "TRIES", "LAST", "URL")
    click.echo(table(heads, [_row(each) for each in found]))


@webhooks.command("show")
@click.argument("request_id")
@server_options
def show_command(url: str | None, key: str | None, as_json: bool, request_id: str) -> None:
    """Show the delivery of one request with its log."""
    with asking(url, key) as server:
        delivery = server.get(f"{AT}/deliveries/{request_id}").json()
    click.echo(json.dumps(delivery, indent=2) if as_json else _described(delivery))


@webhooks.command("redeliver")
@click.argument("request_ids", nargs=-1)
@click.option("--failed", is_flag=True, help="All that were given up.")
@server_options
def redeliver_command(
    url: str | None, key: str | None, as_json: bool, request_ids: tuple[str, ...], failed: bool
) -> None:
    """Send the webhooks of these requests again, now. Their receivers know them by the same ID."""
    if bool(request_ids) == failed:
        raise click.UsageError("say which: by IDs of requests, or --failed")
    with asking(url, key) as server:
        which = list(request_ids) or [each["requestId"] for each in _listed(server, {"state": "failed"}, None)]
        for request_id in which:
            _redeliver(server, request_id)
            if not as_json:
                click.echo(request_id)
    if as_json:
        click.echo(json.dumps({"redelivered": which}))


@webhooks.group("secrets")
def secrets() -> None:
    """Secrets that sign webhooks: of the key's account, all of those there are at once."""


@secrets.command("list")
@server_options
def list_secrets_command(url: str | None, key: str | None, as_json: bool) -> None:
    """Show which there are; not the secrets."""
    with asking(url, key) as server:
        found = server.get(f"{AT}/secrets").json()["secrets"]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    rows = [(each["secretId"], each["createdAt"], each.get("expiresAt", "-")) for each in found]
    click.echo(table(("SECRET", "CREATED", "EXPIRES"), rows))


@secrets.command("create")
@click.option(
    "--others-expire-in",
    "others_expire_s",
    type=click.IntRange(min=0),
    help="Seconds for which the others still sign, to rotate.  [default: for good]",
)
@server_options
def create_secret_command(url: str | None, key: str | None, as_json: bool, others_expire_s: int | None) -> None:
    """Make a secret, and print it. It is shown this once."""
    asked = {} if others_expire_s is None else {"othersExpireInSeconds": others_expire_s}
    with asking(url, key) as server:
        made = server.post(f"{AT}/secrets", asked).json()
    click.echo(json.dumps(made, indent=2) if as_json else made["secret"])


@secrets.command("delete")
@click.argument("secret_id")
@server_options
def delete_secret_command(url: str | None, key: str | None, as_json: bool, secret_id: str) -> None:
    """Delete a secret. It signs nothing more."""
    with asking(url, key) as server:
        server.delete(f"{AT}/secrets/{secret_id}")
    if as_json:
        click.echo(json.dumps({"deleted": [secret_id]}))


@webhooks.group("default")
def default() -> None:
    """Where the ends of a function's requests are told that bring no callback of their own."""


@default.command("show")
@click.argument("function_id")
@server_options
def show_default_command(url: str | None, key: str | None, as_json: bool, function_id: str) -> None:
    """Show a function's default."""
    with asking(url, key) as server:
        _tell_default(server.get(_of(function_id)).json(), as_json=as_json)


@default.command("set")
@click.argument("function_id")
@click.argument("callback_url")
@click.option("--event", "events", multiple=True, type=click.Choice(EVENTS), help="Of this end; can be repeated.")
@server_options
def set_default_command(
    url: str | None, key: str | None, as_json: bool, function_id: str, callback_url: str, events: tuple[str, ...]
) -> None:
    """Tell the ends of a function's requests to a URL."""
    with asking(url, key) as server:
        _tell_default(
            server.put(_of(function_id), {"url": callback_url, "events": list(events)}).json(), as_json=as_json
        )


@default.command("clear")
@click.argument("function_id")
@server_options
def clear_default_command(url: str | None, key: str | None, as_json: bool, function_id: str) -> None:
    """Tell them no more."""
    with asking(url, key) as server:
        server.delete(_of(function_id))
    if as_json:
        click.echo(json.dumps({"functionId": function_id}))


def _listed(server: Server, query: Mapping[str, str], limit: int | None) -> list[Mapping[str, Any]]:
    """The first `limit` of them, or all."""
    found: list[Mapping[str, Any]] = []
    cursor: dict[str, str] = {}
    while limit is None or len(found) < limit:
        wanted = _PAGE if limit is None else min(_PAGE, limit - len(found))
        page = server.get(f"{AT}/deliveries?{urlencode({**query, 'limit': wanted, **cursor})}").json()
        found += page["deliveries"]
        if "cursor" not in page:
            break
        cursor = {"cursor": page["cursor"]}
    return found


def _redeliver(server: Server, request_id: str) -> None:
    """Waits where the server says that there were too many calls."""
    for _ in range(_PATIENCE):
        with suppress(NotYet):
            server.post(f"{AT}/deliveries/{request_id}/redeliver", {})
            return
        time.sleep(_PAUSE_S)
    raise Failed(f"given up at request {request_id}: the server makes no progress")


def _row(each: Mapping[str, Any]) -> tuple[str, ...]:
    last = str(each.get("lastStatusCode") or each.get("lastError") or "-")
    return each["finishedAt"], each["requestId"], each["event"], each["state"], str(each["tries"]), last, each["url"]


def _described(delivery: Mapping[str, Any]) -> str:
    names = {
        "requestId": "Request",
        "webhookId": "Webhook ID",
        "event": "Event",
        "state": "State",
        "url": "URL",
        "functionId": "Function",
        "functionVersionId": "Version",
        "finishedAt": "Finished",
        "nextAt": "Next try",
    }
    lines = [f"{label:<10} {delivery[name]}" for name, label in names.items() if name in delivery]
    rows = [
        (
            str(each["number"]),
            each["triedAt"],
            f"{each['tookSeconds']:.3f} s",
            str(each.get("statusCode", "-")),
            each.get("error", ""),
        )
        for each in delivery["log"]
    ]
    return "\n".join([*lines, "", table(("TRY", "AT", "TOOK", "STATUS", "ERROR"), rows), "", delivery["payload"]])


def _of(function_id: str) -> str:
    return f"/v2/nvcf/functions/{function_id}/webhook"


def _tell_default(found: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(" ".join([found.get("url", "none"), *found.get("events", [])]))
