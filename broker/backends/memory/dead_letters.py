"""Dead letters in one process: the reference reading of the DeadLetters port."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace

from broker.backends.memory.results import MemoryResults
from broker.backends.tallies import tallied
from broker.model import DeadLetter, DeadLetterFilter, DeadLetterPage, Job, Redrive, RequestState, Tally
from broker.ports import PAGE_SCAN
from broker.settings import Settings


@dataclass(slots=True, kw_only=True)
class _Kept:
    """`place` is unique in its account, in the order of dying; `bound_at` is since when its redrive has an ID."""

    letter: DeadLetter
    place: int
    bound_at: float = 0.0


class MemoryDeadLetters:
    """Over the records of a MemoryResults."""

    def __init__(self, results: MemoryResults, settings: Settings) -> None:
        self._results = results
        self._settings = settings
        self._kept: dict[str, _Kept] = {}
        self._accounts: dict[str, list[tuple[int, str]]] = {}

    async def keep(self, job: Job, *, size_bytes: int) -> bool:
        if self._find(job.id) is not None:
            return True
        entry = self._results.entry(job.id)
        if entry is None or entry.state is not RequestState.DEAD or entry.lettered:
            return False
        entry.lettered = True
        letter = DeadLetter(
            id=job.id,
            account=entry.account,
            function_id=entry.function_id,
            version_id=entry.version_id,
            cause=entry.cause or "dead-lettered",
            reason=entry.reason,
            attempts=entry.attempt,
            created_at=entry.created_at,
            died_at=int(entry.finished_at * 1000) / 1000,  # what is told in milliseconds can be asked for again
            kept_until=self._results.now() + self._settings.dead_letter_ttl_s,
            size_bytes=size_bytes,
            body_key=job.body_key,
            job=job,
        )
        listed = self._accounts.setdefault(entry.account, [])
        place = int(letter.died_at * 1e6)
        while (at := bisect.bisect_left(listed, (place, ""))) < len(listed) and listed[at][0] == place:
            place += 1
        listed.insert(at, (place, job.id))
        self._kept[job.id] = _Kept(letter=letter, place=place)
        while len(listed) > self._settings.dead_letters_kept:
            self._remove(listed[0][1])
        return True

    async def read(self, request_id: str) -> DeadLetter | None:
        kept = self._find(request_id)
        return kept.letter if kept else None

    async def glance(self, request_id: str) -> DeadLetter | None:
        kept = self._find(request_id)
        return replace(kept.letter, job=None) if kept else None

    async def page(self, account: str, wanted: DeadLetterFilter, *, limit: int, after: int = 0) -> DeadLetterPage:
        found: list[DeadLetter] = []
        behind = [kept for kept in self._all(account) if not after or kept.place < after]
        for looked, kept in enumerate(behind, start=1):
            if wanted.keeps(kept.letter):
                found.append(replace(kept.letter, job=None))
            if len(found) == limit or looked == PAGE_SCAN:
                return DeadLetterPage(letters=tuple(found), after=kept.place)
        return DeadLetterPage(letters=tuple(found))

    async def tally(self, account: str, wanted: DeadLetterFilter) -> list[Tally]:
        return tallied(kept.letter for kept in self._all(account) if wanted.keeps(kept.letter))

    async def bind(self, request_id: str, candidate: str, *, after: str = "") -> Redrive | None:
        kept = self._find(request_id)
        if kept is None:
            return None
        now, letter = self._results.now(), kept.letter
        if letter.redriven_as in ("", after):
            kept.bound_at = now
            kept.letter = replace(letter, redriven_as=candidate, redriven_at=0.0)
        elif not letter.redriven_at and now - kept.bound_at > self._settings.result_ttl_s:
            kept.letter = replace(letter, redriven_at=now)
        return Redrive(id=kept.letter.redriven_as, done=kept.letter.redriven_at > 0)

    async def unbind(self, request_id: str, redrive_id: str) -> None:
        kept = self._find(request_id)
        if kept is not None and kept.letter.redriven_as == redrive_id:
            kept.letter = replace(kept.letter, redriven_as="", redriven_at=0.0)

    async def redriven(self, request_id: str, redrive_id: str) -> None:
        kept, entry = self._find(request_id), self._results.entry(request_id)
        if kept is not None and kept.letter.redriven_as == redrive_id and not kept.letter.redriven_at:
            kept.letter = replace(kept.letter, redriven_at=self._results.now())
        if entry is not None:
            entry.redriven_as = redrive_id

    async def drop(self, account: str, request_id: str) -> DeadLetter | None:
        kept = self._find(request_id)
        if kept is None:
            return None
        self._remove(request_id)
        return replace(kept.letter, job=None)

    def _find(self, request_id: str) -> _Kept | None:
        kept = self._kept.get(request_id)
        if kept is not None and kept.letter.kept_until <= self._results.now():
            self._remove(request_id)
            return None
        return kept

    def _all(self, account: str) -> list[_Kept]:
        """The latest first."""
        ids = [request_id for _, request_id in reversed(self._accounts.get(account, []))]
        return [kept for request_id in ids if (kept := self._find(request_id)) is not None]

    def _remove(self, request_id: str) -> None:
        kept = self._kept.pop(request_id)
        self._accounts[kept.letter.account].remove((kept.place, request_id))
