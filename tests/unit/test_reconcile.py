"""The reconcile pass over the memory back ends, with instances that live and die at the test's word."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from broker import deployments, functions, specifications
from broker.errors import NotFound, StoreUnavailable
from broker.functions import Definition
from broker.model import (
    Deployment,
    Draft,
    FunctionStatus,
    GpuSpecification,
    Instance,
    InstanceStatus,
    Job,
    Load,
    Principal,
    RequestState,
    Version,
)
from broker.ports import Broker
from broker.revisions import edit
from broker.settings import ControllerSettings
from broker.specifications import Change
from tests.unit.launchers import CPU, KNOWN_IMAGE, FakeLauncher
from workers.controller import serve
from workers.controller.chores import Chores
from workers.controller.leadership import LEASE_S, Leadership
from workers.controller.reconcile import (
    LONGEST_BACKOFF_S,
    QUICK_S,
    SICK_S,
    STRAY_S,
    UNDEPLOY_GRACE_S,
    Reconciler,
    Streak,
    View,
)
from workers.controller.removal import QUIET_S

OURS = Principal(account="ours", subject="me", scopes=frozenset())
SERVER = Definition(name="server", inference_url="/echo", container_image=KNOWN_IMAGE)
S = FunctionStatus
LOOK_S = 10.0


class Controller:
    """A Reconciler whose clock is set by hand, and what the sidecars of its instances would do."""

    def __init__(self, broker: Broker, chores: Chores) -> None:
        self.broker = broker
        self.launcher = FakeLauncher()
        self.settings = ControllerSettings(drain_s=33.0)
        self.clock = 1000.0
        self.chores = chores
        self.leads = True
        self.start_over()

    async def step(self, *, after_s: float = 0.0) -> None:
        self.clock += after_s
        await self._reconciler.step()
        await self.chores.finished()

    async def ensure_queues(self) -> None:
        await self._reconciler.ensure_queues()

    def start_over(self) -> None:
        """As another controller with the same launcher."""
        self._reconciler = Reconciler(
            self.broker, self.settings, self.launcher, self.chores, lambda: self.clock, lambda: self.leads
        )

    @property
    def alive(self) -> list[str]:
        return [instance.instance_id for instance in self.launcher.instances.values() if instance.alive]

    async def beat(
        self, instance_id: str, status: InstanceStatus = InstanceStatus.RUNNING, error: str = "", *, busy: int = 0
    ) -> None:
        report = Instance(
            id=instance_id,
            function_id="f",
            version_id=self.launcher.instances[instance_id].version_id,
            account="ours",
            gpu="CPU",
            instance_type="CPU",
            backend="local",
            status=status,
            created_at=0.0,
            updated_at=0.0,
            busy=busy,
            error=error,
            specification_id=self.launcher.instances[instance_id].specification_id,
        )
        await self.broker.catalog.beat(report, ttl_s=60)

    async def all_run(self, *busy: str) -> None:
        for instance_id in self.alive:
            await self.beat(instance_id, busy=instance_id in busy)

    async def pass_time(self, s: float) -> None:
        """A pass every few seconds, as often as it needs to miss nothing."""
        for _ in range(int(s / LOOK_S) + 1):
            await self.step(after_s=LOOK_S)


@pytest.fixture
async def controller(memory_broker: Broker) -> AsyncIterator[Controller]:
    await memory_broker.catalog.offer([CPU], ttl_s=60)
    async with asyncio.TaskGroup() as group:
        yield Controller(memory_broker, Chores(group))


def wanted(minimum: int, maximum: int | None = None) -> GpuSpecification:
    return GpuSpecification(
        id="", gpu="CPU", instance_type="", min_instances=minimum, max_instances=maximum or max(1, minimum)
    )


async def deployed(broker: Broker, *specifications: GpuSpecification, image: str = KNOWN_IMAGE) -> Version:
    version = await functions.create(broker, OURS, replace(SERVER, container_image=image))
    await deployments.deploy(broker, OURS, version.function_id, version.id, specifications or (wanted(1),))
    return version


async def undeploy(broker: Broker, version: Version, *, graceful: bool = False) -> None:
    await deployments.undeploy(broker, OURS, version.function_id, version.id, graceful=graceful)


async def status(broker: Broker, version: Version) -> FunctionStatus:
    return (await functions.get(broker, OURS, version.function_id, version.id)).status


async def row(broker: Broker, version: Version) -> Deployment | None:
    stored = await broker.catalog.deployments.get(version.id)
    return stored.item if stored else None


async def errors(broker: Broker, version: Version) -> list[str]:
    deployment = await row(broker, version)
    assert deployment is not None
    return [info.error for info in deployment.health]


async def submit(broker: Broker, version: Version, *, published: bool = True) -> Job:
    draft = Draft(
        id=str(uuid.uuid4()),
        account="ours",
        function_id=version.function_id,
        version_id=version.id,
        digest="",
        deadline_s=3600,
    )
    record = await broker.results.create(draft, queue_limit=100, watch=False)
    job = Job(
        id=record.id,
        account=record.account,
        function_id=record.function_id,
        version_id=record.version_id,
        subject="me",
        created_at=record.created_at,
        deadline_at=record.deadline_at,
        digest="",
    )
    if published:
        await broker.queue.publish(job, timeout_s=1)
    return job


async def finish(broker: Broker, version: Version) -> None:
    """As a sidecar would: take a job, and end it."""
    delivery = await broker.queue.take(version.id)
    assert delivery is not None
    await broker.results.end(delivery.job, RequestState.DEAD, reason="test")
    await delivery.ack()


# -- up to the minimum -------------------------------------------------------------------------


async def test_missing_instances_are_started_and_make_the_version_active(controller: Controller) -> None:
    version = await deployed(controller.broker, wanted(2, 3), wanted(1))
    await controller.step()
    assert len(controller.alive) == 3
    assert await status(controller.broker, version) is S.DEPLOYING
    await controller.all_run()
    await controller.step()
    assert len(controller.alive) == 3
    assert await status(controller.broker, version) is S.ACTIVE


async def test_only_running_reports_make_it_active(controller: Controller) -> None:
    version = await deployed(controller.broker)
    await controller.step()
    await controller.beat(controller.alive[0], InstanceStatus.STARTING, "health check: connection refused")
    await controller.step()
    assert await status(controller.broker, version) is S.DEPLOYING
    assert await errors(controller.broker, version) == []


async def test_a_new_controller_keeps_the_instances_it_finds(controller: Controller) -> None:
    await deployed(controller.broker)
    await controller.step()
    before = controller.alive
    controller.start_over()
    await controller.step()
    assert controller.alive == before


async def test_more_than_the_maximum_is_stopped_the_starting_ones_first(controller: Controller) -> None:
    version = await deployed(controller.broker, wanted(3, 3))
    await controller.step()
    first, second, third = controller.alive
    for instance_id in (first, third):
        await controller.beat(instance_id)
    deployment = await row(controller.broker, version)
    assert deployment is not None
    fewer = (replace(deployment.specifications[0], min_instances=1, max_instances=1),)
    await edit(controller.broker.catalog.deployments, version.id, lambda old: replace(old, specifications=fewer))
    await controller.step()
    assert controller.launcher.stopped == [(second, 33.0), (first, 33.0)]
    assert controller.alive == [third]


async def test_an_evicted_instance_is_drained_and_replaced(controller: Controller) -> None:
    version = await deployed(controller.broker, wanted(2, 2))
    await controller.step()
    await controller.all_run()
    first, second = controller.alive
    await deployments.evict(controller.broker, first)
    await controller.step()
    assert controller.launcher.stopped == [(first, 33.0)]
    assert len(controller.alive) == 2
    assert second in controller.alive
    with pytest.raises(NotFound):
        await deployments.evict(controller.broker, first)
    await controller.step()
    deployment = await row(controller.broker, version)
    assert deployment is not None
    assert deployment.evicted == ()


async def test_changed_bounds_take_effect_with_the_next_pass(controller: Controller) -> None:
    version = await deployed(controller.broker, wanted(1, 2))
    await controller.step()
    await controller.all_run()
    await controller.step()
    await change(controller, version, Change(min_instances=3, max_instances=4))
    await controller.step()
    assert len(controller.alive) == 3
    assert await status(controller.broker, version) is S.DEGRADING
    await controller.all_run()
    await change(controller, version, Change(min_instances=0, max_instances=2))
    await controller.step()
    await controller.step()
    assert len(controller.alive) == 2
    assert await status(controller.broker, version) is S.ACTIVE


async def change(controller: Controller, version: Version, change: Change) -> None:
    await specifications.update(controller.broker, OURS, version.function_id, version.id, [change])


async def test_an_error_that_nobody_looks_at_is_undeployed_in_the_end(controller: Controller) -> None:
    version = await deployed(controller.broker)
    await edit(controller.broker.catalog.versions, version.id, lambda old: replace(old, status=S.ERROR))
    await controller.step()
    assert await status(controller.broker, version) is S.ERROR
    long_ago = time.time() - controller.settings.error_ttl_s
    await edit(controller.broker.catalog.deployments, version.id, lambda old: replace(old, updated_at=long_ago))
    for _ in range(3):
        await controller.step(after_s=QUIET_S)
    assert await status(controller.broker, version) is S.INACTIVE
    assert await row(controller.broker, version) is None


async def test_a_deployment_that_takes_too_long_is_an_error(controller: Controller) -> None:
    version = await deployed(controller.broker)
    await controller.step()
    await controller.beat(controller.alive[0], InstanceStatus.STARTING, "health check: HTTP 503")
    long_ago = time.time() - controller.settings.deploy_timeout_s
    await edit(controller.broker.catalog.deployments, version.id, lambda old: replace(old, created_at=long_ago))
    await controller.step()
    assert await status(controller.broker, version) is S.ERROR
    assert await errors(controller.broker, version) == [
        "1 of 1 instances were not ready within 1800 s; health check: HTTP 503"
    ]
    await controller.step()
    assert controller.alive == []


# -- from zero -----------------------------------------------------------------------------------


async def test_nothing_is_started_from_zero_until_a_request_waits(controller: Controller) -> None:
    version = await deployed(controller.broker, wanted(0, 2), wanted(0, 1))
    await controller.step()
    assert controller.alive == []
    await submit(controller.broker, version)
    await controller.step()
    assert len(controller.alive) == 1
    await submit(controller.broker, version)
    await controller.step()
    assert len(controller.alive) == 1
    assert await status(controller.broker, version) is S.ACTIVE


async def test_a_burst_gets_instances_up_to_the_maximum_and_the_first_at_once(controller: Controller) -> None:
    version = await deployed(controller.broker, wanted(0, 4))
    for _ in range(10):
        await submit(controller.broker, version)
    counts = []
    for _ in range(6):
        await controller.step(after_s=1.0)
        counts.append(len(controller.alive))
    assert counts == [1, 1, 4, 4, 4, 4]


async def test_idle_instances_go_after_the_idle_limit_and_the_version_stays_active(controller: Controller) -> None:
    version = await deployed(controller.broker, wanted(0, 1))
    await submit(controller.broker, version)
    await controller.step()
    await controller.all_run()
    await finish(controller.broker, version)
    await controller.pass_time(controller.settings.idle_s - 2 * LOOK_S)
    assert len(controller.alive) == 1
    await controller.pass_time(3 * LOOK_S)
    assert controller.alive == []
    assert [grace_s for _, grace_s in controller.launcher.stopped] == [33.0]
    await controller.step()
    assert await status(controller.broker, version) is S.ACTIVE
    await submit(controller.broker, version)
    await controller.step()
    assert len(controller.alive) == 1


async def test_only_idle_instances_are_scaled_away(controller: Controller) -> None:
    version = await deployed(controller.broker, wanted(4, 4))
    await controller.step()
    await change(controller, version, Change(min_instances=1))
    busy = {controller.alive[0], controller.alive[2]}
    await controller.all_run(*busy)
    await controller.pass_time(controller.settings.idle_s + 2 * LOOK_S)
    assert busy <= set(controller.alive)
    assert len(controller.alive) < 4
    await controller.all_run()
    await controller.pass_time(controller.settings.idle_s + 2 * LOOK_S)
    assert len(controller.alive) == 1


@pytest.mark.parametrize(("running", "idle"), [(0, 3), (1, 3), (2, 2), (3, 1), (9, 0)])
async def test_a_claim_that_no_instance_has_reported_may_run_in_any(
    controller: Controller, running: int, idle: int
) -> None:
    """Reports are seconds old: some of those that say that they are idle may not be."""
    version = await deployed(controller.broker, wanted(4, 4))
    await controller.step()
    await controller.all_run(controller.alive[0])
    deployment, launched = await row(controller.broker, version), await controller.launcher.launched()
    assert deployment is not None
    view = View(
        deployment=deployment,
        version=version,
        reports={report.id: report for report in await controller.broker.catalog.instances(version.id)},
        launched=launched,
        alive=launched,
        load=Load(queued=0, running=running, oldest_age_s=0.0),
    )
    assert len(view.idle()) == idle
    assert controller.alive[0] not in {instance.instance_id for instance in view.idle()}


async def test_an_instance_without_a_report_keeps_all_of_them(controller: Controller) -> None:
    version = await deployed(controller.broker, wanted(2, 2))
    await controller.step()
    await change(controller, version, Change(min_instances=0))
    await controller.beat(controller.alive[0])
    await controller.pass_time(2 * controller.settings.idle_s)
    assert len(controller.alive) == 2


async def test_a_leader_whose_lease_lapsed_within_a_pass_starts_and_stops_nothing(controller: Controller) -> None:
    await deployed(controller.broker, wanted(2))
    controller.leads = False
    await controller.step()
    assert controller.alive == []
    controller.leads = True
    await controller.step()
    assert len(controller.alive) == 2


async def test_work_of_a_worker_that_died_brings_an_instance_back(controller: Controller) -> None:
    version = await deployed(controller.broker, wanted(0, 1))
    job = await submit(controller.broker, version)
    await controller.broker.results.claim(job, worker="dead", lease_s=15, max_attempts=3)
    await controller.step()
    assert len(controller.alive) == 1


# -- the dead --------------------------------------------------------------------------------------


async def test_a_dead_instance_is_replaced_in_the_same_pass(controller: Controller) -> None:
    version = await deployed(controller.broker)
    await controller.step()
    await controller.all_run()
    await controller.step()
    (dead,) = controller.alive
    controller.launcher.kill(dead)
    await controller.step()
    assert len(controller.alive) == 1
    assert dead not in controller.launcher.instances
    assert dead not in [report.id for report in await controller.broker.catalog.instances(version.id)]
    # Its requests are still accepted: DEGRADED would refuse them.
    assert await status(controller.broker, version) is S.DEGRADING
    await controller.all_run()
    await controller.step()
    assert await status(controller.broker, version) is S.ACTIVE
    assert await errors(controller.broker, version) == []


async def test_quick_deaths_in_a_row_are_replaced_more_and_more_slowly(controller: Controller) -> None:
    await deployed(controller.broker)
    await controller.step()
    await controller.all_run()
    await controller.step()
    pauses = []
    for _ in range(10):
        controller.launcher.kill(controller.alive[0])
        pause_s = 0.0
        await controller.step()
        while not controller.alive:
            pause_s += 0.5
            await controller.step(after_s=0.5)
        pauses.append(pause_s)
    assert pauses == [0, 1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert LONGEST_BACKOFF_S == 60


async def test_a_death_after_a_good_while_is_replaced_at_once(controller: Controller) -> None:
    await deployed(controller.broker)
    await controller.step()
    for _ in range(5):
        controller.launcher.kill(controller.alive[0])
        await controller.step(after_s=QUICK_S)
        assert len(controller.alive) == 1


async def test_deaths_of_one_pass_count_as_one() -> None:
    streak = Streak()
    streak.death("boom", quick=True, now=0.0)
    assert (streak.next_start_at, streak.failed) == (0.0, False)


async def test_instances_that_never_ran_make_an_error_with_the_tail_of_the_log(controller: Controller) -> None:
    version = await deployed(controller.broker)
    for death in range(3):
        await controller.step(after_s=10)
        await controller.step(after_s=10)
        assert await status(controller.broker, version) is S.DEPLOYING
        controller.launcher.kill(controller.alive[0], f"container exited with status 1\ndeath {death}")
    await controller.step()
    assert await status(controller.broker, version) is S.ERROR
    assert await errors(controller.broker, version) == ["container exited with status 1\ndeath 2"]
    assert controller.alive == []
    await controller.step(after_s=3600)
    assert controller.alive == []


async def test_instances_that_ran_once_never_make_an_error(controller: Controller) -> None:
    version = await deployed(controller.broker)
    await controller.step()
    await controller.all_run()
    await controller.step()
    for _ in range(5):
        controller.launcher.kill(controller.alive[0])
        await controller.step()
        await controller.step(after_s=QUICK_S - 1)
    controller.launcher.kill(controller.alive[0], "boom")
    await controller.step()
    assert await status(controller.broker, version) is S.DEGRADED
    assert await errors(controller.broker, version) == ["boom"]


async def test_an_unknown_image_is_an_error_at_once(controller: Controller) -> None:
    version = await deployed(controller.broker, image="nobody/knows:1")
    await controller.step()
    assert await status(controller.broker, version) is S.ERROR
    (error,) = await errors(controller.broker, version)
    assert KNOWN_IMAGE in error


async def test_a_sick_instance_is_replaced_after_a_long_while(controller: Controller) -> None:
    version = await deployed(controller.broker)
    await controller.step()
    await controller.all_run()
    await controller.step()
    (sick,) = controller.alive
    await controller.beat(sick, InstanceStatus.ERRORED, "health check: HTTP 500")
    await controller.step()
    assert await status(controller.broker, version) is S.DEGRADED
    assert await errors(controller.broker, version) == ["health check: HTTP 500"]
    await controller.step(after_s=SICK_S - 1)
    assert controller.alive == [sick]
    await controller.step(after_s=1)
    assert sick not in controller.alive
    assert len(controller.alive) == 1


# -- undeployed ------------------------------------------------------------------------------------


async def test_undeploying_stops_the_instances_cancels_what_waits_and_removes_the_queue_last(
    controller: Controller,
) -> None:
    version = await deployed(controller.broker, wanted(2))
    await controller.step()
    await controller.all_run()
    jobs = [await submit(controller.broker, version) for _ in range(3)]
    await undeploy(controller.broker, version)
    await controller.step()
    assert controller.alive == []
    assert {grace_s for _, grace_s in controller.launcher.stopped} == {UNDEPLOY_GRACE_S}
    await controller.step()
    for job in jobs:
        record = await controller.broker.results.read(job.id)
        assert record is not None
        assert (record.state, record.reason) == (RequestState.CANCELLED, "function version was undeployed")
    # A front end may still send what it accepted a moment ago.
    assert await row(controller.broker, version) is not None
    late = await submit(controller.broker, version)
    await controller.step(after_s=QUIET_S)
    assert await row(controller.broker, version) is None
    record = await controller.broker.results.read(late.id)
    assert record is not None
    assert record.state is RequestState.CANCELLED
    with pytest.raises(Exception, match="no queue"):
        await submit(controller.broker, version)


async def test_a_request_that_is_written_down_and_not_yet_published_holds_the_queue(controller: Controller) -> None:
    version = await deployed(controller.broker)
    await undeploy(controller.broker, version)
    await submit(controller.broker, version, published=False)
    await controller.step()
    await controller.step(after_s=QUIET_S)
    assert await row(controller.broker, version) is not None
    settings = controller.broker.settings
    await controller.step(after_s=settings.accept_timeout_s + settings.lease_s)
    assert await row(controller.broker, version) is None


async def test_undeploying_gracefully_keeps_the_instances_until_all_is_done(controller: Controller) -> None:
    version = await deployed(controller.broker, wanted(1))
    await controller.step()
    await controller.all_run()
    await submit(controller.broker, version)
    await undeploy(controller.broker, version, graceful=True)
    await controller.step()
    await controller.step(after_s=3600)
    assert len(controller.alive) == 1
    assert await status(controller.broker, version) is S.INACTIVE
    await finish(controller.broker, version)
    await controller.step()
    assert len(controller.alive) == 1
    await controller.step(after_s=QUIET_S)
    assert controller.alive == []
    assert [grace_s for _, grace_s in controller.launcher.stopped] == [33.0]
    await controller.step(after_s=QUIET_S)
    await controller.step(after_s=QUIET_S)
    assert await row(controller.broker, version) is None


async def test_a_draining_version_whose_instance_dies_gets_another(controller: Controller) -> None:
    version = await deployed(controller.broker)
    await controller.step()
    await submit(controller.broker, version)
    await undeploy(controller.broker, version, graceful=True)
    controller.launcher.kill(controller.alive[0])
    await controller.step()
    assert len(controller.alive) == 1
    assert await status(controller.broker, version) is S.INACTIVE


async def test_a_deleted_version_leaves_nothing_behind(controller: Controller) -> None:
    version = await deployed(controller.broker)
    await controller.step()
    job = await submit(controller.broker, version)
    await functions.delete_version(controller.broker, OURS, version.function_id, version.id)
    await controller.step()
    await controller.step(after_s=QUIET_S)
    assert controller.alive == []
    assert await row(controller.broker, version) is None
    record = await controller.broker.results.read(job.id)
    assert record is not None
    assert record.state is RequestState.CANCELLED


async def test_a_deployment_without_its_version_is_removed(controller: Controller) -> None:
    """`deploy` and `delete_version` at the same moment, and a crash."""
    version = await deployed(controller.broker)
    await controller.broker.catalog.versions.delete(version.id)
    for _ in range(3):
        await controller.step(after_s=QUIET_S)
    assert await row(controller.broker, version) is None


async def test_a_status_that_an_undeploy_could_not_write_is_healed(controller: Controller) -> None:
    version = await deployed(controller.broker)
    await edit(controller.broker.catalog.deployments, version.id, lambda old: replace(old, undeployed=True))
    assert await status(controller.broker, version) is S.DEPLOYING
    await controller.step()
    assert await status(controller.broker, version) is S.INACTIVE


async def test_deploying_again_during_the_removal_replaces_the_instances(controller: Controller) -> None:
    version = await deployed(controller.broker)
    await controller.step()
    (old,) = controller.alive
    await undeploy(controller.broker, version)
    await deployments.deploy(controller.broker, OURS, version.function_id, version.id, [wanted(1)])
    await controller.step()
    assert old not in controller.alive
    assert len(controller.alive) == 1
    assert await status(controller.broker, version) is S.DEPLOYING


# -- a catalog or a queue that was lost ----------------------------------------------------------


async def test_instances_of_a_lost_catalog_finish_what_was_accepted(controller: Controller) -> None:
    version = await deployed(controller.broker)
    await controller.step()
    await submit(controller.broker, version)
    await controller.broker.catalog.deployments.delete(version.id)
    await controller.step(after_s=STRAY_S)
    await controller.step(after_s=STRAY_S)
    assert len(controller.alive) == 1
    await finish(controller.broker, version)
    await controller.step(after_s=STRAY_S)
    assert controller.alive == []


async def test_a_lost_queue_is_made_again(controller: Controller) -> None:
    version = await deployed(controller.broker)
    await controller.broker.queue.delete(version.id)
    await controller.ensure_queues()
    await submit(controller.broker, version)


# -- leadership ------------------------------------------------------------------------------------


async def test_one_controller_leads_and_another_takes_over_when_it_resigns(memory_broker: Broker) -> None:
    first = Leadership(memory_broker.catalog, "first")
    second = Leadership(memory_broker.catalog, "second")
    await first.renew()
    await second.renew()
    assert (first.held, second.held) == (True, False)
    await memory_broker.catalog.resign("first")
    await second.renew()
    await first.renew()
    await asyncio.wait_for(first.lost(), 20)
    assert (first.held, second.held) == (False, True)


class Away:
    """A catalog's `lead`, and then nothing."""

    def __init__(self) -> None:
        self.away = False

    async def lead(self, holder: str, *, ttl_s: float) -> bool:
        if self.away:
            raise StoreUnavailable("away")
        return True


