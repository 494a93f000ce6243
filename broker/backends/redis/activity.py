"""What versions did lately: written by the commands that take a request out of its version, read here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from broker.activity import Histogram, Minute
from broker.backends.redis import keys, scripts
from broker.backends.redis.wire import Command
from broker.model import RequestState

_STATES = {state.value: state for state in RequestState if state.terminal}


def asking(version_id: str, minutes: int) -> Command:
    return scripts.ACTIVITY.call((keys.ledger(version_id),), minutes)


def parse(reply: Sequence[Any], minutes: int) -> tuple[Minute, ...]:
    """What cannot be read counts for nothing."""
    now, *pairs = reply
    found = {int(minute): _minute(int(minute), fields) for minute, fields in zip(pairs[::2], pairs[1::2], strict=True)}
    last = int(now)
    return tuple(found.get(minute) or Minute(at=minute * 60.0) for minute in range(last - minutes + 1, last + 1))


def _minute(minute: int, flat: Sequence[bytes]) -> Minute:
    fields = {
        name.decode(errors="replace"): int(value)
        for name, value in zip(flat[::2], flat[1::2], strict=True)
        if value.isdigit()
    }
    return Minute(
        at=minute * 60.0,
        ends={_STATES[name]: count for name, count in fields.items() if name in _STATES},
        attempts=fields.get("a", 0),
        waits=_histogram(fields, "w"),
        runs=_histogram(fields, "r"),
        cold_starts=_histogram(fields, "s"),
    )


def _histogram(fields: dict[str, int], kind: str) -> Histogram:
    counts = {int(name[1:]): count for name, count in fields.items() if name[0] == kind and name[1:].isdecimal()}
    return Histogram(sum_s=fields.get(f"{kind}:", 0) / 1000, counts=counts)
