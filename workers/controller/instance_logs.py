"""Copies what instances write to where a front end finds it, while somebody looks.

Where nobody does, a turn is one question to the store. Positions are kept there too: a controller that takes over goes
on where the last one was, and of two that reach the same instances, one copies each line.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

import orjson

from broker.errors import LauncherUnavailable
from broker.instance_logs import end_told, position_of
from broker.model import Ended, LogBatch, LogLine, Look, Part
from broker.ports import ENDED_BYTES, ENDED_LINES, MOST_ENDED, Broker, Fleet, Launched, Launcher
from broker.telemetry.logs import scrubbed

logger = logging.getLogger(__name__)

TURN_S = 1.0
# Of one version, beside those that are asked for by name.
MOST_INSTANCES = 64
_AT_ONCE = 8
_UNTOLD = frozenset({"time", "level", "logger", "event", "public"})


@dataclass(slots=True)
class Copier:
    """`step` is one turn."""

    broker: Broker
    launcher: Launcher | Fleet
    _failing: set[str] = field(default_factory=set)

    async def step(self) -> None:
        """Raises StoreUnavailable, or LauncherUnavailable: nothing is known of any instance."""
        looks = await self.broker.instance_logs.looks()
        if not looks:
            self._failing.clear()
            return
        ended = await self._ended()
        gone = {each.instance_id for each in ended}
        here = [item for item in await self._here() if item.instance_id not in gone]
        gate = asyncio.Semaphore(_AT_ONCE)
        for version_id in dict.fromkeys(look.version_id for look in looks):
            own = [look for look in looks if look.version_id == version_id]
            await self._copy_version(version_id, wanted_ended(ended, own), wanted(here, own), gate)

    async def _here(self) -> Sequence[Launched]:
        return await (self.launcher.replicas() if isinstance(self.launcher, Fleet) else self.launcher.launched())

    async def _ended(self) -> Sequence[Ended]:
        """A fleet's platform keeps nothing of a pod that is gone."""
        return () if isinstance(self.launcher, Fleet) else await self.launcher.ended()

    async def _copy_version(
        self, version_id: str, ended: Sequence[Ended], instance_ids: Sequence[str], gate: asyncio.Semaphore
    ) -> None:
        """Those that are gone first: who waits for those that run has them all then."""
        if not ended and not instance_ids:
            return
        positions = await self.broker.instance_logs.positions(version_id)
        for each in ended:
            if not end_told(positions.get((each.instance_id, Part.SIDECAR), "")):
                await self._copy_ended(each, positions)

        async def copy(instance_id: str) -> None:
            async with gate:
                for part in Part:
                    before = positions.get((instance_id, part), "")
                    await self._copy(version_id, instance_id, part, before=before)

        results = await asyncio.gather(*map(copy, instance_ids), return_exceptions=True)
        for fault in results:
            if isinstance(fault, BaseException):
                raise fault

    async def _copy_ended(self, ended: Ended, positions: Mapping[tuple[str, Part], str]) -> None:
        """The last of what it wrote, and how it ended; only the first who gets there."""
        last_at = 0.0
        for part in Part:
            before = positions.get((ended.instance_id, part), "")
            try:
                excerpt = await self.launcher.log(ended.instance_id, part, after=before)
            except LauncherUnavailable as exc:
                self._note_unreadable(ended.instance_id, exc)
                return
            lines = list(told(part, excerpt.lines))
            lines = lines if before else ends_of(lines)
            last_at = max([last_at, *(line.at for line in lines)])
            after = excerpt.position
            if part is Part.SIDECAR:
                cause = scrubbed(ended.cause)
                after = position_of(replace(ended, cause=cause))
                lines.append(LogLine(max(ended.at, last_at), f"instance_ended cause={cause}"))
            batch = LogBatch(version_id=ended.version_id, instance_id=ended.instance_id, part=part, lines=tuple(lines))
            if after != before:
                await self.broker.instance_logs.append(batch, before=before, after=after)

    async def _copy(self, version_id: str, instance_id: str, part: Part, *, before: str) -> None:
        try:
            excerpt = await self.launcher.log(instance_id, part, after=before)
        except LauncherUnavailable as exc:
            self._note_unreadable(instance_id, exc)
            return
        self._failing.discard(instance_id)
        if excerpt.position != before:
            lines = tuple(told(part, excerpt.lines))
            batch = LogBatch(version_id=version_id, instance_id=instance_id, part=part, lines=lines)
            await self.broker.instance_logs.append(batch, before=before, after=excerpt.position)

    def _note_unreadable(self, instance_id: str, exc: LauncherUnavailable) -> None:
        if instance_id not in self._failing:
            logger.warning("log_unreadable", extra={"instance_id": instance_id, "cause": str(exc)})
        self._failing.add(instance_id)


def wanted(here: Sequence[Launched], looks: Sequence[Look]) -> list[str]:
    """Which of the instances that are here are looked at, by looks at one version."""
    own = [item.instance_id for item in here if item.version_id == looks[0].version_id]
    named = {look.instance_id for look in looks if look.instance_id}
    if all(look.instance_id for look in looks):
        return [instance_id for instance_id in own if instance_id in named]
    others = [instance_id for instance_id in own if instance_id not in named]
    return [*(instance_id for instance_id in own if instance_id in named), *others[:MOST_INSTANCES]]


def wanted_ended(ended: Sequence[Ended], looks: Sequence[Look]) -> list[Ended]:
    """As `wanted`, of those that are gone: the newest few, and those that are asked for by name."""
    own = [each for each in ended if each.version_id == looks[0].version_id]
    named = {look.instance_id for look in looks if look.instance_id}
    newest = [] if all(look.instance_id for look in looks) else own[:MOST_ENDED]
    return [each for each in own if each in newest or each.instance_id in named]


def ends_of(lines: Sequence[LogLine]) -> list[LogLine]:
    """The last ENDED_LINES in ENDED_BYTES."""
    room, kept = ENDED_BYTES, list[LogLine]()
    for line in reversed(lines[-ENDED_LINES:]):
        room -= len(line.text.encode()) + 1
        if room < 0:
            break
        kept.append(line)
    return kept[::-1]


def told(part: Part, lines: Iterable[LogLine]) -> Iterable[LogLine]:
    """What a function's author may see of these: all that its container wrote, and the public lines of the sidecar;
    without credentials."""
    for line in lines:
        shown = _public(line) if part is Part.SIDECAR else line
        if shown is not None:
            yield LogLine(shown.at, scrubbed(shown.text).replace("\0", ""))


def _public(line: LogLine) -> LogLine | None:
    try:
        facts = orjson.loads(line.text)
        if not isinstance(facts, dict) or facts.get("public") is not True:
            return None
        at = datetime.fromisoformat(str(facts["time"])).timestamp()
    except (ValueError, KeyError):
        return None
    words = [str(facts.get("event", "")), *(f"{name}={value}" for name, value in facts.items() if name not in _UNTOLD)]
    return LogLine(at, " ".join(words))
