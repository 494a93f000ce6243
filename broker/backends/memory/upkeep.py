"""Upkeep in one process, where books and records are one thing and nothing comes apart."""

from __future__ import annotations

from collections import Counter

from broker.backends.memory.results import MemoryResults
from broker.model import Job, RequestState, Survey


class MemoryUpkeep:
    """Over the records of a MemoryResults."""

    def __init__(self, results: MemoryResults) -> None:
        self._results = results

    async def survey(self, cursor: int, *, limit: int) -> Survey:
        """Of entries that came and went between two looks, some may be missed."""
        entries = self._results.entries()
        part = entries[cursor : cursor + limit]
        expired = sum(self._results.expire(entry) for entry in part)
        following = cursor + limit
        return Survey(
            cursor=following if following < len(entries) else 0,
            states=Counter(entry.state for entry in part),
            expired=expired,
        )

    async def straighten(self, version_id: str, *, skip: int, limit: int) -> tuple[int, bool]:
        return 0, False

    async def restore(self, job: Job) -> RequestState:
        entry = self._results.put_back(job)
        self._results.expire(entry)
        return entry.state

    async def set_aside(self, version_id: str, *, older_than_s: float, limit: int) -> int:
        before = self._results.now() - older_than_s
        waiting = self._results.waiting(version_id)[:limit]
        forgotten = [entry for entry in waiting if entry.created_at <= before and not entry.not_before]
        for entry in forgotten:
            self._results.set_aside(entry)
        return len(forgotten)
