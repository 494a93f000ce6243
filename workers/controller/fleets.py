"""Desired against actual where a platform starts and stops the instances: a pass hands every GPU specification to the
Fleet, drops what is no longer wanted, and tells the catalog what became of it.

Nothing is started here, nothing replaced and nothing scaled. What is read is what the sidecars report and what the
platform says of the pods.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from broker import deployments, registries, secrets
from broker.deployments import Sight
from broker.errors import ConfigurationError, LauncherUnavailable, NoCapacity, RecordDamaged, RevisionConflict
from broker.model import Deployment, FunctionStatus, GpuSpecification, Instance, InstanceStatus, Load, Version
from broker.ports import Broker, Fleet, Replica
from broker.settings import ControllerSettings
from workers.controller.chores import Chores
from workers.controller.reconcile import (
    QUARANTINE_BACKOFF_S,
    QUARANTINE_QUICK_S,
    STRAY_S,
    UNDEPLOY_GRACE_S,
    Streak,
    ensure_queues,
    quarantine_of,
)
from workers.controller.removal import Removals
from workers.controller.rows import with_versions

logger = logging.getLogger(__name__)

# As upstream (contract/management.md §7.4): a container that is started again and again and never gets well.
FAILED_RESTARTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One deployment and all that is known of it."""

    deployment: Deployment
    version: Version | None
    reports: Mapping[str, Instance]
    replicas: Sequence[Replica]
    kept: Sequence[str]
    load: Load

    def of(self, specification: GpuSpecification) -> list[Replica]:
        return [item for item in self.replicas if item.specification_id == specification.id and item.alive]

    def runs(self, replica: Replica) -> bool:
        report = self.reports.get(replica.instance_id)
        return report is not None and report.status is InstanceStatus.RUNNING

    def quarantined(self, replica: Replica) -> bool:
        report = self.reports.get(replica.instance_id)
        return report is not None and report.quarantined


