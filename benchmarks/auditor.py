"""`python -m benchmarks.auditor`: what the auditor costs Redis and the controller while it looks at many requests."""

from __future__ import annotations

import asyncio
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import click
import psutil
from redis.asyncio import Redis as Client

from broker.connect import open_broker
from broker.model import Draft
from broker.ports import Broker
from broker.settings import ControllerSettings, load
from infra.local import binaries
from infra.local.servers import Redis
from workers.controller.auditor import PAUSE_S, RECORDS_AT_ONCE, Auditor

VERSION = "under-test"
CALLERS = 200


@click.command()
@click.option("--requests", type=click.IntRange(1, 10_000_000), default=100_000, show_default=True, help="Queued.")
def main(requests: int) -> None:
    """Measure one pass through the records, and one through the places of their version, at their usual pace."""
    binaries.ensure()
    with tempfile.TemporaryDirectory() as folder, Redis(Path(folder)) as server:
        asyncio.run(_measure(server, requests))


async def _measure(server: Redis, requests: int) -> None:
    settings = load(ControllerSettings, store_url=server.url, queue_limit=10**9)
    async with open_broker(settings) as broker, Client.from_url(server.url) as client:
        await client.config_set("appendfsync", "no")  # while they are made
        await asyncio.gather(*(_accept(broker, requests // CALLERS) for _ in range(CALLERS)))
        auditor = Auditor(broker, settings, leads=lambda: True)

        async def records() -> None:
            while auditor.conservation is None:
                await auditor.records.step()
                await asyncio.sleep(PAUSE_S)

        async def places() -> None:
            skip, more = 0, True
            while more:
                _, more = await broker.upkeep.straighten(VERSION, skip=skip, limit=RECORDS_AT_ONCE)
                skip += RECORDS_AT_ONCE
                await asyncio.sleep(PAUSE_S)

        click.echo(f"{requests} queued requests        seconds   Redis: % of a core   controller: % of a core")
        for name, walk in (("records", records), ("places", places)):
            click.echo("{:<30} {:>9.1f} {:>20.1f} {:>25.1f}".format(name, *await _cost(client, walk)))
        assert auditor.conservation is not None
        click.echo(
            f"\ncounted {auditor.conservation.accepted}, resident {psutil.Process().memory_info().rss >> 20} MiB"
        )


async def _accept(broker: Broker, count: int) -> None:
    for _ in range(count):
        draft = Draft(
            id=str(uuid.uuid4()), account="a", function_id="f", version_id=VERSION, digest="", deadline_s=3600
        )
        await broker.results.create(draft, queue_limit=10**9, watch=False)


async def _cost(client: Client, walk: Callable[[], Awaitable[None]]) -> tuple[float, float, float]:
    """Seconds, and per cents of a core."""
    own, started = psutil.Process(), time.monotonic()
    before = await _redis_cpu_s(client), sum(own.cpu_times()[:2])
    await walk()
    after, took_s = (await _redis_cpu_s(client), sum(own.cpu_times()[:2])), time.monotonic() - started
    redis, controller = (100 * (end - begin) / took_s for begin, end in zip(before, after, strict=True))
    return took_s, redis, controller


async def _redis_cpu_s(client: Client) -> float:
    told = await client.info("cpu")
    return float(told["used_cpu_user"]) + float(told["used_cpu_sys"])


if __name__ == "__main__":
    main()
