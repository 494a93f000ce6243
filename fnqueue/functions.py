"""`fnqueue functions`: what can be called, and how it is defined."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from fnqueue import wire
from fnqueue.blocking import Client
from fnqueue.completion import function_names
from fnqueue.errors import NotFound, UnknownFunction
from fnqueue.terminal import Wrong, calling, server_options, table
from fnqueue.wire.fields import Wire

C = TypeVar("C", bound=Callable[..., Any])

VISIBILITIES = ("private", "authorized", "public")
_HEADS = ("FUNCTION", "NAME", "VERSION", "STATUS", "IMAGE")


@click.group("functions")
def functions() -> None:
    """Functions and their versions: list, show, create, delete. `fnqueue deploy` makes one run."""


@functions.command("list")
@click.option(
    "--visibility",
    "visible",
    multiple=True,
    type=click.Choice(VISIBILITIES),
    help="The account's own, those shared with it, or those of everybody; can be repeated.  [default: private]",
)
@click.option("--status", "statuses", multiple=True, help="Only those in this status, as ACTIVE; can be repeated.")
@server_options
def list_command(
    url: str | None, key: str | None, as_json: bool, visible: Sequence[str], statuses: Sequence[str]
) -> None:
    """Show functions, version by version."""
    with calling(url, key) as fnq:
        found = fnq.ask(
            wire.FunctionList, "GET", f"/functions?visibility={','.join(visible or ('private',))}"
        ).functions
    wanted = {status.upper() for status in statuses}
    shown = sorted(
        (one for one in found if not wanted or one.status in wanted), key=lambda one: (one.name, one.created_at)
    )
    click.echo(_json(shown) if as_json else table(_HEADS, [_row(one) for one in shown]))


@functions.command("show")
@click.argument("function", shell_complete=function_names)
@click.option("--version", "version_id", help="This version, by ID.  [default: all]")
@server_options
def show_command(url: str | None, key: str | None, as_json: bool, function: str, version_id: str | None) -> None:
    """Show FUNCTION, by name or ID: its definition, its instances, and what keeps it from running."""
    with calling(url, key) as fnq:
        chosen = [version(fnq, function, version_id)] if version_id else versions(fnq, function)
        # Only what is asked for alone tells of its instances.
        found = [fnq.ask(wire.FunctionAnswer, "GET", path_of(one)).function for one in chosen]
        deployed = [deployment(fnq, one) for one in found]
    if as_json:
        click.echo(_json(found))
        return
    click.echo("\n\n".join(_described(one, its) for one, its in zip(found, deployed, strict=True)))


def _definition(command: C) -> C:
    """The options of what defines a version."""
    for option in reversed(
        (
            click.option(
                "--from",
                "definition",
                type=click.Path(dir_okay=False, path_type=Path),
                help="A JSON file with the definition, as the API takes it; options replace its fields. - is standard "
                "input.",
            ),
            click.option("--image", help="The container's image."),
            click.option("--inference-url", help="The path that is called, as /predict."),
            click.option("--port", type=int, help="The container's port.  [default: 8000]"),
            click.option("--health-url", help="The path of its health check.  [default: /v2/health/ready]"),
            click.option(
                "--env", "environment", multiple=True, metavar="NAME=VALUE", help="For the container; repeatable."
            ),
            click.option("--args", help="Arguments of the container, as one line."),
            click.option("--tag", "tags", multiple=True, help="A word to find it by; can be repeated."),
            click.option("--description", help="What it does."),
            click.option("--queue-timeout", help="How long a request may wait, as PT10M.  [default: no limit]"),
            click.option("--run-timeout", help="How long an attempt may run, as PT1H.  [default: the worker's limit]"),
            click.option("--secret", "secrets", multiple=True, metavar="NAME=VALUE", help="A secret; can be repeated."),
        )
    ):
        command = option(command)
    return command


@functions.command("create")
@click.argument("name", required=False)
@_definition
@server_options
def create_command(url: str | None, key: str | None, as_json: bool, name: str | None, **given: Any) -> None:
    """Make a function NAME with its first version, and print their IDs. It does not run before it is deployed."""
    body = _body(given, name)
    if "name" not in body:
        raise click.UsageError("NAME: give one, or a `name` in the file of --from")
    with calling(url, key) as fnq:
        made = fnq.ask(wire.FunctionAnswer, "POST", "/functions", body).function
    _made(made, as_json)


@functions.group("version")
def version_group() -> None:
    """Versions of a function. One never changes; another one takes its place."""


@version_group.command("add")
@click.argument("function", shell_complete=function_names)
@_definition
@server_options
def add_command(url: str | None, key: str | None, as_json: bool, function: str, **given: Any) -> None:
    """Add a version to FUNCTION, by name or ID, and print its ID.

    What is not given is as in the newest version, but for secrets, which are never shown.
    """
    body = _body(given, None)
    with calling(url, key) as fnq:
        newest = version(fnq, function, None)
        made = fnq.ask(
            wire.FunctionAnswer, "POST", f"/functions/{newest.id}/versions", _kept(newest, body) | body
        ).function
    _made(made, as_json)


@functions.command("delete")
@click.argument("function", shell_complete=function_names)
@click.option("--version", "version_id", help="This version, by ID.")
@click.option("--all", "everything", is_flag=True, help="All its versions, and so the function.")
@server_options
def delete_command(
    url: str | None, key: str | None, as_json: bool, function: str, version_id: str | None, everything: bool
) -> None:
    """Delete versions of FUNCTION, by name or ID, in any status. What runs of them is stopped."""
    if bool(version_id) == everything:
        raise click.UsageError("say which: --version ID, or --all")
    with calling(url, key) as fnq:
        chosen = versions(fnq, function) if everything else [version(fnq, function, version_id)]
        for one in chosen:
            fnq.tell("DELETE", path_of(one))
    if as_json:
        click.echo(
            json.dumps({"deleted": [{"functionId": one.id, "functionVersionId": one.version_id} for one in chosen]})
        )
    else:
        click.echo("\n".join(f"{one.version_id}  deleted" for one in chosen))


def versions(fnq: Client, function: str) -> list[wire.Function]:
    """Those of a function by name or ID, the oldest first. Raises NotFound, UnknownFunction."""
    found = fnq.ask(wire.FunctionList, "GET", f"/functions/{fnq.function_id(function)}/versions").functions
    return sorted(found, key=lambda one: one.created_at)


def version(fnq: Client, function: str, version_id: str | None) -> wire.Function:
    """The one of this ID, else the newest. Raises UnknownFunction, NotFound."""
    found = versions(fnq, function)
    for one in reversed(found):
        if version_id is None or one.version_id == version_id.lower():
            return one
    raise UnknownFunction(
        f"{function} has no version {version_id}; it has {', '.join(one.version_id for one in found)}"
    )


def path_of(one: wire.Function) -> str:
    return f"/functions/{one.id}/versions/{one.version_id}"


def deployment(fnq: Client, one: wire.Function) -> wire.Deployment | None:
    """None if it is not deployed, or is somebody else's."""
    try:
        return fnq.ask(wire.DeploymentAnswer, "GET", f"/deployments{path_of(one)}").deployment
    except NotFound:
        return None


