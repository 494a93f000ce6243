"""Two front ends, two workers and a controller over servers that can fail, their clients, and what these saw."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

from pydantic import SecretStr

from broker import accounts, invocations
from broker.backends.files import open_blobs
from broker.backends.memory.catalog import MemoryCatalog
from broker.backends.memory.counters import MemoryCounters
from broker.backends.memory.dead_letters import MemoryDeadLetters
from broker.backends.memory.instance_logs import MemoryInstanceLogs
from broker.backends.memory.queue import MemoryQueue
from broker.backends.memory.results import Entry, MemoryResults
from broker.backends.memory.streams import MemoryStreams
from broker.backends.memory.upkeep import MemoryUpkeep
from broker.backends.memory.webhooks import MemoryWebhooks
from broker.errors import AlreadyFinished, FnqueueError, NotFound, StoreUnavailable, TryLater, Unavailable
from broker.invocations import Submission
from broker.keyring import Keyring
from broker.model import (
    NO_TIMINGS,
    FunctionStatus,
    Interest,
    Job,
    Lease,
    Outcome,
    Principal,
    Record,
    RequestState,
    Timings,
    Version,
)
from broker.ports import Broker, Queue, Results
from broker.settings import Settings, SidecarSettings
from tests.checker import UNKNOWN_ID, Census, Ending, Kind, Operation, Terms, Violation, violations
from tests.simulation.clock import START_S
from tests.simulation.processes import Process
from workers import loops
from workers.channel import Dialer
from workers.controller import undertaker
from workers.inference import Answer, ContainerBusy, ContainerLost, Inference
from workers.sidecar import Sidecar

CLIENT = Principal(account="acme", subject="key-1", scopes=frozenset(accounts.SCOPES))
FUNCTION_ID = "2c1d6f0e-9f63-4a52-9a57-0b6f1f1d2e22"
VERSION_ID = "7f0b3a52-0d47-4d9e-8a3c-3f6f1f1d2e11"
LEASE_S = 15.0
SWEEP_S = 15.0
# As long as two leases, a freeze and the longest of all pauses together.
QUIET_S = 180.0
DEADLINE_S = 3600.0


class Store(MemoryResults):
    """A primary with one replica. While `replica_away`, nothing is shown and no result becomes durable, and
    `fail_over` loses those that are not; while `mute`, hints are lost."""

    def __init__(self, settings: Settings) -> None:
        born_at, loop = time.time(), asyncio.get_running_loop()
        super().__init__(settings, now=lambda: born_at + loop.time() - START_S)
        self.replica_away = False
        self._before: dict[str, Entry] = {}

    async def settle(
        self, lease: Lease, job: Job, state: RequestState, outcome: Outcome, timings: Timings = NO_TIMINGS
    ) -> RequestState:
        if not self.replica_away:
            self._before.clear()
            return await super().settle(lease, job, state, outcome, timings)
        entry = self.entry(job.id)
        if entry is not None and not entry.state.terminal:
            self._before[job.id] = replace(entry)
        await super().settle(lease, job, state, outcome, timings)
        raise StoreUnavailable("no replica has it")

    async def _read(self, request_id: str, interest: Interest) -> Record | None:
        if self.replica_away:
            raise StoreUnavailable("no replica has it")
        return await super()._read(request_id, interest)

    def fail_over(self) -> None:
        """The replica becomes the primary."""
        for request_id, before in self._before.items():
            entry = self._entries[request_id]
            entry.state, entry.outcome, entry.finished_at = before.state, None, 0.0
            entry.worker, entry.token, entry.lease_until = before.worker, before.token, before.lease_until
            self._running.setdefault(entry.version_id, set()).add(request_id)
        self._before.clear()
        self.replica_away = False

    def census(self) -> Census:
        listed = (request_id for ids in self._accounts.values() for _, request_id in ids)
        states = {request_id: self._entries[request_id].state for request_id in listed}
        load = self._load(VERSION_ID)
        return Census(
            states={name: state.value for name, state in states.items() if state is not RequestState.ABANDONED},
            queued=load.queued,
            running=load.running,
        )


class Confirms(MemoryQueue):
    """Publishes meet `ends` first, in order: an error, and whether the job lands before it is raised."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[tuple[Unavailable, bool]] = []

    async def publish(self, job: Job, *, timeout_s: float) -> None:
        if not self.ends:
            return await super().publish(job, timeout_s=timeout_s)
        error, lands = self.ends.pop(0)
        if lands:
            await super().publish(job, timeout_s=timeout_s)
        raise error


