"""What `infra/kubernetes` installs, as `kubectl kustomize` renders it."""

from __future__ import annotations

import json
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic_settings import BaseSettings

from broker.settings import ApiSettings, ControllerSettings
from infra.local import binaries
from tests.eventually import eventually
from tests.kubernetes_api import SCHEMAS, KubernetesApi, kubernetes_api
from tests.unit import test_kubernetes_launcher as launcher
from workers.launchers.kubernetes.objects import read_place

ROOT = Path(__file__).parents[2] / "infra" / "kubernetes"
INFRA = ROOT.parent
OVERLAYS = ("dev", "production")
both = pytest.mark.parametrize("overlay", OVERLAYS)

Object = dict[str, Any]

# Of the RabbitMQ operators' objects, the fields that are used here.
_OPERATORS = {
    "RabbitmqCluster": {
        "replicas", "image", "persistence", "resources", "terminationGracePeriodSeconds", "rabbitmq", "affinity",
    },
    "Policy": {"name", "vhost", "pattern", "applyTo", "priority", "definition", "rabbitmqClusterReference"},
}  # fmt: skip


@cache
def rendered(overlay: str) -> tuple[Object, ...]:
    binaries.ensure(["kubectl"])
    command = [str(binaries.program("kubectl")), "kustomize", str(ROOT / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def one(overlay: str, kind: str, name: str) -> Object:
    (found,) = [item for item in rendered(overlay) if (item["kind"], item["metadata"]["name"]) == (kind, name)]
    return found


def pods(overlay: str) -> list[tuple[str, Object]]:
    kinds = ("Deployment", "StatefulSet")
    return [
        (item["metadata"]["name"], item["spec"]["template"]["spec"])
        for item in rendered(overlay)
        if item["kind"] in kinds
    ]


def environment(overlay: str, container: Object) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    for source in container.get("envFrom", []):
        if name := source.get("configMapRef", {}).get("name"):
            variables |= one(overlay, "ConfigMap", name)["data"]
    return variables | {each["name"]: each.get("value") for each in container.get("env", [])}


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_is_named_by_a_kustomization(file: Path) -> None:
    assert list(yaml.safe_load_all(file.read_text(encoding="utf-8")))
    if file.name != "kustomization.yaml":
        assert file.name in (file.parent / "kustomization.yaml").read_text(encoding="utf-8")


@both
def test_every_object_is_valid(overlay: str) -> None:
    for item in rendered(overlay):
        if item["kind"] in _OPERATORS:
            assert item["spec"].keys() <= _OPERATORS[item["kind"]]
        else:
            kubernetes_validate.validate(item, SCHEMAS, strict=True)


@both
def test_every_object_is_in_a_namespace_that_is_made(overlay: str) -> None:
    made = {item["metadata"]["name"] for item in rendered(overlay) if item["kind"] == "Namespace"}
    unbound = {"Namespace", "ClusterRole", "ClusterRoleBinding"}

    assert {item["metadata"].get("namespace") for item in rendered(overlay) if item["kind"] not in unbound} == made


@both
def test_no_secret_is_in_the_files_and_every_other_reference_is(overlay: str) -> None:
    assert [item for item in rendered(overlay) if item["kind"] == "Secret"] == []
    maps = {item["metadata"]["name"] for item in rendered(overlay) if item["kind"] == "ConfigMap"}
    asked = set(re.findall(r'"configMap(?:Ref)?": {"name": "([^"]+)"', json.dumps(rendered(overlay))))
    assert asked == maps


@both
def test_every_service_selects_pods(overlay: str) -> None:
    templates = [item["spec"]["template"] for item in rendered(overlay) if "template" in item.get("spec", {})]
    for item in rendered(overlay):
        if item["kind"] == "Service":
            selector = item["spec"]["selector"].items()
            (template,) = [each for each in templates if selector <= each["metadata"]["labels"].items()]
            containers = template["spec"]["containers"]
            ports = {port["name"] for each in containers for port in each.get("ports", [])}
            assert {port.get("targetPort", port["name"]) for port in item["spec"]["ports"]} <= ports


@both
def test_nobody_is_root_and_only_the_controller_may_call_kubernetes(overlay: str) -> None:
    for name, pod in pods(overlay):
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["runAsUser"] > 0, name
        assert pod.get("automountServiceAccountToken", name == "controller") == (name == "controller")
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name


@both
def test_settings_are_ours_and_read(overlay: str) -> None:
    kinds: dict[str, type[BaseSettings]] = {"api": ApiSettings, "controller": ControllerSettings}
    for name, pod in pods(overlay):
        if name in kinds:
            given = environment(overlay, pod["containers"][0])
            known = {
                f"FNQUEUE_{field.upper()}" for field in (*ApiSettings.model_fields, *ControllerSettings.model_fields)
            }
            assert given.keys() <= known
            fields = {key.removeprefix("FNQUEUE_").lower(): value for key, value in given.items() if value is not None}
            kinds[name].model_validate({key: value for key, value in fields.items() if key in kinds[name].model_fields})


@both
def test_the_launcher_finds_namespace_image_and_load(overlay: str) -> None:
    place = read_place(one(overlay, "ConfigMap", "fnqueue-settings")["data"]["FNQUEUE_LAUNCHER_URL"])

    assert one(overlay, "Namespace", place.namespace)
    assert place.image == one(overlay, "Deployment", "controller")["spec"]["template"]["spec"]["containers"][0]["image"]
    port = one(overlay, "Service", "controller")["spec"]["ports"][0]["port"]
    assert place.load_url == f"http://controller.fnqueue.svc:{port}"


@both
def test_each_process_is_given_the_time_that_it_takes_to_stop(overlay: str) -> None:
    pod = one(overlay, "Deployment", "api")["spec"]["template"]["spec"]
    hook_s = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    settings = ApiSettings()

    longest_s = hook_s + settings.channel_drain_s + settings.shutdown_grace_s
    assert pod["terminationGracePeriodSeconds"] > longest_s


@both
def test_rabbitmq_is_told_what_every_other_node_is_told(overlay: str) -> None:
    (policy,) = json.loads((INFRA / "rabbitmq" / "definitions.json").read_text(encoding="utf-8"))["policies"]
    spec = one(overlay, "Policy", "fnqueue-versions")["spec"]
    conf = one(overlay, "RabbitmqCluster", "rabbitmq")["spec"]["rabbitmq"]["additionalConfig"]

    assert spec["definition"] == policy["definition"]
    assert (spec["pattern"], spec["applyTo"], spec["vhost"]) == (policy["pattern"], policy["apply-to"], policy["vhost"])
    facts = _facts(INFRA / "rabbitmq" / "rabbitmq.conf")
    assert set(conf.split("\n")) - {""} <= facts
    assert {fact for fact in facts if not fact.startswith("log.")} <= set(conf.split("\n"))


def test_redis_is_told_what_every_other_node_is_told() -> None:
    facts = _facts(INFRA / "redis" / "redis.conf")
    script = (ROOT / "overlays" / "production" / "configure.sh").read_text(encoding="utf-8")
    started = " ".join(one("dev", "StatefulSet", "redis")["spec"]["template"]["spec"]["containers"][0]["args"])

    assert facts <= set(script.split("\n"))
    assert all(f"--{fact}" in started for fact in facts)


async def test_the_controller_may_do_what_its_launcher_does_and_nothing_more() -> None:
    granted = {
        (group, resource): set(rule["verbs"])
        for rule in one("dev", "Role", "fnqueue-controller")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    async with kubernetes_api() as api:
        used = await _used_by_the_launcher(api)

    assert used == granted


def _facts(path: Path) -> set[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return {line for line in lines if line and not line.startswith("#")}


async def _used_by_the_launcher(api: KubernetesApi) -> dict[tuple[str, str], set[str]]:
    async with launcher.opened(api) as fleet:
        await fleet.keep(launcher.VERSION, launcher.CPU)
        await api.scale(launcher.NAME, 1)
        (pod,) = await api.roll_out()
        (replica,) = await launcher.replicas(fleet, 1)
        status = launcher.waiting("CrashLoopBackOff", restarts=1, last={"exitCode": 1})
        await fleet.weigh({replica.instance_id: True})
        await api.set_status(pod["metadata"]["name"], status)

        async def asked() -> bool:
            await fleet.replicas()
            return any(path.endswith("/log") for _, path in api.requests)

        await eventually(asked, bool)
        await fleet.evict(replica.instance_id)
        await fleet.drop(launcher.S1, grace_s=launcher.SETTINGS.drain_s)
    used: dict[tuple[str, str], set[str]] = {}
    for method, path in api.requests:
        parts = path.strip("/").split("/")
        group, rest = ("", parts[4:]) if parts[0] == "api" else (parts[1], parts[5:])
        resource = "/".join([rest[0], *rest[2:]])
        named = len(rest) > 1
        # A server-side apply of something new takes both rights.
        verbs = {"GET": {"get"} if named else {"list", "watch"}, "DELETE": {"delete"}, "PATCH": {"patch"}}[method]
        if method == "PATCH" and resource != "pods":
            verbs = verbs | {"create"}
        used.setdefault((group, resource), set()).update(verbs)
    return used