def faults(deployed: wire.Deployment | None) -> list[str]:
    """What keeps instances from running, in their own words."""
    return [info.error for info in (deployed.health_info if deployed else None) or [] if info.error]


def delays(one: wire.Function) -> list[str]:
    """Why instances that start are not healthy yet."""
    return [each.error for each in one.active_instances or [] if each.error]


def _described(one: wire.Function, deployed: wire.Deployment | None) -> str:
    health = one.health
    facts = {
        "Function": f"{one.name}, {one.id}",
        "Version": one.version_id,
        "Status": one.status,
        "Image": one.container_image,
        "Calls": f"{one.inference_url} on port {one.inference_port or 8000}",
        "Health": f"{health.protocol} {health.uri} on port {health.port}, {health.expected_status_code}",
        "Arguments": one.container_args,
        "Environment": " ".join(f"{each.key}={each.value}" for each in one.container_environment or []),
        "Secrets": ", ".join(one.secrets or []),
        "Tags": ", ".join(one.tags or []),
        "Limits": ", ".join(
            f"{word} {limit}" for word, limit in (("queued", one.queue_timeout), ("running", one.run_timeout)) if limit
        ),
        "Created": one.created_at.astimezone().isoformat(sep=" ", timespec="seconds"),
        "About": one.description,
    }
    lines = [f"{name:<12} {value}" for name, value in facts.items() if value]
    lines += [
        f"{'Deployed':<12} {each.min_instances} to {each.max_instances} on {each.instance_type or each.gpu}, "
        f"{each.max_request_concurrency} at once in each"
        for each in (deployed.deployment_specifications if deployed else [])
    ]
    if one.active_instances:
        rows = [
            (each.instance_id, each.instance_status, each.instance_type, each.error or "-")
            for each in one.active_instances
        ]
        lines += ["", table(("INSTANCE", "STATUS", "TYPE", "WAITS FOR"), rows)]
    for fault in faults(deployed):
        lines += ["", fault]
    return "\n".join(lines)


