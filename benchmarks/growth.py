"""`python -m benchmarks.growth functions | polls`: how the CPU of a request grows with what is there beside it.

What grows with a backlog, `python -m benchmarks.backlog` tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import click

from benchmarks import cpu
from benchmarks.backlog import occupy
from benchmarks.children import READY_S, child, end_with_all
from benchmarks.load import LOOPBACK, Burst, Kind, LoadFailed, Send, generator
from benchmarks.meter import Meter, table
from benchmarks.targets import Program, SetUpFailed, Target, another, production, running, started
from benchmarks.waiting import allow_files
from broker.connect import open_broker
from broker.model import FunctionStatus, Outcome, RequestState, Version
from broker.ports import Broker, Delivery
from broker.settings import ApiSettings, SidecarSettings, load
from infra.local import binaries
from infra.local.process import ServerFailed, free_port
from infra.local.stack import fnqueue

try:
    from uvloop import new_event_loop
except ImportError:  # no wheel for this platform: slower, otherwise the same
    from asyncio import new_event_loop  # type: ignore[assignment]  # uvloop's says Loop, a subclass

DATA = Path(".fnqueue")
CALLERS = 64
BODY_BYTES = 1024
AT_ONCE = 100  # connections being opened
DECLARED_AT_ONCE = 32  # each waits for its queue to settle
POLL_S = 3600
FILL_S = 600.0
SLOTS = 16  # of each function
LEASE_S, ATTEMPTS = 60.0, 3


@click.group()
def main() -> None:
    """Tell the CPU of a request beside many functions, or beside many polls."""


@contextlib.contextmanager
def _room() -> Iterator[Path]:
    """A folder for everything, and failures as one line."""
    end_with_all()
    binaries.ensure()
    DATA.mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=DATA, ignore_cleanup_errors=True) as name:
            yield Path(name).resolve()
    except (ServerFailed, SetUpFailed, LoadFailed) as exc:
        raise click.ClickException(str(exc)) from exc


# -- functions ---------------------------------------------------------------------------------


@main.command()
@click.option("--functions", "count", type=click.IntRange(2, 2000), default=1000, show_default=True)
@click.option("--rounds", type=click.IntRange(1, 20), default=3, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.2, 60), default=3.0, show_default=True, help="Of one burst.")
def functions(count: int, rounds: int, seconds: float) -> None:
    """Spread the callers over one function, a tenth of them, and all of so many.

    All are served by one process that claims and settles as a sidecar does, and answers at once without a container:
    so many sidecars would need so many times their memory. Controller, health checks and checks of signatures are left
    out. "1, alone" is measured before there are any others.
    """
    versions = [(str(uuid.uuid4()), str(uuid.uuid4())) for _ in range(count)]
    paths = [f"/v2/nvcf/pexec/functions/{function_id}" for function_id, _ in versions]
    with _room() as folder, started(folder) as servers, generator() as send, contextlib.ExitStack() as opened:
        key, port = secrets.token_hex(32), free_port()
        urls = {name: server.url for name, server in servers.items()}
        shared = {**urls, "FNQUEUE_SECRET_KEY": secrets.token_hex(32), "FNQUEUE_DATA_DIR": str(folder / "data")}
        environment = {
            **shared,
            "FNQUEUE_HOST": LOOPBACK,
            "FNQUEUE_PORT": str(port),
            "FNQUEUE_ADMIN_KEY": key,
        }
        told, of_sidecar = _settings(shared), _settings(urls)
        opened.enter_context(child(seed, told, versions[:1]))
        front = Program("api", folder, command=fnqueue("api"), environment=environment, port=port)
        opened.enter_context(running(front))
        crew = opened.enter_context(child(serve, of_sidecar))
        target = Target(
            name="fnqueue",
            port=port,
            path=paths[0],
            status_path="/v2/nvcf/pexec/status/",
            headers=(("Authorization", f"Bearer {key}"),),
            trees=lambda: {
                "api": cpu.tree(front.pid),
                "worker": cpu.tree(crew.pid),
                **{server.name: cpu.tree(server.pid) for server in servers.values()},
            },
        )
        meter = Meter(send, target, seconds)
        crew.ask([versions[0][1]])
        meter.burst()  # warms up
        alone = "1, alone"
        rows = {alone: [meter.burst() for _ in range(rounds)]}
        idle = {alone: meter.idle()}
        with child(seed, told, versions[1:]):
            crew.ask([version_id for _, version_id in versions[1:]], within_s=READY_S)
        meter.burst(paths)  # warms up
        spreads = dict.fromkeys((1, max(2, count // 10), count))
        for _ in range(rounds):
            for spread in spreads:
                rows.setdefault(f"{spread} of {count}", []).append(meter.burst(paths[:spread]))
        idle[f"{count} of {count}"] = meter.idle()
        click.echo(table(rows, idle))


def _settings(environment: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix("FNQUEUE_").lower(): value for name, value in environment.items()}


def seed(parent: Connection, told: dict[str, str], versions: Sequence[tuple[str, str]]) -> None:
    """Make each an ACTIVE function with its queue."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_seed(told, versions))
    parent.send(None)


