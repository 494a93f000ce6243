"""`fnqueue api`, `dev`, `keys` and `secrets`, plugged in by the entry point group `fnqueue.commands`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from api import embedded, key_service, open_files
from api import processes as keeping
from api.routes.keys import present
from api.server import reserved, serving
from broker import accounts, garbage, registries, webhooks
from broker import secrets as function_secrets
from broker.connect import open_broker
from broker.errors import BadRequest, ConfigurationError, FnqueueError
from broker.examination import profile_kept
from broker.keyring import SETTING, Rotation
from broker.model import ALL_RESOURCES
from broker.ports import Broker
from broker.settings import ApiSettings, ControllerSettings, SecretSettings, Settings, load, refuse_memory
from broker.signatures import Signatures
from broker.tasks import either
from broker.telemetry import logs
from broker.telemetry.process import observed
from fnqueue import config, errors, wire
from fnqueue.blocking import Client
from fnqueue.terminal import calling, server_options, table

try:
    from uvloop import new_event_loop
except ImportError:  # no wheel for this platform: slower, otherwise the same
    from asyncio import new_event_loop  # type: ignore[assignment]  # uvloop's says Loop, a subclass

logger = logging.getLogger(__name__)

T = TypeVar("T")
# The times that `shutdown_grace_s` may pass one after the other when a front end stops.
_STOPPED_WITHIN = 3


class Misconfigured(click.ClickException):
    exit_code = 2


@contextmanager
def told() -> Iterator[None]:
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
@click.option(
    "--processes",
    type=click.IntRange(1, 256),
    help="How many of them share the port; one that dies is started again. [FNQUEUE_PROCESSES]  [default: 1]",
)
@click.option("--parent", type=int, hidden=True, help="The process that this one ends with.")
@click.option("--status-port", type=int, hidden=True, help="In place of FNQUEUE_STATUS_PORT.")
def api(host: str | None, port: int | None, processes: int | None, parent: int | None, status_port: int | None) -> None:
    """Serve the HTTP API over RabbitMQ, Redis and S3.

    Settings come from FNQUEUE_* in the environment. Any number of these may serve the same queue; several on one
    machine may share a port. SIGTERM and Ctrl-C answer who waits, and stop.
    """
    with told():
        settings = load(ApiSettings, host=host, port=port, processes=processes, status_port=status_port)
        refuse_memory(settings, "queue_url", "store_url")
        logs.configure(settings.log_level, settings.log_format)
        if settings.processes > 1:
            _run(_serve_by_several(settings))
        else:
            open_files.allow(settings.max_connections)
            _run(_serve(settings, parent))


async def _serve(settings: ApiSettings, parent: int | None) -> None:
    stop = asyncio.Event()
    _on_signals(stop.set)
    async with (
        profile_kept(settings, stop),
        open_broker(settings) as broker,
        observed(broker),
        serving(broker, settings, reuse_port=settings.port != 0),
    ):
        garbage.look_seldom()
        if parent is None:
            await stop.wait()
        else:
            await either(stop.wait(), keeping.ended(parent))


async def _serve_by_several(settings: ApiSettings) -> None:
    if settings.attach_port:
        raise ConfigurationError("FNQUEUE_ATTACH_PORT: several processes need one each; 0 takes free ones")
    stop = asyncio.Event()
    _on_signals(stop.set)
    with reserved(settings) as port:
        own = ["--host", settings.host, "--port", str(port), "--processes", "1", "--parent", str(os.getpid())]
        # `-P`: a folder named `api` beside the user is not ours.
        command = [sys.executable, "-P", "-m", "fnqueue", "api", *own]
        logger.info("processes_starting", extra={"count": settings.processes, "port": port})
        commands = [[*command, *_status_port(settings, number)] for number in range(settings.processes)]
        await keeping.keep(commands, stop, grace_s=_STOPPED_WITHIN * settings.shutdown_grace_s + 30)


def _status_port(settings: ApiSettings, number: int) -> list[str]:
    """Of the process with this number from 0: one that was set, or the next ones. The default one is whose comes
    first."""
    if not settings.status_port or "status_port" not in settings.model_fields_set:
        return []
    return ["--status-port", str(settings.status_port + number)]


def _on_signals(act: Callable[[], object]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, act)


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
    with told():
        shared = {"queue_url": "memory://", "store_url": "memory://", "blobs_url": "file://", "data_dir": data_dir}
        settings = load(ApiSettings, host=host, port=port, admin_key=key, **shared)
        workers = load(ControllerSettings, **shared, launcher_url="process://")
        chosen = settings.model_fields_set
        logs.configure(settings.log_level, settings.log_format if "log_format" in chosen else "text")
        _run(embedded.run(settings, workers, announce=click.echo))


# -- keys --------------------------------------------------------------------------------------


def _duration(text: str) -> float:
    """Seconds of a whole number of s, m, h or d; at most what a key may live."""
    unit_s = {"s": 1, "m": 60, "h": 3600, "d": 86_400}.get(text[-1:], 0)
    digits = text[:-1]
    ttl_s = int(digits) * unit_s if digits.isascii() and digits.isdigit() and len(digits) < 10 else 0
    if not 0 < ttl_s <= accounts.MAX_KEY_TTL_S:
        raise click.BadParameter("must be a whole number of s, m, h or d, as 12h, and 365d at most")
    return float(ttl_s)


@click.group()
def keys() -> None:
    """API keys: make, list, suspend and revoke them.

    By HTTP, with a key that has manage_keys; or where FNQUEUE_STORE_URL is set, and no --url is given, in the store
    that it names, which asks for no key: so the first one is made."""


@keys.command("create")
@click.option("--account", help="Whose key it is.  [default: the account of --key; in a store `default`]")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(accounts.SCOPES),
    help="What it may do; can be repeated. admin:… is for every account.  [default: everything about functions]",
)
@click.option(
    "--resource",
    "resources",
    multiple=True,
    help="What it may do it with: account-functions/*, authorized-functions/*, function/ID/* or "
    "function/ID/VERSION; can be repeated.  [default: the first two]",
)
@click.option(
    "--expires-in",
    "ttl_s",
    type=_duration,
    help="90s, 30m, 12h or 365d, the longest.  [default: 365d; in a store never]",
)
@click.option("--owner", default="", help="Whom it is for.")
@click.option("--description", default="", help="What it is for.")
@server_options
def create_key(
    url: str | None,
    key: str | None,
    as_json: bool,
    account: str | None,
    scopes: tuple[str, ...],
    resources: tuple[str, ...],
    ttl_s: float | None,
    owner: str,
    description: str,
) -> None:
    """Make a key and print it, once: only its hash is kept.

    The key alone goes to standard output, what is known of it to standard error. By HTTP it can be given no right that
    --key lacks.
    """
    wish = key_service.Wish(
        account=account,
        scopes=scopes or accounts.ACCOUNT_SCOPES,
        resources=resources or ALL_RESOURCES,
        description=description,
        expires_at=time.time() + ttl_s if ttl_s else 0.0,
        owner=owner,
    )
    with _server(url, key) as fnq:
        made = _with_store(lambda broker: key_service.store(broker, wish)) if fnq is None else wish.ask(fnq)
    if as_json:
        click.echo(key_service.as_json(made))
        return
    click.echo(f"id {made.id}, account {made.nca_id}, scopes {', '.join(key_service.scopes(made))}", err=True)
    click.echo(made.value)


@keys.command("list")
@click.option("--account", default="", help="Only this account's.  [default: that of --key; in a store all]")
@server_options
def list_keys(url: str | None, key: str | None, as_json: bool, account: str) -> None:
    """Show keys, one a line. By HTTP scopes and resources are `-`: `fnqueue keys show` has them."""

    async def find(broker: Broker) -> wire.ApiKeyList:
        return wire.ApiKeyList(keys=[present(each) for each in await accounts.list_keys(broker, account)])

    with _server(url, key) as fnq:
        found = _with_store(find) if fnq is None else key_service.listed(fnq, account)
    if as_json:
        click.echo(key_service.as_json(found))
        return
    click.echo(table(key_service.HEADS, [key_service.row(each) for each in found.keys]))


@keys.command("show")
@click.argument("key_id")
@server_options
def show_key(url: str | None, key: str | None, as_json: bool, key_id: str) -> None:
    """Show one key, with its scopes and resources."""

    async def find(broker: Broker) -> wire.ApiKey:
        return present(await accounts.find_key(broker, key_id))

    with _server(url, key) as fnq:
        found = _with_store(find) if fnq is None else key_service.shown(fnq, key_id)
    click.echo(key_service.as_json(found) if as_json else key_service.described(found))


@keys.command("delete")
@click.argument("key_id")
@server_options
def delete_key(url: str | None, key: str | None, as_json: bool, key_id: str) -> None:
    """Revoke a key; servers refuse it within two seconds."""

    async def delete(broker: Broker) -> None:
        await accounts.delete_key(broker, key_id)

    with _server(url, key) as fnq:
        if fnq is None:
            _with_store(delete)
        else:
            key_service.deleted(fnq, key_id)
    click.echo(json.dumps({"deleted": [key_id]}) if as_json else f"{key_id}  deleted")


@keys.command("suspend")
@click.argument("key_id")
@server_options
def suspend_key(url: str | None, key: str | None, as_json: bool, key_id: str) -> None:
    """Refuse a key until it is activated again; servers know within two seconds."""
    _set_suspended(url, key, key_id, suspended=True, as_json=as_json)


@keys.command("activate")
@click.argument("key_id")
@server_options
def activate_key(url: str | None, key: str | None, as_json: bool, key_id: str) -> None:
    """Admit a suspended key again. By HTTP --key needs the rights that it has."""
    _set_suspended(url, key, key_id, suspended=False, as_json=as_json)


@keys.command("messages")
@click.argument("version_id", type=click.UUID)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def message_keys(version_id: uuid.UUID, as_json: bool) -> None:
    """Print FNQUEUE_MESSAGE_KEYS for a sidecar that you start yourself: by them it checks its version's messages.

    They are made of FNQUEUE_SIGNING_KEYS and FNQUEUE_SECRET_KEY, and good for this version only.
    """
    with told():
        made = Signatures.of(load(SecretSettings)).for_sidecar(str(version_id)).get_secret_value()
        if not made:
            raise ConfigurationError("FNQUEUE_SECRET_KEY: there is none, and no FNQUEUE_SIGNING_KEYS either")
    click.echo(json.dumps({"messageKeys": made}) if as_json else made)


def _set_suspended(url: str | None, key: str | None, key_id: str, *, suspended: bool, as_json: bool) -> None:
    async def change(broker: Broker) -> wire.ApiKey:
        return present(await accounts.suspend_key(broker, key_id, suspended=suspended))

    with _server(url, key) as fnq:
        changed = _with_store(change) if fnq is None else key_service.suspended(fnq, key_id, suspended=suspended)
    click.echo(key_service.as_json(changed) if as_json else f"{changed.id}  {changed.status}")


@contextmanager
def _server(url: str | None, key: str | None) -> Iterator[Client | None]:
    """None: the store is meant. A store that is set is that of who runs the servers, who may have FNQUEUE_URL as well,
    for everything else."""
    typed = click.get_current_context().get_parameter_source("url") is ParameterSource.COMMANDLINE
    if os.environ.get("FNQUEUE_STORE_URL") and not typed:
        yield None
        return
    try:
        config.load(url, key)
    except errors.ConfigurationError as exc:
        raise Misconfigured(f"{exc}; or FNQUEUE_STORE_URL, which names the store itself") from exc
    with calling(url, key) as fnq:
        yield fnq


# -- secrets -----------------------------------------------------------------------------------


@click.group()
def secrets() -> None:
    """Secrets, of webhooks too, and registry credentials of the store that FNQUEUE_STORE_URL names."""


@secrets.command("rotate")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def rotate_secrets(as_json: bool) -> None:
    """Seal everything with the first of FNQUEUE_ENCRYPTION_KEYS, so that the others can be dropped.

    Before, give every api and controller the new key as a second one, then as the first. Safe to repeat and to
    interrupt. What none of the keys opens is named, left as it is, and makes the exit status 1.
    """

    async def rotate(broker: Broker) -> Rotation:
        sealed = await function_secrets.rotate(broker) + await registries.rotate(broker)
        return sealed + await webhooks.rotate(broker)

    done = _with_store(rotate, SecretSettings, needs=("encryption_keys",))
    if as_json:
        shown = {"resealed": done.resealed, "current": done.current, "unopened": list(done.unopened)}
        click.echo(json.dumps(shown, indent=2))
    else:
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

    with told():
        settings = load(kind, queue_url="memory://")
        for name in needs:
            if not getattr(settings, name).get_secret_value():
                raise ConfigurationError(f"FNQUEUE_{name.upper()} is not set")
        refuse_memory(settings, "store_url")
        logs.configure("ERROR", settings.log_format)
        return _run(run(settings))
