"""`fnqueue queue`: how long the queues are."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click

from fnqueue.blocking import Client
from fnqueue.errors import NotFound
from fnqueue.terminal import calling, server_options, table
from fnqueue.wire import QueueDepth

_AT_ONCE = 8
_HEADS = ("FUNCTION", "VERSION", "STATUS", "WAITING", "RUNNING", "OLDEST")
# Those of others have no queue.
_DEPLOYED = frozenset({"ACTIVE", "DEPLOYING", "DEGRADING", "DEGRADED"})


@click.command("queue")
@click.argument("functions", nargs=-1)
@click.option("-w", "--watch", is_flag=True, help="Show it again and again, until interrupted.")
@click.option(
    "--every", type=click.FloatRange(min=1.0), default=2.0, show_default=True, help="Seconds between two looks."
)
@server_options
def queue(url: str | None, key: str | None, as_json: bool, functions: Sequence[str], watch: bool, every: float) -> None:
    """Show what waits and what runs: of FUNCTIONS, by name or ID, or of all that are deployed."""
    with calling(url, key) as fnq, ThreadPoolExecutor(_AT_ONCE) as threads:
        while True:
            found = _queues(fnq, functions, threads)
            if watch and sys.stdout.isatty():
                click.clear()
            click.echo(json.dumps([_told(each) for each in found]) if as_json else table(_HEADS, _rows(found)))
            if not watch:
                return
            time.sleep(every)


def _queues(fnq: Client, functions: Sequence[str], threads: ThreadPoolExecutor) -> list[QueueDepth]:
    """The longest first."""
    asked = functions or sorted({each.id for each in fnq.functions() if each.status in _DEPLOYED})

    def look(function: str) -> list[QueueDepth]:
        try:
            return fnq.function(function).queues()
        except NotFound:
            if functions:
                raise
            return []  # undeployed since it was listed

    found = [each for some in threads.map(look, asked) for each in some]
    return sorted(found, key=lambda each: (-each.queue_depth, -(each.in_flight or 0), each.function_name))


def _told(found: QueueDepth) -> dict[str, Any]:
    return found.model_dump(by_alias=True, exclude_none=True)


def _rows(found: Sequence[QueueDepth]) -> list[tuple[str, ...]]:
    return [
        (
            each.function_name,
            each.function_version_id,
            each.function_status,
            str(each.queue_depth),
            "-" if each.in_flight is None else str(each.in_flight),
            f"{each.oldest_age_seconds:.0f} s" if each.queue_depth and each.oldest_age_seconds is not None else "-",
        )
        for each in found
    ]
