"""The verbs of what instances write: the last of it, and then what comes.

Who asks says so in the store, for some seconds at a time, and the controllers that run the instances copy it there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace

from broker.errors import TryLater
from broker.model import Ended, LogBatch, LogLine, Look, Part, Version
from broker.ports import Broker

# How long a look lasts, and how often one that goes on is made again.
LOOK_S = 30.0
_AGAIN_S = 10.0
_POLL_S = 1.0
_LOOKED_S = 0.1
# For all instances that report to be copied once; where none reports yet, for one that starts.
_COPIED_S = 5.0
_SEEN_S = 2.5
_BATCHES = 64
_END = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The last `tail` lines of a version's instances, or of one, that were not written before `since_at` (unix
    seconds); with `previous` only of those that are gone."""

    version: Version
    instance_id: str = ""
    tail: int
    since_at: float = 0.0
    previous: bool = False

    @property
    def look(self) -> Look:
        return Look(account=self.version.account, version_id=self.version.id, instance_id=self.instance_id)

    def of(self, batch: LogBatch) -> LogBatch:
        """What of a batch was asked for."""
        mine = self.instance_id in ("", batch.instance_id)
        return replace(batch, lines=tuple(line for line in batch.lines if mine and line.at >= self.since_at))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recent:
    """`batches` have a line each, by time. `unanswered` are the instances that report and whose logs nobody copied in
    time, `ended` those that are gone, newest first. What comes later comes after the batch `last_id`."""

    batches: tuple[LogBatch, ...] = ()
    unanswered: tuple[str, ...] = ()
    ended: tuple[Ended, ...] = ()
    last_id: str = ""


async def recent(broker: Broker, asked: Asked) -> Recent:
    """Takes up to _COPIED_S while nobody has looked lately. Raises StoreUnavailable, or Overloaded."""
    expected = await _expected(broker, asked)
    if not expected and not await _is_deployed(broker, asked):
        return Recent()
    await broker.instance_logs.look(asked.look, ttl_s=LOOK_S)
    unanswered = await _uncopied(broker, asked, expected)
    batches = await _all(broker, asked)
    ended = _ended(asked, await broker.instance_logs.positions(asked.version.id))
    gone = {each.instance_id for each in ended}
    shown = [asked.of(batch) for batch in batches if not asked.previous or batch.instance_id in gone]
    lines = [(line, batch) for batch in shown for line in batch.lines]
    lines.sort(key=lambda pair: pair[0].at)
    last = lines[-asked.tail :] if asked.tail else []
    return Recent(
        batches=tuple(replace(batch, lines=(LogLine(*line),)) for line, batch in last),
        unanswered=tuple(unanswered),
        ended=ended,
        last_id=batches[-1].id if batches else "",
    )


async def follow(broker: Broker, asked: Asked, *, after: str) -> AsyncGenerator[LogBatch | None, None]:
    """What is written from the batch `after` on, and None about every second. It ends when nothing is deployed any
    more. A store that is away is waited for."""
    renewed_at = 0.0
    while True:
        batches: Sequence[LogBatch] = ()
        try:
            if time.monotonic() - renewed_at >= _AGAIN_S:
                if not await _is_deployed(broker, asked) and not await _expected(broker, asked):
                    return
                await broker.instance_logs.look(asked.look, ttl_s=LOOK_S)
                renewed_at = time.monotonic()
            batches = await broker.instance_logs.read(asked.version.id, after=after, limit=_BATCHES)
        except TryLater:
            pass
        for batch in batches:
            after = batch.id
            if (shown := asked.of(batch)).lines:
                yield shown
        if len(batches) < _BATCHES:
            yield None
            await asyncio.sleep(_POLL_S)


def position_of(ended: Ended) -> str:
    """Where the log of a sidecar stands when all of its instance was copied, and that it ended with it: no launcher's
    positions begin so."""
    return f"{_END} {ended.at} {ended.cause}"


def end_told(position: str) -> bool:
    """Whether it is one of `position_of`."""
    return position.startswith(f"{_END} ")


def _ended(asked: Asked, positions: Mapping[tuple[str, Part], str]) -> tuple[Ended, ...]:
    found = []
    for (instance_id, part), position in positions.items():
        if part is Part.SIDECAR and end_told(position) and asked.instance_id in ("", instance_id):
            _, at, cause = position.split(" ", 2)
            found.append(Ended(instance_id=instance_id, version_id=asked.version.id, at=float(at), cause=cause))
    return tuple(sorted((each for each in found if each.at >= asked.since_at), key=lambda each: each.at, reverse=True))


async def _is_deployed(broker: Broker, asked: Asked) -> bool:
    return await broker.catalog.deployments.get(asked.version.id) is not None


async def _expected(broker: Broker, asked: Asked) -> set[str]:
    reported = {instance.id for instance in await broker.catalog.instances(asked.version.id)}
    return reported & {asked.instance_id} if asked.instance_id else reported


async def _uncopied(broker: Broker, asked: Asked, expected: set[str]) -> list[str]:
    """Wait until all of them were copied, and return those that were not in time."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + (_COPIED_S if expected else _SEEN_S)
    while True:
        positions = await broker.instance_logs.positions(asked.version.id)
        copied = {instance_id for instance_id, part in positions if part is Part.SIDECAR}
        missing = expected - copied
        # Where none runs, more than one that is gone may still come.
        settled = expected or copied - {each.instance_id for each in _ended(asked, positions)}
        if (settled and not missing) or loop.time() >= give_up_at:
            return sorted(missing)
        await asyncio.sleep(_LOOKED_S)


async def _all(broker: Broker, asked: Asked) -> list[LogBatch]:
    found: list[LogBatch] = []
    while True:
        after = found[-1].id if found else ""
        batches = await broker.instance_logs.read(asked.version.id, after=after, limit=_BATCHES)
        found += batches
        if len(batches) < _BATCHES:
            return found
