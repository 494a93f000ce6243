"""`python -m benchmarks.stages`: where the time of one request goes when nobody else asks.

A front end, a sidecar, the echo function, RabbitMQ, Redis and a client that asks again when it was answered, each in a
process of its own. Front end and sidecar are the product's, started here, so that calls of their ports can be noted on
the clock that all processes of a machine share. There is no controller.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import click

from api.server import serving
from benchmarks import plot
from benchmarks.children import child, end_with_all
from benchmarks.load import LOOPBACK, echoed, message
from benchmarks.targets import ECHO, HTTP_S, Program, SetUpFailed, running, started
from broker.connect import open_broker
from broker.model import Claim, Draft, FunctionStatus, Job, Record, Version
from broker.ports import Broker, Queue, Results, Watch
from broker.settings import ApiSettings, SidecarSettings, load
from broker.signatures import Signatures
from broker.telemetry import logs
from infra.local import binaries
from infra.local.process import ServerFailed, free_port
from workers import loops
from workers.channel import Dialer
from workers.inference import Answer, Inference
from workers.sidecar import Sidecar

try:
    from uvloop import new_event_loop
except ImportError:  # no wheel for this platform: slower, otherwise the same
    from asyncio import new_event_loop  # type: ignore[assignment]  # uvloop's says Loop, a subclass

T = TypeVar("T")
Marks = dict[str, dict[str, float]]

DATA = Path(".fnqueue")
FUNCTION = "5636b912-ecc0-493d-ab0c-1f702b96d75c"
VERSION = "65721e80-9b32-4396-9bec-8c08256297cf"
WARM_UP = 50
BODY_BYTES = 1024
BAR = 20
SHARED = ASSETS, RESPONSES = "assets", "responses"
# What happens in the stage that ends with each mark; the first one begins when the request was sent.
STAGES = (
    ("accept", "create", "HTTP, key, limits, version, headers"),
    ("record", "created", "Redis has it on disk"),
    ("publish", "published", "RabbitMQ has it on disk, or the sidecar has it already"),
    ("deliver", "claim", "until the sidecar has it and asks for it"),
    ("claim", "claimed", "Redis has it on disk"),
    ("prepare", "call", "output directory, headers"),
    ("container", "called", "the function's own HTTP exchange"),
    ("settle", "told", "Redis has the result on disk, and the front end knows"),
    ("read", "read", "the result, from Redis"),
    ("answer", "got", "HTTP"),
)


@dataclass(frozen=True, slots=True)
class Found:
    """Milliseconds of each request, by stage, and altogether."""

    stages: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    whole: list[float] = field(default_factory=list)

    def usual(self) -> dict[str, float]:
        """Means by stage of the fifth of requests that took neither long nor short: together as long as a usual one,
        which the medians of stages are not."""
        in_order = sorted(range(len(self.whole)), key=self.whole.__getitem__)
        middle = in_order[len(in_order) * 2 // 5 : len(in_order) * 3 // 5] or in_order
        return {name: statistics.fmean(taken[at] for at in middle) for name, taken in self.stages.items()}


class Notes:
    """When what happened to which request. `calling` notes the beginning and the end of a call."""

    def __init__(self) -> None:
        self.marks: Marks = defaultdict(dict)

    def note(self, request_id: str, mark: str) -> None:
        self.marks[request_id][mark] = time.perf_counter()

    async def calling(self, request_id: str, before: str, call: Awaitable[T], after: str) -> T:
        self.note(request_id, before)
        done = await call
        self.note(request_id, after)
        return done


class _Port:
    """A port of the product, some of whose calls are noted."""

    def __init__(self, port: object, notes: Notes) -> None:
        self._port: Any = port
        self._notes = notes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._port, name)


class NotedQueue(_Port):
    async def publish(self, job: Job, *, timeout_s: float) -> None:
        await self._notes.calling(job.id, "publish", self._port.publish(job, timeout_s=timeout_s), "confirmed")


class NotedResults(_Port):
    async def create(self, draft: Draft, **more: Any) -> Record:
        created: Record = await self._notes.calling(draft.id, "create", self._port.create(draft, **more), "created")
        return created

    async def claim(self, job: Job, **more: Any) -> Claim:
        claim: Claim = await self._notes.calling(job.id, "claim", self._port.claim(job, **more), "claimed")
        return claim

    def watch(self, request_id: str, *more: Any) -> AbstractAsyncContextManager[Watch]:
        return _Noted(self._port.watch(request_id, *more), request_id, self._notes)


class _Noted(AbstractAsyncContextManager[Watch]):
    def __init__(self, inner: AbstractAsyncContextManager[Watch], request_id: str, notes: Notes) -> None:
        self._inner, self._id, self._notes = inner, request_id, notes

    async def __aenter__(self) -> Watch:
        self._watch = await self._inner.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._inner.__aexit__(kind, error, trace)

    async def read(self) -> Record | None:
        record = await self._watch.read()
        self._notes.note(self._id, "read")
        return record

    async def changed(self, timeout_s: float) -> bool:
        told = await self._watch.changed(timeout_s)
        self._notes.note(self._id, "told")
        return told

    def wake(self) -> None:
        self._watch.wake()


class NotedInference(Inference):
    def __init__(self, settings: SidecarSettings, notes: Notes) -> None:
        super().__init__(settings)
        self._notes = notes

    async def infer(self, job: Job, headers: Iterable[tuple[str, str]], **more: Any) -> Answer:
        return await self._notes.calling(job.id, "call", super().infer(job, headers, **more), "called")


def noted(broker: Broker, notes: Notes) -> Broker:
    return replace(
        broker,
        queue=cast("Queue", NotedQueue(broker.queue, notes)),
        results=cast("Results", NotedResults(broker.results, notes)),
    )


@click.command()
@click.option("--requests", type=click.IntRange(10, 100_000), default=2000, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Write JSON here too.")
@click.option(
    "--plot", "picture", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Draw SVG here too."
)
def main(requests: int, output: Path | None, picture: Path | None) -> None:
    """Send so many requests of 1 KiB, one after the other, and tell where their time went."""
    try:
        found, direct_ms = _measure(requests)
    except (ServerFailed, SetUpFailed) as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(f"{len(found.whole)} requests, one after the other; load {os.getloadavg()[0]:.1f}\n")
    usual = found.usual()
    longest = max(usual.values())
    click.echo(f"{'stage':<10} {'usual ms':>9} {'p50 ms':>8} {'p99 ms':>8}")
    for name, _, what in STAGES:
        p50, p99 = _p(found.stages[name], 50), _p(found.stages[name], 99)
        bar = "#" * round(usual[name] / longest * BAR)
        click.echo(f"{name:<10} {usual[name]:>9.2f} {p50:>8.2f} {p99:>8.2f}  {bar:<{BAR}} {what}")
    whole = _p(found.whole, 50), _p(found.whole, 99)
    floor = _p(direct_ms, 50), _p(direct_ms, 99)
    click.echo(f"{'all':<10} {sum(usual.values()):>9.2f} {whole[0]:>8.2f} {whole[1]:>8.2f}")
    click.echo(f"{'direct':<10} {'':>9} {floor[0]:>8.2f} {floor[1]:>8.2f}")
    click.echo(f"{'added':<10} {'':>9} {whole[0] - floor[0]:>8.2f} {whole[1] - floor[1]:>8.2f}")
    if output is not None:
        output.write_text(json.dumps({"stages_ms": found.stages, "all_ms": found.whole, "direct_ms": direct_ms}))
    if picture is not None:
        rows = [plot.Bar(name, {"": usual[name]}, f"{usual[name]:.2f}") for name, _, _ in STAGES]
        picture.write_text(plot.bars(("Milliseconds of a usual request, at one caller", rows)))


def _p(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _measure(requests: int) -> tuple[Found, list[float]]:
    """The requests' stages, and milliseconds of as many direct ones, in turns of a hundred."""
    end_with_all()
    binaries.ensure()
    DATA.mkdir(exist_ok=True)
    with contextlib.ExitStack() as opened:
        name = opened.enter_context(
            tempfile.TemporaryDirectory(prefix="benchmark-", dir=DATA, ignore_cleanup_errors=True)
        )
        folder, port = Path(name).resolve(), free_port()
        for kind in SHARED:
            (folder / kind).mkdir()
        echo = [sys.executable, str(ECHO), "--port", str(port)]
        opened.enter_context(running(Program("function", folder, command=echo, environment={}, port=port)))
        urls = {
            name.removeprefix("FNQUEUE_").lower(): server.url
            for name, server in opened.enter_context(started(folder)).items()
        }
        key = os.urandom(16).hex()
        told = {**urls, "secret_key": os.urandom(32).hex(), "data_dir": str(folder / "data")}
        front = opened.enter_context(child(front_end, {**told, "admin_key": key}))
        keys = Signatures.of(load(ApiSettings, **told)).for_sidecar(VERSION).get_secret_value()
        worker = opened.enter_context(child(sidecar, folder, {**urls, "inference_port": port, "message_keys": keys}))
        path = f"/v2/nvcf/pexec/functions/{FUNCTION}"
        times, direct_ms = _turns(requests, (int(front.first), path, key), (port, "/echo", ""))
        marks: Marks = defaultdict(dict)
        for process in (front, worker):
            for request_id, more in process.ask().items():
                marks[request_id].update(more)
        return stages(times, marks), direct_ms