async def _seed(told: dict[str, str], versions: Sequence[tuple[str, str]]) -> None:
    settings, doors = load(ApiSettings, **told), asyncio.Semaphore(DECLARED_AT_ONCE)
    async with open_broker(settings) as broker:

        async def one(function_id: str, version_id: str) -> None:
            async with doors:
                await broker.queue.declare(version_id)
                version = Version(
                    id=version_id,
                    function_id=function_id,
                    account=settings.admin_account,
                    name="growth",
                    inference_url="/",
                    container_image="none",
                    created_at=1.0,
                    status=FunctionStatus.ACTIVE,
                )
                await broker.catalog.versions.put(version)

        await asyncio.gather(*(one(*each) for each in versions))


def serve(parent: Connection, told: dict[str, str]) -> None:
    """Answer whatever the parent names the versions of, until terminated."""
    with contextlib.suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(parent, told))


async def _serve(parent: Connection, told: dict[str, str]) -> None:
    settings = load(SidecarSettings, function_id="f", function_version_id="v", **told)
    async with open_broker(settings) as broker, asyncio.TaskGroup() as tasks:
        asked = asyncio.Event()
        asyncio.get_running_loop().add_reader(parent.fileno(), asked.set)
        parent.send(None)
        while True:
            await asked.wait()
            asked.clear()
            while parent.poll():
                subscribed = {version_id: asyncio.Event() for version_id in parent.recv()}
                for version_id, event in subscribed.items():
                    tasks.create_task(_answer_all(broker, version_id, event))
                for event in subscribed.values():
                    await event.wait()
                parent.send(None)


async def _answer_all(broker: Broker, version_id: str, subscribed: asyncio.Event) -> None:
    async with broker.queue.consume(version_id, prefetch=SLOTS) as deliveries, asyncio.TaskGroup() as tasks:
        subscribed.set()
        async for delivery in deliveries:
            tasks.create_task(_answer(broker, delivery))


async def _answer(broker: Broker, delivery: Delivery) -> None:
    job = delivery.job
    claim = await broker.results.claim(job, worker="growth", lease_s=LEASE_S, max_attempts=ATTEMPTS)
    if claim.lease is not None:
        outcome = Outcome(status=200, body=job.body.replace(b"message", b"echo", 1))
        await broker.results.settle(claim.lease, job, RequestState.FULFILLED, outcome)
    await delivery.ack()


# -- polls -------------------------------------------------------------------------------------


def _numbers(_context: click.Context, _parameter: click.Parameter, value: str) -> list[int]:
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in value.split(",")]
    if not all(0 < number <= 100_000 for number in numbers):
        raise click.BadParameter("give numbers from 1 to 100000, separated by commas, such as 10,10000,10")
    return numbers


@main.command()
@click.option("--polls", default="10,10000,10", show_default=True, callback=_numbers, help="Waiting, one by one.")
@click.option("--rounds", type=click.IntRange(1, 20), default=3, show_default=True)
@click.option("--seconds", type=click.FloatRange(0.2, 60), default=3.0, show_default=True, help="Of one burst.")
def polls(polls: list[int], rounds: int, seconds: float) -> None:
    """Let so many clients poll a queued request each, on a connection of its own, and invoke another function beside
    them. The requests are queued from the beginning."""
    allow_files(max(polls))
    with _room() as folder, production(folder, slots=CALLERS) as target, generator() as send:
        held = another(target, "held", slots=1)
        occupy(held)
        ids = _queued(send, held, max(polls))
        meter, rows, idle = Meter(send, target, seconds), {}, {}
        meter.burst()  # warms up
        for turn, number in enumerate(polls, 1):
            name = f"{turn}. {number} waiting"
            with child(hold, target.port, dict(target.headers), target.status_path, ids[:number]):
                rows[name] = [meter.burst() for _ in range(rounds)]
                idle[name] = meter.idle()
        click.echo(table(rows, idle))


def _queued(send: Send, held: Target, count: int) -> list[str]:
    tally = send(
        Burst(
            kind=Kind.SUBMIT,
            port=held.port,
            concurrency=CALLERS,
            seconds=FILL_S,
            requests=count,
            first_serial=1,
            path=held.path,
            headers=(*held.headers, ("Prefer", "respond-async")),
        )
    )
    if tally.errors or len(tally.accepted) < count:
        raise LoadFailed(f"only {len(tally.accepted)} of {count} requests were accepted: {tally.examples}")
    return [one.id for one in tally.accepted]


def hold(parent: Connection, port: int, headers: dict[str, str], path: str, ids: Sequence[str]) -> None:
    """Poll each of the requests until terminated."""
    allow_files(len(ids))
    with contextlib.suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_hold(parent, port, headers, path, ids))


async def _hold(parent: Connection, port: int, headers: dict[str, str], path: str, ids: Sequence[str]) -> None:
    doors, kept = asyncio.Semaphore(AT_ONCE), []
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())

    async def poll(request_id: str) -> None:
        async with doors:
            kept.append(await asyncio.open_connection(LOOPBACK, port))
            asked = (
                f"GET {path}{request_id} HTTP/1.1\r\nHost: {LOOPBACK}\r\n{fields}NVCF-POLL-SECONDS: {POLL_S}\r\n\r\n"
            )
            kept[-1][1].write(asked.encode())
            await kept[-1][1].drain()

    await asyncio.gather(*(poll(request_id) for request_id in ids))
    parent.send(None)
    answered, _ = await asyncio.wait(
        [asyncio.create_task(reader.read(1)) for reader, _ in kept], return_when=asyncio.FIRST_COMPLETED
    )
    raise SetUpFailed(f"{len(answered)} polls were answered")


if __name__ == "__main__":
    main()
