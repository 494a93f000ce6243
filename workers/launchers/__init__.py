"""What starts instances, chosen by the scheme of `launcher_url`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from broker.errors import ConfigurationError
from broker.ports import Launcher
from broker.settings import ControllerSettings
from workers.launchers.process import ProcessLauncher, StartSidecar, start_sidecar_process


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
        raise ConfigurationError(f"FNQUEUE_LAUNCHER_URL: unknown scheme {scheme[:20]!r}; known is process://")
    launcher = ProcessLauncher(settings, start_sidecar=start_sidecar)
    try:
        yield launcher
    finally:
        await launcher.close()
