"""`fnqueue controller`."""

from __future__ import annotations

import asyncio
import signal
import sys

import click

from broker.connect import open_broker
from broker.errors import ConfigurationError
from broker.examination import profile_kept
from broker.settings import ControllerSettings, load, refuse_memory
from broker.telemetry import logs
from broker.telemetry.process import observed
from workers.controller import serve
from workers.launchers import open_platform


@click.command()
def controller() -> None:
    """Keep deployed functions running: start, watch and stop their instances.

    Settings come from FNQUEUE_* in the environment. SIGTERM and Ctrl-C drain this controller's instances, for
    FNQUEUE_DRAIN_S seconds at most, and stop them; a second one ends the controller at once, and the next one on
    the same data folder takes its instances over. On Kubernetes and, unless FNQUEUE_DOCKER_KEEP_INSTANCES says
    otherwise, in a container engine, instances go on without it.
    """
    try:
        settings = load(ControllerSettings)
        refuse_memory(settings, "queue_url", "store_url")
        logs.configure(settings.log_level, settings.log_format)
        asyncio.run(_run(settings))
    except ConfigurationError as exc:
        click.echo(f"fnqueue controller: {exc}", err=True)
        sys.exit(2)


async def _run(settings: ControllerSettings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def end(number: signal.Signals) -> None:
        stop.set()
        loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    async with (
        profile_kept(settings, stop),
        open_broker(settings) as broker,
        observed(broker),
        open_platform(settings) as launcher,
    ):
        await serve(broker, settings, launcher, stop)
