"""What starts instances, chosen by the scheme of `launcher_url`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from broker.errors import ConfigurationError
from broker.ports import Fleet, Launcher
from broker.settings import ControllerSettings
from workers.launchers.kubernetes import open_fleet
from workers.launchers.process import ProcessLauncher, StartSidecar, start_sidecar_process


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
    """The launcher that the settings name. Closing it leaves its instances running: the next one on the same
    data folder finds them again.

    Raises:
        ConfigurationError: an unknown scheme, or a bad images file.
    """
    scheme = settings.launcher_url.partition("://")[0]
    if "://" not in settings.launcher_url or scheme != "process":
        raise ConfigurationError(
            f"FNQUEUE_LAUNCHER_URL: unknown scheme {scheme[:20]!r}; known are process:// and, for "
            "`fnqueue controller`, kubernetes://"
        )
    launcher = ProcessLauncher(settings, start_sidecar=start_sidecar)
    try:
        yield launcher
    finally:
        await launcher.close()