async def test_the_lease_is_given_up_before_another_may_have_it() -> None:
    now = 0.0
    catalog = Away()
    leadership = Leadership(catalog, "me", now=lambda: now)  # type: ignore[arg-type]  # all that it uses of a Catalog
    await leadership.renew()
    catalog.away = True
    now = 5.0
    with pytest.raises(StoreUnavailable):
        await leadership.renew()
    held = [leadership.held]
    now = LEASE_S - 3
    held.append(leadership.held)
    assert held == [True, False]
    with pytest.raises(StoreUnavailable):
        await leadership.renew()
    await asyncio.wait_for(leadership.lost(), 20)


# -- all of it -------------------------------------------------------------------------------------


@asynccontextmanager
async def serving(broker: Broker, launcher: FakeLauncher) -> AsyncIterator[None]:
    stop, offered = asyncio.Event(), asyncio.Event()
    settings = ControllerSettings(reconcile_s=0.01, sweep_s=0.01, drain_s=1.0)
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(broker, settings, launcher, stop, offered=offered))
        await offered.wait()
        yield
        stop.set()


async def test_a_controller_serves_from_its_offer_to_its_stop(memory_broker: Broker) -> None:
    launcher = FakeLauncher()
    async with asyncio.timeout(20), serving(memory_broker, launcher):
        version = await deployed(memory_broker)
        await launcher.started.wait()
        (instance_id,) = launcher.instances
        await memory_broker.catalog.beat(
            Instance(
                id=instance_id,
                function_id="f",
                version_id=version.id,
                account="ours",
                gpu="CPU",
                instance_type="CPU",
                backend="local",
                status=InstanceStatus.RUNNING,
                created_at=0.0,
                updated_at=0.0,
            ),
            ttl_s=60,
        )
        while await status(memory_broker, version) is not S.ACTIVE:  # noqa: ASYNC110  a catalog tells nobody
            await asyncio.sleep(0)
    assert launcher.stopped == [(instance_id, 1.0)]
    assert await memory_broker.catalog.lead("another", ttl_s=1)


