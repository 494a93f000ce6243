"""What the dashboard shows, read once for all who look at it.

One poll of the stores serves every page that this front end has open, and stops with the last of them. What a page is
sent is made once for all of the same audience, which is the same key's view of the same account: all of it at first,
then what has changed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import orjson

from api.calls import Calls
from api.dashboard.activity import Activity, Point
from api.events import KEEP_ALIVE, encode
from api.routes.dead_letters import present
from broker import dead_letters
from broker.accounts import ADMIN, INVOKE, acting_for
from broker.errors import Forbidden, TryLater
from broker.model import DeadLetterFilter, Deployment, Gpu, Instance, InstanceStatus, Load, Principal, Version
from broker.ports import Broker
from broker.visibility import covers

logger = logging.getLogger(__name__)

EVERYBODY = "*"  # can be no account's name
# What changes more slowly than queues, and costs more to read, is read at every third look: each at another one, for
# this process has calls to answer meanwhile.
DEFINITIONS, ACTIVITY, DEAD = range(3)
HISTORY = 300  # looks; of two seconds, ten minutes

FUNCTIONS, DEPLOYMENTS, WORKERS, GPUS = "functions", "deployments", "workers", "gpus"
# The scope behind which the API says the same.
SCOPES = {
    FUNCTIONS: "queue_details",
    DEPLOYMENTS: "deploy_function",
    WORKERS: "list_functions_details",
    GPUS: "list_cluster_groups",
}
_SILENT_S = 15.0
_ERROR_MAX = 2000
_AT_ONCE = 100
_JITTER_S = 1.0


@dataclass(frozen=True, slots=True)
class View:
    """Through whose eyes, and which account: EVERYBODY is all of them, for who holds `admin:` scopes."""

    principal: Principal
    account: str

    @property
    def scopes(self) -> frozenset[str]:
        """Those that are good for that account."""
        if self.account == self.principal.account:
            return self.principal.scopes
        return frozenset(scope.removeprefix(ADMIN) for scope in self.principal.scopes if scope.startswith(ADMIN))

    def require_any(self) -> None:
        """Raises Forbidden: there is nothing that it may see."""
        if self.scopes.isdisjoint({*SCOPES.values(), INVOKE}):
            raise Forbidden("the credential has no scope for anything that the dashboard shows of this account")

    def acting(self, account: str) -> Principal:
        return self.principal if account == self.principal.account else acting_for(self.principal, account)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table as JSON, and at which look it became so. `version` is whose it is; None is nobody's."""

    body: bytes
    tick: int
    version: Version | None = None


Rows = Mapping[str, Row]


@dataclass(slots=True)
class _Seen:
    """What the looks so far have found."""

    versions: dict[str, Version] = field(default_factory=dict)
    deployments: dict[str, Deployment] = field(default_factory=dict)
    oldest_at: dict[str, float] = field(default_factory=dict)
    tables: dict[str, dict[str, Row]] = field(default_factory=lambda: {name: {} for name in SCOPES})
    depths: dict[str, tuple[int, int]] = field(default_factory=dict)
    activity: Activity = field(default_factory=Activity)


