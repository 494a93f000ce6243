"""InstanceLogs of one process: the reference reading of the port."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice

from broker.errors import Overloaded
from broker.model import LogBatch, Look, Part
from broker.ports import LOGS_KEPT_BYTES, LOGS_KEPT_S, MOST_ACCOUNT_LOOKS, MOST_LOOKS


@dataclass(slots=True)
class _Log:
    batches: deque[LogBatch] = field(default_factory=deque)
    positions: dict[tuple[str, Part], str] = field(default_factory=dict)
    kept_bytes: int = 0
    until: float = 0.0


class MemoryInstanceLogs:
    """`now` is the clock; tests hand in their own."""

    def __init__(self, *, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._looks: dict[Look, float] = {}
        self._logs: dict[str, _Log] = {}
        self._last = 0

    async def look(self, look: Look, *, ttl_s: float) -> None:
        looks = await self.looks()
        mine = sum(other.account == look.account for other in looks)
        if look not in looks and (len(looks) >= MOST_LOOKS or mine >= MOST_ACCOUNT_LOOKS):
            raise Overloaded("too many logs are being read; end one, or try again", retry_after_s=ttl_s)
        if all(other.version_id != look.version_id for other in looks):
            self._logs.pop(look.version_id, None)
        self._looks[look] = self._now() + ttl_s

    async def looks(self) -> list[Look]:
        now = self._now()
        self._looks = {look: until for look, until in self._looks.items() if until > now}
        self._logs = {key: log for key, log in self._logs.items() if log.until > now}
        return list(self._looks)

    async def positions(self, version_id: str) -> Mapping[tuple[str, Part], str]:
        return dict(self._log(version_id).positions)

    async def append(self, batch: LogBatch, *, before: str, after: str) -> bool:
        log, source = self._log(batch.version_id), (batch.instance_id, batch.part)
        if log.positions.get(source, "") != before:
            return False
        self._logs[batch.version_id] = log
        log.positions[source] = after
        log.until = self._now() + LOGS_KEPT_S
        if batch.lines:
            self._last += 1
            log.batches.append(replace(batch, id=f"{self._last}-0"))
            log.kept_bytes += _size(batch)
            while log.kept_bytes > LOGS_KEPT_BYTES and len(log.batches) > 1:
                log.kept_bytes -= _size(log.batches.popleft())
        return True

    async def read(self, version_id: str, *, after: str = "", limit: int) -> list[LogBatch]:
        behind = _place(after)
        return list(islice((each for each in self._log(version_id).batches if _place(each.id) > behind), limit))

    def _log(self, version_id: str) -> _Log:
        log = self._logs.get(version_id)
        return log if log is not None and log.until > self._now() else _Log()


def _size(batch: LogBatch) -> int:
    return sum(len(line.text.encode()) for line in batch.lines)


def _place(batch_id: str) -> tuple[int, int]:
    first, _, second = (batch_id or "0-0").partition("-")
    return int(first), int(second or 0)
