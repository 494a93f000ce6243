"""`python -m benchmarks.dashboard`: what the dashboard costs the browser that shows it, with many functions at work."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import random
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
from playwright.async_api import CDPSession, Page, async_playwright
from pydantic import SecretStr

from api.server import serving
from benchmarks.load import LOOPBACK, REPLY_S
from broker.connect import open_broker
from broker.model import (
    Deployment,
    Draft,
    FunctionStatus,
    Gpu,
    GpuSpecification,
    Instance,
    InstanceStatus,
    Job,
    Outcome,
    RequestState,
    Version,
)
from broker.ports import Broker
from broker.settings import ApiSettings
from infra.local import binaries

KEY = "benchmark"
TTL_S = 3600.0
STEP_S = 0.1
SETTLE_S = 3.0
# The browser says itself when its page was kept from answering: a task of 50 ms or more, and a frame that came late.
WATCH = """
window.tasks = [];
new PerformanceObserver((list) => tasks.push(...list.getEntries().map((each) => each.duration)))
  .observe({ type: "longtask", buffered: true });
window.frames_ms = [];
let before = performance.now();
const frame = (now) => { frames_ms.push(now - before); before = now; requestAnimationFrame(frame); };
requestAnimationFrame(frame);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`touched` of `functions` change in each look, and `seconds` are measured. A CPU slower by `slowdown` is the
    browser's own imitation of one."""

    functions: int
    touched: int
    seconds: float
    slowdown: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Times are in milliseconds. `first` is the message that has everything, `sizes` those that have changes.
    `busy` is the share of the time in which the page's thread worked."""

    first: int
    sizes: Sequence[int]
    tasks: Sequence[float]
    frames: Sequence[float]
    busy: float
    nodes: int
    heap_before: int
    heap_after: int


@click.command()
@click.option("--functions", type=click.IntRange(1, 5000), default=500, show_default=True)
@click.option("--touched", type=click.IntRange(0, 5000), default=500, show_default=True, help="Of them, in each look.")
@click.option("--seconds", type=click.FloatRange(2), default=30.0, show_default=True)
@click.option("--slowdown", type=click.FloatRange(1, 20), default=1.0, show_default=True, help="Of the browser's CPU.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Keep what was shown, as PNG.")
def main(functions: int, touched: int, seconds: float, slowdown: float, picture: Path | None) -> None:
    """Show the overview of so many functions, of which some change in each look, and let the browser tell its tasks of
    50 ms and more, its frames, and what it was sent.

    The front end is a process of its own, over back ends in memory.
    """
    plan = Plan(functions=functions, touched=min(touched, functions), seconds=seconds, slowdown=slowdown)
    binaries.ensure([binaries.BROWSER])
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    front = context.Process(target=serve, args=(theirs, plan), daemon=True)
    front.start()
    try:
        if not ours.poll(REPLY_S):
            raise click.ClickException("the front end did not start")
        found = asyncio.run(measure(str(ours.recv()), plan, picture))
    finally:
        front.terminate()
        front.join(REPLY_S)
    tell(found, plan)


def tell(found: Found, plan: Plan) -> None:
    late = [each for each in found.frames if each >= 50]
    sizes = sorted(found.sizes) or [0]
    for name, value in (
        ("functions, and changed in each look", f"{plan.functions}, {plan.touched}"),
        ("first message", f"{found.first / 1000:.1f} kB"),
        ("later messages", f"{len(found.sizes) / plan.seconds:.2f} a second"),
        ("… of them, median and largest", f"{sizes[len(sizes) // 2] / 1000:.1f} and {sizes[-1] / 1000:.1f} kB"),
        ("tasks of 50 ms and more", f"{len(found.tasks)}, the longest {max(found.tasks, default=0):.0f} ms"),
        (
            "frames",
            f"{len(found.frames)}, of which {len(late)} took 50 ms or more, the longest {max(found.frames):.0f}",
        ),
        ("the page's thread worked", f"{found.busy:.1%} of the time"),
        ("elements", str(found.nodes)),
        ("heap, before and after", f"{found.heap_before / 1e6:.1f} and {found.heap_after / 1e6:.1f} MB"),
    ):
        click.echo(f"{name:<38} {value}")


# -- the server --------------------------------------------------------------------------------


def serve(parent: Connection, plan: Plan) -> None:
    """The front end, and what makes its figures change, until it is terminated."""
    with suppress(KeyboardInterrupt), tempfile.TemporaryDirectory(prefix="fnqueue-dashboard-") as folder:
        asyncio.run(_serve(parent, plan, Path(folder)))


async def _serve(parent: Connection, plan: Plan, folder: Path) -> None:
    settings = ApiSettings(host=LOOPBACK, port=0, data_dir=folder, admin_key=SecretStr(KEY))
    versions = [version(number, settings.admin_account) for number in range(plan.functions)]
    async with open_broker(settings) as broker:
        await asyncio.gather(*(deploy(broker, each) for each in versions))
        await broker.catalog.offer([Gpu(name="H100", instance_type="big", backend="here", capacity=600)], ttl_s=TTL_S)
        async with serving(broker, settings) as url:
            parent.send(url)
            await work(broker, versions, each_s=settings.dashboard_refresh_s / max(1, plan.touched))


