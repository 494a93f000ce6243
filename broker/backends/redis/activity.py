"""What versions did lately: written by the commands that take a request out of its version, read here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from broker.activity import Histogram, Minute, step_of
from broker.backends.redis import keys, scripts
from broker.backends.redis.wire import Command
from broker.model import RequestState

_STATES = {state.value: state for state in RequestState if state.terminal}
_LINE = re.compile(rb"(\d{1,15}) ([a-z-]+) (\d{1,9}) (\d{1,15}) (\d{1,15}) (\d{1,15}) (\d{1,15}) (\d{1,15})\n")


def asking(version_id: str, minutes: int) -> Command:
    return scripts.ACTIVITY.call((keys.ledger(version_id),), minutes)


def parse(reply: Sequence[Any], minutes: int) -> tuple[Minute, ...]:
    """What cannot be read counts for nothing."""
    now, lines, *pairs = reply
    counted = {int(minute): _counts(fields) for minute, fields in zip(pairs[::2], pairs[1::2], strict=True)}
    for line in _LINE.findall(lines):
        _add(counted, *line)
    found = {minute: _minute(minute, fields) for minute, fields in counted.items()}
    last = int(now)
    return tuple(found.get(minute) or Minute(at=minute * 60.0) for minute in range(last - minutes + 1, last + 1))


def _counts(flat: Sequence[bytes]) -> dict[str, int]:
    return {
        name.decode(errors="replace"): int(value)
        for name, value in zip(flat[::2], flat[1::2], strict=True)
        if value.isdigit()
    }


def _add(counted: dict[int, dict[str, int]], ended: bytes, state: bytes, attempts: bytes, *times: bytes) -> None:
    """What `scripts` does once there are some."""
    ended_ms, accepted_ms, started_ms, *others_ms = map(int, (ended, *times))
    fields = counted.setdefault(ended_ms // 60_000, {})

    def add(field: str, by: int) -> None:
        fields[field] = fields.get(field, 0) + by

    add(state.decode(), 1)
    add("a", int(attempts))
    if not started_ms:
        return
    spent = [("w", started_ms - accepted_ms), ("r", ended_ms - started_ms)]
    spent += [(kind, ms) for kind, ms in zip("sil", others_ms, strict=True) if ms]
    for kind, ms in spent:
        add(f"{kind}:", max(0, ms))
        add(f"{kind}{step_of(ms / 1000)}", 1)


def _minute(minute: int, fields: dict[str, int]) -> Minute:
    return Minute(
        at=minute * 60.0,
        ends={_STATES[name]: count for name, count in fields.items() if name in _STATES},
        attempts=fields.get("a", 0),
        waits=_histogram(fields, "w"),
        runs=_histogram(fields, "r"),
        cold_starts=_histogram(fields, "s"),
        starts=_histogram(fields, "i"),
        leads=_histogram(fields, "l"),
    )


def _histogram(fields: dict[str, int], kind: str) -> Histogram:
    counts = {int(name[1:]): count for name, count in fields.items() if name[0] == kind and name[1:].isdecimal()}
    return Histogram(sum_s=fields.get(f"{kind}:", 0) / 1000, counts=counts)
