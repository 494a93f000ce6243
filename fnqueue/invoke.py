"""`fnqueue invoke`: a function called from a shell, with files in and out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fnqueue.blocking import Handle
from fnqueue.completion import function_names
from fnqueue.events import Done, Queued, Running
from fnqueue.inputs import File
from fnqueue.results import Result
from fnqueue.terminal import Line, calling, server_options

_PATH = click.Path(dir_okay=False, path_type=Path)


@click.command("invoke")
@click.argument("function", shell_complete=function_names)
@click.option("-d", "--data", help="The input as JSON; @PATH reads a file, - standard input.")
@click.option("-i", "--input", "whole", type=_PATH, help="The input as one file of any type; - is standard input.")
@click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    metavar="NAME=PATH",
    help="A file in the field NAME of the JSON; repeatable.",
)
@click.option("-o", "--output", type=_PATH, help="Write the answer to this file.")
@click.option(
    "--files-to", type=click.Path(file_okay=False, path_type=Path), help="Write files that come along to this folder."
)
@click.option("-w", "--watch", is_flag=True, help="Show the place in the queue, then the progress.")
@click.option("--no-wait", is_flag=True, help="Print the request's ID and leave it running.")
@click.option(
    "--stream", is_flag=True, help="Print the answer's events as they come; with --json one JSON object a line."
)
@click.option(
    "--timeout", type=click.FloatRange(min=0), default=3600.0, show_default=True, help="Seconds to wait for the answer."
)
@click.option("--idempotency-key", help="The same key with the same input leads to the same request.")
@click.option("--callback", metavar="URL", help="Tell this webhook how the request ended; `none` tells nobody.")
@click.option("--version", help="A version by ID.  [default: any that is deployed]")
@server_options
def invoke(
    *,
    url: str | None,
    key: str | None,
    as_json: bool,
    function: str,
    data: str | None,
    whole: Path | None,
    files: Sequence[str],
    output: Path | None,
    files_to: Path | None,
    watch: bool,
    no_wait: bool,
    stream: bool,
    timeout: float,
    idempotency_key: str | None,
    callback: str | None,
    version: str | None,
) -> None:
    """Call FUNCTION, by name or ID, and print its answer.

    Files that do not fit into a body are uploaded. Interrupting leaves the request running. Exit status 3: the request
    ended without a result; 4: it goes on.
    """
    if sum((watch, no_wait, stream)) > 1:
        raise click.UsageError("--watch, --no-wait and --stream exclude each other")
    value = _value(data, whole, files)
    line = Line()
    with calling(url, key) as fnq:
        called = fnq.function(function, version=version, callback=callback)
        try:
            handle = called.spawn(value, idempotency_key=idempotency_key, stream=stream, progress=line.uploading)
        finally:
            line.end()
        if no_wait:
            click.echo(json.dumps({"requestId": handle.id}) if as_json else handle.id)
        elif stream:
            _stream(handle, timeout, as_json=as_json)
        else:
            with _awaited(handle, line, timeout, watch=watch) as result:
                _give(result, output=output, files_to=files_to, as_json=as_json)


def follow(handle: Handle, line: Line, timeout_s: float) -> None:
    """Show what happens to a request, until it ends."""
    try:
        for event in handle.events(timeout_s=timeout_s):
            line.show(described(event))
    finally:
        line.end()


def described(event: Queued | Running | Done) -> str:
    if isinstance(event, Queued):
        place = f", {event.position} of {event.length}" if event.position else ""
        return f"queued{place}" + (f", {expected(event.eta.p50_s, event.eta.p90_s)}" if event.eta else "")
    if isinstance(event, Running):
        again = f", attempt {event.attempt}" if event.attempt > 1 else ""
        return f"running{again}" + ("" if event.percent is None else f", {event.percent} %")
    return event.status


def expected(p50_s: float, p90_s: float) -> str:
    return f"done in about {_time(p50_s)} (9 in 10: {_time(p90_s)})"


def _time(seconds: float) -> str:
    """As exact as an estimate deserves."""
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 7200 else f"{round(seconds / 3600)} h"


def _awaited(handle: Handle, line: Line, timeout_s: float, *, watch: bool) -> Result:
    try:
        if watch:
            click.echo(f"request {handle.id}", err=True)
            follow(handle, line, timeout_s)
        return handle.get(timeout_s=timeout_s, progress=line.downloading)
    except KeyboardInterrupt:
        line.end()
        click.echo(f"request {handle.id} goes on: fnqueue status {handle.id}", err=True)
        raise
    finally:
        line.end()


def _give(result: Result, *, output: Path | None, files_to: Path | None, as_json: bool) -> None:
    if output is not None:
        result.save(output)
    written = result.extract(files_to) if files_to is not None else []
    if as_json:
        click.echo(json.dumps(_told(result, output, written), indent=2))
        return
    if output is None:
        sys.stdout.buffer.write(result.content)
        sys.stdout.buffer.flush()
        if sys.stdout.isatty():
            click.echo()
    if result.files and files_to is None:
        click.echo(f"{len(result.files)} files came along: --files-to FOLDER keeps them", err=True)


def _told(result: Result, output: Path | None, written: Sequence[Path]) -> dict[str, Any]:
    """Without the answer where that went to a file; as a string where it is no JSON."""
    told: dict[str, Any] = {"requestId": result.request_id, "statusCode": result.status}
    if output is not None:
        told["output"] = str(output)
    else:
        try:
            told["result"] = result.json()
        except ValueError:
            told["result"] = result.text
    return told | {"files": [str(path) for path in written] or result.files}


def _stream(handle: Handle, timeout_s: float, *, as_json: bool) -> None:
    try:
        for event in handle.stream(timeout_s=timeout_s):
            told = {"event": event.event, "id": event.id, "data": event.data}
            click.echo(json.dumps(told) if as_json else event.data)
    except KeyboardInterrupt:
        click.echo(f"request {handle.id} is cancelled by the server soon, as nobody reads its stream", err=True)
        raise


def _value(data: str | None, whole: Path | None, files: Sequence[str]) -> Any:
    """Raises click.UsageError."""
    if whole is not None:
        if data is not None or files:
            raise click.UsageError("--input is all of the input: give --data and --file without it")
        return File(sys.stdin.buffer) if str(whole) == "-" else whole
    value = {} if data is None else _parsed(data)
    if not files:
        return value
    if not isinstance(value, dict):
        raise click.UsageError("--file names a field of --data, which is no JSON object")
    for given in files:
        name, equals, path = given.partition("=")
        if not (name and equals and path):
            raise click.UsageError(f"--file {given!r}: write NAME=PATH")
        value[name] = Path(path)
    return value


def _parsed(data: str) -> Any:
    try:
        if data == "-":
            return json.loads(sys.stdin.buffer.read())
        return json.loads(Path(data[1:]).read_bytes() if data.startswith("@") else data)
    except OSError as exc:
        raise click.UsageError(f"--data {data}: {exc.strerror}") from exc
    except ValueError as exc:
        raise click.UsageError(f"--data is not JSON: {exc}") from exc