def _row(one: wire.Function) -> tuple[str, ...]:
    return (one.id, one.name, one.version_id, one.status, one.container_image or one.helm_chart or "-")


def _made(made: wire.Function, as_json: bool) -> None:
    if as_json:
        click.echo(made.to_json().decode())
    else:
        click.echo(f"function {made.id}\nversion  {made.version_id}")


def _body(given: dict[str, Any], name: str | None) -> dict[str, Any]:
    """Raises click.UsageError, Wrong."""
    filed = _filed(given["definition"]) if given["definition"] is not None else {}
    named = {
        "name": name,
        "containerImage": given["image"],
        "inferenceUrl": given["inference_url"],
        "inferencePort": given["port"],
        "containerArgs": given["args"],
        "description": given["description"],
        "queueTimeout": given["queue_timeout"],
        "runTimeout": given["run_timeout"],
        "healthUri": given["health_url"],
        "tags": list(given["tags"]) or None,
        "containerEnvironment": [{"key": key, "value": value} for key, value in _pairs("--env", given["environment"])]
        or None,
        "secrets": [{"name": key, "value": value} for key, value in _pairs("--secret", given["secrets"])] or None,
    }
    return filed | {field: value for field, value in named.items() if value is not None}


def _filed(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(click.open_file(str(path), "rb").read())
    except OSError as exc:
        raise Wrong(f"--from {path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise Wrong(f"--from {path} is not JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise Wrong(f"--from {path}: must be a JSON object")
    return found


def _pairs(option: str, given: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for each in given:
        name, equals, value = each.partition("=")
        if not (name and equals):
            # It may be a secret without its name.
            raise click.UsageError(f"{option}: write NAME=VALUE")
        pairs.append((name, value))
    return pairs


def _kept(newest: wire.Function, body: Mapping[str, Any]) -> dict[str, Any]:
    """What a new version has in common with another one unless `body` tells otherwise."""
    fields = newest.model_dump(mode="json", by_alias=True, exclude_none=True)
    if "healthUri" in body:
        fields["health"]["uri"] = body["healthUri"]
    return {name: value for name, value in fields.items() if name in _INHERITED}


_INHERITED = {
    field.alias for name, field in wire.CreateFunction.model_fields.items() if name not in ("secrets", "health_uri")
}


def _json(found: Sequence[Wire]) -> str:
    return json.dumps([each.model_dump(mode="json", by_alias=True, exclude_none=True) for each in found], indent=2)