@dataclass(slots=True)
class FleetReconciler:
    """`step` is one pass; it waits for the platform's API and for no instance. A new leader starts with nothing.
    `now` is a monotonic clock, and `leads` says whether this controller may still act. `saw` is told
    what each pass finds."""

    broker: Broker
    settings: ControllerSettings
    fleet: Fleet
    chores: Chores
    now: Callable[[], float] = time.monotonic
    leads: Callable[[], bool] = lambda: True
    saw: Callable[[Sequence[View]], object] = lambda _: None
    _quarantines: dict[str, Streak] = field(default_factory=dict)
    _faults: dict[str, str] = field(default_factory=dict)
    _hopeless: set[str] = field(default_factory=set)
    _ran: set[str] = field(default_factory=set)
    _stray_at: dict[str, float] = field(default_factory=dict)
    removals: Removals = field(init=False)

    def __post_init__(self) -> None:
        self.removals = Removals(self.broker, self.chores, self.now)

    async def step(self) -> None:
        """Raises StoreUnavailable, LauncherUnavailable: nothing was decided about what it did not get to."""
        kept, replicas = await self.fleet.kept(), await self.fleet.replicas()
        rows = await self.broker.catalog.deployments.list()
        views = await self._look([row.item for row in rows], kept, replicas)
        self.saw(views)
        for view in views:
            if not self.leads():
                return
            try:
                await self._tend(view)
            except (RevisionConflict, RecordDamaged) as exc:  # the next pass looks again
                logger.info("reconcile_postponed", extra={"version_id": view.deployment.version_id, "cause": str(exc)})
        if not self.leads():
            return
        await self._drop_strays(views, kept)
        self._forget(views)
        reports = [report for view in views for report in view.reports.values()]
        await self.fleet.weigh({report.id: report.busy > 0 for report in reports})

    async def ensure_queues(self) -> None:
        """As Reconciler's."""
        await ensure_queues(self.broker)

    async def _look(
        self, wanted: Sequence[Deployment], kept: Mapping[str, str], replicas: Sequence[Replica]
    ) -> list[View]:
        if not wanted:
            return []
        found = await with_versions(self.broker, wanted)
        ids = [deployment.version_id for deployment, _ in found]
        reports = await asyncio.gather(*(self.broker.catalog.instances(version_id) for version_id in ids))
        loads = await self.broker.results.load(ids)
        return [
            View(
                deployment=deployment,
                version=version,
                reports={report.id: report for report in reported},
                replicas=[item for item in replicas if item.version_id == deployment.version_id],
                kept=[key for key, version_id in kept.items() if version_id == deployment.version_id],
                load=load,
            )
            for (deployment, version), reported, load in zip(found, reports, loads, strict=True)
        ]

    async def _tend(self, view: View) -> None:
        deployment, version = view.deployment, view.version
        if version is None and not deployment.undeployed:
            await deployments.disown(self.broker, deployment)
        elif deployment.undeployed and (version is None or self.removals.due(deployment, view.load)):
            await self._remove(view)
        elif version is not None and version.status is FunctionStatus.ERROR:
            await self._drop(view.kept, grace_s=UNDEPLOY_GRACE_S)
            if time.time() - deployment.updated_at >= self.settings.error_ttl_s:
                await deployments.disown(self.broker, deployment)
        elif version is not None:
            await self._keep(view, version)
            if not deployment.undeployed:
                await self._observe(view, version)

    async def _keep(self, view: View, version: Version) -> None:
        await self._evict(view)
        await self._replace_quarantined(view)
        ids = {specification.id for specification in view.deployment.specifications}
        await self._drop([key for key in view.kept if key not in ids], grace_s=self.settings.drain_s)
        row = await self.broker.catalog.secrets.get(version.id)
        for specification in view.deployment.specifications:
            try:
                content = secrets.reveal(self.broker, row.item) if row else None
                login = await registries.credential_for(self.broker, version.account, version.container_image)
                await self.broker.users.admit([version.id])
                await self.fleet.keep(version, specification, secrets=content, login=login)
            except (ConfigurationError, LauncherUnavailable, NoCapacity) as exc:
                self._note(specification, version, exc)
            else:
                self._faults.pop(specification.id, None)
                self._hopeless.discard(specification.id)

    def _note(self, specification: GpuSpecification, version: Version, exc: Exception) -> None:
        if self._faults.get(specification.id) != str(exc):
            logger.warning("specification_not_kept", extra={"version_id": version.id, "cause": str(exc)})
        self._faults[specification.id] = str(exc)
        if isinstance(exc, ConfigurationError):
            self._hopeless.add(specification.id)

    async def _evict(self, view: View) -> None:
        there = {replica.instance_id for replica in view.replicas}
        for instance_id in there.intersection(view.deployment.evicted):
            await self.fleet.evict(instance_id)
        if not there.issuperset(view.deployment.evicted):
            await deployments.forget_evicted(self.broker, view.deployment, there)

    async def _replace_quarantined(self, view: View) -> None:
        """Until its time has come, one stays: it takes no work, and its platform puts none in its place."""
        for specification in view.deployment.specifications:
            quarantined = [item for item in view.of(specification) if view.quarantined(item)]
            streak = self._quarantines.setdefault(specification.id, Streak())
            if not quarantined or streak.next_start_at > self.now():
                continue
            for replica in quarantined:
                await self.fleet.evict(replica.instance_id)
                logger.warning(
                    "instance_quarantined",
                    extra={"instance_id": replica.instance_id, "version_id": replica.version_id},
                )
            error = quarantine_of(specification, view.reports.values())
            quick = self.now() - streak.next_start_at < QUARANTINE_QUICK_S
            streak.death(error, quick=quick, now=self.now(), longest_s=QUARANTINE_BACKOFF_S)

    async def _observe(self, view: View, version: Version) -> None:
        sights = [self._sight(view, specification) for specification in view.deployment.specifications]
        now, deploy_timeout_s = time.time(), self.settings.deploy_timeout_s
        age_s = now - view.deployment.created_at
        status, health = deployments.next_status(version.status, sights, age_s=age_s, deploy_timeout_s=deploy_timeout_s)
        if status is version.status and health == view.deployment.health:
            return
        written = await deployments.observe(
            self.broker, view.deployment, sights, now=now, deploy_timeout_s=deploy_timeout_s
        )
        if written not in (None, version.status):
            logger.info(
                "version_status",
                extra={"version_id": version.id, "before": version.status.value, "status": written and written.value},
            )

    def _sight(self, view: View, specification: GpuSpecification) -> Sight:
        replicas = view.of(specification)
        running = sum(view.runs(replica) for replica in replicas)
        if running:
            self._ran.add(specification.id)
        reports = [view.reports[item.instance_id] for item in replicas if item.instance_id in view.reports]
        ill = [report.error for report in reports if report.status is InstanceStatus.ERRORED and report.error]
        slow = [report.error for report in reports if report.status is InstanceStatus.STARTING and report.error]
        broken = [item.error for item in replicas if item.error and not view.runs(item)]
        waiting = [item.delay for item in replicas if item.delay]
        fault = [self._faults[specification.id]] if specification.id in self._faults else []
        quarantine = quarantine_of(specification, view.reports.values())
        looping = bool(replicas) and all(item.restarts >= FAILED_RESTARTS for item in replicas)
        return Sight(
            specification=specification,
            running=running,
            starting=len(replicas) - running - len(ill),
            error=quarantine or next(iter([*broken, *ill, *fault]), ""),
            quarantined=bool(quarantine),
            delay=next(iter([*waiting, *slow]), ""),
            failed=specification.id in self._hopeless or (looping and specification.id not in self._ran),
        )

    async def _remove(self, view: View) -> None:
        """First the instances, then the requests, the queue and the row. Begun again by every pass until done."""
        await self.removals.deactivate(view.deployment, view.version)
        if view.kept or view.replicas:
            grace_s = self.settings.drain_s if view.deployment.draining else UNDEPLOY_GRACE_S
            await self._drop({*view.kept, *(item.specification_id for item in view.replicas)}, grace_s=grace_s)
            return
        self.removals.clear(view.deployment)

    async def _drop(self, specification_ids: Sequence[str] | set[str], *, grace_s: float) -> None:
        for specification_id in sorted(specification_ids):
            await self.fleet.drop(specification_id, grace_s=grace_s)

    async def _drop_strays(self, views: Sequence[View], kept: Mapping[str, str]) -> None:
        """Specifications of versions that have no deployment. A removal ends with the row, so the catalog was lost;
        what was accepted is still in the queue, and the sidecars rebuild its records. They go when they are idle."""
        known = {view.deployment.version_id for view in views}
        ids = sorted({version_id for version_id in kept.values() if version_id not in known})
        loads = dict(zip(ids, await self.broker.results.load(ids) if ids else [], strict=True))
        self._stray_at = {key: self._stray_at.get(key, self.now()) for key in ids}
        for version_id, load in loads.items():
            if load.queued + load.running:
                self._stray_at[version_id] = self.now()
        over = {key for key, since in self._stray_at.items() if self.now() - since >= STRAY_S}
        await self._drop([key for key, version_id in kept.items() if version_id in over], grace_s=self.settings.drain_s)

    def _forget(self, views: Sequence[View]) -> None:
        ids = {specification.id for view in views for specification in view.deployment.specifications}
        self._faults = {key: fault for key, fault in self._faults.items() if key in ids}
        self._hopeless &= ids
        self._ran &= ids
        self._quarantines = {key: streak for key, streak in self._quarantines.items() if key in ids}
        self.removals.forget({view.deployment.id for view in views})
