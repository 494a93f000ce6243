"""What is asked of a container engine, where no card and no registry is needed to see it."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest

from broker.errors import ConfigurationError
from broker.model import Gpu, Login, Model, Version
from broker.settings import ControllerSettings, SidecarSettings, load
from workers.launchers.cards import Card
from workers.launchers.docker import plans
from workers.launchers.docker.engine import archive_of
from workers.launchers.docker.plans import Plan

CARD = Card(uuid="GPU-1", index=0, name="H100", memory_bytes=80 * 2**30, driver_version="580")
OFFER = Gpu(
    name="H100",
    instance_type="NCP.GPU.H100_1x",
    backend="local",
    capacity=2,
    gpu_count=1,
    cpu_cores=8,
    system_memory_bytes=64 * 2**30,
)
VERSION = Version(
    id="v", function_id="f", account="ours", name="n", inference_url="/", container_image="a/b:1", created_at=0.0
)
SIDECAR = load(SidecarSettings, function_id="f", function_version_id="v")


def a_plan(version: Version = VERSION, **settings: Any) -> Plan:
    return Plan(
        settings=load(ControllerSettings, **settings),
        instance_id="i",
        version=version,
        specification_id="s",
        cards=(CARD,),
        offer=OFFER,
        has_secrets=False,
    )


def host(plan: Plan) -> Any:
    return plan.container(SIDECAR)["HostConfig"]


def test_cards_are_asked_for_by_their_own_ids() -> None:
    assert host(a_plan())["DeviceRequests"] == [{"Driver": "nvidia", "DeviceIDs": ["GPU-1"], "Capabilities": [["gpu"]]}]
    assert host(a_plan(docker_gpus="cdi"))["DeviceRequests"] == [
        {"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=GPU-1"]}
    ]
    assert "DeviceRequests" not in host(replace(a_plan(), cards=()))


def test_cards_are_on_the_label_so_that_the_next_controller_knows_them_taken() -> None:
    assert a_plan().container(SIDECAR)["Labels"]["fnqueue.cards"] == "GPU-1"


def test_an_instance_has_its_cards_share_of_the_machine_unless_the_settings_say_otherwise() -> None:
    assert (host(a_plan())["NanoCpus"], host(a_plan())["Memory"]) == (8 * 10**9, 64 * 2**30)
    assert host(a_plan(docker_cpus=1.5))["NanoCpus"] == 1_500_000_000
    assert "Memory" not in host(replace(a_plan(), cards=(), offer=None))


def test_a_container_is_told_nothing_of_the_servers() -> None:
    urls = {f"{name}_url": f"amqp://u:hush@{name}" for name in ("queue", "store", "blobs")}
    sidecar = load(SidecarSettings, function_id="f", function_version_id="v", message_keys="k:hush", **urls)
    plan = a_plan(version_users=True, secret_key="hush" * 8)
    assert "hush" not in str(plan.container(sidecar))
    assert "amqp://u:hush@queue" in str(plan.sidecar(sidecar)["Env"])


def test_a_container_is_restarted_only_when_the_settings_say_so() -> None:
    assert host(a_plan())["RestartPolicy"] == {"Name": "no"}
    assert host(a_plan(docker_restarts=2))["RestartPolicy"] == {"Name": "on-failure", "MaximumRetryCount": 2}


@pytest.mark.parametrize(
    ("reference", "whole"),
    [
        ("busybox", "docker.io/library/busybox"),
        ("a/b:1", "docker.io/a/b:1"),
        ("localhost/a", "localhost/a"),
        ("nvcr.io/a/b@sha256:0", "nvcr.io/a/b@sha256:0"),
        ("host:5000/a", "host:5000/a"),
    ],
)
def test_references_are_sent_with_their_registry(reference: str, whole: str) -> None:
    assert plans.qualified(reference) == whole


def test_a_login_goes_to_its_own_registry_only() -> None:
    login = Login(hostname="nvcr.io", username="u", password="p")
    assert plans.login_for("nvcr.io/a:1", login) is login
    assert plans.login_for("docker.io/a:1", login) is None
    assert plans.login_for("a:1", None) is None


@pytest.mark.parametrize("name", ["..", "a/b", ""])
def test_a_models_name_leads_to_no_other_folder(name: str) -> None:
    version = replace(VERSION, models=(Model(name=name, version="1", uri="x"),))
    with pytest.raises(ConfigurationError):
        a_plan(version, docker_artifacts_dir="/srv").container(SIDECAR)


def test_models_need_the_folder_that_holds_them() -> None:
    version = replace(VERSION, models=(Model(name="m", version="1", uri="x"),))
    with pytest.raises(ConfigurationError, match="FNQUEUE_DOCKER_ARTIFACTS_DIR"):
        a_plan(version).container(SIDECAR)


def test_a_sidecar_reports_its_health_to_the_engine_where_it_has_a_port() -> None:
    assert a_plan().sidecar(SIDECAR)["Healthcheck"] == {"Test": ["NONE"]}
    anywhere = SIDECAR.model_copy(update={"status_port": "any"})
    assert a_plan().sidecar(anywhere)["Healthcheck"] == {"Test": ["NONE"]}
    with_port = SIDECAR.model_copy(update={"status_port": 8090})
    assert "http://127.0.0.1:8090/v1/health/ready" in a_plan().sidecar(with_port)["Healthcheck"]["Test"]


def test_an_archive_ends_where_podman_stops_reading_it() -> None:
    archive = archive_of(tarfile.TarInfo("file"), content=b"secret")
    assert len(archive) == 4 * tarfile.BLOCKSIZE  # of the name, of the content, and two that are empty
    with tarfile.open(fileobj=BytesIO(archive)) as read:
        (member,) = read
        file = read.extractfile(member)
        assert file is not None
        assert file.read() == b"secret"
