"""What only containers have: registries, networks, limits and labels; with podman's service as the engine."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
import platform
import tarfile
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from broker.errors import ConfigurationError, LauncherUnavailable
from broker.model import Login, Model
from infra.local.podman import Podman
from tests import images
from tests.contract.launchers import SERVING, SPECIFICATION, Containers, dead, started, tidy
from tests.eventually import eventually
from workers.launchers.docker import DockerLauncher

CREDENTIALS = "Basic " + base64.b64encode(b"puller:pass:word").decode()
LOGIN = Login(hostname=images.REGISTRY, username="puller", password="pass:word")


async def test_an_instance_is_two_containers_that_are_given_what_they_need(podman: Podman, tmp_path: Path) -> None:
    model = tmp_path / "artifacts" / "models" / "tiny" / "1"
    model.mkdir(parents=True)
    (model / "weights").write_text("0.5")
    version = replace(
        Containers(tmp_path, podman).serving,
        container_args=f"{SERVING} 'two words'",
        container_environment=(("GREETING", "hello"), ("NVCF_NCA_ID", "forged")),
        models=(Model(name="tiny", version="1", uri="https://models.invalid/tiny"),),
    )
    kind = Containers(
        tmp_path,
        podman,
        docker_network="bridge",
        docker_egress=False,
        docker_cpus=0.5,
        docker_memory_bytes=256 * 2**20,
        docker_shm_bytes=64 * 2**20,
        docker_artifacts_dir=str(tmp_path / "artifacts"),
    )
    async with tidy(kind), kind.open() as launcher:
        instance_id = await started(launcher, version, secrets=b'{"A": "one"}')
        await kind.up(launcher, instance_id)
        told = kind.told(instance_id, "container")
        assert told["argv"] == ["two words"]
        assert told["environ"].items() >= {"GREETING": "hello", "NVCF_NCA_ID": "ours", "NVCF_BACKEND": "local"}.items()
        assert not [name for name in told["environ"] if name.startswith("FNQUEUE_")]
        assert (told["secrets"], told["may_write_secrets"]) == ('{"A": "one"}', False)
        assert told["requests"] == {"inputAssets": "0o41777", "response": "0o41777"}
        assert told["config"] == {"/config/models/tiny/weights": "0.5"}
        assert told["shm_bytes"] == 64 * 2**20
        limits = podman.control(
            "inspect", "--format", "{{.HostConfig.NanoCpus}} {{.HostConfig.Memory}}", f"{kind.project}-{instance_id}"
        )
        assert limits.split() == ["500000000", str(256 * 2**20)]

        given = kind.told(instance_id, "sidecar")
        assert given["argv"] == ["sidecar"]
        assert given["environ"]["FNQUEUE_INFERENCE_HOST"] == "function"
        assert not [name for name in given["environ"] if "ENCRYPTION" in name]
        await eventually(
            lambda: asyncio.to_thread(kind.log, instance_id, "sidecar"), lambda log: "reached" in log, within_s=20
        )

        await launcher.stop(instance_id, grace_s=5.0)
        assert kind.kept_log(instance_id, "sidecar").endswith("drained")
        assert kind.things() == []


async def test_a_sidecar_on_the_machines_own_network_reaches_its_container(podman: Podman, tmp_path: Path) -> None:
    kind = Containers(tmp_path, podman)
    async with tidy(kind), kind.open() as launcher:
        instance_id = await started(launcher, kind.serving)
        await eventually(
            lambda: asyncio.to_thread(kind.log, instance_id, "sidecar"), lambda log: "reached" in log, within_s=30
        )


# -- images ------------------------------------------------------------------------------------------


class Registry:
    """Speaks as much of the distribution API as a pull needs: knows one user, and holds one image, `team/ours:1`."""

    def __init__(self) -> None:
        self.logins: list[str] = []
        layer, difference = one_file()
        config = {
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": {"Cmd": ["/nothing"]},
            "rootfs": {"type": "layers", "diff_ids": [difference]},
        }
        of_docker = "application/vnd.docker."
        content = json.dumps(config).encode()
        self.blobs = {digest(content): content, digest(layer): layer}
        self.manifest_type = of_docker + "distribution.manifest.v2+json"
        self.manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": self.manifest_type,
                "config": described(content, of_docker + "container.image.v1+json"),
                "layers": [described(layer, of_docker + "image.rootfs.diff.tar.gzip")],
            }
        ).encode()

    async def answer(self, request: web.Request) -> web.Response:
        sent = request.headers.get("Authorization", "")
        self.logins.append(sent)
        if sent != CREDENTIALS:
            body = {"errors": [{"code": "UNAUTHORIZED", "message": "who are you"}]}
            return web.json_response(body, status=401, headers={"WWW-Authenticate": 'Basic realm="test"'})
        if request.path == "/v2/":
            return web.json_response({})
        if request.path.startswith("/v2/team/ours/manifests/"):
            headers = {"Docker-Content-Digest": digest(self.manifest), "Content-Type": self.manifest_type}
            return web.Response(body=self.manifest, headers=headers)
        blob = self.blobs.get(request.path.rpartition("/")[2])
        if blob is not None:
            return web.Response(body=blob)
        body = {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "no such shelf"}]}
        return web.json_response(body, status=404)


def one_file() -> tuple[bytes, str]:
    """A layer, compressed, and the digest of what is in it."""
    plain = BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("empty"))
    return gzip.compress(plain.getvalue()), digest(plain.getvalue())


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def described(content: bytes, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "size": len(content), "digest": digest(content)}


@asynccontextmanager
async def registry() -> AsyncIterator[Registry]:
    serving = Registry()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", serving.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    host, _, port = images.REGISTRY.partition(":")
    await web.TCPSite(runner, host, int(port)).start()
    try:
        yield serving
    finally:
        await runner.cleanup()


async def test_what_the_registry_says_is_the_instances_error(podman: Podman, tmp_path: Path) -> None:
    kind = Containers(tmp_path, podman)
    version = replace(kind.serving, container_image=f"{images.REGISTRY}/team/absent:1")
    async with registry() as serving, tidy(kind), kind.open() as launcher:
        anonymous, known = str(uuid.uuid4()), str(uuid.uuid4())
        await launcher.start(anonymous, version, SPECIFICATION)
        error = (await dead(launcher, anonymous)).error
        assert "team/absent" in error
        assert "unauthorized: who are you" in error
        assert CREDENTIALS not in serving.logins

        await launcher.start(known, version, SPECIFICATION, login=LOGIN)
        assert "manifest unknown" in (await dead(launcher, known)).error
        assert CREDENTIALS in serving.logins
        for instance_id in (anonymous, known):
            await launcher.stop(instance_id, grace_s=0.0)
        assert kind.things() == []


async def test_an_image_is_pulled_with_the_login_of_its_registry_and_of_no_other(
    podman: Podman, tmp_path: Path
) -> None:
    kind = Containers(tmp_path, podman)
    image = f"{images.REGISTRY}/team/ours:1"
    version = replace(kind.serving, container_image=image)
    async with registry() as serving, tidy(kind), kind.open() as launcher:
        other = replace(LOGIN, hostname="registry.invalid")
        refused = await started(launcher, version, login=other)
        assert "who are you" in (await dead(launcher, refused)).error
        assert CREDENTIALS not in serving.logins
        assert not podman.has_image(image)

        pulled = await started(launcher, version, login=LOGIN)
        error = (await dead(launcher, pulled)).error  # nothing in it can run
        assert podman.has_image(image)
        assert "who are you" not in error
        podman.control("rmi", "--force", image)


async def test_an_image_that_may_not_be_pulled_must_be_there(podman: Podman, tmp_path: Path) -> None:
    kind = Containers(tmp_path, podman, docker_pull="never")
    async with tidy(kind), kind.open() as launcher:
        instance_id = await started(launcher, replace(kind.serving, container_image="nobody/knows:1"))
        assert "nobody/knows:1 is not on this machine" in (await dead(launcher, instance_id)).error


# -- crashes -----------------------------------------------------------------------------------------


async def test_what_a_killed_controller_left_half_made_is_cleared(podman: Podman, tmp_path: Path) -> None:
    kind = Containers(tmp_path, podman)
    label = f"fnqueue.project={kind.project}"
    left = ["--label", label, "--label", "fnqueue.instance=left"]
    await asyncio.to_thread(podman.control, "network", "create", *left, f"{kind.project}-left")
    await asyncio.to_thread(podman.control, "volume", "create", *left, f"{kind.project}-left-secrets")
    async with tidy(kind), kind.open() as launcher:
        assert isinstance(launcher, DockerLauncher)
        instance_id = await started(launcher, kind.serving)
        await kind.up(launcher, instance_id)
        for _ in range(2):  # what is seen once may be another controller's, at work
            await launcher.sweep()
        assert [name for name in kind.things() if "left" in name] == []
        assert [item.alive for item in await launcher.launched()] == [True]


async def test_installations_that_share_an_engine_leave_each_other_alone(podman: Podman, tmp_path: Path) -> None:
    ours, theirs = Containers(tmp_path / "ours", podman), Containers(tmp_path / "theirs", podman)
    async with tidy(ours), tidy(theirs), ours.open() as launcher, theirs.open() as other:
        instance_id = await started(launcher, ours.serving)
        await ours.up(launcher, instance_id)
        assert await other.launched() == []
        await other.stop(instance_id, grace_s=0.0)
        assert [item.alive for item in await launcher.launched()] == [True]


async def test_an_engine_that_is_away_is_said_to_be(tmp_path: Path, podman: Podman) -> None:
    kind = Containers(tmp_path, podman, launcher_url=f"docker://{tmp_path}/no.sock")
    async with kind.open() as launcher:
        with pytest.raises(LauncherUnavailable, match="cannot be reached"):
            await launcher.launched()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("queue_url", "memory://"),
        ("blobs_url", "file://"),
        ("docker_ulimits", "nofile=many"),
        ("docker_restarts", 3),
        ("launcher_url", "dockre://"),
    ],
)
async def test_settings_that_cannot_work_are_refused_at_once(
    tmp_path: Path, podman: Podman, setting: str, value: object
) -> None:
    kind = Containers(tmp_path, podman, **{setting: value})
    with pytest.raises(ConfigurationError, match="FNQUEUE_"):
        async with kind.open():
            raise AssertionError