class Container:
    """In the place of `Inference`: writes each attempt down, thinks for as long as its job says, and never gives the
    same answer twice. A job that asks to `die` takes the container along in the middle of its answer; one is told to
    come back after `busy_s` for the first `busy` times, and one has a `large` answer."""

    fault = ""
    silent = False

    def __init__(self, process: Process, starts: Counter[str]) -> None:
        self._process = process
        self._starts = starts

    async def healthy(self) -> bool:
        return True

    def keeps(self, _: int) -> bool:
        return False

    async def infer(self, job: Job, headers: object, *, spill: Callable[[], Path], **_: object) -> Answer:
        await self._process.there()
        order = json.loads(job.body)
        self._starts[order["name"]] += 1
        await asyncio.sleep(order["think_s"])
        await self._process.there()
        if order["die"]:
            raise ContainerLost("the container closed the connection", sent=True)
        if self._starts[order["name"]] <= order.get("busy", 0):
            raise ContainerBusy(Outcome(status=503), order["busy_s"])
        if order.get("large"):
            return Answer(status=200, spilled=_written(spill()))
        return Answer(status=200, body=uuid.uuid4().hex.encode())


def _written(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(uuid.uuid4().bytes)
    return path


class World:
    """Use as an async context manager, in virtual time. `mutate_*` put something between the processes and the
    servers."""

    def __init__(
        self,
        folder: Path,
        *,
        mutate_queue: Callable[[Queue], Queue] = lambda queue: queue,
        mutate_results: Callable[[Results, Store], Results] = lambda results, _: results,
        concurrency: int = 1,
    ) -> None:
        self._folder = folder
        self._mutate_queue, self._mutate_results = mutate_queue, mutate_results
        self._concurrency = concurrency
        self.history: list[Operation] = []
        self.starts: Counter[str] = Counter()
        self._ids: dict[str, str] = {}
        self._stops: dict[Process, asyncio.Event] = {}
        self._number = 0

    async def __aenter__(self) -> Self:
        settings = Settings(
            data_dir=self._folder,
            secret_key=SecretStr("simulated" * 4),
            request_deadline_s=DEADLINE_S,
            lease_s=LEASE_S,
        )
        self.store, self.queue, self.catalog = Store(settings), Confirms(), MemoryCatalog()
        self._blobs = open_blobs("file://", settings)
        self._servers = Broker(
            queue=self._mutate_queue(self.queue),
            results=self._mutate_results(self.store, self.store),
            streams=MemoryStreams(self.store, settings),
            catalog=self.catalog,
            counters=MemoryCounters(),
            upkeep=MemoryUpkeep(self.store),
            dead_letters=MemoryDeadLetters(self.store, settings),
            webhooks=MemoryWebhooks(self.store, settings),
            instance_logs=MemoryInstanceLogs(),
            blobs=await self._blobs.__aenter__(),
            settings=settings,
            keyring=Keyring({}),
        )
        self.version = Version(
            id=VERSION_ID,
            function_id=FUNCTION_ID,
            account=CLIENT.account,
            name="simulated",
            inference_url="/",
            container_image="simulated",
            created_at=0.0,
            status=FunctionStatus.ACTIVE,
        )
        await self.catalog.versions.put(self.version)
        await self.queue.declare(VERSION_ID)
        self.fronts = [Process(f"front-{number}", self._servers) for number in range(2)]
        self.workers = [self._worker() for _ in range(2)]
        self.controller = self._controller()
        return self

    async def __aexit__(self, *_: object) -> None:
        everyone = [*self.fronts, *self.workers, self.controller]
        for process in everyone:
            await process.kill()
        for process in everyone:
            await process.gone()
        await self._blobs.__aexit__(None, None, None)

    # -- clients --------------------------------------------------------------------------

    async def submit(
        self,
        name: str,
        *,
        front: int = 0,
        wait_s: float = 0.0,
        think_s: float = 1.0,
        die: bool = False,
        **asked: object,
    ) -> Operation:
        """With `name` as the Idempotency-Key; what is `asked` goes to the container."""
        submission = Submission(
            principal=CLIENT,
            function_id=FUNCTION_ID,
            version_id=VERSION_ID,
            headers=(),
            body=json.dumps({"name": name, "think_s": think_s, "die": die, **asked}).encode(),
            idempotency_key=name,
        )
        process, began_at = self.fronts[front], self.now()
        record, error = await self._asked(
            process,
            invocations.invoke(
                process.broker,
                submission,
                self.version,
                wait_s=wait_s,
                spawn=lambda work: asyncio.shield(process.spawn(work)),
            ),
        )
        if record is not None:
            self._ids[name] = record.id
            return self._note(Kind.SUBMIT, name, Ending.OK, began_at, record)
        refused = isinstance(error, TryLater) and not getattr(error, "outcome_unknown", False)
        return self._note(Kind.SUBMIT, name, Ending.FAILED if refused else Ending.UNKNOWN, began_at, error=error)

    async def insist(self, name: str, *, think_s: float = 1.0) -> None:
        """Submit at either front end until somebody says what became of it."""
        for front in (0, 1, 1, 1):
            if (await self.submit(name, front=front, think_s=think_s)).ending is not Ending.UNKNOWN:
                return

    async def read(self, name: str, *, front: int = 1, wait_s: float = 0.0) -> Operation:
        process, began_at = self.fronts[front], self.now()
        record, error = await self._asked(
            process, invocations.poll(process.broker, CLIENT, self._ids[name], wait_s=wait_s)
        )
        ending = Ending.OK if record or isinstance(error, NotFound) else Ending.UNKNOWN
        return self._note(Kind.READ, name, ending, began_at, record, error=error)

    async def cancel(self, name: str, *, front: int = 1) -> Operation:
        process, began_at = self.fronts[front], self.now()
        record, error = await self._asked(process, invocations.cancel(process.broker, CLIENT, self._ids[name]))
        failed = isinstance(error, AlreadyFinished | NotFound)
        ending = Ending.OK if record else Ending.FAILED if failed else Ending.UNKNOWN
        return self._note(Kind.CANCEL, name, ending, began_at, error=error)

    def request_id(self, name: str) -> str:
        """ "" if it is not known to have been accepted."""
        return self._ids.get(name, "")

    def accepted(self) -> Iterable[str]:
        return tuple(self._ids)

    # -- faults ---------------------------------------------------------------------------

    async def replace_worker(self, number: int) -> None:
        """What a launcher does for one that died."""
        await self.workers[number].kill()
        self.workers[number] = self._worker()

    async def replace_front(self, number: int) -> None:
        await self.fronts[number].kill()
        self.fronts[number] = Process(f"front-{number}", self._servers)

    async def heal(self) -> None:
        """Everything works again, and what died is replaced."""
        self.store.replica_away = False
        self.queue.ends.clear()
        for process in (*self.fronts, *self.workers):
            process.failpoint = None
        for number in range(2):
            if self.fronts[number].dead:
                await self.replace_front(number)
            if self.workers[number].dead:
                await self.replace_worker(number)

    async def verdict(self, *, terms: Terms | None = None) -> list[Violation]:
        """Heal, wait until all is quiet, read everything at every front end, and judge."""
        await self.heal()
        await asyncio.sleep(QUIET_S)
        for name in self.accepted():
            for front in range(len(self.fronts)):
                await self.read(name, front=front)
        return violations(self.history, self.starts, self.store.census(), terms or Terms(deadline_s=DEADLINE_S))

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    # -- processes ------------------------------------------------------------------------

    def _worker(self) -> Process:
        self._number += 1
        process = Process(f"worker-{self._number}", self._servers)
        folder = self._folder / process.name
        settings = SidecarSettings(
            function_id=FUNCTION_ID,
            function_version_id=VERSION_ID,
            function_name="simulated",
            instance_id=process.name,
            lease_s=LEASE_S,
            max_request_concurrency=self._concurrency,
            asset_dir=folder / "assets",
            response_dir=folder / "response",
            data_dir=folder,
            drain_s=1,
            status_port=0,
        )
        (folder / "response").mkdir(parents=True)
        container = cast("Inference", Container(process, self.starts))

        async def serve() -> None:
            with loops.Clerk() as clerk:
                sidecar = Sidecar(process.broker, settings, container, cast("Dialer", None), clerk)
                await sidecar.run(asyncio.Event())

        process.spawn(serve())
        return process

    def _controller(self) -> Process:
        process = Process("controller", self._servers)
        process.spawn(undertaker.serve(process.broker))
        process.spawn(loops.every(SWEEP_S, lambda: undertaker.sweep(process.broker), name="sweep"))
        process.spawn(loops.every(SWEEP_S, self._relieve, name="relieve"))
        return process

    async def _relieve(self) -> None:
        reports = await self.catalog.instances(VERSION_ID)
        quarantined = {report.id for report in reports if report.quarantined}
        for number, worker in enumerate(self.workers):
            if worker.name in quarantined:
                await self.replace_worker(number)

    async def _asked(self, process: Process, work: Any) -> tuple[Record | None, FnqueueError | None]:
        """What a front end answers; neither, if it died over it."""
        if process.dead:
            work.close()
            return None, None
        task = process.spawn(work)
        await asyncio.wait([task])
        if task.cancelled():
            return None, None
        error = task.exception()
        if error is None:
            return task.result(), None
        if not isinstance(error, FnqueueError):
            raise error
        return None, error

    def _note(
        self,
        kind: Kind,
        name: str,
        ending: Ending,
        began_at: float,
        record: Record | None = None,
        *,
        error: FnqueueError | None = None,
    ) -> Operation:
        state, digest = "", ""
        if record is not None:
            state = record.state.value
            if record.outcome is not None:
                outcome = record.outcome
                answer = b"%d %s %s" % (outcome.status, outcome.blob_key.encode(), outcome.body)
                digest = hashlib.sha256(answer).hexdigest()
        elif isinstance(error, NotFound) and kind is Kind.READ:
            state = UNKNOWN_ID
        operation = Operation(
            kind=kind,
            name=name,
            ending=ending,
            began_at=began_at,
            ended_at=self.now(),
            request_id=record.id if record else self._ids.get(name, ""),
            state=state,
            digest=digest,
            attempt=record.attempt if record else 0,
            note=type(error).__name__ if error else "",
        )
        self.history.append(operation)
        return operation


@asynccontextmanager
async def a_world(folder: Path, **given: Any) -> AsyncIterator[World]:
    """In a folder of its own below `folder`."""
    async with World(folder / uuid.uuid4().hex, **given) as world:
        yield world