def stages(times: Mapping[str, tuple[float, float]], marks: Mapping[str, Mapping[str, float]]) -> Found:
    """`times` are those when each request was sent and answered. Raises SetUpFailed: something was not noted."""
    found = Found()
    for request_id, (sent, got) in times.items():
        seen = {**marks[request_id], "got": got}
        # The sidecar may have the message before the front end has the confirm.
        seen["published"] = min(seen.get("confirmed", got), seen.get("claim", got))
        if missing := [mark for _, mark, _ in STAGES if mark not in seen]:
            raise SetUpFailed(f"request {request_id} was not seen to {', '.join(missing)}")
        at = sent
        for name, mark, _ in STAGES:
            found.stages[name].append((seen[mark] - at) * 1000)
            at = seen[mark]
        found.whole.append((got - sent) * 1000)
    return found


def _turns(
    requests: int, through: tuple[int, str, str], direct: tuple[int, str, str]
) -> tuple[dict[str, tuple[float, float]], list[float]]:
    times: dict[str, tuple[float, float]] = {}
    direct_ms: list[float] = []
    ask, ask_directly = _client(*through), _client(*direct)
    for _ in range(WARM_UP):
        ask()
        ask_directly()
    while len(times) < requests:
        for _ in range(min(100, requests - len(times))):
            request_id, sent, got = ask()
            times[request_id] = sent, got
        for _ in range(100):
            _, sent, got = ask_directly()
            direct_ms.append((got - sent) * 1000)
    return times, direct_ms


