"""`fnqueue top`: what goes on now, function by function."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import click

from fnqueue.blocking import Client
from fnqueue.errors import NotFound
from fnqueue.functions import path_of
from fnqueue.terminal import Screen, calling, server_options, table
from fnqueue.wire import Function, FunctionAnswer, FunctionList, QueueDepth

_AT_ONCE = 8
# A narrow terminal cuts off the end.
_HEADS = ("FUNCTION", "STATUS", "WAITING", "OLDEST", "RUNNING", "INSTANCES", "VERSION")
_BROKEN = "ERROR"
_DEPLOYED = frozenset({"ACTIVE", "DEPLOYING", "DEGRADING", "DEGRADED", _BROKEN})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """`up` of its `instances` take work."""

    version: Function
    queue: QueueDepth | None
    up: int
    instances: int


@click.command("top")
@click.option(
    "--every", type=click.FloatRange(min=1.0), default=2.0, show_default=True, help="Seconds between two looks."
)
@click.option("--count", type=click.IntRange(min=1), help="End after so many looks.  [default: when interrupted]")
@server_options
def top(url: str | None, key: str | None, as_json: bool, every: float, count: int | None) -> None:
    """Show all deployed functions, again and again: what waits and for how long, what runs, and on how many instances.

    In a terminal in one place, elsewhere one table after the other; with --json a line for each look. Of versions in
    ERROR no server tells what waits and runs (with --json null).
    """
    screen = Screen()
    with calling(url, key) as fnq, ThreadPoolExecutor(_AT_ONCE) as threads:
        looks = 0
        while True:
            rows = _look(fnq, threads)
            screen.show(json.dumps([_told(row) for row in rows]) if as_json else _page(rows))
            looks += 1
            if looks == count:
                return
            time.sleep(every)


def _look(fnq: Client, threads: ThreadPoolExecutor) -> list[_Row]:
    """Those with the longest queue first."""
    listed = fnq.ask(FunctionList, "GET", "/functions?visibility=private").functions
    deployed = [one for one in listed if one.status in _DEPLOYED]

    def row(one: Function) -> _Row | None:
        try:
            found = fnq.ask(FunctionAnswer, "GET", path_of(one)).function
            # In ERROR it has no queue to ask for.
            is_broken = found.status == _BROKEN
            queues = [] if is_broken else fnq.function(one.id, version=one.version_id).queues()
        except NotFound:
            return None  # undeployed since it was listed
        instances = found.active_instances or []
        up = sum(each.instance_status == "RUNNING" for each in instances)
        return _Row(version=found, queue=queues[0] if queues else None, up=up, instances=len(instances))

    rows = [each for each in threads.map(row, deployed) if each is not None]
    return sorted(rows, key=lambda each: (-_waiting(each), -_running(each), each.version.name))


def _waiting(row: _Row) -> int:
    return row.queue.queue_depth if row.queue else 0


def _running(row: _Row) -> int:
    return (row.queue.in_flight or 0) if row.queue else 0


def _page(rows: Sequence[_Row]) -> str:
    sums = (
        f"{time.strftime('%H:%M:%S')}  {len(rows)} deployed, {sum(map(_waiting, rows))} waiting, "
        f"{sum(map(_running, rows))} running, {sum(row.up for row in rows)} of {sum(row.instances for row in rows)} "
        "instances up"
    )
    return f"{sums}\n\n{table(_HEADS, [_cells(row) for row in rows])}"


def _cells(row: _Row) -> tuple[str, ...]:
    return (
        row.version.name,
        row.version.status,
        str(_waiting(row)) if row.queue else "-",
        f"{_oldest_s(row):.0f} s" if _waiting(row) else "-",
        str(_running(row)) if row.queue else "-",
        f"{row.up}/{row.instances}",
        row.version.version_id,
    )


def _oldest_s(row: _Row) -> float:
    return (row.queue.oldest_age_seconds or 0.0) if row.queue else 0.0


def _told(row: _Row) -> dict[str, str | int | float | None]:
    return {
        "functionId": row.version.id,
        "functionVersionId": row.version.version_id,
        "name": row.version.name,
        "status": row.version.status,
        "queueDepth": _waiting(row) if row.queue else None,
        "oldestAgeSeconds": _oldest_s(row) if row.queue else None,
        "inFlight": _running(row) if row.queue else None,
        "instances": row.instances,
        "instancesRunning": row.up,
    }