async def test_a_controller_that_does_not_lead_touches_nothing(memory_broker: Broker) -> None:
    assert await memory_broker.catalog.lead("another", ttl_s=60)
    await memory_broker.catalog.offer([CPU], ttl_s=60)
    version = await deployed(memory_broker)
    launcher, stop = FakeLauncher(), asyncio.Event()
    settings = ControllerSettings(reconcile_s=0.01, sweep_s=0.01, drain_s=1.0)
    async with asyncio.TaskGroup() as group:
        group.create_task(serve(memory_broker, settings, launcher, stop))
        for _ in range(100):
            await asyncio.sleep(0)
        stop.set()
    assert launcher.instances == {}
    assert await status(memory_broker, version) is S.DEPLOYING
    with pytest.raises(NotFound):
        await functions.pick_callable(memory_broker, OURS, version.function_id)


async def test_no_room_is_waited_for_and_is_no_failure(controller: Controller) -> None:
    controller.launcher.room = 0
    version = await deployed(controller.broker)
    for _ in range(10):
        await controller.step(after_s=10)
    assert await status(controller.broker, version) is S.DEPLOYING
    assert await errors(controller.broker, version) == ["1 H100 needed: 0 of 1 are free on this machine"]
    controller.launcher.room = 1
    await controller.step()
    await controller.all_run()
    await controller.step()
    assert (await status(controller.broker, version), await errors(controller.broker, version)) == (S.ACTIVE, [])