class Board:
    """How many pages may look at once is for the caller to see to."""

    def __init__(self, broker: Broker, calls: Calls, *, look_s: float) -> None:
        self._broker = broker
        self._calls = calls
        self._look_s = look_s
        self._seen = _Seen()
        self._tick = 0
        self._at = 0.0
        self._away = ""
        self._turned = asyncio.Event()
        self._pages = 0
        self._poll: asyncio.Task[None] | None = None
        self._audiences: dict[View, _Audience] = {}

    @property
    def looks(self) -> int:
        """How often the stores were asked."""
        return self._tick

    async def follow(self, admitted: Callable[[], Awaitable[View]]) -> AsyncGenerator[bytes, None]:
        """Events for one page, until it is closed. `admitted` says who it is for now, and raises when nobody is let in
        any more."""
        self._pages += 1
        try:
            audience: _Audience | None = None
            told = 0
            while True:
                view = await admitted()
                if audience is None or audience.view != view:
                    audience, told = await self._audience(view), 0
                if self._tick == told or not self._at:
                    yield await self._turn()
                    continue
                before, told = told, self._tick
                yield self._told(audience, before)
        finally:
            self._pages -= 1
            if not self._pages and self._poll is not None:
                self._poll.cancel()
                self._poll = None
                self._audiences.clear()
                self._seen, self._at = _Seen(), 0.0  # it is old by the time that somebody looks again

    async def _audience(self, view: View) -> _Audience:
        found = self._audiences.get(view)
        if found is None:
            found = self._audiences[view] = _Audience(view)
            found.wanted_at = time.monotonic()
            with suppress(TryLater):
                await found.count_dead(self._broker)
        return found

    def _told(self, audience: _Audience, told: int) -> bytes:
        audience.wanted_at = time.monotonic()
        if self._away:
            return encode("away", orjson.dumps({"detail": self._away}))
        return audience.event(self._seen, self._tick, self._at, told)

    async def _turn(self) -> bytes:
        """Wait for the next look, and say nothing of it."""
        if self._poll is None or self._poll.done():
            self._poll = self._calls.spawn(self._look_on())
        turned = self._turned
        try:
            async with asyncio.timeout(_SILENT_S):
                await turned.wait()
        except TimeoutError:
            pass
        return KEEP_ALIVE

    async def _look_on(self) -> None:
        while True:
            began = time.monotonic()
            try:
                blind = self._away or not self._at
                await self._look([DEFINITIONS, ACTIVITY] if blind else [self._tick % 3])
                self._away = ""
            except TryLater as exc:
                if not self._away:  # once per streak
                    logger.warning("dashboard_blind", extra={"cause": str(exc)})
                self._away = str(exc)
            self._at = time.time()
            self._tick += 1
            self._forget_audiences()
            turned, self._turned = self._turned, asyncio.Event()
            turned.set()
            await asyncio.sleep(max(self._look_s / 2, self._look_s - (time.monotonic() - began)))

    async def _look(self, parts: Sequence[int]) -> None:
        seen, catalog = self._seen, self._broker.catalog
        if DEFINITIONS in parts:
            versions, deployments = await asyncio.gather(catalog.versions.list(), catalog.deployments.list())
            seen.versions = {row.item.id: row.item for row in versions}
            seen.deployments = {row.item.version_id: row.item for row in deployments}
        if ACTIVITY in parts:
            await seen.activity.read(self._broker.results, seen.versions.keys())
        if DEAD in parts:
            await self._count_dead()
        deployed = [version_id for version_id in seen.deployments if version_id in seen.versions]
        ids = list(seen.versions)
        loads, gpus = await asyncio.gather(self._broker.results.load(ids), catalog.gpus())
        instances: dict[str, list[Instance]] = {}
        for start in range(0, len(deployed), _AT_ONCE):
            some = deployed[start : start + _AT_ONCE]
            found = await asyncio.gather(*(catalog.instances(version_id) for version_id in some))
            instances |= dict(zip(some, found, strict=True))
        self._write(dict(zip(ids, loads, strict=True)), instances, gpus)

    def _write(
        self, loads: Mapping[str, Load], instances: Mapping[str, Sequence[Instance]], gpus: Sequence[Gpu]
    ) -> None:
        seen, now = self._seen, time.time()
        seen.depths = {version_id: (load.queued, load.running) for version_id, load in loads.items()}
        seen.oldest_at = {
            version_id: _steady(now - load.oldest_age_s, seen.oldest_at.get(version_id))
            for version_id, load in loads.items()
            if load.queued
        }
        functions, workers = [], []
        for version_id, load in loads.items():
            version, live = seen.versions[version_id], instances.get(version_id, ())
            recent = seen.activity.recent([version_id], now)
            row = _function(version, load, seen.oldest_at.get(version_id), live)
            functions.append((version_id, version, {**row, "recent": recent}))
            workers += [(one.id, version, _worker(version, one)) for one in live]
        deployments = [
            (version_id, its, _deployment(its, deployment, instances.get(version_id, ())))
            for version_id, deployment in seen.deployments.items()
            if (its := seen.versions.get(version_id)) is not None
        ]
        offered = [_gpu(gpu) for gpu in gpus]
        for name, found in (
            (FUNCTIONS, functions),
            (DEPLOYMENTS, deployments),
            (WORKERS, workers),
            (GPUS, [(str(row["id"]), None, row) for row in offered]),
        ):
            seen.tables[name] = _rows(found, seen.tables[name], self._tick + 1)

    async def _count_dead(self) -> None:
        for audience in list(self._audiences.values()):
            await audience.count_dead(self._broker)

    def _forget_audiences(self) -> None:
        """Those that nobody has asked for since some looks ago: a key was changed, or a page closed."""
        old = time.monotonic() - 2 * _SILENT_S - 3 * self._look_s
        self._audiences = {view: each for view, each in self._audiences.items() if each.wanted_at >= old}


