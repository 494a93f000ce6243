"""`fnqueue sidecar`, plugged into the command line by the entry point group `fnqueue.commands`."""

from __future__ import annotations

import asyncio
import signal

import click

from broker import garbage
from broker.connect import open_broker
from broker.errors import ConfigurationError
from broker.examination import profile_kept
from broker.settings import SidecarSettings, load, refuse_memory
from broker.telemetry import logs
from broker.telemetry.process import observed
from workers.health import NeverReady
from workers.open_files import allow_open_files
from workers.sidecar import serve

try:
    from uvloop import new_event_loop
except ImportError:  # no wheel for this platform: slower, otherwise the same
    from asyncio import new_event_loop  # type: ignore[assignment]  # uvloop's says Loop, a subclass

USAGE = 2
NEVER_READY = 3


@click.command()
@click.option("--function-id", help="The function's ID.")
@click.option("--function-version-id", help="The version's ID: whose queue to serve.")
@click.option("--inference-port", type=int, help="Port of the inference container.")
@click.option("--inference-url", help="Path that jobs are POSTed to.")
@click.option("--health-uri", help="Path of the container's health check.")
@click.option("--max-request-concurrency", type=int, help="Jobs sent to the container at once.")
def sidecar(**given: str | int | None) -> None:
    """Run the jobs of one function version in the container beside this process.

    Every setting can be given in the environment as FNQUEUE_<NAME>; the options here win. SIGTERM drains.
    """
    try:
        settings = load(SidecarSettings, **given)
        refuse_memory(settings, "queue_url", "store_url")
        logs.configure(settings.log_level, settings.log_format)
        allow_open_files(settings.max_request_concurrency)
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_serve(settings))
    except ConfigurationError as exc:
        _fail(exc, USAGE)
    except NeverReady as exc:
        _fail(exc, NEVER_READY)


async def _serve(settings: SidecarSettings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with (
        profile_kept(settings, stop),
        open_broker(settings) as broker,
        observed(broker, forgets=False),  # it has one version, and may not list them
    ):
        garbage.look_seldom()
        await serve(broker, settings, stop)


def _fail(error: Exception, code: int) -> None:
    click.echo(f"fnqueue sidecar: {error}", err=True)
    raise click.exceptions.Exit(code)