def _client(port: int, path: str, key: str) -> Callable[[], tuple[str, float, float]]:
    """Asks once when called, over one connection: the request's ID, when it was sent and when it was answered."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=HTTP_S)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    serials = itertools.count(1)
    template, expected = message(BODY_BYTES), echoed(BODY_BYTES)

    def ask() -> tuple[str, float, float]:
        serial = next(serials)
        body = template % serial
        sent = time.perf_counter()
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        got = time.perf_counter()
        if answer.status != 200 or content != expected % serial:
            raise SetUpFailed(f"answered {answer.status}: {content[:300]!r}")
        return answer.headers.get("NVCF-REQID", ""), sent, got

    return ask


def front_end(parent: Connection, told: dict[str, Any]) -> None:
    _run(_front(parent, told))


def sidecar(parent: Connection, folder: Path, told: dict[str, Any]) -> None:
    _run(_worker(parent, folder, told))


def _run(work: Coroutine[Any, Any, None]) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        logs.configure("INFO", "json")
        with contextlib.suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(work)
        logging.shutdown()


async def _front(parent: Connection, told: dict[str, Any]) -> None:
    """As `fnqueue api`, with one version that is ACTIVE."""
    notes, settings = Notes(), load(ApiSettings, host=LOOPBACK, port=0, **told)
    async with open_broker(settings) as broker:
        await broker.queue.declare(VERSION)
        await broker.catalog.versions.put(
            Version(
                id=VERSION,
                function_id=FUNCTION,
                account=settings.admin_account,
                name="stages",
                inference_url="/echo",
                container_image="none",
                created_at=1.0,
                status=FunctionStatus.ACTIVE,
            )
        )
        async with serving(noted(broker, notes), settings) as url:
            parent.send(url.rpartition(":")[2])
            await _asked(parent)
            parent.send(dict(notes.marks))


async def _worker(parent: Connection, folder: Path, told: dict[str, Any]) -> None:
    """As `fnqueue sidecar`."""
    notes, stop = Notes(), asyncio.Event()
    settings = load(
        SidecarSettings,
        function_id=FUNCTION,
        function_version_id=VERSION,
        inference_url="/echo",
        health_uri="/health",
        max_request_concurrency=64,
        asset_dir=str(folder / ASSETS),
        response_dir=str(folder / RESPONSES),
        **told,
    )
    with loops.Clerk() as clerk:
        async with open_broker(settings) as broker, NotedInference(settings, notes) as inference, Dialer() as dialer:
            product = Sidecar(noted(broker, notes), settings, inference, dialer, clerk)
            async with loops.beside(product.run(stop)):
                parent.send(None)
                await _asked(parent)
                parent.send(dict(notes.marks))


async def _asked(parent: Connection) -> None:
    """Return once the parent asks for what was noted."""
    asked = asyncio.Event()
    asyncio.get_running_loop().add_reader(parent.fileno(), asked.set)
    await asked.wait()
    asyncio.get_running_loop().remove_reader(parent.fileno())
    os.set_blocking(parent.fileno(), True)  # libuv made it otherwise; what is sent next is larger than a pipe


if __name__ == "__main__":
    main()
