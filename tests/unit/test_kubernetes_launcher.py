"""The Fleet of `kubernetes://` against the API server of `tests/kubernetes_api.py`."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlencode

import httpx2
import pytest
from lightkube import ApiError, AsyncClient
from lightkube.config.kubeconfig import KubeConfig, SingleConfig
from lightkube.resources.apps_v1 import Deployment
from lightkube.resources.core_v1 import Node, Pod
from lightkube.resources.networking_v1 import NetworkPolicy
from lightkube.types import PatchType
from pydantic import SecretStr

from broker.errors import ConfigurationError, LauncherUnavailable, NoCapacity
from broker.model import (
    Autoscaling,
    GpuSpecification,
    LogExcerpt,
    Login,
    LogLine,
    Model,
    Part,
    Resource,
    Scaling,
    Stickiness,
    Version,
)
from broker.ports import Fleet, Replica
from broker.settings import ControllerSettings
from broker.signatures import Signatures
from tests.eventually import eventually
from tests.kubernetes_api import KubernetesApi, Object, fault_of, kubernetes_api
from workers.launchers import kubernetes
from workers.launchers.kubernetes import KubernetesFleet, objects, open_fleet

V1, V2 = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
S1, S2 = "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa", "bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb"
URL = "kubernetes://functions?" + urlencode(
    {"image": "registry.example/fnqueue:1", "load_url": "http://controller.fnqueue:8090", "cluster": "here"}
)
SETTINGS = ControllerSettings(
    launcher_url=URL,
    queue_url=SecretStr("amqp://user:queue-password@rabbitmq/"),
    store_url=SecretStr("redis://:store-password@redis/0"),
    blobs_url=SecretStr("s3://access:blobs-password@s3/bucket"),
    drain_s=90,
)
VERSION = Version(
    id=V1,
    function_id="33333333-3333-4333-8333-333333333333",
    account="acme",
    name="reader",
    inference_url="/read",
    container_image="registry.example/reader:7",
    container_args='--level "very high"',
    container_environment=(("LEVEL", "$(HOME)"), ("PORT", "1")),
    created_at=0.0,
)
CPU = GpuSpecification(id=S1, gpu="CPU", instance_type="CPU", min_instances=0, max_instances=3)
H100 = replace(CPU, id=S2, gpu="H100", instance_type="NCP.GPU.H100_2x", min_instances=2, max_instances=4)
NAME = f"fnq-{S1}"


def node(name: str, product: str = "", cards: int = 0) -> Object:
    labels = {objects.PRODUCT: product, "nvidia.com/gpu.memory": "81559"} if product else {}
    gpus = {objects.GPU_RESOURCE: str(cards)} if cards else {}
    info = {"architecture": "amd64", "operatingSystem": "linux"}
    words = "bootID containerRuntimeVersion kernelVersion kubeProxyVersion kubeletVersion machineID osImage systemUUID"
    unknown = dict.fromkeys(words.split(), "")
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "status": {"allocatable": {"cpu": "15890m", "memory": "64Gi", **gpus}, "nodeInfo": {**info, **unknown}},
    }


def config_of(api: KubernetesApi) -> SingleConfig:
    at = {"name": "test"}
    config = KubeConfig.from_dict(
        {
            "current-context": "test",
            "clusters": [{**at, "cluster": {"server": api.url, "insecure-skip-tls-verify": True}}],
            "contexts": [{**at, "context": {"cluster": "test", "user": "test"}}],
            "users": [{**at, "user": {"token": "of-a-test"}}],
        }
    ).get()
    assert config is not None
    return config


@pytest.fixture
async def api() -> AsyncIterator[KubernetesApi]:
    async with kubernetes_api() as opened:
        yield opened


@asynccontextmanager
async def opened(api: KubernetesApi, settings: ControllerSettings = SETTINGS) -> AsyncIterator[KubernetesFleet]:
    async with open_fleet(settings, config=config_of(api)) as fleet:
        yield fleet


@pytest.fixture
async def fleet(api: KubernetesApi) -> AsyncIterator[KubernetesFleet]:
    async with opened(api) as fleet:
        yield fleet


async def kept(fleet: Fleet, *ids: str) -> None:
    async def known() -> bool:
        return set(await fleet.kept()) == set(ids)

    await eventually(known, bool)


async def replicas(fleet: Fleet, count: int) -> list[Replica]:
    async def known() -> bool:
        return len(await fleet.replicas()) == count

    await eventually(known, bool)
    return list(await fleet.replicas())


def decoded(secret: Object) -> dict[str, str]:
    return {name: base64.b64decode(value).decode() for name, value in secret["data"].items()}


def writes(api: KubernetesApi) -> list[tuple[str, str]]:
    return [request for request in api.requests if request[0] != "GET"]


def waiting(reason: str, message: str = "", *, restarts: int = 0, last: Object | None = None) -> Object:
    container = {
        "name": "inference", "image": "i", "imageID": "", "ready": False, "restartCount": restarts,
        "state": {"waiting": {"reason": reason, "message": message}},
        **({"lastState": {"terminated": last}} if last else {}),
    }  # fmt: skip
    return {"phase": "Pending", "containerStatuses": [container]}


# -- what is made ------------------------------------------------------------------------------------


def render(specification: GpuSpecification = CPU, version: Version = VERSION, **given: Any) -> dict[str, Object]:
    place = objects.read_place(given.pop("url", URL))
    manifests = objects.render(place, given.pop("settings", SETTINGS), version, specification, **given)
    return {f"{each['kind']} {each['metadata']['name']}": each for each in manifests}


@pytest.mark.parametrize("specification", [CPU, H100], ids=["CPU", "H100"])
def test_every_manifest_is_valid(specification: GpuSpecification) -> None:
    products = frozenset({"NVIDIA-H100-80GB-HBM3"}) if specification is H100 else frozenset[str]()
    login = Login(hostname="docker.io", username="u", password="p")

    manifests = render(specification, products=products, secrets=b"{}", login=login)

    assert [fault_of(manifest) for manifest in manifests.values()] == [""] * 7


def test_a_pod_outlives_its_drain_and_no_container_is_told_to_stop_before_it() -> None:
    pod = render()[f"Deployment {NAME}"]["spec"]["template"]["spec"]

    assert pod["terminationGracePeriodSeconds"] > SETTINGS.drain_s
    (sidecar,), (container,) = pod["initContainers"], pod["containers"]
    assert sidecar["restartPolicy"] == "Always"
    hook = {"preStop": {"httpGet": {"path": "/v1/drain", "port": sidecar["ports"][0]["containerPort"]}}}
    assert sidecar["lifecycle"] == container["lifecycle"] == hook


def test_servers_addresses_are_in_a_secret_and_nowhere_else() -> None:
    manifests = render()

    settings = decoded(manifests.pop(f"Secret {NAME}-settings"))
    assert settings["FNQUEUE_QUEUE_URL"] == "amqp://user:queue-password@rabbitmq/"
    assert set(settings) == {"FNQUEUE_QUEUE_URL", "FNQUEUE_STORE_URL", "FNQUEUE_BLOBS_URL", "FNQUEUE_MESSAGE_KEYS"}
    assert "password" not in json.dumps(manifests)


def test_sidecars_come_in_with_users_of_their_own() -> None:
    given = {
        "secret_key": SecretStr("k" * 40),
        "version_users": True,
        "queue_management_url": SecretStr("http://c:queue-password@rabbitmq:15672"),
        "sidecar_store_url": SecretStr("redis://theirs@redis/"),
        "sidecar_blobs_url": SecretStr("s3://theirs:theirs@s3/bucket"),
    }
    manifests = render(settings=SETTINGS.model_copy(update=given))
    told = decoded(manifests.pop(f"Secret {NAME}-settings"))
    assert told["FNQUEUE_QUEUE_URL"].startswith(f"amqp://fnqueue-v-{V1}:")
    assert told["FNQUEUE_STORE_URL"] == "redis://theirs@redis/"
    assert "password" not in str(told) + json.dumps(manifests)


def test_keys_of_front_ends_and_controllers_are_not_told_but_those_for_messages_of_the_version() -> None:
    settings = SETTINGS.model_copy(
        update={"secret_key": SecretStr("k" * 40), "encryption_keys": SecretStr("k1:" + "a" * 64)}
    )
    with_keys, without = render(settings=settings), render()
    told = decoded(with_keys.pop(f"Secret {NAME}-settings"))
    assert told["FNQUEUE_MESSAGE_KEYS"] == Signatures.of(settings).for_sidecar(V1).get_secret_value() != ""
    assert "k" * 40 not in str(told)
    without.pop(f"Secret {NAME}-settings")
    assert with_keys == without


def test_a_container_is_given_what_the_contract_promises_over_its_own_environment() -> None:
    container = render()[f"Deployment {NAME}"]["spec"]["template"]["spec"]["containers"][0]

    environment = {each["name"]: each["value"] for each in container["env"]}
    assert container["args"] == ["--level", "very high"]
    assert environment["LEVEL"] == "$$(HOME)"
    assert environment["PORT"] == "8000"
    assert environment["NVCF_FUNCTION_VERSION_ID"] == V1


def test_cards_are_limits_and_their_products_a_node_affinity() -> None:
    pod = render(H100, products=frozenset({"B", "A"}))[f"Deployment fnq-{S2}"]["spec"]["template"]["spec"]

    assert pod["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": "2"}}
    (term,) = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": objects.PRODUCT, "operator": "In", "values": ["A", "B"]}]


def test_an_instance_type_of_the_cloud_is_a_node_selector() -> None:
    pod = render(replace(H100, instance_type="p5.48xlarge_8x"))[f"Deployment fnq-{S2}"]["spec"]["template"]["spec"]

    assert pod["nodeSelector"]["node.kubernetes.io/instance-type"] == "p5.48xlarge_8x"
    assert pod["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": "8"}}


def test_zones_are_honoured() -> None:
    placed = replace(CPU, availability_zones=("z1", "z2"))
    pod = render(placed)[f"Deployment {NAME}"]["spec"]["template"]["spec"]

    (term,) = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert {each["key"]: each["values"] for each in term["matchExpressions"]} == {
        "topology.kubernetes.io/zone": ["z1", "z2"],
    }


async def test_what_is_placed_elsewhere_is_not_kept(api: KubernetesApi) -> None:
    async with opened(api) as fleet:
        with pytest.raises(NoCapacity, match=r"regions: elsewhere"):
            await fleet.keep(VERSION, replace(CPU, regions=("elsewhere",)))
        assert api.all("Deployment") == []
        places = {(gpu.place.cluster, gpu.place.region) for gpu in await fleet.gpus()}
        assert places == {(SETTINGS.cluster, SETTINGS.region)}


def test_models_and_resources_are_mounted_from_the_claim() -> None:
    version = replace(
        VERSION,
        models=(Model(name="bert", version="2", uri="u"),),
        resources=(Resource(name="words", version="1", uri="u"),),
    )
    with pytest.raises(ConfigurationError, match="artifacts_claim"):
        render(version=version)
    pod = render(version=version, url=f"{URL}&artifacts_claim=models")[f"Deployment {NAME}"]["spec"]["template"]["spec"]
    claim = {"claimName": "models", "readOnly": True}
    assert {"name": "artifacts", "persistentVolumeClaim": claim} in pod["volumes"]
    mounts = [each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "artifacts"]
    assert {(each["mountPath"], each["subPath"], each["readOnly"]) for each in mounts} == {
        ("/config/models/bert", "models/bert/2", True),
        ("/config/resources/words", "resources/words/1", True),
    }
    assert "artifacts" not in str(pod["initContainers"])


def test_the_status_port_keeps_out_of_the_containers_way() -> None:
    version = replace(VERSION, inference_port=28_090, health=replace(VERSION.health, port=28_091))
    sidecar = render(version=version)[f"Deployment {NAME}"]["spec"]["template"]["spec"]["initContainers"][0]

    assert sidecar["ports"][0]["containerPort"] == 28_092


def test_the_number_of_pods_follows_queued_and_running_requests() -> None:
    spec = render(replace(CPU, max_request_concurrency=8))[f"ScaledObject {NAME}"]["spec"]

    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (0, 3)
    (trigger,) = spec["triggers"]
    assert trigger["metadata"] == {
        "url": f"http://controller.fnqueue:8090/v1/versions/{V1}/load",
        "valueLocation": "load",
        "targetValue": "8",
    }


def test_a_users_policy_sets_target_steps_and_patience() -> None:
    stickiness = Stickiness(size="PT2M", threshold="PT1M")
    policy = Autoscaling(
        up=Scaling(factor=3.0, threshold=50, stickiness=stickiness), down=Scaling(factor=0.25, threshold=20)
    )
    spec = render(replace(CPU, max_request_concurrency=4, autoscaling=policy))[f"ScaledObject {NAME}"]["spec"]

    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert spec["triggers"][0]["metadata"]["targetValue"] == "2"
    assert behavior["scaleUp"]["stabilizationWindowSeconds"] == 120
    assert behavior["scaleUp"]["policies"][0]["value"] == 200
    assert behavior["scaleDown"]["policies"][0]["value"] == 75


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (replace(VERSION, helm_chart="oci://x/y"), "Helm"),
        (replace(VERSION, container_args='"'), "containerArgs"),
        (replace(VERSION, health=replace(VERSION.health, timeout="soon")), "health.timeout"),
    ],
)
def test_what_can_never_run_is_refused(version: Version, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        render(version=version)


@pytest.mark.parametrize(
    "url",
    ["kubernetes://", "kubernetes://ns", "kubernetes://ns?image=i", URL + "&colour=red", URL + "&cooldown_s=soon",
     URL.replace("functions", "no_name")],
)  # fmt: skip
def test_a_url_that_cannot_be_read_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="FNQUEUE_LAUNCHER_URL"):
        objects.read_place(url)


# -- what is kept ------------------------------------------------------------------------------------


async def test_all_that_is_made_is_owned_by_its_deployment(api: KubernetesApi, fleet: KubernetesFleet) -> None:
    await fleet.keep(VERSION, CPU, secrets=b'{"token": "t"}')

    uid = api.one("Deployment")["metadata"]["uid"]
    made = [
        item for kind in ("Secret", "PodDisruptionBudget", "NetworkPolicy", "ScaledObject") for item in api.all(kind)
    ]
    assert len(made) == 6
    for item in made:
        assert [owner["uid"] for owner in item["metadata"]["ownerReferences"]] == [uid]
        assert item["metadata"]["labels"][objects.SPECIFICATION] == S1
    assert decoded(api.one("Secret", f"{NAME}-secrets")) == {"secrets.json": '{"token": "t"}'}


async def test_it_begins_with_the_minimum_and_leaves_the_number_to_the_autoscaler(
    api: KubernetesApi, fleet: KubernetesFleet
) -> None:
    await fleet.keep(VERSION, CPU)
    assert api.one("Deployment")["spec"]["replicas"] == 0

    await api.scale(NAME, 3)
    await kept(fleet, S1)
    await fleet.keep(replace(VERSION, container_image="registry.example/reader:8"), CPU)

    deployment = api.one("Deployment")
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == "registry.example/reader:8"
    assert deployment["spec"]["replicas"] == 3


async def test_a_variable_that_is_no_longer_wanted_goes(api: KubernetesApi, fleet: KubernetesFleet) -> None:
    await fleet.keep(VERSION, CPU)
    await kept(fleet, S1)
    await fleet.keep(replace(VERSION, container_environment=()), CPU)

    container = api.one("Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert "LEVEL" not in {each["name"] for each in container["env"]}


async def test_keeping_what_is_kept_writes_nothing(api: KubernetesApi, fleet: KubernetesFleet) -> None:
    await fleet.keep(VERSION, CPU)
    await kept(fleet, S1)
    before = writes(api)
    await fleet.keep(VERSION, CPU)

    assert writes(api) == before


async def test_the_number_of_pods_is_not_set_twice_while_a_watch_lags(api: KubernetesApi) -> None:
    async with opened(api) as fleet:
        assert set(await fleet.kept()) == set()
        await fleet.keep(VERSION, CPU)
        await api.scale(NAME, 3)
        await fleet.keep(VERSION, CPU)  # before anybody could have told of the first

    assert api.one("Deployment")["spec"]["replicas"] == 3


async def test_what_somebody_deleted_comes_back(
    api: KubernetesApi, fleet: KubernetesFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fleet.keep(VERSION, CPU)
    await kept(fleet, S1)
    async with AsyncClient(config=config_of(api), namespace="functions") as client:
        await client.delete(NetworkPolicy, NAME)
    monkeypatch.setattr(kubernetes, "REAPPLY_S", 0.0)
    await fleet.keep(VERSION, CPU)

    assert len(api.all("NetworkPolicy")) == 1


async def test_new_secrets_replace_the_file_and_restart_nothing(api: KubernetesApi, fleet: KubernetesFleet) -> None:
    await fleet.keep(VERSION, CPU, secrets=b"old")
    await kept(fleet, S1)
    template = api.one("Deployment")["spec"]["template"]
    await fleet.keep(VERSION, CPU, secrets=b"new")

    assert decoded(api.one("Secret", f"{NAME}-secrets")) == {"secrets.json": "new"}
    assert api.one("Deployment")["spec"]["template"] == template


async def test_another_controller_takes_over_what_it_finds(api: KubernetesApi, fleet: KubernetesFleet) -> None:
    await fleet.keep(VERSION, CPU)
    uid = api.one("Deployment")["metadata"]["uid"]
    async with opened(api) as other:
        await kept(other, S1)
        await other.keep(VERSION, CPU)

    assert api.one("Deployment")["metadata"]["uid"] == uid


async def test_a_pool_of_nodes_that_has_gone_restarts_nothing(api: KubernetesApi) -> None:
    await api.add(node("a", "NVIDIA-H100-80GB-HBM3", 8))
    async with opened(api) as fleet:
        await fleet.keep(VERSION, H100)
        await kept(fleet, S2)
    template = api.one("Deployment")["spec"]["template"]
    async with AsyncClient(config=config_of(api)) as client:
        await client.delete(Node, "a")
    async with opened(api) as other:
        await kept(other, S2)
        await other.keep(VERSION, H100)

    assert api.one("Deployment")["spec"]["template"] == template


async def test_without_any_node_that_has_the_card_it_cannot_start(fleet: KubernetesFleet) -> None:
    with pytest.raises(ConfigurationError, match="no node of the cluster has H100"):
        await fleet.keep(VERSION, H100)


async def test_a_cluster_without_keda_says_so(api: KubernetesApi, fleet: KubernetesFleet) -> None:
    api.absent.add("ScaledObject")

    with pytest.raises(LauncherUnavailable, match=r"keda.sh/v1alpha1 ScaledObject"):
        await fleet.keep(VERSION, CPU)


async def test_what_the_server_finds_invalid_can_never_start(fleet: KubernetesFleet) -> None:
    with pytest.raises(ConfigurationError, match="refused"):
        await fleet.keep(VERSION, replace(CPU, min_instances="two"))  # type: ignore[arg-type]  # on purpose


# -- what ends ---------------------------------------------------------------------------------------


async def test_dropping_leaves_nothing_behind(api: KubernetesApi, fleet: KubernetesFleet) -> None:
    await fleet.keep(VERSION, CPU, secrets=b"{}")
    await api.scale(NAME, 2)
    await api.roll_out()
    await replicas(fleet, 2)
    await fleet.drop(S1, grace_s=SETTINGS.drain_s)

    # It stands until its pods have drained, so that nobody takes it for gone.
    await eventually(lambda: _all_ending(fleet), bool)
    assert set(await fleet.kept()) == {S1}
    assert {pod["metadata"]["deletionGracePeriodSeconds"] for pod in api.all("Pod")} == {120}
    await api.end_pods()
    await kept(fleet)
    kinds = ("Deployment", "Pod", "Secret", "PodDisruptionBudget", "NetworkPolicy", "ScaledObject")
    assert [item for kind in kinds for item in api.all(kind)] == []


async def test_dropping_in_a_hurry_shortens_the_grace_once(api: KubernetesApi, fleet: KubernetesFleet) -> None:
    await fleet.keep(VERSION, CPU)
    await api.scale(NAME, 1)
    await api.roll_out()
    await replicas(fleet, 1)
    await fleet.drop(S1, grace_s=SETTINGS.drain_s)
    await fleet.drop(S1, grace_s=5)

    async def written() -> int:
        before = len(writes(api))
        await fleet.drop(S1, grace_s=5)
        return len(writes(api)) - before

    await eventually(written, lambda count: count == 0)
    assert api.one("Pod")["metadata"]["deletionGracePeriodSeconds"] == 5


async def test_a_version_that_is_deployed_again_waits_for_the_old_one_to_go(
    api: KubernetesApi, fleet: KubernetesFleet
) -> None:
    await fleet.keep(VERSION, CPU)
    await api.scale(NAME, 1)
    await api.roll_out()
    await replicas(fleet, 1)
    await fleet.drop(S1, grace_s=SETTINGS.drain_s)
    await eventually(lambda: _all_ending(fleet), bool)
    old = api.one("Deployment")["metadata"]["uid"]
    await fleet.keep(VERSION, CPU)
    assert api.one("Deployment")["metadata"]["uid"] == old
    await api.end_pods()
    await kept(fleet)
    await fleet.keep(VERSION, CPU)

    assert api.one("Deployment")["metadata"]["uid"] != old


async def test_an_evicted_instance_drains(api: KubernetesApi, fleet: KubernetesFleet) -> None:
    await fleet.keep(VERSION, CPU)
    await api.scale(NAME, 2)
    await api.roll_out()
    one, other = await replicas(fleet, 2)
    await fleet.evict(one.instance_id)
    await fleet.evict("unknown")

    ending = {pod["metadata"]["uid"]: "deletionTimestamp" in pod["metadata"] for pod in api.all("Pod")}
    assert ending == {one.instance_id: True, other.instance_id: False}


# -- who has work ------------------------------------------------------------------------------------


def cost(api: KubernetesApi, uid: str) -> str:
    (pod,) = [pod for pod in api.all("Pod") if pod["metadata"]["uid"] == uid]
    return str(pod["metadata"].get("annotations", {}).get(objects.COST, ""))


async def test_a_busy_instance_is_dearer_at_once_and_an_idle_one_after_a_while(
    api: KubernetesApi, fleet: KubernetesFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fleet.keep(VERSION, CPU)
    await api.scale(NAME, 2)
    await api.roll_out()
    one, other = await replicas(fleet, 2)
    await fleet.weigh({one.instance_id: True, other.instance_id: False})
    assert (cost(api, one.instance_id), cost(api, other.instance_id)) == (objects.BUSY_COST, "")

    before = writes(api)
    await fleet.weigh({one.instance_id: False, other.instance_id: False})
    assert writes(api) == before, "a job of a second is not worth two patches"

    monkeypatch.setattr(kubernetes, "IDLE_S", 0.0)
    await fleet.weigh({one.instance_id: False, other.instance_id: False})
    assert cost(api, one.instance_id) == objects.IDLE_COST


async def test_a_pod_that_has_just_gone_is_no_error_to_mark(api: KubernetesApi, fleet: KubernetesFleet) -> None:
    await fleet.keep(VERSION, CPU)
    await api.scale(NAME, 1)
    await api.roll_out()
    (one,) = await replicas(fleet, 1)
    async with AsyncClient(config=config_of(api), namespace="functions") as client:
        await client.delete(Pod, api.one("Pod")["metadata"]["name"])
    await api.end_pods()

    await fleet.weigh({one.instance_id: True})


# -- what is seen ------------------------------------------------------------------------------------


async def test_words_of_the_registry_are_told(api: KubernetesApi, fleet: KubernetesFleet) -> None:
    await fleet.keep(VERSION, CPU)
    await api.scale(NAME, 1)
    (pod,) = await api.roll_out()
    await api.set_status(pod["metadata"]["name"], waiting("ImagePullBackOff", "manifest unknown"))

    async def told() -> bool:
        return [each.error for each in await fleet.replicas()] == ["inference: ImagePullBackOff: manifest unknown"]

    await eventually(told, bool)


async def test_a_crash_is_told_with_the_last_words_of_the_container(api: KubernetesApi, fleet: KubernetesFleet) -> None:
    await fleet.keep(VERSION, CPU)
    await api.scale(NAME, 1)
    (pod,) = await api.roll_out()
    name = pod["metadata"]["name"]
    api.logs[name] = "loading\nno such model\n"
    await api.set_status(name, waiting("CrashLoopBackOff", restarts=4, last={"exitCode": 137, "reason": "OOMKilled"}))

    async def told() -> bool:
        return [replica.restarts for replica in await fleet.replicas()] == [4]

    await eventually(told, bool)
    (replica,) = await fleet.replicas()
    assert replica.alive
    assert replica.error == "inference ended with status 137 (OOMKilled)\nloading\nno such model"
    await fleet.replicas()
    assert sum(path.endswith("/log") for _, path in api.requests) == 1


async def test_what_a_pod_writes_is_read_on_from_where_it_was(api: KubernetesApi, fleet: KubernetesFleet) -> None:
    await fleet.keep(VERSION, CPU)
    await api.scale(NAME, 1)
    (pod,) = await api.roll_out()
    (replica,) = await replicas(fleet, 1)
    name = pod["metadata"]["name"]
    api.logs[name] = "2026-01-31T08:00:00.000000001Z one\n2026-01-31T08:00:00.5Z two\n"
    first = await fleet.log(replica.instance_id, Part.CONTAINER, after="")
    assert first.lines == (LogLine(1769846400.000000001, "one"), LogLine(1769846400.5, "two"))
    api.logs[name] += "2026-01-31T08:00:00.500000001Z three\n"
    second = await fleet.log(replica.instance_id, Part.CONTAINER, after=first.position)
    assert [line.text for line in second.lines] == ["three"]
    assert [asked["container"] for asked in api.asked_logs] == ["inference", "inference"]
    assert "sinceSeconds" not in api.asked_logs[0]
    assert int(api.asked_logs[1]["sinceSeconds"]) >= time.time() - 1769846400
    assert all(asked["timestamps"] == "true" and asked["tailLines"] == "1000" for asked in api.asked_logs)


async def test_of_a_pod_that_has_not_begun_or_is_not_there_nothing_is_read(
    api: KubernetesApi, fleet: KubernetesFleet
) -> None:
    await fleet.keep(VERSION, CPU)
    await api.scale(NAME, 1)
    (pod,) = await api.roll_out()
    (replica,) = await replicas(fleet, 1)
    api.silent.add(pod["metadata"]["name"])
    assert await fleet.log(replica.instance_id, Part.SIDECAR, after="") == LogExcerpt(lines=(), position="0")
    assert await fleet.log("nobody", Part.SIDECAR, after="") == LogExcerpt(lines=(), position="")


async def test_a_pod_that_finds_no_room_says_so(api: KubernetesApi, fleet: KubernetesFleet) -> None:
    await fleet.keep(VERSION, CPU)
    await api.scale(NAME, 1)
    (pod,) = await api.roll_out()
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
    await api.set_status(pod["metadata"]["name"], {"phase": "Pending", "conditions": [condition]})

    async def told() -> bool:
        return [(each.delay, each.error) for each in await fleet.replicas()] == [("0/3 nodes", "")]

    await eventually(told, bool)


async def test_pods_of_others_are_not_seen(api: KubernetesApi, fleet: KubernetesFleet) -> None:
    await api.add(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "other", "namespace": "functions"}, "spec": {}}
    )
    assert list(await fleet.replicas()) == []


async def test_a_history_that_is_too_old_is_listed_anew(api: KubernetesApi, fleet: KubernetesFleet) -> None:
    await fleet.keep(VERSION, CPU)
    await kept(fleet, S1)
    await api.forget_history()
    await api.scale(NAME, 1)
    await api.roll_out()

    await replicas(fleet, 1)


async def test_while_the_server_is_down_nothing_is_known(
    api: KubernetesApi, fleet: KubernetesFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fleet.keep(VERSION, CPU)
    await kept(fleet, S1)
    monkeypatch.setattr("workers.launchers.kubernetes.mirror._READY_S", 0.05)
    api.down = True
    await api.cut_watches()

    async def unknown() -> bool:
        try:
            await fleet.replicas()
        except LauncherUnavailable:
            return True
        return False

    await eventually(unknown, bool)
    api.down = False
    await kept(fleet, S1)


async def test_the_cards_of_the_nodes_are_offered(api: KubernetesApi, fleet: KubernetesFleet) -> None:
    await api.add(node("a", "NVIDIA-H100-80GB-HBM3", 8))
    await api.add(node("b", "NVIDIA-H100-PCIe", 2))
    await api.add(node("c"))

    offered = {gpu.instance_type: gpu for gpu in await fleet.gpus()}
    assert {name: gpu.capacity for name, gpu in offered.items()} == {
        "NCP.GPU.H100_1x": 10, "NCP.GPU.H100_2x": 5, "NCP.GPU.H100_4x": 2, "NCP.GPU.H100_8x": 1, "CPU": 45,
    }  # fmt: skip
    assert offered["NCP.GPU.H100_1x"].gpu_memory_bytes == 81559 * 2**20
    await fleet.keep(VERSION, H100)
    assert api.one("Deployment")["metadata"]["annotations"] == {
        objects.PRODUCTS: "NVIDIA-H100-80GB-HBM3,NVIDIA-H100-PCIe"
    }


async def test_local_files_are_refused(api: KubernetesApi) -> None:
    with pytest.raises(ConfigurationError, match="file://"):
        async with opened(api, SETTINGS.model_copy(update={"blobs_url": SecretStr("file://")})):
            pass


# -- the server of these tests -----------------------------------------------------------------------


async def test_the_test_server_refuses_unknown_fields_and_conflicts(api: KubernetesApi) -> None:
    root = objects.render(objects.read_place(URL), SETTINGS, VERSION, CPU)[0]
    async with AsyncClient(config=config_of(api), namespace="functions") as client:

        async def apply(manifest: Object, manager: str, *, force: bool = False) -> Any:
            return await client.patch(
                Deployment, NAME, manifest, patch_type=PatchType.APPLY, field_manager=manager, force=force
            )

        with pytest.raises(ApiError, match="colour"):
            await apply({**root, "spec": {**root["spec"], "colour": "red"}}, "one")
        await apply(root, "one")
        other = {**root, "spec": {**root["spec"], "revisionHistoryLimit": 5}}
        with pytest.raises(ApiError, match="conflict"):
            await apply(other, "two")
        assert (await apply(other, "two", force=True)).spec.revisionHistoryLimit == 5
        with pytest.raises(ApiError, match="modified"):
            await client.patch(Deployment, NAME, {"metadata": {"resourceVersion": "1"}}, patch_type=PatchType.MERGE)
    async with httpx2.AsyncClient() as plain:
        assert (await plain.get(f"{api.url}/apis/none/v1/namespaces/functions/things")).status_code == 404


async def _all_ending(fleet: Fleet) -> bool:
    return all(not replica.alive for replica in await fleet.replicas())
