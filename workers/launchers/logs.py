"""What instances write, read from where it is; and the logs of those that are gone: a folder each, the newest few of
them."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from broker.model import Ended, LogExcerpt, LogLine
from broker.ports import ENDED_KEPT_S, LOG_BYTES, LOG_LINES

KEPT = 20
LEFT_OUT = "[fnqueue] lines were left out here: more was written than is copied"

_START = "0"
_ENDED = "ended.json"
_STAMPED = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d) ?(.*)", re.ASCII | re.DOTALL)
_NS = 1_000_000_000


def of_file(path: Path, *, after: str) -> LogExcerpt:
    """The latest whole lines of a file behind a position, which is an offset in bytes. A file knows no times: all lines
    have that of its last write."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            begun = int(after or _START)
            if begun > status.st_size:  # it is another one
                begun, after = 0, ""
            start = max(begun, status.st_size - LOG_BYTES)
            file.seek(start)
            content = file.read(LOG_BYTES)
    except FileNotFoundError:
        return LogExcerpt(lines=(), position=after or _START)
    whole = content.rfind(b"\n") + 1 or (len(content) if len(content) == LOG_BYTES else 0)
    texts = content[:whole].decode(errors="replace").split("\n")[: -1 if content[:whole].endswith(b"\n") else None]
    if start > begun and len(texts) > 1:
        texts = texts[1:]  # the rest of a line
    lines = [LogLine(status.st_mtime, text.rstrip("\r")) for text in texts if whole]
    return _latest(lines, position=str(start + whole), gap=start > begun, first=not after)


def stamped(text: str, *, after: str) -> LogExcerpt:
    """The latest lines behind a position of a log in which each begins with its time. Many have the same, where an
    engine tells seconds: the position is a time in nanoseconds and how many lines of it were read."""
    begun_ns, known = _place(after)
    latest_ns, latest, total, oldest_ns = begun_ns, 0, 0, 0
    lines: list[LogLine] = []
    is_new = False
    for line in text.removesuffix("\n").split("\n"):
        found = _STAMPED.match(line)
        if found is not None:
            at_ns = _nanoseconds(found)
            total, oldest_ns = total + 1, oldest_ns or at_ns
            if at_ns >= latest_ns:
                latest_ns, latest = at_ns, latest + 1 if at_ns == latest_ns else 1
            is_new = at_ns > begun_ns or (at_ns == begun_ns and latest > known)
            if is_new:
                lines.append(LogLine(at_ns / _NS, found[4].rstrip("\r")))
        elif is_new:
            lines.append(LogLine(lines[-1].at, line))
    # A log that was cut off here may have had more before it.
    gap = total >= LOG_LINES and oldest_ns >= begun_ns
    position = f"{latest_ns}/{max(latest, known) if latest_ns == begun_ns else latest}"
    return _latest(lines, position=position, gap=gap, first=not after)


def since_s(after: str) -> int:
    """A time in unix seconds before the position in a log with times; 0: from its beginning."""
    return max(0, _place(after)[0] // _NS - 1)


def _place(position: str) -> tuple[int, int]:
    at_ns, _, known = (position or _START).partition("/")
    return int(at_ns), int(known or 0)


def _latest(lines: list[LogLine], *, position: str, gap: bool, first: bool) -> LogExcerpt:
    """The last LOG_LINES of them in LOG_BYTES. What a first look leaves out is not missed."""
    room, kept = LOG_BYTES, 0
    for line in reversed(lines[-LOG_LINES:]):
        room -= len(line.text.encode()) + 1
        if room < 0 and kept:
            break
        kept += 1
    latest = lines[len(lines) - kept :]
    if (gap or kept < len(lines)) and not first and latest:
        latest.insert(0, LogLine(latest[0].at, LEFT_OUT))
    return LogExcerpt(lines=tuple(latest), position=position)


def _nanoseconds(found: re.Match[str]) -> int:
    seconds = int(datetime.fromisoformat(found[1] + found[3]).timestamp())
    return seconds * _NS + int((found[2] or "").ljust(9, "0"))


def keep(root: Path, instance_id: str, logs: Mapping[str, str]) -> None:
    """Write `logs` (file name to text) into the instance's folder under `root`."""
    folder = root / instance_id
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, text in logs.items():
        (folder / name).write_text(text, encoding="utf-8")


def note_end(root: Path, ended: Ended) -> None:
    """Write down in the instance's folder that it is no more; without one there is nothing to tell."""
    folder = root / ended.instance_id
    if folder.is_dir():
        facts = {"version_id": ended.version_id, "at": ended.at, "cause": ended.cause}
        (folder / _ENDED).write_text(json.dumps(facts), encoding="utf-8")


def ended(root: Path) -> list[Ended]:
    """The instances whose end was noted in the last ENDED_KEPT_S and whose folders are still there, newest first."""
    found = []
    for path in root.glob(f"*/{_ENDED}"):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            one = Ended(
                instance_id=path.parent.name,
                version_id=str(facts["version_id"]),
                at=float(facts["at"]),
                cause=str(facts["cause"]),
            )
        except (OSError, ValueError, KeyError, TypeError):  # it makes way just now, or was half written
            continue
        if time.time() - one.at < ENDED_KEPT_S:
            found.append(one)
    return sorted(found, key=lambda one: one.at, reverse=True)


def has_ended(root: Path, instance_id: str) -> bool:
    return (root / instance_id / _ENDED).exists()


def cause_of(error: str) -> str:
    """One line of a dead instance's error; one that was alive was stopped."""
    return error.partition("\n")[0] or "stopped"


def forget_oldest(root: Path, *, in_use: Callable[[Path], bool] = lambda _: False) -> None:
    """Leave the newest `KEPT` folders of `root` that are not in use."""
    over = [path for path in root.iterdir() if path.is_dir() and not in_use(path)]
    for old in sorted(over, key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
