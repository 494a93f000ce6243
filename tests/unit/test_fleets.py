"""The reconcile pass where Kubernetes keeps the instances: memory back ends, and the API server of the tests."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace

import aiohttp
import pytest

from broker import deployments, functions
from broker.functions import Definition
from broker.model import Draft, FunctionStatus, GpuSpecification, Instance, InstanceStatus, Principal, Version
from broker.ports import Broker
from broker.settings import ControllerSettings
from tests.eventually import eventually
from tests.kubernetes_api import KubernetesApi, Object, kubernetes_api
from tests.unit.launchers import Users
from tests.unit.test_kubernetes_launcher import SETTINGS, opened, waiting
from workers.controller.chores import Chores
from workers.controller.fleets import FleetReconciler
from workers.controller.reconcile import STRAY_S
from workers.controller.removal import QUIET_S
from workers.controller.status import Status
from workers.launchers.kubernetes import KubernetesFleet, objects

OURS = Principal(account="ours", subject="me", scopes=frozenset())
SERVER = Definition(name="server", inference_url="/echo", container_image="registry.example/server:1")
S = FunctionStatus


class Controller:
    """A FleetReconciler whose clock is set by hand, and what kubelet and sidecars would do."""

    def __init__(self, broker: Broker, api: KubernetesApi, fleet: KubernetesFleet, chores: Chores) -> None:
        self.broker, self.api, self.fleet, self.chores = broker, api, fleet, chores
        self.clock = 1000.0
        self._reconciler = FleetReconciler(broker, SETTINGS, fleet, chores, lambda: self.clock)

    def use(self, users: Users) -> None:
        self.broker = replace(self.broker, users=users)
        self._reconciler = FleetReconciler(self.broker, SETTINGS, self.fleet, self.chores, lambda: self.clock)

    async def step(self, *, after_s: float = 0.0) -> None:
        self.clock += after_s
        await self.seen()
        await self._reconciler.step()
        await self.chores.finished()

    async def seen(self) -> None:
        """Return when the watches have told all that is."""

        async def told() -> bool:
            kept = {item["metadata"]["labels"][objects.SPECIFICATION] for item in self.api.all("Deployment")}
            pods = {pod["metadata"]["uid"]: _state(pod) for pod in self.api.all("Pod")}
            seen = {each.instance_id: (each.alive, each.restarts) for each in await self.fleet.replicas()}
            return set(await self.fleet.kept()) == kept and seen == pods

        await eventually(told, bool)

    async def pods(self) -> list[Object]:
        found = await self.api.roll_out()
        await self.seen()
        return found

    async def beat(
        self,
        pod: Object,
        status: InstanceStatus = InstanceStatus.RUNNING,
        *,
        busy: int = 0,
        error: str = "",
        quarantined: bool = False,
    ) -> None:
        labels = pod["metadata"]["labels"]
        report = Instance(
            id=pod["metadata"]["uid"],
            function_id=labels[objects.FUNCTION],
            version_id=labels[objects.VERSION],
            account="ours",
            gpu="CPU",
            instance_type="CPU",
            backend="here",
            status=status,
            created_at=0.0,
            updated_at=0.0,
            busy=busy,
            error=error,
            quarantined=quarantined,
            specification_id=labels[objects.SPECIFICATION],
        )
        await self.broker.catalog.beat(report, ttl_s=60)

    async def deploy(self, minimum: int, *, image: str = "registry.example/server:1") -> Version:
        version = await functions.create(self.broker, OURS, replace(SERVER, container_image=image))
        specification = GpuSpecification(
            id="", gpu="CPU", instance_type="", min_instances=minimum, max_instances=max(minimum, 2)
        )
        await deployments.deploy(self.broker, OURS, version.function_id, version.id, [specification])
        return version

    async def status(self, version: Version) -> FunctionStatus:
        return (await functions.get(self.broker, OURS, version.function_id, version.id)).status

    async def errors(self, version: Version) -> list[str]:
        row = await self.broker.catalog.deployments.get(version.id)
        return [info.error for info in row.item.health] if row else []


def _state(pod: Object) -> tuple[bool, int]:
    containers = pod["status"].get("containerStatuses", [])
    restarts = max((each["restartCount"] for each in containers), default=0)
    return "deletionTimestamp" not in pod["metadata"], restarts


@pytest.fixture
async def controller(memory_broker: Broker) -> AsyncIterator[Controller]:
    async with kubernetes_api() as api, opened(api) as fleet, asyncio.TaskGroup() as group:
        await memory_broker.catalog.offer(await fleet.gpus(), ttl_s=60)
        yield Controller(memory_broker, api, fleet, Chores(group))


async def test_a_version_has_its_user_before_anything_is_kept(controller: Controller) -> None:
    users = Users()
    controller.use(users)
    users.there = False
    version = await controller.deploy(1)
    await controller.step()
    assert controller.api.all("Deployment") == []
    assert await controller.errors(version) == ["RabbitMQ is away"]
    users.there = True
    await controller.step()
    assert len(controller.api.all("Deployment")) == 1
    assert users.admitted == {version.id}


async def test_a_deployment_becomes_active_when_its_pods_report(controller: Controller) -> None:
    version = await controller.deploy(2)
    await controller.step()
    pods = await controller.pods()
    assert len(pods) == 2
    await controller.beat(pods[0])
    await controller.step()
    assert await controller.status(version) is S.DEPLOYING
    await controller.beat(pods[1])
    await controller.step()

    assert await controller.status(version) is S.ACTIVE


async def test_a_container_that_ends_again_and_again_is_an_error_with_its_words(controller: Controller) -> None:
    version = await controller.deploy(1)
    await controller.step()
    (pod,) = await controller.pods()
    controller.api.logs[pod["metadata"]["name"]] = "no such model\n"
    crashed = waiting("CrashLoopBackOff", restarts=3, last={"exitCode": 1, "reason": "Error"})
    await controller.api.set_status(pod["metadata"]["name"], crashed)
    await controller.step()

    assert await controller.status(version) is S.ERROR
    assert await controller.errors(version) == ["inference ended with status 1 (Error)\nno such model"]
    await controller.step()
    assert controller.api.one("Pod")["metadata"]["deletionTimestamp"]


async def test_a_cluster_that_is_not_set_up_is_no_error_of_the_function(controller: Controller) -> None:
    controller.api.absent.add("ScaledObject")
    version = await controller.deploy(1)
    await controller.step()

    assert await controller.status(version) is S.DEPLOYING
    (error,) = await controller.errors(version)
    assert "keda.sh/v1alpha1 ScaledObject" in error
    controller.api.absent.clear()
    await controller.step()
    (pod,) = await controller.pods()
    await controller.beat(pod)
    await controller.step()
    assert (await controller.status(version), await controller.errors(version)) == (S.ACTIVE, [])


async def test_an_undeployed_version_leaves_nothing_behind(controller: Controller) -> None:
    version = await controller.deploy(1)
    await controller.step()
    await controller.pods()
    await deployments.undeploy(controller.broker, OURS, version.function_id, version.id, graceful=False)
    await controller.step()
    assert controller.api.one("Pod")["metadata"]["deletionGracePeriodSeconds"] == 5
    assert await controller.broker.catalog.deployments.get(version.id) is not None, "its pod is still ending"
    await controller.api.end_pods()
    await controller.step()
    await controller.step(after_s=QUIET_S)

    assert await controller.broker.catalog.deployments.get(version.id) is None
    assert controller.api.all("Deployment") == controller.api.all("Secret") == controller.api.all("ScaledObject") == []


async def test_an_evicted_instance_ends_and_is_forgotten(controller: Controller) -> None:
    version = await controller.deploy(1)
    await controller.step()
    (pod,) = await controller.pods()
    await controller.beat(pod)
    await deployments.evict(controller.broker, pod["metadata"]["uid"])
    await controller.step()
    assert controller.api.one("Pod")["metadata"]["deletionTimestamp"]
    await controller.api.end_pods()
    await controller.step()

    row = await controller.broker.catalog.deployments.get(version.id)
    assert row is not None
    assert row.item.evicted == ()


async def test_pods_in_quarantine_are_replaced_less_and_less_often(controller: Controller) -> None:
    version = await controller.deploy(1)
    await controller.step()
    for pause_s in (0, 0, 1, 2):
        (pod,) = await controller.pods()
        await controller.beat(pod, InstanceStatus.ERRORED, error="quarantined: three", quarantined=True)
        if pause_s:
            await controller.step(after_s=pause_s - 0.5)
            assert "deletionTimestamp" not in controller.api.one("Pod")["metadata"]
        await controller.step(after_s=0.5)
        assert await controller.errors(version) == ["quarantined: three"]
        assert controller.api.one("Pod")["metadata"]["deletionTimestamp"]
        await controller.api.end_pods()


async def test_busy_pods_are_marked(controller: Controller) -> None:
    await controller.deploy(2)
    await controller.step()
    pods = await controller.pods()
    await controller.beat(pods[0], busy=1)
    await controller.beat(pods[1])
    await controller.step()

    costs = {
        pod["metadata"]["uid"]: pod["metadata"].get("annotations", {}).get(objects.COST)
        for pod in controller.api.all("Pod")
    }
    assert costs == {pods[0]["metadata"]["uid"]: objects.BUSY_COST, pods[1]["metadata"]["uid"]: None}


async def test_what_a_lost_catalog_left_goes_when_it_is_idle(controller: Controller) -> None:
    version = await controller.deploy(0)
    await controller.step()
    await controller.broker.catalog.deployments.delete(version.id)
    await controller.step()
    assert len(controller.api.all("Deployment")) == 1
    await controller.step(after_s=STRAY_S)

    assert controller.api.all("Deployment") == []


async def test_the_load_counts_what_runs_and_what_waits(memory_broker: Broker, unused_tcp_port: int) -> None:
    version_id = str(uuid.uuid4())
    draft = Draft(
        id=str(uuid.uuid4()), account="ours", function_id="f", version_id=version_id, digest="", deadline_s=3600
    )
    await memory_broker.results.create(draft, queue_limit=10, watch=False)
    url = f"http://127.0.0.1:{unused_tcp_port}/v1"
    settings = ControllerSettings(status_port=unused_tcp_port)
    async with Status(memory_broker).shown(settings), aiohttp.ClientSession() as session:
        async with session.get(f"{url}/versions/{version_id}/load") as response:
            told = await response.json()
        async with session.get(f"{url}/versions/none/load") as response:
            assert response.status == 404
        async with session.get(f"{url}/health/ready") as response:
            assert response.status == 200

    assert {name: told[name] for name in ("load", "queued", "running")} == {"load": 1, "queued": 1, "running": 0}
