"""The process launcher, with real processes; and what is expected of every launcher, the fake of the tests included."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from broker.errors import ConfigurationError
from broker.model import GpuSpecification, Health, Version
from broker.ports import Launched, Launcher
from broker.settings import ControllerSettings, SidecarSettings, load
from tests.unit.launchers import KNOWN_IMAGE, FakeLauncher
from workers.launchers import open_launcher
from workers.launchers.children import Child
from workers.launchers.images import find_image, read_images
from workers.launchers.process import ProcessLauncher, sidecar_environment

# Tells what it was given, starts a child of its own, and serves.
SERVER = """
import http.server, json, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
told = {"environ": dict(os.environ), "argv": sys.argv[1:], "child": child.pid, "cwd": os.getcwd()}
with open(os.environ["TOLD"] + ".new", "w") as file:
    json.dump(told, file)
os.rename(os.environ["TOLD"] + ".new", os.environ["TOLD"])
address = os.environ["HOST"], int(os.environ["PORT"])
http.server.ThreadingHTTPServer(address, http.server.SimpleHTTPRequestHandler).serve_forever()
"""
# Drains: it ends a moment after it was asked to, and says so.
SIDECAR = """
import signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
print("ready", flush=True)
while not asked:
    time.sleep(0.01)
time.sleep(float(sys.argv[1]))
print("drained", flush=True)
"""
DEADLINE_S = 20.0

VERSION = Version(
    id=str(uuid.uuid4()),
    function_id=str(uuid.uuid4()),
    account="ours",
    name="server",
    inference_url="/echo",
    container_image=KNOWN_IMAGE,
    created_at=0.0,
)
SPECIFICATION = GpuSpecification(
    id="spec-1", gpu="CPU", instance_type="CPU", min_instances=1, max_instances=1, max_request_concurrency=3
)


class Sidecars:
    """Starts stand-ins for the sidecar: real processes that drain for `drain_s`."""

    def __init__(self) -> None:
        self.drain_s = 0.0
        self.settings: list[SidecarSettings] = []

    async def __call__(self, settings: SidecarSettings, *, log: Path) -> Child:
        self.settings.append(settings)
        command = [sys.executable, "-c", SIDECAR, str(self.drain_s)]
        return Child.spawn(command, environment=dict(os.environ), folder=log.parent, log=log)


@pytest.fixture
def sidecars() -> Sidecars:
    return Sidecars()


@pytest.fixture
def settings(tmp_path: Path) -> ControllerSettings:
    images = tmp_path / "images.toml"
    told = tmp_path / "told.json"
    images.write_text(
        f"""
[{json.dumps(KNOWN_IMAGE)}]
command = ["{{python}}", "-c", {json.dumps(SERVER)}, "--port={{port}}"]
env = {{ TOLD = {json.dumps(str(told))}, LISTEN = "{{port}}", SHADOWED = "image" }}

["test/crash:1"]
command = ["{{python}}", "-c", "print('x' * 9000); print('the reason'); raise SystemExit(3)"]

