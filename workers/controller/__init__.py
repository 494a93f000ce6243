"""Keeps what is deployed running: the loops of `fnqueue controller`, also run inside `fnqueue dev`.

Several controllers may run; the one that holds the lease acts, the others wait for it to lapse. All send webhooks.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import uuid
from collections.abc import Awaitable, Callable
from functools import partial

from broker.errors import FnqueueError
from broker.ports import Broker, Fleet, Launcher
from broker.secrets import sweep as sweep_secrets
from broker.settings import ControllerSettings
from workers.controller import notify, undertaker
from workers.controller.auditor import Auditor
from workers.controller.chores import Chores
from workers.controller.fleets import FleetReconciler
from workers.controller.instance_logs import TURN_S, Copier
from workers.controller.leadership import RENEW_S, Leadership
from workers.controller.reconcile import Reconciler
from workers.controller.secrets import REFRESH_S, SWEEP_S, Refresher
from workers.controller.status import Status
from workers.loops import beside, every

logger = logging.getLogger(__name__)

OFFER_S = 10.0
OFFER_TTL_S = 60.0
# Past the grace, a container has seconds to end by itself, and then some to be seen gone.
_AFTER_GRACE_S = 20.0


async def serve(
    broker: Broker,
    settings: ControllerSettings,
    launcher: Launcher | Fleet,
    stop: asyncio.Event,
    *,
    offered: asyncio.Event | None = None,
) -> None:
    """Act for as long as this controller leads, until `stop`; then drain and stop this launcher's instances, all
    at once and in `drain_s` at most, and let another controller lead. A fleet's go on without any controller, and so
    do those of a launcher that leaves them running: the controller that leads next has them already.

    `offered` is set once the inventory can be deployed to. When cancelled instead, it leaves the instances
    running, as a crash would; the next controller on the data folder finds them again.
    """
    holder = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    leadership = Leadership(broker.catalog, holder)
    status = Status(broker)
    async with (
        status.shown(settings),
        beside(
            every(RENEW_S, leadership.renew, name="leadership"),
            every(TURN_S, _copier(broker, launcher, leadership), name="instance_logs"),
            _lead(broker, settings, launcher, leadership, status, offered or asyncio.Event()),
            notify.serve(broker, settings),
        ),
    ):
        await stop.wait()
    # First, so that another controller's instances take over while ours drain.
    await _resign(broker, holder)
    if leadership.ever_held and not isinstance(launcher, Fleet) and not launcher.leaves_running:
        await stop_all(launcher, grace_s=settings.drain_s)


async def stop_all(launcher: Launcher, *, grace_s: float) -> None:
    """Drain and stop every instance of the launcher, all at the same time."""
    try:
        async with asyncio.timeout(grace_s + _AFTER_GRACE_S), asyncio.TaskGroup() as group:
            chores = Chores(group)
            for instance in await launcher.launched():
                chores.begin(
                    f"stop {instance.instance_id}",
                    partial(launcher.stop, instance.instance_id, grace_s=grace_s if instance.alive else 0.0),
                )
    except (TimeoutError, FnqueueError, OSError) as exc:
        logger.warning("instances_left", extra={"cause": str(exc) or "not stopped in time"})


def _copier(broker: Broker, launcher: Launcher | Fleet, leadership: Leadership) -> Callable[[], Awaitable[None]]:
    """Any controller may read the logs of a fleet. What instances of a launcher write is with it alone, whoever leads;
    and before it led, they are not its own."""
    copier = Copier(broker, launcher)
    if isinstance(launcher, Fleet):
        return leadership.only(copier.step)

    async def step() -> None:
        if leadership.ever_held:
            await copier.step()

    return step


async def _lead(
    broker: Broker,
    settings: ControllerSettings,
    launcher: Launcher | Fleet,
    leadership: Leadership,
    status: Status,
    offered: asyncio.Event,
) -> None:
    """One term after another."""

    async def offer() -> None:
        gpus = await launcher.gpus()
        await broker.catalog.offer(gpus, ttl_s=OFFER_TTL_S)
        status.figures.offered(gpus)
        offered.set()

    while True:
        await leadership.won()
        logger.info("leadership_won", extra={"holder": leadership.holder})
        async with asyncio.TaskGroup() as group:
            chores = Chores(group)
            reconciler: Reconciler | FleetReconciler
            if isinstance(launcher, Fleet):  # whose passes deliver secrets too
                reconciler = FleetReconciler(
                    broker, settings, launcher, chores, leads=lambda: leadership.held, saw=status.figures.saw
                )
                also = []
            else:
                reconciler = Reconciler(
                    broker, settings, launcher, chores, leads=lambda: leadership.held, saw=status.figures.saw
                )
                also = [every(REFRESH_S, leadership.only(Refresher(broker, launcher).step), name="secrets")]
            auditor = Auditor(broker, settings, leads=lambda: leadership.held)
            status.figures.leads(auditor)
            async with beside(
                every(OFFER_S, leadership.only(offer), name="offer"),
                every(settings.reconcile_s, leadership.only(reconciler.step), name="reconcile"),
                *also,
                every(SWEEP_S, leadership.only(lambda: sweep_secrets(broker)), name="secrets_sweep"),
                every(settings.sweep_s, leadership.only(reconciler.ensure_queues), name="queues"),
                every(settings.sweep_s, leadership.only(lambda: undertaker.sweep(broker)), name="sweep"),
                every(1.0, leadership.only(lambda: undertaker.serve(broker)), name="undertaker"),
                every(auditor.records.pause_s, leadership.only(auditor.records.step), name="audit_records"),
                every(auditor.versions.pause_s, leadership.only(auditor.versions.step), name="audit_versions"),
                every(auditor.objects.pause_s, leadership.only(auditor.objects.step), name="audit_objects"),
            ):
                await leadership.lost()
            status.figures.leads(None)
            chores.cancel()
        logger.warning("leadership_lost", extra={"holder": leadership.holder})


async def _resign(broker: Broker, holder: str) -> None:
    try:
        await broker.catalog.resign(holder)
    except FnqueueError as exc:  # the lease lapses by itself
        logger.warning("resign_failed", extra={"cause": str(exc)})
