"""`fnqueue status` and `fnqueue cancel`: requests that were accepted before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime

import click

from fnqueue import wire
from fnqueue.blocking import Handle
from fnqueue.errors import Refused
from fnqueue.invoke import expected, follow
from fnqueue.terminal import Line, calling, of_each, refuse, server_options, table


@click.command("status")
@click.argument("request_id")
@click.option("-w", "--watch", is_flag=True, help="Show what happens to it until it ends.")
@click.option("--timeout", type=click.FloatRange(min=0), default=3600.0, show_default=True, help="Seconds to watch.")
@server_options
def status(url: str | None, key: str | None, as_json: bool, request_id: str, watch: bool, timeout: float) -> None:
    """Show where a request stands: its attempts, and where its time went."""
    with calling(url, key) as fnq:
        handle = fnq.handle(request_id)
        if watch:
            follow(handle, Line(), timeout)
        receipt = handle.status()
        click.echo(receipt.to_json().decode() if as_json else _described(receipt, _place(handle, receipt)))


@click.command("cancel")
@click.argument("request_ids", nargs=-1, required=True)
@server_options
def cancel(url: str | None, key: str | None, as_json: bool, request_ids: Sequence[str]) -> None:
    """Cancel requests: none of them starts any more, and one that runs is cut off.

    One that cannot be cancelled keeps none of the others from it, and makes the exit status 1; 2 if only what is no ID
    was in the way.
    """
    with calling(url, key) as fnq:
        found, failed = of_each(request_ids, lambda request_id: fnq.handle(request_id).cancel())
    if as_json:
        told: list[dict[str, str | bool]] = [{"requestId": each, "cancelled": done} for each, done in found.items()]
        told += [{"requestId": each, "cancelled": False, "error": str(exc)} for each, exc in failed.items()]
        click.echo(json.dumps(told, indent=2))
    else:
        for request_id, done in found.items():
            click.echo(f"{request_id}  {'cancelled' if done else 'had ended'}")
    refuse(failed, "cancelled")


def _place(handle: Handle, receipt: wire.RequestReceipt) -> str:
    """Of a request that waits, where the key may ask for it."""
    if receipt.status != "queued":
        return ""
    try:
        place = handle.position()
    except Refused:
        return ""
    return f"{place.position_in_queue} of {place.queue_length or '?'}"


def _described(receipt: wire.RequestReceipt, place: str) -> str:
    facts = {
        "Request": receipt.request_id,
        "Status": receipt.status + (f" ({receipt.status_code})" if receipt.status_code else ""),
        "Position": place,
        "Expected": expected(receipt.eta.p50_seconds, receipt.eta.p90_seconds) if receipt.eta else "",
        "Reason": receipt.reason,
        "Cause": receipt.cause,
        "Function": receipt.function_id,
        "Version": receipt.function_version_id,
        "Accepted": _when(receipt.created_at),
        "Started": _when(receipt.started_at),
        "Ended": _when(receipt.finished_at),
        "Redriven as": receipt.redriven_as,
    }
    lines = [f"{name:<12} {value}" for name, value in facts.items() if value]
    if (timings := receipt.timings) is not None:
        spent = timings.model_dump(exclude_none=True)
        told = (f"{name.removesuffix('_seconds').replace('_', ' ')} {seconds:g} s" for name, seconds in spent.items())
        lines.append(f"{'Time':<12} {', '.join(told)}")
    if receipt.attempts:
        rows = [
            (str(each.number), each.outcome, each.instance_id, _when(each.started_at), each.reason or "-")
            for each in receipt.attempts
        ]
        lines += ["", table(("ATTEMPT", "OUTCOME", "INSTANCE", "STARTED", "REASON"), rows)]
    return "\n".join(lines)


def _when(at: datetime | None) -> str:
    return at.astimezone().isoformat(sep=" ", timespec="seconds") if at else ""