def version(number: int, account: str) -> Version:
    made = str(uuid.UUID(int=number + 1, version=4))
    return Version(
        id=made,
        function_id=made,
        account=account,
        name=f"function-{number:04}",
        inference_url="/",
        container_image="none",
        created_at=1.0,
        status=FunctionStatus.ACTIVE,
    )


async def deploy(broker: Broker, of: Version) -> None:
    kind = GpuSpecification(id=of.id, gpu="H100", instance_type="big", min_instances=1, max_instances=1)
    await broker.catalog.versions.put(of)
    await broker.catalog.deployments.put(
        Deployment(
            id=of.id,
            function_id=of.function_id,
            version_id=of.id,
            account=of.account,
            specifications=(kind,),
            created_at=1.0,
            updated_at=1.0,
        )
    )
    await broker.catalog.beat(
        Instance(
            id=of.id,
            function_id=of.function_id,
            version_id=of.id,
            account=of.account,
            gpu=kind.gpu,
            instance_type=kind.instance_type,
            backend="here",
            status=InstanceStatus.RUNNING,
            created_at=1.0,
            updated_at=1.0,
            slots=4,
        ),
        ttl_s=TTL_S,
    )


async def work(broker: Broker, versions: Sequence[Version], *, each_s: float) -> None:
    """In turn, one more request waits for a version, or its oldest one is run: each version changes once a round."""
    began = time.monotonic()
    waiting: dict[str, list[Job]] = {each.id: [] for each in versions}
    for done, of in enumerate(itertools.cycle(versions)):
        early_s = done * each_s - (time.monotonic() - began)
        if early_s > STEP_S:
            await asyncio.sleep(early_s)
        jobs = waiting[of.id]
        if len(jobs) < random.randrange(1, 4):
            jobs.append(await accept(broker, of))
        else:
            await run(broker, jobs.pop(0))


async def accept(broker: Broker, of: Version) -> Job:
    request_id = str(uuid.uuid4())
    draft = Draft(
        id=request_id, account=of.account, function_id=of.function_id, version_id=of.id, digest="", deadline_s=TTL_S
    )
    record = await broker.results.create(draft, queue_limit=10**6, watch=False)
    return Job(
        id=request_id,
        account=of.account,
        function_id=of.function_id,
        version_id=of.id,
        subject="",
        created_at=record.created_at,
        deadline_at=record.deadline_at,
        digest="",
    )


async def run(broker: Broker, job: Job) -> None:
    claim = await broker.results.claim(job, worker="benchmark", lease_s=TTL_S, max_attempts=1)
    assert claim.lease is not None, "nobody else claims it"
    await broker.results.settle(claim.lease, job, RequestState.FULFILLED, Outcome(status=200))


# -- the browser -------------------------------------------------------------------------------


async def measure(url: str, plan: Plan, picture: Path | None) -> Found:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=binaries.program(binaries.BROWSER), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        page = await browser.new_page(viewport={"width": 1280, "height": 900})
        devtools = await page.context.new_cdp_session(page)
        sizes: list[int] = []
        devtools.on("Network.eventSourceMessageReceived", lambda event: sizes.append(len(event["data"].encode())))
        await devtools.send("Network.enable")
        await devtools.send("Performance.enable")
        await page.goto(f"{url}/dashboard")
        await page.get_by_label("API key").fill(KEY)
        await page.keyboard.press("Enter")
        await page.get_by_text(f"of {plan.functions}").wait_for()
        await asyncio.sleep(SETTLE_S)  # what a page costs once is not what it goes on costing
        first, before = sizes[0], await figures(devtools)
        sizes.clear()
        if plan.slowdown > 1:
            await devtools.send("Emulation.setCPUThrottlingRate", {"rate": plan.slowdown})
        await page.evaluate(WATCH)
        await asyncio.sleep(plan.seconds)
        after = await figures(devtools)
        found = Found(
            first=first,
            sizes=list(sizes),
            tasks=await page.evaluate("tasks"),
            frames=await page.evaluate("frames_ms"),
            busy=(after["TaskDuration"] - before["TaskDuration"]) / (after["Timestamp"] - before["Timestamp"]),
            nodes=await page.evaluate("document.querySelectorAll('*').length"),
            heap_before=int(before["JSHeapUsedSize"]),
            heap_after=int(after["JSHeapUsedSize"]),
        )
        await keep(page, picture)
        await browser.close()
        return found


async def figures(devtools: CDPSession) -> dict[str, Any]:
    """Of the page, without what nobody holds any more."""
    await devtools.send("HeapProfiler.collectGarbage")
    told = await devtools.send("Performance.getMetrics")
    return {each["name"]: each["value"] for each in told["metrics"]}


async def keep(page: Page, picture: Path | None) -> None:
    if picture is not None:
        await page.screenshot(path=picture)


if __name__ == "__main__":
    main()
