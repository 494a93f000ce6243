"""`fnqueue dev`: the API, the controller and the sidecars in one process. The one file that imports the workers."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from pydantic import SecretStr

from api.server import serving
from broker.accounts import new_token
from broker.connect import open_broker
from broker.errors import ConfigurationError, FnqueueError
from broker.examination import profile_kept
from broker.ports import Broker, Launcher
from broker.settings import ApiSettings, ControllerSettings, SidecarSettings
from broker.telemetry.process import observed
from fnqueue.calls import Failed
from fnqueue.welcome import welcome
from workers import controller, sidecar
from workers.health import NeverReady
from workers.launchers import open_launcher
from workers.loops import Fault, either, guard, together

# All that waits is lost with this process anyway, and one person at one machine does not want to wait.
DRAIN_S = 1.0
RECONCILE_S = 0.25
INTERRUPTED = 130

_KEY = re.compile(r"[!-~]{1,512}")


class NotWelcome(FnqueueError):
    """The sample function could not be deployed and invoked."""


async def run(settings: ApiSettings, workers: ControllerSettings, *, announce: Callable[[str], object]) -> None:
    """Serve until SIGTERM or Ctrl-C; `announce` gets the welcome once everything is up.

    Raises:
        ConfigurationError: a setting, the address or the data folder is of no use.
        NotWelcome: the sample function does not run here.
    """
    settings = settings.model_copy(
        update={"admin_key": SecretStr(_key(settings)), "encryption_keys": SecretStr(_encryption_keys(settings))}
    )
    quick = {"drain_s": DRAIN_S, "reconcile_s": RECONCILE_S}
    if "channel_drain_s" not in settings.model_fields_set:
        settings = settings.model_copy(update={"channel_drain_s": DRAIN_S})
    workers = workers.model_copy(update={name: quick[name] for name in quick.keys() - workers.model_fields_set})
    # One process has one listener for all that it does: the controller's, which shows the most.
    settings = settings.model_copy(update={"status_port": 0})
    stop = asyncio.Event()
    _stop_on_signals(stop)
    try:
        async with (
            profile_kept(settings, stop),
            open_broker(settings) as broker,
            observed(broker),
            together() as tasks,
        ):
            sidecars = Sidecars(broker, tasks)
            async with open_launcher(workers, start_sidecar=sidecars.start) as launcher:
                await launcher.launched()  # refuses a data folder that another server works in
                fault = await _serve(broker, settings, workers, launcher, stop, announce)
    finally:
        _kill_children()  # there are none, unless something of ours failed
    if fault:
        raise NotWelcome(fault)


async def _serve(
    broker: Broker,
    settings: ApiSettings,
    workers: ControllerSettings,
    launcher: Launcher,
    stop: asyncio.Event,
    announce: Callable[[str], object],
) -> str:
    """Until `stop`, or what is wrong with the sample function. The controller is told to stop and never cancelled:
    that would leave its instances running."""
    offered = asyncio.Event()
    async with together() as tasks, serving(broker, settings) as url:
        tasks.create_task(controller.serve(broker, workers, launcher, stop, offered=offered), name="controller")
        await either(offered.wait(), stop.wait())
        fault = "" if stop.is_set() else await _welcome(url, settings.admin_key.get_secret_value(), announce)
        if fault:
            stop.set()
        await stop.wait()
    return fault


async def _welcome(url: str, key: str, announce: Callable[[str], object]) -> str:
    """Greet through the front door: what a user will do is done once, over HTTP. Returns what went wrong."""
    try:
        greeting = await asyncio.to_thread(welcome, url, key)
    except Failed as exc:
        return str(exc)
    announce(greeting.text() + "\n  Ctrl-C stops everything.\n")
    return ""


def _key(settings: ApiSettings) -> str:
    """The key that was given, else the data folder's own, so that it is the same after a restart."""
    key = settings.admin_key.get_secret_value() or _kept(settings.data_dir / "dev-key", new_token)
    if _KEY.fullmatch(key) is None:
        raise ConfigurationError("the API key must have 1 to 512 printable ASCII characters, and no blanks")
    return key


def _encryption_keys(settings: ApiSettings) -> str:
    """As `_key`."""
    path = settings.data_dir / "dev-encryption-keys"
    return settings.encryption_keys.get_secret_value() or _kept(path, lambda: f"dev:{secrets.token_hex(32)}")


def _kept(path: Path, new: Callable[[], str]) -> str:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read_key(path)
    except OSError as exc:
        raise ConfigurationError(f"the data folder {path.parent} cannot be used: {exc.strerror}") from exc
    key = new()
    with os.fdopen(descriptor, "w") as file:
        file.write(key + "\n")
    return key


def _read_key(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError) as exc:
        raise ConfigurationError(f"the key in {path} cannot be read; remove it, and another is made") from exc


def _stop_on_signals(stop: asyncio.Event) -> None:
    def on_signal() -> None:
        if stop.is_set():
            _end_at_once()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)


def _end_at_once() -> None:
    _kill_children()
    os._exit(INTERRUPTED)


def _kill_children() -> None:
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()


class Sidecars:
    """Runs sidecars as tasks of this process, where the back ends in memory are."""

    def __init__(self, broker: Broker, tasks: asyncio.TaskGroup) -> None:
        self._broker = broker
        self._tasks = tasks

    async def start(self, settings: SidecarSettings, *, log: Path) -> Sidecar:
        """Its log lines go where all of this process's go."""
        return Sidecar(self._broker, settings.model_copy(update={"status_port": 0}), self._tasks)


class Sidecar:
    """Implements `workers.launchers.process.Sidecar`."""

    identity = None

    def __init__(self, broker: Broker, settings: SidecarSettings, tasks: asyncio.TaskGroup) -> None:
        self._stop = asyncio.Event()
        self._fate = ""
        self._task = tasks.create_task(self._run(broker, settings), name=f"sidecar {settings.instance_id}")

    @property
    def alive(self) -> bool:
        return not self._task.done()

    @property
    def fate(self) -> str:
        return self._fate or "ended"

    async def stop(self, *, grace_s: float) -> None:
        self._stop.set()
        await asyncio.wait([self._task], timeout=grace_s + DRAIN_S)
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self, broker: Broker, settings: SidecarSettings) -> None:
        """A sidecar that fails is its launcher's to see, and nobody else's end."""
        work = sidecar.serve(broker, settings, self._stop)
        try:
            await guard(work, expected=(FnqueueError, NeverReady), instance_id=settings.instance_id)
        except (FnqueueError, NeverReady, Fault) as exc:
            self._fate = f"failed: {exc}"
