"""`fnqueue dead-letters`: what died, of what, and starting it again or throwing it away."""

from __future__ import annotations

import base64
import binascii
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

import click

from fnqueue.calls import Failed, Server
from fnqueue.terminal import asking, server_options, table

AT = "/v2/nvcf/dead-letters"
CAUSES = ("attempts-exhausted", "worker-deaths", "delivery-limit", "rejected", "queue-full", "dead-lettered")
_PAGE = 200
_SHOWN_BYTES = 4096
_LONGEST_WAIT_S = 30.0
# Calls in a row that may come to nothing because the server says to wait.
_PATIENCE = 20


class _Instant(click.ParamType[str]):
    """A time, as RFC 3339 writes it; without an offset, of this machine's clock."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return datetime.fromisoformat(value).astimezone().isoformat()
        except ValueError:
            self.fail(f"{value!r} is no time; write 2026-01-31T08:00:00Z", param, ctx)


def _with(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_narrowing = _with(
    click.option("--function", "function_id", help="Those of this function, by ID."),
    click.option("--version", "version_id", help="Those of this version, by ID."),
    click.option("--cause", "causes", multiple=True, type=click.Choice(CAUSES), help="Of this cause; can be repeated."),
    click.option("--since", type=_Instant(), help="Those that died at this time or later, as 2026-01-31T08:00:00Z."),
    click.option("--until", type=_Instant(), help="Those that died before this time."),
)


@click.group("dead-letters")
def dead_letters() -> None:
    """Requests that ended dead, kept with their inputs: of one API key's account, on a running server."""