class _Audience:
    """All pages that show the same. What it was told last is kept, so that the next page costs nothing."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.wanted_at = 0.0
        self._tick = 0
        self._before = 0
        self._tables: dict[str, dict[str, Row]] = {}
        self._changes = b""
        self._whole = b""
        self._history: deque[tuple[int, int, int]] = deque(maxlen=HISTORY)
        self._dead: list[dict[str, Any]] | None = None
        self._points: dict[float, Point] = {}
        self._new_points: list[Point] = []
        self._recent: dict[str, Any] | None = None

    def event(self, seen: _Seen, tick: int, at: float, told: int) -> bytes:
        """For a page that was told of the look `told` last: what has changed if that was the one before, else all."""
        if self._tick != tick:
            self._turn(seen, tick, at)
        if told and told == self._before:
            return self._changes
        if not self._whole:
            self._whole = encode(
                "everything", self._said(at, {name: list(rows.values()) for name, rows in self._tables.items()})
            )
        return self._whole

    async def count_dead(self, broker: Broker) -> None:
        """Of one account: there is no list of all."""
        if self.view.account == EVERYBODY or INVOKE not in self.view.scopes:
            return
        acting = self.view.acting(self.view.account)
        tallies = await dead_letters.causes(broker, acting, DeadLetterFilter(redriven=False))
        self._dead = orjson.loads(present(tallies).to_json())["causes"]

    def _turn(self, seen: _Seen, tick: int, at: float) -> None:
        scopes = self.view.scopes
        tables = {
            name: {key: row for key, row in seen.tables[name].items() if self._shows(row)}
            for name, scope in SCOPES.items()
            if scope in scopes
        }
        if FUNCTIONS in tables:
            self._look_at_activity(seen, tables[FUNCTIONS], at)
            depths = [seen.depths[key] for key in tables[FUNCTIONS] if key in seen.depths]
            self._history.append((int(at), sum(queued for queued, _ in depths), sum(running for _, running in depths)))
        put = {
            name: [row for key, row in rows.items() if row != self._tables.get(name, {}).get(key)]
            for name, rows in tables.items()
        }
        gone = {name: [key for key in rows if key not in tables.get(name, {})] for name, rows in self._tables.items()}
        self._before, self._tick, self._tables, self._whole = self._tick, tick, tables, b""
        self._changes = encode("changes", self._said(at, put, gone))

    def _look_at_activity(self, seen: _Seen, functions: Rows, at: float) -> None:
        same = self._tables.get(FUNCTIONS, {}).keys() == functions.keys()
        known = self._points if same else {}
        self._points = seen.activity.points(functions.keys(), known=known)
        self._new_points = [point for minute, point in self._points.items() if known.get(minute) != point]
        self._recent = seen.activity.recent(functions, at)

    def _said(
        self, at: float, put: Mapping[str, Sequence[Row]], gone: Mapping[str, Sequence[str]] | None = None
    ) -> bytes:
        said = {
            "at": at,
            "account": self.view.account,
            "put": {
                name: [orjson.Fragment(row.body) for row in rows] for name, rows in put.items() if rows or gone is None
            },
            "gone": {name: keys for name, keys in (gone or {}).items() if keys},
            "history": list(self._history) if gone is None else list(self._history)[-1:],
            "points": list(self._points.values()) if gone is None else self._new_points,
            "recent": self._recent,
            "deadLetters": self._dead,
        }
        return orjson.dumps(said)

    def _shows(self, row: Row) -> bool:
        version = row.version
        if version is None:
            return True
        if self.view.account not in (EVERYBODY, version.account):
            return False
        return covers(self.view.acting(version.account), version)


def _rows(
    found: Iterable[tuple[str, Version | None, Mapping[str, Any]]], before: Mapping[str, Row], tick: int
) -> dict[str, Row]:
    """Rows that say what they said are those of before."""
    rows = {}
    for key, version, content in found:
        row, body = before.get(key), orjson.dumps(content)
        same = row is not None and row.body == body and row.version == version
        rows[key] = row if same and row else Row(body=body, tick=tick, version=version)
    return rows


def _steady(at: float, before: float | None) -> float:
    """The same request is the oldest one still, though the clock of each look is a little different."""
    return before if before is not None and abs(at - before) < _JITTER_S else round(at, 1)


def _function(version: Version, load: Load, oldest_at: float | None, instances: Sequence[Instance]) -> dict[str, Any]:
    return {
        **_named(version),
        "queued": load.queued,
        "running": load.running,
        "oldestAt": oldest_at,
        "workers": len(instances),
        "slots": sum(one.slots for one in instances),
        "busy": sum(one.busy for one in instances),
    }


def _deployment(version: Version, deployment: Deployment, instances: Sequence[Instance]) -> dict[str, Any]:
    starting = [one for one in instances if one.status is InstanceStatus.STARTING]
    return {
        **_named(version),
        "deploymentId": deployment.id,
        "state": _state(version, deployment),
        "running": sum(one.status is InstanceStatus.RUNNING for one in instances),
        "starting": len(starting),
        "waitsFor": next((one.error[-_ERROR_MAX:] for one in starting if one.error), ""),
        "updatedAt": deployment.updated_at,
        "specifications": [
            {
                "gpu": each.gpu,
                "instanceType": each.instance_type,
                "backend": each.backend,
                "least": each.min_instances,
                "most": each.max_instances,
                "concurrency": each.max_request_concurrency,
            }
            for each in deployment.specifications
        ],
        "health": [
            {"gpu": each.gpu, "instanceType": each.instance_type, "error": each.error[-_ERROR_MAX:]}
            for each in deployment.health
        ],
    }


def _state(version: Version, deployment: Deployment) -> str:
    if deployment.removing or (deployment.undeployed and not deployment.draining):
        return "REMOVING"
    return "DRAINING" if deployment.draining else version.status.value


def _worker(version: Version, instance: Instance) -> dict[str, Any]:
    return {
        **_named(version),
        "id": instance.id,
        "gpu": instance.gpu,
        "instanceType": instance.instance_type,
        "backend": instance.backend,
        "location": instance.location,
        "state": "QUARANTINED" if instance.quarantined else instance.status.value,
        "slots": instance.slots,
        "busy": instance.busy,
        "since": instance.created_at,
        "error": instance.error[-_ERROR_MAX:],
    }


def _gpu(gpu: Gpu) -> dict[str, Any]:
    return {
        "id": f"{gpu.backend}/{gpu.place.cluster}/{gpu.name}/{gpu.instance_type}",
        "gpu": gpu.name,
        "instanceType": gpu.instance_type,
        "backend": gpu.backend,
        "cluster": gpu.place.cluster,
        "capacity": gpu.capacity,
        "gpuCount": gpu.gpu_count,
        "cpuCores": gpu.cpu_cores,
        "memoryBytes": gpu.gpu_memory_bytes or gpu.system_memory_bytes,
    }


def _named(version: Version) -> dict[str, Any]:
    return {
        "id": version.id,
        "functionId": version.function_id,
        "versionId": version.id,
        "account": version.account,
        "name": version.name,
        "status": version.status.value,
    }
