"""Desired against actual: one pass looks at every deployment, starts what is missing and stops what is too much.

Deaths are remembered by GPU specification. A first death is replaced at once, further quick ones after 1, 2, 4 … 60
seconds. How many instances are wanted between a specification's minimum and maximum, `autoscale` decides; which ones
go is decided here: never one that is busy, as far as anybody knows, and one that takes a job in that moment drains.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from math import inf

from broker import deployments, registries, secrets
from broker.deployments import Sight
from broker.errors import ConfigurationError, LauncherUnavailable, NoCapacity, RecordDamaged, RevisionConflict
from broker.model import Deployment, FunctionStatus, GpuSpecification, Instance, InstanceStatus, Load, Version
from broker.ports import Broker, Launched, Launcher
from broker.settings import ControllerSettings
from workers.controller import autoscale
from workers.controller.autoscale import Decision, History, Reading
from workers.controller.chores import Chores
from workers.controller.removal import Removals
from workers.controller.rows import with_versions

logger = logging.getLogger(__name__)

QUICK_S = 60.0
LONGEST_BACKOFF_S = 60.0
FAILED_DEATHS = 3
# As upstream (contract/management.md §7.4): an instance that was ready and no longer is.
SICK_S = 1800.0
# The longest pause before one that was quarantined is replaced: where every payload kills, each new one is started for
# nothing.
QUARANTINE_BACKOFF_S = 1800.0
# One that took longer to get there did some work.
QUARANTINE_QUICK_S = 3600.0
# For the sidecar of a dead container to hand its jobs back.
DEAD_GRACE_S = 10.0
# Undeploying without `graceful` gives up what runs; the sidecar gets a moment to say so.
UNDEPLOY_GRACE_S = 5.0
STRAY_S = 60.0
# Of one specification in one pass, so that a burst of one version does not hold up the others.
MOST_STARTS = 16


@dataclass(slots=True)
class Streak:
    """The deaths of one specification's instances. `failures` counts waves of quick ones in a row."""

    failures: int = 0
    next_start_at: float = 0.0
    error: str = ""
    ran: bool = False
    hopeless: bool = False

    @property
    def failed(self) -> bool:
        return self.hopeless or (self.failures >= FAILED_DEATHS and not self.ran)

    def death(self, error: str, *, quick: bool, now: float, longest_s: float = LONGEST_BACKOFF_S) -> None:
        self.failures = self.failures + 1 if quick else 1
        backoff_s = 0.0 if self.failures == 1 else min(2.0 ** (self.failures - 2), longest_s)
        self.next_start_at = now + backoff_s
        self.error = error

    def cannot_start(self, error: str, *, hopeless: bool, now: float) -> None:
        self.failures += 1
        self.hopeless = hopeless
        self.next_start_at = now + min(2.0 ** (self.failures - 1), LONGEST_BACKOFF_S)
        self.error = error

    def waits(self, error: str) -> None:
        """Nothing is wrong with it: there is no room. The next pass asks again, and it is no failure."""
        self.error = error

    def runs(self) -> None:
        self.ran, self.hopeless, self.error = True, False, ""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One deployment and all that is known of it. `alive` leaves out what is being stopped."""

    deployment: Deployment
    version: Version | None
    reports: Mapping[str, Instance]
    launched: Sequence[Launched]
    alive: list[Launched]
    load: Load

    def of(self, specification: GpuSpecification) -> list[Launched]:
        return [instance for instance in self.alive if instance.specification_id == specification.id]

    def runs(self, instance: Launched) -> bool:
        report = self.reports.get(instance.instance_id)
        return report is not None and report.status is InstanceStatus.RUNNING

    def quarantined(self, instance: Launched) -> bool:
        report = self.reports.get(instance.instance_id)
        return report is not None and report.quarantined

    def starts(self, instance: Launched) -> bool:
        """Not yet reporting counts as starting."""
        report = self.reports.get(instance.instance_id)
        return report is None or report.status is InstanceStatus.STARTING

    def idle(self) -> list[Launched]:
        """Those that reported that nothing runs in them. What is claimed and no instance has reported yet may run in
        any of these: so many are left out."""
        reported = sum(report.busy for report in self.reports.values())
        idle = [item for item in self.alive if item.instance_id in self.reports and not self.busy(item)]
        unseen = max(0, self.load.running - reported)
        return idle[: len(idle) - unseen] if unseen < len(idle) else []

    def busy(self, instance: Launched) -> bool:
        report = self.reports.get(instance.instance_id)
        return report is not None and report.busy > 0


@dataclass(slots=True)
class Reconciler:
    """`step` is one pass; it never waits for an instance. What it remembers between passes it can do without: a
    new leader starts with nothing. `now` is a monotonic clock, and `leads` says whether this controller may still act:
    its process may be stopped and go on anywhere in a pass. `saw` is told what each pass finds."""

    broker: Broker
    settings: ControllerSettings
    launcher: Launcher
    chores: Chores
    now: Callable[[], float] = time.monotonic
    leads: Callable[[], bool] = lambda: True
    saw: Callable[[Sequence[View]], object] = lambda _: None
    _histories: dict[str, History] = field(default_factory=dict)
    _decisions: dict[str, Decision] = field(default_factory=dict)
    _streaks: dict[str, Streak] = field(default_factory=dict)
    _started_at: dict[str, float] = field(default_factory=dict)
    _buried: set[str] = field(default_factory=set)
    _sick_at: dict[str, float] = field(default_factory=dict)
    _stray_at: dict[str, float] = field(default_factory=dict)
    removals: Removals = field(init=False)

    def __post_init__(self) -> None:
        self.removals = Removals(self.broker, self.chores, self.now)

    async def step(self) -> None:
        """Raises StoreUnavailable: nothing was decided about the deployments that it did not get to."""
        launched = await self.launcher.launched()
        rows = await self.broker.catalog.deployments.list()
        views = await self._look([row.item for row in rows], launched)
        self.saw(views)
        for view in views:
            try:
                await self._tend(view)
            except (RevisionConflict, RecordDamaged) as exc:  # the next pass looks again
                logger.info("reconcile_postponed", extra={"version_id": view.deployment.version_id, "cause": str(exc)})
        await self._tend_strays(views, launched)
        self._forget(views, launched)

    async def ensure_queues(self) -> None:
        """Make the queues of all deployments exist again, should the broker have lost one, and the users for them."""
        await ensure_queues(self.broker)

    # -- looking -----------------------------------------------------------------------------------

    async def _look(self, wanted: Sequence[Deployment], launched: Sequence[Launched]) -> list[View]:
        if not wanted:
            return []
        found = await with_versions(self.broker, wanted)
        ids = [deployment.version_id for deployment, _ in found]
        reports = await asyncio.gather(*(self.broker.catalog.instances(version_id) for version_id in ids))
        loads = await self.broker.results.load(ids)
        views = []
        for (deployment, version), reported, load in zip(found, reports, loads, strict=True):
            own = [instance for instance in launched if instance.version_id == deployment.version_id]
            alive = [item for item in own if item.alive and _stopping(item) not in self.chores]
            views.append(
                View(
                    deployment=deployment,
                    version=version,
                    reports={report.id: report for report in reported},
                    launched=own,
                    alive=alive,
                    load=load,
                )
            )
        return views

    # -- one deployment ----------------------------------------------------------------------------

    async def _tend(self, view: View) -> None:
        self._bury_dead(view)
        deployment, version = view.deployment, view.version
        if version is None and not deployment.undeployed:
            await deployments.disown(self.broker, deployment)
        elif deployment.undeployed and (version is None or self.removals.due(deployment, view.load)):
            await self._remove(view)
        elif version is not None and version.status is FunctionStatus.ERROR:
            self._stop(view, view.alive, grace_s=UNDEPLOY_GRACE_S)
            if time.time() - deployment.updated_at >= self.settings.error_ttl_s:
                await deployments.disown(self.broker, deployment)
        elif version is not None:
            await self._keep(view, version)
            if not deployment.undeployed:
                await self._observe(view, version)

    async def _keep(self, view: View, version: Version) -> None:
        """As many instances as each specification wants, and none that is evicted, or of one that is no more."""
        await self._evict(view)
        ids = {specification.id for specification in view.deployment.specifications}
        unwanted = [item for item in view.alive if item.specification_id not in ids]
        self._stop(view, unwanted, grace_s=self.settings.drain_s)
        counts = self._decide(view).counts
        for specification, count in zip(view.deployment.specifications, counts, strict=True):
            alive = view.of(specification)
            streak = self._streaks.setdefault(specification.id, Streak())
            if any(view.runs(instance) for instance in alive):
                streak.runs()
            self._stop(view, self._surplus(view, specification, count), grace_s=self.settings.drain_s)
            for _ in range(min(count - len(alive), MOST_STARTS)):
                if not await self._start(view, version, specification, streak):
                    break

    def _decide(self, view: View) -> Decision:
        deployment, now = view.deployment, self.now()
        history = self._histories.setdefault(
            deployment.id, History(gap_s=max(autoscale.GAP_S, 3 * self.settings.reconcile_s))
        )
        history.keep_s = autoscale.history_s(deployment.specifications[0].autoscaling)
        history.add(
            Reading(
                at=now,
                queued=view.load.queued,
                running=view.load.running,
                counts=tuple(len(view.of(specification)) for specification in deployment.specifications),
                slots=sum(view.reports[item.instance_id].slots for item in view.alive if view.runs(item)),
                complete=all(item.instance_id in view.reports for item in view.alive),
            )
        )
        decision = autoscale.decide(history, deployment.specifications, now=now, idle_s=self.settings.idle_s)
        if decision.reason and decision != self._decisions.get(deployment.id):
            logger.info(
                "scaling",
                extra={
                    "version_id": deployment.version_id,
                    "before": sum(history.last.counts) if history.last else 0,
                    "wanted": sum(decision.counts),
                    "reason": decision.reason,
                },
            )
        self._decisions[deployment.id] = decision
        return decision

    def _surplus(self, view: View, specification: GpuSpecification, count: int) -> list[Launched]:
        """Which to stop: all above the maximum, and of those above `count` the idle ones."""
        alive = view.of(specification)
        idle = {instance.instance_id for instance in view.idle()}
        order = self._least_useful_first(view, alive, idle)
        over = max(0, len(alive) - specification.max_instances)
        more = [item for item in order[over:] if item.instance_id in idle]
        return order[:over] + more[: max(0, len(alive) - over - count)]

    async def _evict(self, view: View) -> None:
        evicted = [item for item in view.alive if item.instance_id in view.deployment.evicted]
        self._stop(view, evicted, grace_s=self.settings.drain_s)
        for instance in evicted:
            view.alive.remove(instance)
        there = {instance.instance_id for instance in view.launched}
        if not there.issuperset(view.deployment.evicted):
            await deployments.forget_evicted(self.broker, view.deployment, there)

    async def _start(self, view: View, version: Version, specification: GpuSpecification, streak: Streak) -> bool:
        """Whether it was started; if not, another one cannot be either, in this pass."""
        if streak.next_start_at > self.now():
            return False
        instance_id = str(uuid.uuid4())
        try:
            row = await self.broker.catalog.secrets.get(version.id)
            content = secrets.reveal(self.broker, row.item) if row else None
            login = await registries.credential_for(self.broker, version.account, version.container_image)
            await self.broker.users.admit([version.id])
            if not self.leads():
                return False
            await self.launcher.start(instance_id, version, specification, secrets=content, login=login)
        except NoCapacity as exc:
            streak.waits(str(exc))
            return False
        except (ConfigurationError, LauncherUnavailable, OSError) as exc:
            streak.cannot_start(str(exc), hopeless=isinstance(exc, ConfigurationError), now=self.now())
            logger.warning("instance_cannot_start", extra={"version_id": version.id, "cause": str(exc)})
            return False
        self._started_at[instance_id] = self.now()
        view.alive.append(_Started(instance_id, version.id, specification.id))
        return True

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
        alive = view.of(specification)
        streak = self._streaks.get(specification.id) or Streak()
        reports = [view.reports[item.instance_id] for item in alive if item.instance_id in view.reports]
        quarantine = quarantine_of(specification, view.reports.values())
        return Sight(
            specification=specification,
            running=sum(view.runs(instance) for instance in alive),
            starting=sum(view.starts(instance) for instance in alive),
            error=quarantine or _first_error(reports, InstanceStatus.ERRORED) or streak.error,
            delay=_first_error(reports, InstanceStatus.STARTING),
            failed=streak.failed,
            quarantined=bool(quarantine),
        )

    # -- the dead and the unwanted -----------------------------------------------------------------

    def _bury_dead(self, view: View) -> None:
        dead: dict[str, list[Launched]] = {}
        for instance in view.launched:
            condemned = instance.alive and view.quarantined(instance)
            alive = instance.alive and not condemned and not self._sick(view, instance)
            if alive or _stopping(instance) in self.chores:
                continue
            if instance in view.alive:
                view.alive.remove(instance)
            if instance.instance_id not in self._buried:
                self._buried.add(instance.instance_id)
                dead.setdefault(instance.specification_id, []).append(instance)
            grace_s = self.settings.drain_s if condemned else DEAD_GRACE_S
            self._stop_one(instance, view.reports.get(instance.instance_id), grace_s=grace_s)
        for specification_id, instances in dead.items():
            reports = [view.reports.get(instance.instance_id) for instance in instances]
            error = next((item.error for item in instances if item.error), "")
            error = error or next((report.error for report in reports if report), "")
            quarantined = any(view.quarantined(instance) for instance in instances)
            self._note_deaths(specification_id, instances, error, quarantined=quarantined)

    def _sick(self, view: View, instance: Launched) -> bool:
        """It was healthy, and has not been for so long that it is not worth waiting for."""
        report = view.reports.get(instance.instance_id)
        if report is None or report.status is not InstanceStatus.ERRORED:
            self._sick_at.pop(instance.instance_id, None)
            return False
        return self.now() - self._sick_at.setdefault(instance.instance_id, self.now()) >= SICK_S

    def _note_deaths(
        self, specification_id: str, instances: Sequence[Launched], error: str, *, quarantined: bool
    ) -> None:
        """Those that one pass finds count as one death."""
        now, quick_s = self.now(), QUARANTINE_QUICK_S if quarantined else QUICK_S
        quick = any(now - self._started_at.get(item.instance_id, -inf) < quick_s for item in instances)
        longest_s = QUARANTINE_BACKOFF_S if quarantined else LONGEST_BACKOFF_S
        streak = self._streaks.setdefault(specification_id, Streak())
        streak.death(error, quick=quick, now=now, longest_s=longest_s)
        for instance in instances:
            logger.warning(
                "instance_quarantined" if quarantined else "instance_died",
                extra={
                    "instance_id": instance.instance_id,
                    "version_id": instance.version_id,
                    "cause": error.partition("\n")[0],
                },
            )

    async def _tend_strays(self, views: Sequence[View], launched: Sequence[Launched]) -> None:
        """Instances of versions that have no deployment. A removal ends with the row, so the catalog was lost; what
        was accepted is still in the queue, and the sidecars rebuild its records. They go when they are idle."""
        known = {view.deployment.version_id for view in views}
        strays = [instance for instance in launched if instance.version_id not in known]
        ids = sorted({instance.version_id for instance in strays})
        loads = dict(zip(ids, await self.broker.results.load(ids) if ids else [], strict=True))
        self._stray_at = {key: self._stray_at.get(key, self.now()) for key in ids}
        for version_id, load in loads.items():
            if load.queued + load.running:
                self._stray_at[version_id] = self.now()
        for stray in strays:
            if not stray.alive or self.now() - self._stray_at[stray.version_id] >= STRAY_S:
                self._stop_one(stray, None, grace_s=self.settings.drain_s)

    def _stop(self, view: View, instances: Iterable[Launched], *, grace_s: float) -> None:
        for instance in instances:
            self._stop_one(instance, view.reports.get(instance.instance_id), grace_s=grace_s)

    def _stop_one(self, instance: Launched, report: Instance | None, *, grace_s: float) -> None:
        """`report` is what an instance that was killed cannot take back itself."""

        async def stop() -> None:
            await self.launcher.stop(instance.instance_id, grace_s=grace_s)
            if report is not None:
                await self.broker.catalog.retire(report)

        if self.leads():
            self.chores.begin(_stopping(instance), stop)

    def _least_useful_first(self, view: View, instances: Sequence[Launched], idle: Set[str]) -> list[Launched]:
        """Starting ones before running ones, idle ones before busy ones, the older first (contract/management.md
        §2.6)."""

        def use(item: Launched) -> tuple[bool, bool, float]:
            return view.runs(item), item.instance_id not in idle, self._started_at.get(item.instance_id, 0.0)

        return sorted(instances, key=use)

    # -- removing ----------------------------------------------------------------------------------

    async def _remove(self, view: View) -> None:
        """First the instances, then the requests, the queue and the row. Begun again by every pass until done."""
        deployment = view.deployment
        await self.removals.deactivate(deployment, view.version)
        if view.launched:
            self._stop(view, view.alive, grace_s=self.settings.drain_s if deployment.draining else UNDEPLOY_GRACE_S)
            return
        self.removals.clear(deployment)

    # -- memory ------------------------------------------------------------------------------------

    def _forget(self, views: Sequence[View], launched: Sequence[Launched]) -> None:
        specifications = {item.id for view in views for item in view.deployment.specifications}
        ids = {view.deployment.id for view in views}
        instances = {item.instance_id for item in launched} | {
            item.instance_id for view in views for item in view.alive
        }
        self._streaks = {key: kept for key, kept in self._streaks.items() if key in specifications}
        self._histories = {key: kept for key, kept in self._histories.items() if key in ids}
        self._decisions = {key: kept for key, kept in self._decisions.items() if key in ids}
        self._started_at = {key: kept for key, kept in self._started_at.items() if key in instances}
        self.removals.forget(ids)
        self._sick_at = {key: kept for key, kept in self._sick_at.items() if key in instances}
        self._buried &= instances


async def ensure_queues(broker: Broker) -> None:
    """The queues of what is deployed, and the users who consume them."""
    rows = await broker.catalog.deployments.list()
    deployed = [row.item.version_id for row in rows if not row.item.undeployed]
    for version_id in deployed:
        await broker.queue.declare(version_id)
    await broker.users.admit(deployed, look=True)


@dataclass(frozen=True, slots=True)
class _Started:
    """An instance that this pass started; the next one sees how it does."""

    instance_id: str
    version_id: str
    specification_id: str
    alive: bool = True
    error: str = ""


def _stopping(instance: Launched) -> str:
    return f"stop {instance.instance_id}"


def quarantine_of(specification: GpuSpecification, reports: Iterable[Instance]) -> str:
    """Why an instance of it is in quarantine, '' if none is; one that is being ended included."""
    return next((item.error for item in reports if item.quarantined and item.specification_id == specification.id), "")


def _first_error(reports: Iterable[Instance], status: InstanceStatus) -> str:
    return next((report.error for report in reports if report.status is status and report.error), "")