@dead_letters.command("list")
@_narrowing
@click.option("--redriven/--not-redriven", default=None, help="Only those that were started again, or were not.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="The most that are shown.")
@server_options
def list_command(url: str | None, key: str | None, as_json: bool, limit: int, **which: Any) -> None:
    """Show dead letters, the latest first."""
    with asking(url, key) as server:
        found = _listed(server, _query(**which), limit)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    rows = [
        (each["diedAt"], each["requestId"], each["functionVersionId"], each["cause"], each.get("redrivenAs", "-"))
        for each in found
    ]
    click.echo(table(("DIED", "REQUEST", "VERSION", "CAUSE", "REDRIVEN AS"), rows))


@dead_letters.command("show")
@click.argument("request_id")
@click.option("--body", is_flag=True, help="Write the input's bytes to standard output, and nothing else.")
@server_options
def show_command(url: str | None, key: str | None, as_json: bool, request_id: str, body: bool) -> None:
    """Show one dead letter with its input."""
    with asking(url, key) as server:
        letter = server.get(f"{AT}/{request_id}").json()
        content = _body(server, letter) if body else b""
    if body:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    elif as_json:
        click.echo(json.dumps(letter, indent=2))
    else:
        click.echo(_described(letter))


@dead_letters.command("causes")
@_narrowing
@click.option("--redriven/--not-redriven", default=None, help="Only those that were started again, or were not.")
@server_options
def causes_command(url: str | None, key: str | None, as_json: bool, **which: Any) -> None:
    """Count dead letters by what they died of."""
    with asking(url, key) as server:
        found = server.get(f"{AT}/causes{_query(**which)}").json()["causes"]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    rows = [(each["cause"], str(each["count"]), each["firstDiedAt"], each["lastDiedAt"]) for each in found]
    click.echo(table(("CAUSE", "COUNT", "FIRST", "LAST"), rows))


@dead_letters.command("redrive")
@click.argument("request_ids", nargs=-1)
@_narrowing
@click.option("--all", "everything", is_flag=True, help="All that were not started again yet.")
@click.option("--to-version", help="Start them on this version of their function.  [default: their own]")
@click.option("--rate", type=click.IntRange(1, 1000), help="The most in a second.  [default: what the server allows]")
@server_options
def redrive_command(
    url: str | None,
    key: str | None,
    as_json: bool,
    request_ids: tuple[str, ...],
    everything: bool,
    to_version: str | None,
    rate: int | None,
    **which: Any,
) -> None:
    """Start dead requests again: those of these IDs, or those that the options choose.

    Each once, as a new request. What was cut off can be asked for again. Exit status 1 if some could not be started.
    """
    redriven: list[Mapping[str, Any]] = []
    left: list[Mapping[str, Any]] = []
    extra = {"functionVersionId": to_version, "perSecond": rate}
    with asking(url, key) as server:
        for select in _selections(request_ids, everything, **which):
            for answer in _calls(server, "redrive", {"select": select, **extra}):
                redriven += answer["redriven"]
                left += answer["left"]
    if as_json:
        click.echo(json.dumps({"redriven": redriven, "left": left}, indent=2))
    else:
        click.echo(table(("REQUEST", "REDRIVEN AS"), [(each["requestId"], each["redrivenAs"]) for each in redriven]))
    if left:
        first = left[0]
        raise click.ClickException(f"{len(left)} were not started; {first['requestId']}: {first['detail']}")


@dead_letters.command("purge")
@click.argument("request_ids", nargs=-1)
@_narrowing
@click.option("--all", "everything", is_flag=True, help="All of them.")
@server_options
def purge_command(
    url: str | None, key: str | None, as_json: bool, request_ids: tuple[str, ...], everything: bool, **which: Any
) -> None:
    """Throw dead letters and their inputs away: those of these IDs, or those that the options choose."""
    count = 0
    with asking(url, key) as server:
        for select in _selections(request_ids, everything, **which):
            for answer in _calls(server, "purge", {"select": select}):
                count += answer["purged"]
    click.echo(json.dumps({"purged": count}) if as_json else f"{count} purged")


def _query(
    *,
    function_id: str | None,
    version_id: str | None,
    causes: Sequence[str],
    since: str | None,
    until: str | None,
    redriven: bool | None,
) -> str:
    given = {
        "functionId": function_id,
        "functionVersionId": version_id,
        "cause": ",".join(causes),
        "diedAfter": since,
        "diedBefore": until,
        "redriven": None if redriven is None else str(redriven).lower(),
    }
    return "?" + urlencode({name: value for name, value in given.items() if value})


def _selections(
    request_ids: Sequence[str],
    everything: bool,
    *,
    function_id: str | None,
    version_id: str | None,
    causes: Sequence[str],
    since: str | None,
    until: str | None,
) -> list[dict[str, Any]]:
    given = {
        "functionId": function_id,
        "functionVersionId": version_id,
        "causes": list(causes),
        "diedAfter": since,
        "diedBefore": until,
    }
    narrowed = {name: value for name, value in given.items() if value}
    if sum((bool(request_ids), bool(narrowed), everything)) != 1:
        raise click.UsageError("say which: by IDs, by options such as --cause, or --all")
    if request_ids:
        return [{"requestIds": list(request_ids[at : at + 100])} for at in range(0, len(request_ids), 100)]
    return [narrowed or {"all": True}]


def _listed(server: Server, query: str, limit: int) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    cursor = ""
    while len(found) < limit:
        page = server.get(f"{AT}{query}&limit={min(_PAGE, limit - len(found))}{cursor}").json()
        found += page["deadLetters"]
        if "cursor" not in page:
            break
        cursor = f"&cursor={page['cursor']}"
    return found


def _calls(server: Server, verb: str, content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The answers to one call after another, to the end; a server that says to wait is waited for."""
    asked = {name: value for name, value in content.items() if value is not None}
    vain = 0
    while True:
        answer = server.post(f"{AT}/{verb}", asked).json()
        yield answer
        if "cursor" not in answer:
            return
        asked["cursor"] = answer["cursor"]
        vain = 0 if answer.get("redriven") or answer.get("purged") else vain + 1
        if vain > _PATIENCE:
            raise Failed(f"given up: {answer.get('stopped', 'the server makes no progress')}")
        if "stopped" in answer:
            click.echo(f"waiting: {answer['stopped']}", err=True)
            time.sleep(min(_LONGEST_WAIT_S, answer.get("retryAfterSeconds", 1.0)))


def _body(server: Server, letter: Mapping[str, Any]) -> bytes:
    given = letter.get("input")
    if given is None:
        raise Failed("the input is shown to the account that sent it, and to nobody else")
    if "bodyUrl" in given:
        return server.fetch(given["bodyUrl"])
    try:
        return base64.b64decode(given.get("body", ""), validate=True)
    except binascii.Error as exc:
        raise Failed("the server did not send the input in Base64") from exc


def _described(letter: Mapping[str, Any]) -> str:
    names = {
        "requestId": "Request",
        "cause": "Cause",
        "reason": "Reason",
        "attempts": "Attempts",
        "functionId": "Function",
        "functionVersionId": "Version",
        "createdAt": "Accepted",
        "diedAt": "Died",
        "keptUntil": "Kept until",
        "redrivenAs": "Redriven as",
        "sizeBytes": "Input bytes",
    }
    lines = [f"{label:<12} {letter[name]}" for name, label in names.items() if name in letter]
    given = letter.get("input", {})
    lines += [f"{'':<12} {header['name']}: {header['value']}" for header in given.get("headers", [])]
    if "bodyUrl" in given:
        lines.append(f"{'Input':<12} {given['bodyUrl']}")
    elif "body" in given:
        content = base64.b64decode(given["body"])[:_SHOWN_BYTES]
        lines += ["", content.decode(errors="backslashreplace")]
    return "\n".join(lines)
