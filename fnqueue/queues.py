"""`fnqueue queue`: how long the queues are."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click

from fnqueue.blocking import Client
from fnqueue.client import FunctionVersion
from fnqueue.completion import function_names
from fnqueue.errors import Forbidden, NotFound
from fnqueue.terminal import Screen, calling, server_options, table
from fnqueue.wire import QueueDepth

_AT_ONCE = 8
# A narrow terminal cuts off the end.
_HEADS = ("FUNCTION", "STATUS", "WAITING", "RUNNING", "OLDEST", "VERSION")
# Those of others have no queue.
_DEPLOYED = frozenset({"ACTIVE", "DEPLOYING", "DEGRADING", "DEGRADED"})
_BROKEN = "ERROR"


@click.command("queue")
@click.argument("functions", nargs=-1, shell_complete=function_names)
@click.option("-w", "--watch", is_flag=True, help="Show it again and again, until interrupted.")
@click.option(
    "--every", type=click.FloatRange(min=1.0), default=2.0, show_default=True, help="Seconds between two looks."
)
@server_options
def queue(url: str | None, key: str | None, as_json: bool, functions: Sequence[str], watch: bool, every: float) -> None:
    """Show what waits and what runs: of FUNCTIONS, by name or ID, or of all that are deployed.

    Versions in ERROR come last: no server tells what waits for them (with --json `queueDepth` is null).
    """
    screen = Screen()
    with calling(url, key) as fnq, ThreadPoolExecutor(_AT_ONCE) as threads:
        while True:
            found = _queues(fnq, functions, threads)
            text = (
                json.dumps([_told(each) for each in found])
                if as_json
                else table(_HEADS, [_row(each) for each in found])
            )
            if not watch:
                click.echo(text)
                return
            screen.show(text)
            time.sleep(every)


def _queues(fnq: Client, functions: Sequence[str], threads: ThreadPoolExecutor) -> list[QueueDepth | FunctionVersion]:
    """The longest first, and then versions in ERROR: they have no queue to ask for."""
    listed = _listed(fnq, functions)
    broken = [each for each in listed if each.status == _BROKEN]
    asked = functions or sorted({each.id for each in listed if each.status in _DEPLOYED})

    def look(function: str) -> list[QueueDepth]:
        try:
            return fnq.function(function).queues()
        except NotFound:
            if functions and not any(function in (each.id, each.name) for each in broken):
                raise
            return []  # or undeployed since it was listed

    found = [each for some in threads.map(look, asked) for each in some]
    found.sort(key=lambda each: (-each.queue_depth, -(each.in_flight or 0), each.function_name))
    return [*found, *sorted(broken, key=lambda each: each.name)]


def _listed(fnq: Client, functions: Sequence[str]) -> list[FunctionVersion]:
    """All, or those of `functions`, as far as the key may list any: for a queue that is named it need not."""
    if not functions:
        return fnq.functions()
    try:
        return [each for each in fnq.functions() if each.id in functions or each.name in functions]
    except Forbidden:
        return []


def _told(found: QueueDepth | FunctionVersion) -> dict[str, Any]:
    if isinstance(found, QueueDepth):
        return found.model_dump(by_alias=True, exclude_none=True)
    return {
        "functionVersionId": found.version_id,
        "functionName": found.name,
        "functionStatus": found.status,
        "queueDepth": None,
    }


def _row(found: QueueDepth | FunctionVersion) -> tuple[str, ...]:
    if not isinstance(found, QueueDepth):
        return found.name, found.status, "-", "-", "-", found.version_id
    has_age = found.queue_depth and found.oldest_age_seconds is not None
    return (
        found.function_name,
        found.function_status,
        str(found.queue_depth),
        "-" if found.in_flight is None else str(found.in_flight),
        f"{found.oldest_age_seconds:.0f} s" if has_age else "-",
        found.function_version_id,
    )
