"""`fnqueue api`, `dev`, `keys` and `secrets`, plugged in by the entry point group `fnqueue.commands`."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from api import embedded
from api.server import serving
from broker import accounts, registries
from broker import secrets as function_secrets
from broker.connect import open_broker
from broker.errors import BadRequest, ConfigurationError, FnqueueError
from broker.keyring import SETTING, Rotation
from broker.model import Key
from broker.ports import Broker
from broker.settings import ApiSettings, ControllerSettings, SecretSettings, Settings, load
from broker.telemetry import logs

try:
    from uvloop import new_event_loop
except ImportError:  # no wheel for this platform: slower, otherwise the same
    from asyncio import new_event_loop  # type: ignore[assignment]  # uvloop's says Loop, a subclass

T = TypeVar("T")


class Misconfigured(click.ClickException):
    exit_code = 2


@contextmanager
def _told() -> Iterator[None]:
    """What went wrong as one line: 2 for what was typed or set, 1 for a server or an object that is not there."""
    try:
        yield
    except (ConfigurationError, BadRequest) as exc:
        raise Misconfigured(str(exc)) from exc
    except FnqueueError as exc:
        raise click.ClickException(str(exc)) from exc


def _run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)


# -- api ---------------------------------------------------------------------------------------


@click.command()
@click.option("--host", help="Address to listen on. [FNQUEUE_HOST]")
@click.option("--port", type=click.IntRange(0, 65_535), help="Port to listen on; 0 takes a free one. [FNQUEUE_PORT]")
def api(host: str | None, port: int | None) -> None:
    """Serve the HTTP API over RabbitMQ, Redis and S3.

    Settings come from FNQUEUE_* in the environment. Any number of these may serve the same queue; several on one
    machine may share a port. SIGTERM and Ctrl-C answer who waits, and stop.
    """
    with _told():
        settings = load(ApiSettings, host=host, port=port)
        _refuse_memory(settings, "queue_url", "store_url")
        logs.configure(settings.log_level, settings.log_format)
        _run(_serve(settings))


async def _serve(settings: ApiSettings) -> None:
    stop = asyncio.Event()
    _on_signals(stop.set)
    async with open_broker(settings) as broker, serving(broker, settings, reuse_port=settings.port != 0):
        await stop.wait()


def _on_signals(act: Callable[[], object]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, act)


def _refuse_memory(settings: Settings, *names: str) -> None:
    for name in names:
        if getattr(settings, name).get_secret_value().startswith("memory:"):
            raise ConfigurationError(
                f"FNQUEUE_{name.upper()} is memory://, which no other process could see; name a server, or use: "
                "fnqueue dev"
            )


# -- dev ---------------------------------------------------------------------------------------


@click.command()
@click.option("--host", help="Address to listen on. [FNQUEUE_HOST]  [default: 127.0.0.1]")
@click.option(
    "--port", type=click.IntRange(0, 65_535), help="Port; 0 takes a free one. [FNQUEUE_PORT]  [default: 8080]"
)
@click.option(
    "--key",
    envvar=["FNQUEUE_ADMIN_KEY", "FNQUEUE_KEY"],
    help="API key with every scope. [FNQUEUE_ADMIN_KEY, FNQUEUE_KEY]  [default: one kept in the data folder]",
)
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for files and logs. [FNQUEUE_DATA_DIR]  [default: .fnqueue]",
)
def dev(host: str | None, port: int | None, key: str | None, data_dir: Path | None) -> None:
    """Serve everything in one process: API, controller and workers, with nothing else installed or running.

    Queue and results live in memory and end with it; assets and large results are files in the data folder.
    Ctrl-C stops all that it started, a second one at once.
    """
    with _told():
        shared = {"queue_url": "memory://", "store_url": "memory://", "blobs_url": "file://", "data_dir": data_dir}
        settings = load(ApiSettings, host=host, port=port, admin_key=key, **shared)
        workers = load(ControllerSettings, **shared, launcher_url="process://")
        chosen = settings.model_fields_set
        logs.configure(settings.log_level, settings.log_format if "log_format" in chosen else "text")
        _run(embedded.run(settings, workers, announce=click.echo))


# -- keys --------------------------------------------------------------------------------------


@click.group()
def keys() -> None:
    """API keys of the store that FNQUEUE_STORE_URL names."""


@keys.command("create")
@click.option("--account", default="default", show_default=True, help="Whose key it is.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(accounts.SCOPES),
    help="What it may do; can be repeated.  [default: everything]",
)
@click.option("--description", default="", help="What it is for.")
def create_key(account: str, scopes: tuple[str, ...], description: str) -> None:
    """Make a key and print it, once: only its hash is kept.

    The key alone goes to standard output, what is known of it to standard error.
    """

    async def create(broker: Broker) -> tuple[str, Key]:
        return await accounts.create_key(
            broker, account=account, scopes=scopes or accounts.SCOPES, description=description
        )

    token, key = _with_store(create)
    click.echo(f"id {key.id}, account {key.account}, scopes {', '.join(key.scopes)}", err=True)
    click.echo(token)


@keys.command("list")
@click.option("--account", default="", help="Only this account's.")
def list_keys(account: str) -> None:
    """One line per key: id, account, hint, scopes, description."""

    async def find(broker: Broker) -> list[Key]:
        return await accounts.list_keys(broker, account)

    for key in _with_store(find):
        click.echo("\t".join([key.id, key.account, key.hint, ",".join(key.scopes), key.description]))


@keys.command("delete")
@click.argument("key_id")
def delete_key(key_id: str) -> None:
    """Revoke a key; servers refuse it within two seconds."""

    async def delete(broker: Broker) -> None:
        await accounts.delete_key(broker, key_id)

    _with_store(delete)


# -- secrets -----------------------------------------------------------------------------------


@click.group()
def secrets() -> None:
    """Secrets and registry credentials of the store that FNQUEUE_STORE_URL names."""


@secrets.command("rotate")
def rotate_secrets() -> None:
    """Seal everything with the first of FNQUEUE_ENCRYPTION_KEYS, so that the others can be dropped.

    Before, give every api and controller the new key as a second one, then as the first. Safe to repeat and to
    interrupt. What none of the keys opens is named, left as it is, and makes the exit status 1.
    """

    async def rotate(broker: Broker) -> Rotation:
        return await function_secrets.rotate(broker) + await registries.rotate(broker)

    done = _with_store(rotate, SecretSettings, needs=("encryption_keys",))
    click.echo(f"{done.resealed} sealed again, {done.current} were already")
    if done.unopened:
        raise click.ClickException(f"{SETTING} does not open {', '.join(done.unopened)}")


def _with_store(
    work: Callable[[Broker], Coroutine[Any, Any, T]], kind: type[Settings] = Settings, *, needs: Sequence[str] = ()
) -> T:
    """What `work` returns. Only the store is used: the queue need not be reachable. `needs` must not be empty."""

    async def run(settings: Settings) -> T:
        async with open_broker(settings) as broker:
            return await work(broker)

    with _told():
        settings = load(kind, queue_url="memory://")
        for name in needs:
            if not getattr(settings, name).get_secret_value():
                raise ConfigurationError(f"FNQUEUE_{name.upper()} is not set")
        _refuse_memory(settings, "store_url")
        logs.configure("ERROR", settings.log_format)
        return _run(run(settings))
