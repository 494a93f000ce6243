"""`python -m benchmarks.waiting`: what a front end's memory costs for each call that waits for a result."""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import click
import psutil
from pydantic import SecretStr

from api.server import serving
from benchmarks.load import LOOPBACK, REPLY_S
from broker.connect import open_broker
from broker.model import FunctionStatus, Version
from broker.settings import ApiSettings

try:
    from uvloop import new_event_loop
except ImportError:  # no wheel for this platform: slower, otherwise the same
    from asyncio import new_event_loop  # type: ignore[assignment]  # uvloop's says Loop, a subclass

KEY = "benchmark"
FUNCTION = "5636b912-ecc0-493d-ab0c-1f702b96d75c"
VERSION = "65721e80-9b32-4396-9bec-8c08256297cf"
POLL_S = 600
OPENING = 200  # connections at once
SPARE_FILES = 100


@dataclass(frozen=True, slots=True)
class Found:
    polls: int
    before_bytes: int
    waiting_bytes: int
    woken_s: float

    @property
    def each_bytes(self) -> float:
        return (self.waiting_bytes - self.before_bytes) / self.polls


@click.command()
@click.option("--polls", type=click.IntRange(1, 100_000), default=10_000, show_default=True)
def main(polls: int) -> None:
    """Let so many clients poll one request that nobody runs, look at the front end's resident memory, cancel the
    request, and see that each of them is answered, and how long after the cancellation was sent the last one is.

    The front end is a process of its own, over back ends in memory. Exits with 1 when a client was not answered.
    """
    allow_files(polls)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    front = context.Process(target=serve, args=(theirs,), daemon=True)
    front.start()
    try:
        assert front.pid is not None, "it was started"
        if not ours.poll(REPLY_S):
            raise click.ClickException("the front end did not start")
        found = asyncio.run(measure(int(ours.recv()), psutil.Process(front.pid), polls))
    finally:
        front.terminate()
        front.join(REPLY_S)
    click.echo(f"{'waiting':>8} {'before MiB':>11} {'waiting MiB':>12} {'KiB each':>9} {'woken s':>8}")
    before, waiting = found.before_bytes / 2**20, found.waiting_bytes / 2**20
    click.echo(
        f"{found.polls:>8} {before:>11.1f} {waiting:>12.1f} {found.each_bytes / 1024:>9.1f} {found.woken_s:>8.2f}"
    )


def allow_files(polls: int) -> None:
    """Of each connection, one in each of the two processes. Raises ClickException."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if polls + SPARE_FILES > hard:
        raise click.ClickException(f"{polls} connections need more open files than the {hard} that are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def serve(parent: Connection) -> None:
    """The front end, until it is terminated."""
    with (
        suppress(KeyboardInterrupt),
        tempfile.TemporaryDirectory(prefix="fnqueue-waiting-") as folder,
        asyncio.Runner(loop_factory=new_event_loop) as runner,  # as `fnqueue api`
    ):
        runner.run(_serve(parent, Path(folder)))


async def _serve(parent: Connection, folder: Path) -> None:
    settings = ApiSettings(host=LOOPBACK, port=0, data_dir=folder, admin_key=SecretStr(KEY))
    async with open_broker(settings) as broker:
        await broker.queue.declare(VERSION)
        version = Version(
            id=VERSION,
            function_id=FUNCTION,
            account=settings.admin_account,
            name="waiting",
            inference_url="/",
            container_image="none",
            created_at=1.0,
            status=FunctionStatus.ACTIVE,
        )
        await broker.catalog.versions.put(version)
        async with serving(broker, settings) as url:
            parent.send(url.rpartition(":")[2])
            await asyncio.Event().wait()


async def measure(port: int, front: psutil.Process, polls: int) -> Found:
    """Raises ClickException: a client was not answered as it should be."""
    request_id = await _ask(port, "POST", f"/v2/nvcf/pexec/functions/{FUNCTION}", "Prefer: respond-async")
    before_bytes = front.memory_info().rss
    doors = asyncio.Semaphore(OPENING)
    connections: list[asyncio.StreamReader] = []
    writers: list[asyncio.StreamWriter] = []

    async def poll() -> None:
        async with doors:
            reader, writer = await asyncio.open_connection(LOOPBACK, port)
            path = f"/v2/nvcf/pexec/status/{request_id}"
            writer.write(_head("GET", path, f"NVCF-POLL-SECONDS: {POLL_S}"))
            await writer.drain()
            connections.append(reader)
            writers.append(writer)

    await asyncio.gather(*(poll() for _ in range(polls)))
    await _ask(port, "GET", f"/v2/nvcf/pexec/status/{request_id}", "Prefer: respond-async")  # behind all of them
    waiting_bytes = front.memory_info().rss
    cancelled_at = time.perf_counter()
    await _ask(port, "DELETE", f"/v2/nvcf/requests/{request_id}", "Accept: */*")
    async with asyncio.timeout(REPLY_S):
        lines = await asyncio.gather(*(reader.readline() for reader in connections))
    woken_s = time.perf_counter() - cancelled_at
    for writer in writers:
        writer.close()
    if missing := polls - sum(line.startswith(b"HTTP/1.1 410 ") for line in lines):
        raise click.ClickException(f"{missing} of {polls} were not told that the request was cancelled")
    return Found(polls, before_bytes, waiting_bytes, woken_s)


async def _ask(port: int, method: str, path: str, header: str) -> str:
    """The request's ID, of an answer that has one."""
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    try:
        async with asyncio.timeout(REPLY_S):
            writer.write(_head(method, path, header, "Content-Length: 0"))
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    finally:
        writer.close()
    if not head.startswith("HTTP/1.1 2"):
        raise click.ClickException(f"{method} was answered {head.partition(chr(13))[0]}")
    fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
    return fields.get("nvcf-reqid", "")


def _head(method: str, path: str, *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {LOOPBACK}", f"Authorization: Bearer {KEY}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


if __name__ == "__main__":
    main()