["test/missing:1"]
command = ["{{examples}}/no-such-program"]
"""
    )
    return load(ControllerSettings, images_file=images, data_dir=tmp_path / "data", drain_s=7.0)


@pytest.fixture
async def launcher(settings: ControllerSettings, sidecars: Sidecars) -> AsyncIterator[Launcher]:
    async with process_launcher(settings, sidecars) as launcher:
        yield launcher


@asynccontextmanager
async def process_launcher(settings: ControllerSettings, sidecars: Sidecars) -> AsyncIterator[Launcher]:
    """Stops what it started when the test is over."""
    async with open_launcher(settings, start_sidecar=sidecars) as launcher:
        yield launcher
        for instance in await launcher.launched():
            await launcher.stop(instance.instance_id, grace_s=0.0)


async def until(true: Callable[[], bool]) -> None:
    """Other processes can only be watched."""
    async with asyncio.timeout(DEADLINE_S):
        while not true():  # noqa: ASYNC110  nobody sets an event over there
            await asyncio.sleep(0.01)


async def started(launcher: Launcher, version: Version = VERSION) -> Launched:
    instance_id = str(uuid.uuid4())
    await launcher.start(instance_id, version, SPECIFICATION)
    (instance,) = [item for item in await launcher.launched() if item.instance_id == instance_id]
    return instance


def pids(instance: Launched, settings: ControllerSettings) -> tuple[int, int]:
    state = json.loads((settings.data_dir / "instances" / instance.instance_id / "state.json").read_text())
    return state["container"]["pid"], state["sidecar"]["pid"]


def log_of(instance: Launched, settings: ControllerSettings, name: str) -> str:
    return (settings.data_dir / "instances" / instance.instance_id / f"{name}.log").read_text()


def gone(pid: int) -> bool:
    """Not even a zombie is left, unless it is one of another process."""
    try:
        process = psutil.Process(pid)
        return process.status() == psutil.STATUS_ZOMBIE and process.ppid() != os.getpid()
    except psutil.NoSuchProcess:
        return True


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


async def told(settings: ControllerSettings) -> dict[str, Any]:
    file = settings.data_dir.parent / "told.json"
    await until(file.exists)
    return cast(dict[str, Any], json.loads(file.read_text()))


# -- every launcher ------------------------------------------------------------------------------


@pytest.fixture(params=["fake", "process"])
async def any_launcher(
    request: pytest.FixtureRequest, settings: ControllerSettings, sidecars: Sidecars
) -> AsyncIterator[Launcher]:
    async with AsyncExitStack() as stack:
        if request.param == "fake":
            yield FakeLauncher()
        else:
            yield await stack.enter_async_context(process_launcher(settings, sidecars))


async def kill(instance: Launched, launcher: Launcher, settings: ControllerSettings) -> None:
    if isinstance(launcher, FakeLauncher):
        launcher.kill(instance.instance_id)
    else:
        os.kill(pids(instance, settings)[0], signal.SIGKILL)
        await until(lambda: not instance.alive)


async def test_a_started_instance_is_launched_and_alive(any_launcher: Launcher) -> None:
    instance = await started(any_launcher)
    assert (instance.version_id, instance.specification_id) == (VERSION.id, "spec-1")
    assert (instance.alive, instance.error) == (True, "")


async def test_a_stopped_instance_is_forgotten_and_may_be_stopped_again(any_launcher: Launcher) -> None:
    instance, other = await started(any_launcher), await started(any_launcher)
    for _ in range(2):
        await any_launcher.stop(instance.instance_id, grace_s=5.0)
    assert [item.instance_id for item in await any_launcher.launched()] == [other.instance_id]


async def test_a_dead_instance_stays_until_it_is_stopped_and_says_why(
    any_launcher: Launcher, settings: ControllerSettings
) -> None:
    instance = await started(any_launcher)
    await kill(instance, any_launcher, settings)
    (dead,) = await any_launcher.launched()
    assert not dead.alive
    assert "container was killed by signal 9" in dead.error
    await any_launcher.stop(dead.instance_id, grace_s=0.0)
    assert await any_launcher.launched() == []


async def test_an_unknown_image_can_never_start_and_the_known_ones_are_listed(any_launcher: Launcher) -> None:
    with pytest.raises(ConfigurationError, match=KNOWN_IMAGE):
        await started(any_launcher, replace(VERSION, container_image="nobody/knows:1"))
    assert await any_launcher.launched() == []


async def test_there_is_something_to_deploy_to(any_launcher: Launcher) -> None:
    (gpu,) = await any_launcher.gpus()
    assert (gpu.name, gpu.instance_type) == ("CPU", "CPU")
    assert gpu.capacity >= 1


# -- what the two processes are given ---------------------------------------------------------------


async def test_the_container_is_told_where_to_listen_and_who_it_is(
    launcher: Launcher, settings: ControllerSettings, sidecars: Sidecars
) -> None:
    environment = (("GREETING", "hello"), ("SHADOWED", "user"), ("PORT", "1"), ("NVCF_NCA_ID", "forged"))
    version = replace(VERSION, container_args="--flag 'two words'", container_environment=environment)
    await started(launcher, version)
    given = await told(settings)
    port = str(sidecars.settings[0].inference_port)
    assert given["argv"] == [f"--port={port}", "--flag", "two words"]
    assert given["cwd"] == str(settings.data_dir.parent)
    expected = {
        "HOST": "127.0.0.1",
        "PORT": port,
        "LISTEN": port,
        "GREETING": "hello",
        "SHADOWED": "user",
        "NVCF_BACKEND": "local",
        "NVCF_ENV": "local",
        "NVCF_FUNCTION_ID": VERSION.function_id,
        "NVCF_FUNCTION_NAME": "server",
        "NVCF_FUNCTION_VERSION_ID": VERSION.id,
        "NVCF_INSTANCETYPE": "CPU",
        "NVCF_NCA_ID": "ours",
        "NVCF_REGION": "local",
    }
    assert given["environ"].items() >= expected.items()


async def test_the_container_is_given_none_of_our_secrets(
    settings: ControllerSettings, sidecars: Sidecars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FNQUEUE_SECRET_KEY", "s" * 40)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    async with process_launcher(settings, sidecars) as launcher:
        await started(launcher)
        environ = (await told(settings))["environ"]
    assert not [name for name in environ if name.startswith(("FNQUEUE_", "AWS_"))]


async def test_the_container_answers_on_its_port(launcher: Launcher, sidecars: Sidecars) -> None:
    await started(launcher)
    port = sidecars.settings[0].inference_port
    await until(lambda: listens(port))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.0 200")
    writer.close()
    await writer.wait_closed()


async def test_the_sidecar_is_told_all_about_its_instance(
    launcher: Launcher, settings: ControllerSettings, sidecars: Sidecars
) -> None:
    health = Health(protocol="HTTP", uri="/health", port=9, timeout="PT2.5S", expected_status=204)
    instance = await started(launcher, replace(VERSION, health=health))
    (given,) = sidecars.settings
    folder = settings.data_dir.resolve() / "instances" / instance.instance_id
    assert (given.function_id, given.function_version_id, given.function_name) == (
        VERSION.function_id,
        VERSION.id,
        "server",
    )
    assert (given.account, given.instance_id, given.specification_id) == ("ours", instance.instance_id, "spec-1")
    assert (given.inference_url, given.health_uri, given.health_expected_status) == ("/echo", "/health", 204)
    assert (given.health_timeout_s, given.health_port) == (2.5, given.inference_port)
    assert (given.max_request_concurrency, given.drain_s) == (3, 7.0)
    assert (given.asset_dir, given.response_dir) == (folder / "assets", folder / "responses")
    assert given.asset_dir.is_dir()
    assert given.response_dir.is_dir()


async def test_each_sidecar_has_a_status_port_of_its_own_on_loopback(
    launcher: Launcher, sidecars: Sidecars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FNQUEUE_STATUS_PORT", "8090")
    monkeypatch.setenv("FNQUEUE_STATUS_HOST", "0.0.0.0")
    await started(launcher)
    (given,) = sidecars.settings
    assert given.status_port not in (0, 8090, given.inference_port, given.health_port)
    assert given.status_host == "127.0.0.1"


def test_a_sidecar_process_reads_back_the_settings_it_was_meant_to_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REGION", "the machine's own word")
    monkeypatch.setenv("function_id", "another")
    meant = load(
        SidecarSettings,
        function_id="f",
        function_version_id="v",
        region="local",
        queue_url="amqp://user:secret@host:1/vhost",
        data_dir=tmp_path,
        drain_s=3.0,
    )
    environment = sidecar_environment(meant)
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert load(SidecarSettings) == meant


@pytest.mark.parametrize(
    "version",
    [
        replace(VERSION, container_image="test/missing:1"),
        replace(VERSION, container_args="'half a word"),
        replace(VERSION, health=Health(timeout="soon")),
    ],
)
async def test_what_can_never_start_leaves_nothing_behind(
    launcher: Launcher, settings: ControllerSettings, version: Version
) -> None:
    with pytest.raises(ConfigurationError):
        await started(launcher, version)
    assert await launcher.launched() == []


# -- secrets -----------------------------------------------------------------------------------------


def secrets_folder(instance_id: str, settings: ControllerSettings) -> Path:
    return settings.data_dir.resolve() / "instances" / instance_id / "secrets"


async def started_with_secrets(launcher: Launcher, content: bytes = b'{"A": "one"}') -> str:
    instance_id = str(uuid.uuid4())
    await launcher.start(instance_id, VERSION, SPECIFICATION, secrets=content)
    return instance_id


async def test_secrets_are_a_file_of_the_instance_and_nobody_elses(
    launcher: Launcher, settings: ControllerSettings
) -> None:
    folder = secrets_folder(await started_with_secrets(launcher), settings)
    assert (await told(settings))["environ"]["NVCF_SECRETS_FILE"] == str(folder / "secrets.json")
    assert (folder / "secrets.json").read_bytes() == b'{"A": "one"}'
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder / "secrets.json")] == [0o700, 0o600]


async def test_a_delivery_replaces_the_file_in_one_step(launcher: Launcher, settings: ControllerSettings) -> None:
    instance_id = await started_with_secrets(launcher)
    file = secrets_folder(instance_id, settings) / "secrets.json"
    with file.open("rb") as opened_before:
        await launcher.deliver(instance_id, b'{"A": "two"}')
        assert opened_before.read() == b'{"A": "one"}'
    assert file.read_bytes() == b'{"A": "two"}'
    written_at = file.stat().st_ino
    await launcher.deliver(instance_id, b'{"A": "two"}')
    assert (file.stat().st_ino, stat.S_IMODE(file.stat().st_mode)) == (written_at, 0o600)
    assert [path.name for path in file.parent.iterdir()] == ["secrets.json"]


async def test_a_link_where_the_file_goes_is_replaced_and_not_followed(
    launcher: Launcher, settings: ControllerSettings, tmp_path: Path
) -> None:
    instance_id = await started_with_secrets(launcher)
    folder = secrets_folder(instance_id, settings)
    target = tmp_path / "target"
    target.write_text("untouched")
    (folder / "secrets.json").unlink()
    for name in ("secrets.json", "secrets.json.new"):
        (folder / name).symlink_to(target)
    await launcher.deliver(instance_id, b"{}")
    assert target.read_text() == "untouched"
    assert not (folder / "secrets.json").is_symlink()


async def test_without_secrets_there_is_no_file_and_none_comes_later(
    launcher: Launcher, settings: ControllerSettings
) -> None:
    instance = await started(launcher)
    assert "NVCF_SECRETS_FILE" not in (await told(settings))["environ"]
    await launcher.deliver(instance.instance_id, b"{}")
    await launcher.deliver("nobody", b"{}")
    assert not secrets_folder(instance.instance_id, settings).exists()


async def test_secrets_go_with_their_instance(launcher: Launcher, settings: ControllerSettings) -> None:
    instance_id = await started_with_secrets(launcher)
    await asyncio.gather(launcher.stop(instance_id, grace_s=0.0), launcher.deliver(instance_id, b'{"A": "late"}'))
    assert not secrets_folder(instance_id, settings).exists()


async def test_what_cannot_start_leaves_no_secrets(launcher: Launcher, settings: ControllerSettings) -> None:
    with pytest.raises(ConfigurationError):
        await launcher.start("x", replace(VERSION, container_image="test/missing:1"), SPECIFICATION, secrets=b"{}")
    assert not secrets_folder("x", settings).exists()


async def test_secrets_outlive_a_killed_controller_only_with_their_instance(
    settings: ControllerSettings, sidecars: Sidecars
) -> None:
    first = ProcessLauncher(settings, start_sidecar=sidecars)
    instance_id = await started_with_secrets(first)
    (lost,) = await first.launched()
    await first.close()
    for unknown in ("never-written-down", "unreadable"):
        secrets_folder(unknown, settings).mkdir(parents=True)
        (secrets_folder(unknown, settings) / "secrets.json").write_text("{}")
    (secrets_folder("unreadable", settings).parent / "state.json").write_text("{")
    async with process_launcher(settings, sidecars) as launcher:
        await launcher.deliver(instance_id, b'{"A": "two"}')
        assert (secrets_folder(instance_id, settings) / "secrets.json").read_bytes() == b'{"A": "two"}'
        assert not any(secrets_folder(name, settings).exists() for name in ("never-written-down", "unreadable"))
        await launcher.stop(instance_id, grace_s=0.0)
        assert not secrets_folder(instance_id, settings).exists()
    reap(lost)


def test_a_sidecar_process_is_given_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FNQUEUE_ENCRYPTION_KEYS", "k1:hidden-value")
    monkeypatch.setenv("fnqueue_encryption_keys", "k1:hidden-value")
    monkeypatch.setenv("FNQUEUE_ADMIN_KEY", "hidden-value")
    monkeypatch.setenv("FNQUEUE_SIGNING_KEYS", "hidden-value")
    settings = load(SidecarSettings, function_id="f", function_version_id="v", data_dir=tmp_path)
    assert "hidden-value" not in str(sidecar_environment(settings))


# -- life and death ----------------------------------------------------------------------------------


async def test_stopping_drains_the_sidecar_and_ends_the_whole_group(
    launcher: Launcher, settings: ControllerSettings, sidecars: Sidecars
) -> None:
    sidecars.drain_s = 0.2
    instance = await started(launcher)
    container, sidecar = pids(instance, settings)
    child = (await told(settings))["child"]
    await until(lambda: "ready" in log_of(instance, settings, "sidecar"))
    await launcher.stop(instance.instance_id, grace_s=DEADLINE_S)
    assert log_of(instance, settings, "sidecar").endswith("drained\n")
    assert [gone(pid) for pid in (container, sidecar, child)] == [True, True, True]


async def test_a_drain_ends_with_the_grace(
    launcher: Launcher, settings: ControllerSettings, sidecars: Sidecars
) -> None:
    sidecars.drain_s = 600.0
    instance = await started(launcher)
    await until(lambda: "ready" in log_of(instance, settings, "sidecar"))
    began_at = time.monotonic()
    await launcher.stop(instance.instance_id, grace_s=0.2)
    assert 0.2 <= time.monotonic() - began_at < DEADLINE_S
    assert "drained" not in log_of(instance, settings, "sidecar")


async def test_the_children_of_a_dead_container_are_ended_too(launcher: Launcher, settings: ControllerSettings) -> None:
    instance = await started(launcher)
    child = (await told(settings))["child"]
    os.kill(pids(instance, settings)[0], signal.SIGKILL)
    await until(lambda: not instance.alive)
    await launcher.stop(instance.instance_id, grace_s=0.0)
    assert gone(child)


async def test_only_the_logs_of_the_last_instances_are_kept(launcher: Launcher, settings: ControllerSettings) -> None:
    root = settings.data_dir / "instances"
    for number in range(30):
        (root / f"old-{number}").mkdir(parents=True)
        os.utime(root / f"old-{number}", (number, number))
    instance, running = await started(launcher), await started(launcher)
    await launcher.stop(instance.instance_id, grace_s=0.0)
    kept = {path.name for path in root.iterdir() if path.is_dir()}
    assert kept == {instance.instance_id, running.instance_id} | {f"old-{number}" for number in range(11, 30)}
    left = sorted(path.name for path in (root / instance.instance_id).iterdir())
    assert left == ["container.log", "ended.json", "sidecar.log"]


async def test_what_a_killed_sidecar_left_of_its_requests_goes_with_the_instance(
    launcher: Launcher, sidecars: Sidecars, settings: ControllerSettings
) -> None:
    instance = await started(launcher)
    left = fill_request_folders(sidecars.settings[0])
    os.kill(pids(instance, settings)[1], signal.SIGKILL)
    await until(lambda: not instance.alive)
    await launcher.stop(instance.instance_id, grace_s=0.0)
    assert not any(path.exists() for path in left)


# -- a controller that was killed --------------------------------------------------------------------


async def abandoned(settings: ControllerSettings, sidecars: Sidecars) -> Launched:
    """An instance whose launcher is gone, as after `kill -9` of the controller. Our process stays the parent."""
    launcher = ProcessLauncher(settings, start_sidecar=sidecars)
    instance = await started(launcher)
    await told(settings)
    await launcher.close()
    return instance


def reap(lost: Launched) -> None:
    """What the system does for the children of a process that is gone."""
    for child in (cast(Any, lost).container, cast(Any, lost).sidecar):
        assert not child.alive


async def test_what_was_left_of_requests_goes_when_the_next_controller_takes_over(
    settings: ControllerSettings, sidecars: Sidecars
) -> None:
    """A controller that was killed while it removed an instance, or before it had written down that there is one."""
    async with process_launcher(settings, sidecars) as launcher:
        instance = await started(launcher)
        await launcher.stop(instance.instance_id, grace_s=0.0)
        left = fill_request_folders(sidecars.settings[0])
    async with process_launcher(settings, sidecars) as launcher:
        assert await launcher.launched() == []
    assert not any(path.exists() for path in left)


def fill_request_folders(settings: SidecarSettings) -> list[Path]:
    folders = [settings.asset_dir, settings.response_dir, Path(settings.scratch_dir)]
    for folder in folders:
        (folder / "request").mkdir(parents=True)
        (folder / "request" / "file").touch()
    return folders


async def test_instances_are_found_again(settings: ControllerSettings, sidecars: Sidecars) -> None:
    lost = await abandoned(settings, sidecars)
    container, sidecar = pids(lost, settings)
    child = (await told(settings))["child"]
    async with process_launcher(settings, sidecars) as launcher:
        (found,) = await launcher.launched()
        assert (found.instance_id, found.version_id, found.specification_id, found.alive) == (
            lost.instance_id,
            VERSION.id,
            "spec-1",
            True,
        )
        await launcher.stop(found.instance_id, grace_s=DEADLINE_S)
        assert await launcher.launched() == []
    reap(lost)
    assert [gone(pid) for pid in (container, sidecar, child)] == [True, True, True]


@pytest.mark.parametrize("half", [0, 1], ids=["container", "sidecar"])
async def test_half_an_instance_is_found_dead(settings: ControllerSettings, sidecars: Sidecars, half: int) -> None:
    lost = await abandoned(settings, sidecars)
    os.kill(pids(lost, settings)[half], signal.SIGKILL)
    await until(lambda: not lost.alive)
    async with process_launcher(settings, sidecars) as launcher:
        (found,) = await launcher.launched()
        assert not found.alive
        assert found.error.startswith(("container is gone", "sidecar is gone")[half])
    reap(lost)


@pytest.mark.parametrize("written_down", ["neither", "container"])
async def test_what_was_started_and_not_yet_written_down_is_ended(
    settings: ControllerSettings, sidecars: Sidecars, written_down: str
) -> None:
    """A controller that is killed between the start of a process and the note of it."""
    first = ProcessLauncher(settings, start_sidecar=sidecars)
    instance = await started(first)
    container, sidecar = pids(instance, settings)
    child = (await told(settings))["child"]
    await first.close()
    file = settings.data_dir / "instances" / instance.instance_id / "state.json"
    if written_down == "neither":
        file.unlink()
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"sidecar": None}))
    async with process_launcher(settings, sidecars) as second:
        assert [item.alive for item in await second.launched()] == ([] if written_down == "neither" else [False])
        lost = [sidecar, container, child] if written_down == "neither" else [sidecar]
        await until(lambda: not cast(Any, instance).sidecar.alive)
        await until(lambda: cast(Any, instance).container.alive == (container not in lost))
        await until(lambda: all(gone(pid) for pid in lost))


async def test_a_process_id_used_again_is_nobody_of_ours(settings: ControllerSettings, sidecars: Sidecars) -> None:
    """An instance from before the machine started again: its process ID belongs to somebody else now."""
    folder = settings.data_dir / "instances" / "from-before"
    folder.mkdir(parents=True)
    ourselves = {"pid": os.getpid(), "created_at": psutil.Process().create_time() - 1000}
    state = {"instance_id": "from-before", "version_id": "v", "specification_id": "s", "port": 1}
    (folder / "state.json").write_text(json.dumps(state | {"container": ourselves, "sidecar": ourselves}))
    async with process_launcher(settings, sidecars) as launcher:
        (found,) = await launcher.launched()
        assert not found.alive
        await launcher.stop("from-before", grace_s=0.0)
        assert await launcher.launched() == []


async def test_a_data_folder_has_one_launcher_at_a_time(settings: ControllerSettings, sidecars: Sidecars) -> None:
    async with process_launcher(settings, sidecars) as first, process_launcher(settings, sidecars) as second:
        await first.launched()
        with pytest.raises(ConfigurationError, match="FNQUEUE_DATA_DIR"):
            await second.launched()
        await cast(ProcessLauncher, first).close()
        assert await second.launched() == []


# -- images ------------------------------------------------------------------------------------------


def test_the_samples_are_known_images() -> None:
    image = find_image(read_images(None), "fnqueue/echo:latest")
    command = image.command_for(1234)
    assert command[0] == sys.executable
    assert Path(command[1]).is_file()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[", "images.toml"),
        ('["a:1"]', "command"),
        ('["a:1"]\ncommand = "true"', "command"),
        ('["a:1"]\ncommand = []', "command"),
        ('["a:1"]\ncommand = ["true"]\nenv = { A = 1 }', "env"),
        ('a = "b"', "command"),
    ],
)
def test_a_bad_images_file_says_what_is_bad(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "images.toml").write_text(text)
    with pytest.raises(ConfigurationError, match=fault):
        read_images(tmp_path / "images.toml")


async def test_an_unknown_launcher_lists_the_known_one(settings: ControllerSettings) -> None:
    with pytest.raises(ConfigurationError, match="process://"):
        async with open_launcher(settings.model_copy(update={"launcher_url": "nomad://"})):
            raise AssertionError
