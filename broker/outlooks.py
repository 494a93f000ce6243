"""What one process knows of the versions that it is asked about, so that whoever has to wait is told for how long.

One look at a version serves everybody for a second. It is taken beside the requests: an answer waits for one, briefly,
only where nothing is known or what is known is old.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from broker.activity import KEPT_MINUTES
from broker.errors import Unavailable
from broker.estimates import Capacity, Estimate, Forecast, Lately, Starting
from broker.model import Deployment, Instance, InstanceStatus, Record, RequestState
from broker.ports import Broker

MOST_VERSIONS = 500
FRESH_S = 1.0
STALE_S = 5.0
# What an answer may wait for a first look: a store that is well needs a few milliseconds.
_PATIENCE_S = 0.1

Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class Outlooks:
    """`spawn` makes the one task for each look at a version, which may outlive who asked; `most` versions are
    remembered, those that were asked about last."""

    def __init__(self, broker: Broker, spawn: Spawn, *, most: int = MOST_VERSIONS) -> None:
        self._broker = broker
        self._most = most
        self._spawn = spawn
        self._versions: OrderedDict[str, _Version] = OrderedDict()

    async def estimate(self, record: Record) -> Estimate | None:
        """How much longer the request takes; None for one that has ended, or that too little is known for."""
        if record.state.terminal or not record.version_id:
            return None
        version = self._version(record.version_id)
        now = asyncio.get_running_loop().time()
        if now - version.read_at >= FRESH_S and version.looking is None:
            version.looking = self._spawn(self._look(record.version_id, version))
        if now - version.read_at >= STALE_S and version.looking is not None:
            await asyncio.wait([version.looking], timeout=_PATIENCE_S)
        return version.estimate(record)

    def _version(self, version_id: str) -> _Version:
        version = self._versions.setdefault(version_id, _Version())
        self._versions.move_to_end(version_id)
        if len(self._versions) > self._most:
            self._versions.popitem(last=False)
        return version

    async def _look(self, version_id: str, version: _Version) -> None:
        """What cannot be had leaves what is known as it is."""
        results, catalog = self._broker.results, self._broker.catalog
        try:
            line, [minutes], instances, row = await asyncio.gather(
                results.line(version_id),
                results.activity([version_id], minutes=version.unread_minutes()),
                catalog.instances(version_id),
                catalog.deployments.get(version_id),
            )
        except Unavailable:
            return
        finally:
            version.looking = None
        version.read_at = asyncio.get_running_loop().time()
        version.lately.add(minutes)
        capacity = _capacity(instances, row.item if row else None)
        version.forecast = Forecast(line, capacity, version.lately.runs, version.lately.starts, version.lately.leads)


class _Version:
    __slots__ = ("forecast", "lately", "looking", "read_at")

    def __init__(self) -> None:
        self.forecast: Forecast | None = None
        self.lately = Lately()
        self.looking: asyncio.Task[None] | None = None
        self.read_at = float("-inf")

    def unread_minutes(self) -> int:
        """Of what was read before, only the last minute may have changed since."""
        if self.forecast is None:
            return KEPT_MINUTES
        return min(KEPT_MINUTES, int((asyncio.get_running_loop().time() - self.read_at) // 60) + 2)

    def estimate(self, record: Record) -> Estimate | None:
        age_s = asyncio.get_running_loop().time() - self.read_at
        if self.forecast is None or age_s >= STALE_S:
            return None
        now = self.forecast.line.at + age_s
        if record.state is RequestState.RUNNING:
            return self.forecast.running(max(0.0, now - record.started_at))
        if record.rank:
            return self.forecast.placed(record.rank, since_s=age_s)
        since_s = min(age_s, max(0.0, now - record.created_at))
        return self.forecast.queued(self.forecast.rank(record.created_at), since_s=since_s)


def _capacity(instances: Iterable[Instance], deployment: Deployment | None) -> Capacity:
    """Without a deployment, no more instances come."""
    taking = [each for each in instances if not each.quarantined]
    specifications = deployment.specifications if deployment and not deployment.undeployed else ()
    return Capacity(
        slots=sum(each.slots for each in taking if each.status is InstanceStatus.RUNNING),
        starting=tuple(
            Starting(since=each.created_at, slots=each.slots)
            for each in taking
            if each.status is InstanceStatus.STARTING
        ),
        most_slots=sum(each.max_instances * each.max_request_concurrency for each in specifications),
        slots_each=max((each.max_request_concurrency for each in specifications), default=1),
    )
