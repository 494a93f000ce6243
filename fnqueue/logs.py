"""`fnqueue logs`: what instances write, and what those said that died."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from urllib.parse import urlencode

import click

from fnqueue.blocking import Client
from fnqueue.completion import function_names
from fnqueue.functions import deployment, path_of, version
from fnqueue.terminal import Wrong, calling, server_options
from fnqueue.wire import Function, FunctionAnswer, HealthInfo, InstanceLogs, LogLine, LogLines

MOST_TAIL = 1000
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SHORT = 8
_UUID = 36
# Of what a container writes, nothing may move the cursor or change the screen of whoever reads.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if code != ord("\t")}


def _since(ctx: click.Context, parameter: click.Parameter, text: str | None) -> datetime | None:
    if text is None:
        return None
    digits, unit_s = text[:-1], _UNITS_S.get(text[-1:], 0)
    try:
        if unit_s and digits.isascii() and digits.isdigit():
            return datetime.now(UTC) - timedelta(seconds=int(digits) * unit_s)
        at = datetime.fromisoformat(text)
        return at if at.tzinfo else at.astimezone()
    except (ValueError, OverflowError) as exc:
        raise click.BadParameter("write 90s, 30m, 12h or 2d, or a time, as 2026-01-31T08:00:00Z") from exc


@click.command("logs")
@click.argument("function", shell_complete=function_names)
@click.option("--version", "version_id", help="This version, by ID.  [default: the newest]")
@click.option("--instance", help="This instance, by ID or how its ID begins.  [default: all]")
@click.option(
    "-n",
    "--tail",
    type=click.IntRange(0, MOST_TAIL),
    default=100,
    show_default=True,
    help="How many of the last lines.",
)
@click.option("--since", callback=_since, help="No older lines: 90s, 30m, 12h or 2d ago, or a time with its offset.")
@click.option("-f", "--follow", is_flag=True, help="Show what is written from now on, too, until Ctrl-C.")
@click.option("-p", "--previous", is_flag=True, help="Only of instances that were stopped or died in the last hour.")
@click.option("-t", "--timestamps", is_flag=True, help="Say when each line was written.")
@server_options
def logs(
    *,
    url: str | None,
    key: str | None,
    as_json: bool,
    function: str,
    version_id: str | None,
    instance: str | None,
    tail: int,
    since: datetime | None,
    follow: bool,
    previous: bool,
    timestamps: bool,
) -> None:
    """Show what the instances of FUNCTION, by name or ID, write; while none runs, also the last words of one that died.

    Each line begins with its instance. Lines of a sidecar are what it says about the container. `fnqueue dev` and
    process:// keep no times of lines: all of an instance have that of its last one.

    Of instances that were stopped or died in the last hour there are up to 200 lines each, of the newest five; the last
    one of each, `instance_ended`, says how. Where a new one has written a lot since, --previous shows those alone. On
    Kubernetes `kubectl logs --previous` has them.

    With --json and --follow there is one JSON object a line.
    """
    if previous and follow:
        raise click.UsageError("--previous shows what is over: it cannot be followed")
    with calling(url, key) as fnq:
        one = version(fnq, function, version_id)
        asked = {"tail": str(tail)} | ({"previous": "true"} if previous else {})
        if instance is not None:
            asked["instanceId"] = _instance(fnq, one, instance)
        if since is not None:
            asked["since"] = since.isoformat()
        path, query = f"/logs{path_of(one)}", urlencode(asked)
        if follow:
            for found in fnq.listen(LogLines, f"{path}/events?{query}"):
                _show(found.lines, timestamps=timestamps, as_json=as_json)
            click.echo(f"{one.version_id} is not deployed any more", err=True)
            return
        last = fnq.ask(InstanceLogs, "GET", f"{path}?{query}")
        deployed = deployment(fnq, one)
    failures = (deployed.health_info if deployed and not previous else None) or []
    if as_json:
        click.echo(_json(last, failures))
        return
    _show(last.lines, timestamps=timestamps, as_json=False)
    for failure in failures:
        click.echo(f"{failure.instance_type}:\n" + "\n".join(map(_plain, failure.error.splitlines())))
    _show_missing(last)
    if previous and not (last.lines or last.ended):
        click.echo(f"{one.status}: no instance of {one.version_id} that has ended has lines here", err=True)
    elif not (last.lines or failures or last.unanswered or last.ended):
        click.echo(f"{one.status}: no instance of {one.version_id} has written anything, and none has failed", err=True)


def _show_missing(last: InstanceLogs) -> None:
    """Whose lines are not among these, and why."""
    shown = {line.instance_id for line in last.lines}
    for ended in last.ended:
        if ended.instance_id not in shown:
            at = ended.ended_at.astimezone().isoformat(timespec="seconds")
            told = f"{ended.instance_id}: ended at {at}, {_plain(ended.cause)}; --previous shows its last lines"
            click.echo(told, err=True)
    for instance_id in last.unanswered:
        click.echo(f"{instance_id}: its logs did not come in time; no controller that runs it answers", err=True)


def _instance(fnq: Client, one: Function, given: str) -> str:
    """One that runs, or else one that has ended. Raises Wrong: none, or several, that begin so."""
    there = fnq.ask(FunctionAnswer, "GET", path_of(one)).function.active_instances or []
    ids = [each.instance_id for each in there]
    if len(given) == _UUID and given.lower() not in ids:
        return given
    found = [instance_id for instance_id in ids if instance_id.startswith(given.lower())]
    gone: list[str] = []
    if not found:
        ended = fnq.ask(InstanceLogs, "GET", f"/logs{path_of(one)}?tail=0&previous=true").ended
        gone = [each.instance_id for each in ended]
        found = [instance_id for instance_id in gone if instance_id.startswith(given.lower())]
    if len(found) == 1:
        return found[0]
    raise Wrong(
        f"--instance {given}: {'several begin so' if found else 'there is none'}; running are {_listed(ids)}"
        + (f", ended in the last hour {_listed(gone)}" if gone else "")
    )


def _listed(ids: list[str]) -> str:
    return ", ".join(ids) or "none"


def _show(lines: Iterable[LogLine], *, timestamps: bool, as_json: bool) -> None:
    for line in lines:
        if as_json:
            click.echo(line.to_json())
            continue
        whose = line.instance_id[:_SHORT] + ("" if line.part == "container" else f" {line.part}")
        at = f"{line.at.astimezone().isoformat(timespec='milliseconds')} " if timestamps else ""
        click.echo(f"{at}[{whose}] {_plain(line.text)}")


def _plain(text: str) -> str:
    return click.unstyle(text).translate(_CONTROLS)


def _json(last: InstanceLogs, failures: Iterable[HealthInfo]) -> str:
    told = last.model_dump(mode="json", by_alias=True)
    told["failures"] = [each.model_dump(mode="json", by_alias=True, exclude_none=True) for each in failures]
    return json.dumps(told, indent=2)
