"""The end of an undeployed version: no new requests, then no instances, then the requests, the queue and the row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from broker import deployments
from broker.model import Deployment, FunctionStatus, Load, Version
from broker.ports import Broker
from workers.controller import undertaker
from workers.controller.chores import Chores

logger = logging.getLogger(__name__)

# Longer than a front end may still pick a version that was undeployed, and take to write the request down.
QUIET_S = 3.0


@dataclass(slots=True)
class Removals:
    """Of one Reconciler, and by its clock `now`. `deactivate` comes first, and `clear` when no instance is left; both
    are repeated by every pass until the row is gone."""

    broker: Broker
    chores: Chores
    now: Callable[[], float]
    _undeployed_at: dict[str, float] = field(default_factory=dict)
    _busy_at: dict[str, float] = field(default_factory=dict)

    def due(self, deployment: Deployment, load: Load) -> bool:
        """Whether it need not finish anything: it was not asked to, or nothing is queued or running, for long enough
        that no front end still sends anything."""
        if not deployment.draining:
            return True
        now = self.now()
        if load.queued + load.running or deployment.id not in self._busy_at:
            self._busy_at[deployment.id] = now
        return now - self._busy_at[deployment.id] >= QUIET_S

    async def deactivate(self, deployment: Deployment, version: Version | None) -> None:
        """Raises RevisionConflict."""
        self._undeployed_at.setdefault(deployment.id, self.now())
        if version is not None and version.status is not FunctionStatus.INACTIVE:
            await deployments.deactivate(self.broker, deployment.version_id)

    def clear(self, deployment: Deployment) -> None:
        """Begin to end the requests, and to delete the queue and the row."""
        since = self._undeployed_at.setdefault(deployment.id, self.now())
        self.chores.begin(f"remove {deployment.version_id}", lambda: self._clear(deployment, since))

    def forget(self, ids: Collection[str]) -> None:
        """All deployments but those with these `ids`."""
        self._undeployed_at = {key: kept for key, kept in self._undeployed_at.items() if key in ids}
        self._busy_at = {key: kept for key, kept in self._busy_at.items() if key in ids}

    async def _clear(self, deployment: Deployment, since: float) -> None:
        if not await undertaker.clear(self.broker, deployment.version_id) or not await self._silent(deployment, since):
            return
        if not await deployments.claim_removal(self.broker, deployment):
            return
        # Whoever was late: now nobody can be later.
        if await undertaker.clear(self.broker, deployment.version_id):
            await self.broker.users.expel(deployment.version_id)
            await deployments.finish_removal(self.broker, deployment)
            logger.info("deployment_removed", extra={"version_id": deployment.version_id})

    async def _silent(self, deployment: Deployment, since: float) -> bool:
        """Whether no front end can still be publishing: none has written a request down and is yet to publish it,
        or, if one seems to have, for longer than publishing may take. Then it died in between, and accepted
        nothing."""
        elapsed_s = self.now() - since
        (load,) = await self.broker.results.load([deployment.version_id])
        if load.queued + load.running == 0:
            return elapsed_s >= QUIET_S
        return elapsed_s >= QUIET_S + self.broker.settings.accept_timeout_s + self.broker.settings.lease_s
