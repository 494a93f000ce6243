"""What starts instances, chosen by the scheme of `launcher_url`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from broker.errors import ConfigurationError
from broker.ports import Fleet, Launcher
from broker.settings import ControllerSettings
from workers.launchers.docker import open_docker_launcher
from workers.launchers.kubernetes import open_fleet
from workers.launchers.process import ProcessLauncher, StartSidecar, start_sidecar_process

_SCHEMES = ("process", "docker")


@asynccontextmanager
async def open_platform(settings: ControllerSettings) -> AsyncIterator[Launcher | Fleet]:
    """The launcher or the fleet that the settings name, for a controller that is a process of its own.

    Raises:
        ConfigurationError: as `open_launcher` and `open_fleet`.
    """
    if settings.launcher_url.startswith("kubernetes://"):
        async with open_fleet(settings) as fleet:
            yield fleet
    else:
        async with open_launcher(settings) as launcher:
            yield launcher


@asynccontextmanager
async def open_launcher(
    settings: ControllerSettings, *, start_sidecar: StartSidecar = start_sidecar_process
) -> AsyncIterator[Launcher]:
    """The launcher that the settings name. Closing it leaves its instances running: the next one, on the same data
    folder or engine, finds them again. `start_sidecar` is for sidecars that are processes.

    Raises:
        ConfigurationError: an unknown scheme, a bad images file, or no container engine.
    """
    scheme, separator, _ = settings.launcher_url.partition("://")
    if not separator or scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise ConfigurationError(
            f"FNQUEUE_LAUNCHER_URL: unknown scheme {scheme[:20]!r}; known are {known} and, for `fnqueue controller`, "
            "kubernetes://"
        )
    if scheme == "docker":
        async with open_docker_launcher(settings) as containers:
            yield containers
        return
    processes = ProcessLauncher(settings, start_sidecar=start_sidecar)
    try:
        yield processes
    finally:
        await processes.close()
