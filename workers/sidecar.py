"""The sidecar: takes jobs of one function version, runs them in the container beside it, and settles them.

A message is a hint, the store is the fact: settle, then acknowledge (PROTOCOL §2.4, steps 6 to 10). Jobs run in
tasks owned here; a lost connection to the broker ends a loan, never a job.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from aiohttp import web

from broker.errors import RecordDamaged, StoreUnavailable, Unavailable
from broker.model import (
    AttemptEnd,
    Claim,
    DeadCause,
    Instance,
    InstanceStatus,
    Job,
    Lease,
    Outcome,
    RequestState,
    Timings,
    Verdict,
)
from broker.ports import Broker, Delivery
from broker.settings import SidecarSettings
from broker.telemetry.tracing import Attempt
from workers import loops
from workers.channel import ClientLeft, Dialer, Line, converse, stopped
from workers.figures import Figures
from workers.health import Gate, status_address, status_server
from workers.inference import (
    INFERENCE_FAULT,
    AttemptFailed,
    ContainerBusy,
    ContainerLost,
    Inference,
    RunTimedOut,
    problem,
)
from workers.inputs import BodyAltered, container_headers, headers_for_all, workspace
from workers.leases import Leases
from workers.metering import HEARTBEAT_S, Meter
from workers.outputs import collect
from workers.progress import ProgressWatch
from workers.quarantine import Quarantine
from workers.slots import Slots
from workers.spares import Spares
from workers.streams import Feed, LeaseLost

logger = logging.getLogger(__name__)

SHORTEST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 60.0
FAULT_PAUSE_S = 1.0
# Objects being deleted from the blob store at once; more are left there.
MOST_DISCARDED = 64
# Jobs that are held back at once with their slot at other work; those of more are idle. Each takes a channel.
MOST_STAND_INS = 64
STAND_IN_PAUSE_S = 0.25
# What is over for good; a dead request may be started once more.
OVER = (
    RequestState.FULFILLED,
    RequestState.ERRORED,
    RequestState.EXPIRED,
    RequestState.TIMED_OUT,
    RequestState.CANCELLED,
    RequestState.ABANDONED,
)
# Why an attempt came to nothing, where its container is not to blame.
STOPPED = "the worker was told to stop before the container answered"
FAULTY = "the worker met a fault of its own; its log has more"
# Beats of an instance that may go missing before it is taken for dead.
BEATS = 5


@dataclass(slots=True, kw_only=True, eq=False)
class _Run:
    """One job of this process, from its delivery to the end of its loan.

    `refund` tells whether handing the attempt back now would cost nothing. `ends_at`, `called_at` (when the container
    was) and `leased_until` are by the monotonic clock; `run_limited` tells that it is the run timeout that ends it, and
    not the request's deadline. `lost` says how its container was.
    """

    delivery: Delivery
    job: Job
    task: asyncio.Task[None] | None = None
    waiting: bool = False
    lease: Lease | None = None
    refund: bool = True
    started_at: float = 0.0
    ends_at: float = 0.0
    called_at: float = 0.0
    run_limited: bool = False
    leased_until: float = 0.0
    cold_start_s: float = 0.0
    inputs_s: float = 0.0
    container_s: float = 0.0
    upload_s: float = 0.0
    size_bytes: int = 0
    lost: str = ""
    facts: dict[str, object] = field(default_factory=dict)
    traced: Attempt | None = None

    @property
    def timings(self) -> Timings:
        return Timings(
            cold_start_s=self.cold_start_s,
            inputs_s=self.inputs_s,
            container_s=self.container_s,
            upload_s=self.upload_s,
        )

    def left_s(self) -> float:
        return max(0.0, self.ends_at - time.monotonic())

    @contextmanager
    def wait(self) -> Iterator[None]:
        """While the body runs, nothing is lost by ending this run."""
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False


class _Calls:
    """Those to the container that are under way."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class _Calling:
    """While the body runs, the container is at work for the run."""

    __slots__ = ("_calls", "_run")

    def __init__(self, calls: _Calls, run: _Run) -> None:
        self._calls, self._run = calls, run

    def __enter__(self) -> None:
        self._run.called_at = time.monotonic()
        self._calls.count += 1

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        run = self._run
        self._calls.count -= 1
        run.container_s = time.monotonic() - run.called_at
        if run.traced is not None:
            run.traced.called(error)


async def serve(broker: Broker, settings: SidecarSettings, stop: asyncio.Event) -> None:
    """Run jobs from when the container is healthy until `stop` is set and the running ones are done or handed back.

    Raises:
        ConfigurationError: a setting that this sidecar cannot serve.
        NeverReady: the container was not healthy within `ready_timeout_s`.
    """
    with loops.Clerk() as clerk:
        async with Inference(settings) as inference, Dialer() as dialer:
            await Sidecar(broker, settings, inference, dialer, clerk).run(stop)


class Sidecar:
    def __init__(
        self, broker: Broker, settings: SidecarSettings, inference: Inference, dialer: Dialer, clerk: loops.Clerk
    ) -> None:
        self._queue, self._results, self._streams = broker.queue, broker.results, broker.streams
        self._catalog, self._blobs = broker.catalog, broker.blobs
        self._tracing = broker.tracing
        self._settings = settings
        self._inference = inference
        self._dialer = dialer
        self._clerk = clerk
        self._spares = Spares(clerk, most=settings.max_request_concurrency)
        self._headers_for_all = headers_for_all(settings)
        self._progress = ProgressWatch(broker.results, settings, clerk)
        self._gate = Gate(inference, settings, full=lambda: self._calls.count >= settings.max_request_concurrency)
        self._slots = Slots(settings.max_request_concurrency)
        self._runs: dict[str, _Run] = {}
        self._calls = _Calls()
        self._discarding = 0
        self._stand_ins = 0
        self._jobs = asyncio.TaskGroup()
        self._leases = Leases(broker.results, settings, spawn=self._jobs.create_task)
        self._id = settings.instance_id or str(uuid.uuid4())
        self._quarantine = Quarantine(broker.catalog, settings, self._gate, self._id)
        self._metrics = broker.metrics
        self._figures = Figures(broker.metrics, settings)
        self._meter = Meter(settings, self._id)
        self._status_address = ""
        self._ready_at = 0.0
        self._untold_start_s = 0.0
        self._created_at = time.time()
        self._started = False
        self._draining = False

    async def run(self, stop: asyncio.Event) -> None:
        """As `serve`; once in the life of a Sidecar."""
        over = asyncio.Event()

        async def drain_route(_: web.Request) -> web.Response:
            """What Kubernetes asks before it ends a container of the pod: answered when no job runs any more."""
            stop.set()
            await over.wait()
            return web.json_response({"status": "OK"})

        try:
            async with (
                loops.beside(
                    loops.every(self._settings.beat_s, self._beat, name="beat"),
                    loops.every(HEARTBEAT_S, self._report, name="metering"),
                ),
                self._shown(web.get("/v1/drain", drain_route)),
            ):
                try:
                    await loops.either(self._gate.start(), stop.wait())
                    if not stop.is_set():
                        await self._work(stop)
                finally:
                    over.set()
        finally:
            await self._report()
            with suppress(Unavailable, TimeoutError):
                async with asyncio.timeout(self._settings.store_timeout_s):
                    await self._catalog.retire(self._instance())

    @asynccontextmanager
    async def _shown(self, *routes: web.RouteDef) -> AsyncIterator[None]:
        with self._figures.shown(busy=self._busy, ready=lambda: self._gate.healthy):
            async with status_server(self._settings, self._metrics, self._missing, *routes) as port:
                self._status_address = status_address(self._settings.status_host, port)
                yield

    async def _work(self, stop: asyncio.Event) -> None:
        await self._report()
        self._started = True
        self._untold_start_s = max(0.0, time.time() - self._created_at)
        self._figures.ready(after_s=self._untold_start_s)
        with suppress(StoreUnavailable):
            await self._note_readiness()
            await self._beat()
        logger.info(
            "sidecar_started",
            extra={"public": True, "instance_id": self._id, "version_id": self._settings.function_version_id},
        )
        checking = loops.every(0, self._gate.check_when_due, name="health")
        looking = loops.every(self._progress.pause_s, self._progress.look, name="progress")
        try:
            async with loops.beside(checking, looking), self._jobs:
                async with loops.beside(loops.every(1.0, self._consume, name="consume")):
                    await stop.wait()
                await self._drain()
        finally:
            self._spares.close()
        logger.info("sidecar_stopped", extra={"public": True, "instance_id": self._id})

    async def _note_readiness(self) -> None:
        """What was accepted before now waited for a cold start, unless another instance was there to take it."""
        others = await self._catalog.instances(self._settings.function_version_id)
        if not any(other.status is InstanceStatus.RUNNING and other.id != self._id for other in others):
            self._ready_at = (await self._results.epoch(fresh=True)).now

    async def _consume(self) -> None:
        """Take deliveries for as long as the container is healthy."""
        await self._gate.opened()
        async with self._queue.consume(
            self._settings.function_version_id, prefetch=self._settings.max_request_concurrency
        ) as deliveries:
            await loops.either(self._accept(deliveries), self._gate.shut())

    async def _accept(self, deliveries: AsyncIterator[Delivery]) -> None:
        async for delivery in deliveries:
            await self._adopt(delivery)
            del delivery  # with its body; the next may be long in coming

    async def _adopt(self, delivery: Delivery) -> asyncio.Task[None] | None:
        """The task of the job from here on; None when it had one before."""
        run = self._runs.get(delivery.job.id)
        if run is None:
            run = self._runs[delivery.job.id] = _Run(delivery=delivery, job=delivery.job)
            run.task = self._jobs.create_task(self._see_through(run))
            return run.task
        # A copy, or the same message after the connection was lost: the run goes on with this loan. The old one is
        # over already, or is a copy that nobody needs.
        old, run.delivery = run.delivery, delivery
        await old.ack()
        return None

    async def _see_through(self, run: _Run) -> None:
        """Run the job, again and again for as long as it is postponed."""
        try:
            while wait_s := await self._hold_slot(run):
                await self._stand_back(run, wait_s)
        except loops.Fault:
            await asyncio.sleep(FAULT_PAUSE_S)
            with suppress(loops.Fault):
                await loops.guard(self._give_back(run, refund=False, reason=FAULTY), request_id=run.job.id)
        except asyncio.CancelledError:
            await self._give_back(run, refund=run.refund, reason=run.lost or STOPPED)
            raise

    async def _hold_slot(self, run: _Run) -> float:
        """As `_run`, once there is a slot. After a reconnect there can be more loans than slots."""
        if not self._slots.take():
            with run.wait():
                await self._slots.wait()
        try:
            if self._draining or not self._gate.healthy:
                await self._end(run, RequestState.QUEUED)
                return 0.0
            return await loops.guard(self._run(run), request_id=run.job.id)
        finally:
            self._slots.give()

    async def _stand_back(self, run: _Run, wait_s: float) -> None:
        """Wait without a slot until the job's time has come, or it was cancelled."""
        if self._draining:
            return
        with run.wait():
            if self._stand_ins < MOST_STAND_INS:
                self._stand_ins += 1
                try:
                    async with loops.beside(self._stand_in()):
                        await self._until_free(run.job, wait_s)
                finally:
                    self._stand_ins -= 1
            else:
                await self._until_free(run.job, wait_s)

    async def _stand_in(self) -> None:
        """Keep the slot of a job that stands back at work. Its message stays on loan, so that it is delivered again if
        this process dies, and counts towards the subscription's prefetch: other jobs are taken one by one. The pause
        spares a container that refuses all of them."""
        while True:
            await asyncio.sleep(STAND_IN_PAUSE_S)
            await self._gate.opened()
            with suppress(Unavailable):
                while delivery := await self._queue.take(self._settings.function_version_id):
                    task = await self._adopt(delivery)
                    if task is not None:
                        await asyncio.wait([task])

    async def _run(self, run: _Run) -> float:
        """Take one job to its end, or return the seconds for which it is postponed."""
        began_at = time.time() if self._tracing is not None else 0.0
        claim = await self._claim(run)
        if claim.lease is None:
            if claim.state is RequestState.QUEUED:
                return max(claim.wait_s, SHORTEST_BACKOFF_S)
            await self._decline(run, claim)
            self._discard_body(run.job, claim.state)
            return 0.0
        if self._tracing is None:
            return await self._try(run, claim.lease)
        with self._tracing.attempt(run.job, number=claim.lease.attempt, began_at=began_at) as run.traced:
            return await self._try(run, claim.lease)

    async def _try(self, run: _Run, lease: Lease) -> float:
        """As `_run`, of one attempt."""
        try:
            attempt = self._attempt if run.job.channel is None else self._converse
            state, outcome = await attempt(run, lease)
        except LeaseLost as lost:
            if not lost.state.terminal:
                await self._deny_death(lease)
            await self._end(run, lost.state, metered=await self._ended_by(run, lease, lost.state))
            self._discard_body(run.job, lost.state)
        except ContainerLost as lost:
            if run.traced is not None:
                run.traced.failed("container_lost", str(lost))
            await self._hand_back(run, lost)
        except ContainerBusy as busy:
            if run.traced is not None:
                run.traced.failed("container_busy", str(busy))
            return await self._postpone(run, lease, busy)
        except BodyAltered as altered:
            await self._refuse(run, lease, str(altered))
        else:
            await self._finish(run, lease, state, outcome)
        return 0.0

    async def _claim(self, run: _Run) -> Claim:
        """The store's answer. When another worker has a lease, its end is waited for and the claim repeated."""
        job, settings = run.job, self._settings
        attempts = settings.max_attempts if job.channel is None else 1
        token = os.urandom(16).hex()  # the answer may be lost, and the attempt be ours all the same

        def claim() -> Awaitable[Claim]:
            run.leased_until = time.monotonic() + settings.lease_s
            return self._results.claim(
                job, worker=self._id, lease_s=settings.lease_s, max_attempts=attempts, token=token
            )

        answer = await loops.insist(claim, on=StoreUnavailable, name="claim")
        if answer.verdict is Verdict.HELD and answer.state is RequestState.RUNNING and not self._draining:
            with run.wait():
                await self._until_free(job, answer.wait_s)
            answer = await loops.insist(claim, on=StoreUnavailable, name="claim")
        if answer.lease is not None:
            run.lease, run.started_at = answer.lease, time.monotonic()
            run_timeout_s = min(job.run_timeout_s or self._settings.run_timeout_s, self._settings.run_timeout_s)
            run.ends_at = run.started_at + min(answer.remaining_s, run_timeout_s)
            run.run_limited = run_timeout_s < answer.remaining_s
            if answer.lease.attempt == 1:
                run.cold_start_s = max(0.0, self._ready_at - job.created_at)
            waited_s = max(0.0, time.time() - job.created_at)
            run.facts = {"attempt": answer.lease.attempt, "queued_s": round(waited_s, 3)}
            self._figures.claimed(first=answer.lease.attempt == 1, waited_s=waited_s, cold_start_s=run.cold_start_s)
        if answer.lost is not None:
            await self._quarantine.lost(job, answer.lost)
        return answer

    async def _attempt(self, run: _Run, lease: Lease) -> tuple[RequestState, Outcome]:
        """Run the job in the container while its lease is kept.

        Raises:
            ContainerLost, ContainerBusy, LeaseLost, BodyAltered.
        """
        try:
            with self._leases.keep(run, lease):
                outcome = await loops.guard(
                    self._answer(run, lease),
                    expected=(AttemptFailed, ContainerLost, ContainerBusy, LeaseLost, BodyAltered),
                    request_id=run.job.id,
                )
        except RunTimedOut as late:
            return RequestState.TIMED_OUT if run.run_limited else late.state, late.outcome
        except AttemptFailed as failed:
            return failed.state, failed.outcome
        except loops.Fault:
            return RequestState.ERRORED, problem(run.job, 500, INFERENCE_FAULT)
        if self._quarantine.suspected:
            await self._quarantine.answered()
        return RequestState.FULFILLED if outcome.status < 400 else RequestState.ERRORED, outcome

    async def _answer(self, run: _Run, lease: Lease) -> Outcome:
        job, settings = run.job, self._settings
        async with workspace(self._blobs, settings, job, self._clerk, self._spares) as room:
            run.inputs_s = time.monotonic() - run.started_at
            headers = container_headers(job, room, self._headers_for_all, run.left_s())
            if run.traced is not None:
                headers = run.traced.carried(headers)
            if job.streaming:
                return await self._stream(run, lease, headers, room.body)
            progress = nullcontext() if job.passthrough else self._progress.watching(lease, room.response_name)
            with _Calling(self._calls, run):
                async with progress:
                    answer = await self._inference.infer(
                        job,
                        headers,
                        body=room.body,
                        spill=room.spill,
                        attempt=lease.attempt,
                    )
            run.size_bytes, since = answer.size_bytes, time.monotonic()
            outcome = await collect(self._blobs, settings, job, answer, room, left_s=run.left_s)
            if outcome.blob_key:
                run.upload_s = time.monotonic() - since
                if run.traced is not None:
                    run.traced.uploaded(run.upload_s)
            return outcome

    async def _stream(self, run: _Run, lease: Lease, headers: Iterable[tuple[str, str]], body: bytes | Path) -> Outcome:
        with _Calling(self._calls, run):
            async with self._streams.write(lease) as writer:
                feed = Feed(self._results, writer, self._settings, run.job)
                async with (
                    loops.beside(feed.attend()),
                    self._inference.exchange(
                        run.job, headers, body=body, budget_s=run.left_s(), attempt=lease.attempt
                    ) as response,
                ):
                    try:
                        return await feed.carry(response)
                    finally:
                        run.size_bytes = feed.size_bytes

    async def _converse(self, run: _Run, lease: Lease) -> tuple[RequestState, Outcome]:
        """Run the job over its channel while its lease is kept. There is no other attempt, so nothing is handed back.

        Raises:
            LeaseLost.
        """
        expected = (AttemptFailed, ContainerLost, ClientLeft)
        try:
            async with self._dialer.line(run.job) as line:
                with self._leases.keep(run, lease):
                    outcome = await loops.guard(self._talk(run, line), expected=expected, request_id=run.job.id)
        except RunTimedOut as late:
            return RequestState.TIMED_OUT if run.run_limited else late.state, late.outcome
        except AttemptFailed as failed:
            return failed.state, failed.outcome
        except loops.Fault:
            return RequestState.ERRORED, problem(run.job, 500, INFERENCE_FAULT)
        except ClientLeft as left:
            await self._cancel(run.job, left.reason)
            raise LeaseLost(RequestState.CANCELLED) from left
        except asyncio.CancelledError:
            with suppress(StoreUnavailable, TimeoutError):
                async with asyncio.timeout(self._settings.store_timeout_s):
                    await self._results.settle(lease, run.job, RequestState.ERRORED, stopped(run.job))
            raise
        if self._quarantine.suspected:
            await self._quarantine.answered()
        return RequestState.FULFILLED if outcome.status < 400 else RequestState.ERRORED, outcome

    async def _talk(self, run: _Run, line: Line) -> Outcome:
        settings = self._settings
        async with workspace(self._blobs, settings, run.job, self._clerk) as room:
            await line.open()
            headers = container_headers(run.job, room, self._headers_for_all, run.left_s())
            if run.traced is not None:
                headers = run.traced.carried(headers)
            with _Calling(self._calls, run):
                try:
                    return await converse(line, self._inference, settings, headers, budget_s=run.left_s())
                finally:
                    run.size_bytes = line.answered_bytes

    async def _cancel(self, job: Job, reason: str) -> None:
        async def cancel() -> None:
            with suppress(RecordDamaged):
                await self._results.cancel(job.id, reason=reason)

        await loops.insist(cancel, on=StoreUnavailable, name="cancel")

    async def _until_free(self, job: Job, wait_s: float) -> None:
        async with self._results.watch(job.id) as watch:
            with suppress(Unavailable):
                record = await watch.read()
                if record is not None and record.state.terminal:
                    return
            await watch.changed(wait_s)

    async def _decline(self, run: _Run, claim: Claim) -> None:
        """Settled: nothing is left to do. Held by another worker all this time: a copy goes to the end of the
        queue, so that this one stops taking up a slot."""
        copied = False
        if claim.verdict is Verdict.HELD:
            with suppress(Unavailable):
                await self._queue.publish(run.job, timeout_s=self._settings.publish_timeout_s)
                copied = True
        await self._end(run, claim.state, copied=copied)

    async def _postpone(self, run: _Run, lease: Lease, busy: ContainerBusy) -> float:
        """The seconds for which the job now stands back; 0.0 if it is over, because its deadline comes first."""

        async def postpone() -> RequestState:
            return await self._results.postpone(lease, busy.outcome, wait_s=busy.wait_s)

        state = await loops.insist(postpone, on=StoreUnavailable, name="postpone")
        if state is RequestState.QUEUED:
            logger.info("postponed", extra={"request_id": run.job.id, "cause": str(busy), **run.facts})
            self._tell(run, AttemptEnd.RETURNED)
            run.lease = None
            return busy.wait_s
        if state is RequestState.RUNNING:
            await self._finish(run, lease, RequestState.ERRORED, busy.outcome)
        else:
            await self._end(run, state, metered=await self._ended_by(run, lease, state))
        return 0.0

    async def _refuse(self, run: _Run, lease: Lease, reason: str) -> None:
        """End a request as dead that no worker may run. If this process dies in between, the next finds the same."""

        async def release() -> RequestState:
            return await self._results.release(lease, refund=False, reason=reason)

        async def end() -> Claim:
            return await self._results.end(run.job, RequestState.DEAD, reason=reason, cause=DeadCause.REJECTED)

        logger.error("body_refused", extra={"request_id": run.job.id, "cause": reason, **run.facts})
        await loops.insist(release, on=StoreUnavailable, name="refuse")
        ended = await loops.insist(end, on=StoreUnavailable, name="refuse")
        await self._end(run, ended.state, metered=await self._ended_by(run, lease, ended.state))

    async def _finish(self, run: _Run, lease: Lease, state: RequestState, outcome: Outcome) -> None:
        stands = await self._settle(run, lease, state, outcome)
        if not stands.terminal:
            await self._deny_death(lease)
        metered = stands is state and time.monotonic() < run.leased_until  # as most often
        await self._end(run, stands, outcome, metered=metered or await self._ended_by(run, lease, stands))
        self._discard_body(run.job, stands)
        if stands is not state:  # it came too late
            self._discard(outcome.blob_key)

    async def _settle(self, run: _Run, lease: Lease, state: RequestState, outcome: Outcome) -> RequestState:
        """The state that stands, once it does durably; message and lease are kept until then (PROTOCOL step 9)."""

        timings = self._with_start(run.timings)

        def settle() -> Awaitable[RequestState]:
            return self._results.settle(lease, run.job, state, outcome, timings)

        if run.traced is None:
            return await loops.insist(settle, on=StoreUnavailable, name="settle")
        with run.traced.settling():
            return await loops.insist(settle, on=StoreUnavailable, name="settle")

    def _with_start(self, timings: Timings) -> Timings:
        """With what this instance's start took, the first time."""
        start_s, self._untold_start_s = self._untold_start_s, 0.0
        return (
            replace(timings, start_s=start_s, lead_s=max(0.0, timings.cold_start_s - start_s)) if start_s else timings
        )

    async def _ended_by(self, run: _Run, lease: Lease, state: RequestState) -> bool:
        """Whether the request ended with this attempt, which nobody else may bill then. No other worker could end it
        while the lease lived; of one that may have run out, the record tells."""
        if not state.terminal or time.monotonic() < run.leased_until:
            return state.terminal
        try:
            record = await self._results.glance(run.job.id)
        except Unavailable:
            return False
        return record is not None and (record.worker, record.attempt) == (self._id, lease.attempt)

    async def _deny_death(self, lease: Lease) -> None:
        """A request that is not over and not ours has gone to another worker, who took this one for dead."""
        with suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(self._settings.store_timeout_s):
                await self._results.release(lease, refund=True)

    def _discard_body(self, job: Job, state: RequestState) -> None:
        """A body in the blob store is of no use once there is a result, or nobody wants one."""
        if state in OVER:
            self._discard(job.body_key)

    def _discard(self, key: str) -> None:
        """Delete an object in the background. Best effort: what is left there is the controller's auditor's to find."""
        if key and self._discarding < MOST_DISCARDED:
            self._discarding += 1
            self._jobs.create_task(self._delete(key))

    async def _delete(self, key: str) -> None:
        try:
            with suppress(Unavailable, TimeoutError, loops.Fault):
                async with asyncio.timeout(self._settings.store_timeout_s):
                    await loops.guard(self._blobs.discard(key), expected=(Unavailable,), key=key)
        finally:
            self._discarding -= 1

    async def _hand_back(self, run: _Run, lost: ContainerLost) -> None:
        """Give the attempt back when the container is well again, or at the end of the backoff at the latest. The
        attempt counts if the container may have seen it."""
        assert run.lease is not None
        run.refund, run.lost = not lost.sent, str(lost)
        backoff_s = min(self._settings.crash_backoff_s * 2 ** (run.lease.attempt - 1), LONGEST_BACKOFF_S)
        logger.warning(
            "container_lost", extra={"public": True, "request_id": run.job.id, "cause": str(lost), **run.facts}
        )
        if lost.sent and not self._draining and not self._inference.keeps(run.lease.attempt):
            await self._quarantine.crashed(run.job, began_at=run.called_at)
        pause_s = max(backoff_s, SHORTEST_BACKOFF_S) * random.uniform(0.5, 1)  # noqa: S311  spreads load
        with run.wait(), suppress(TimeoutError):
            await self._gate.check()
            async with asyncio.timeout(pause_s):
                # Nothing but the pause slows down what costs no attempt.
                await (self._gate.opened() if lost.sent else asyncio.sleep(pause_s))
        await self._give_back(run, refund=run.refund, reason=run.lost)

    async def _give_back(self, run: _Run, *, refund: bool, reason: str) -> None:
        """Release the attempt, then the message, in bounded time; the lease runs out by itself if need be."""
        state, metered = RequestState.QUEUED, False
        if run.lease is not None:
            with suppress(StoreUnavailable, TimeoutError):
                async with asyncio.timeout(self._settings.store_timeout_s):
                    state = await self._results.release(run.lease, refund=refund, reason=reason)
                    metered = await self._ended_by(run, run.lease, state)
        await self._end(run, state, metered=metered)

    async def _end(
        self,
        run: _Run,
        state: RequestState,
        outcome: Outcome | None = None,
        *,
        copied: bool = False,
        metered: bool = False,
    ) -> None:
        """End the loan. A request that is not terminal is somebody's to run: a message of it must remain. That of a
        dead one goes to the dead letters, where its input is kept. `metered`: it ended with this run."""
        if self._runs.get(run.job.id) is run:
            del self._runs[run.job.id]
        if state is RequestState.DEAD:
            await run.delivery.reject()
        elif state.terminal or copied:
            await run.delivery.ack()
        else:
            await run.delivery.requeue()
        if state.terminal and state is not RequestState.DEAD:  # those the undertaker counts
            self._figures.ended(state)
        if run.lease is not None:
            self._tell(run, _end_of(run, state, metered=metered))
        self._log(run, state, outcome, metered=metered)

    def _tell(self, run: _Run, end: RequestState | AttemptEnd) -> None:
        self._figures.attempted(end, took_s=time.monotonic() - run.started_at, timings=run, size_bytes=run.size_bytes)

    def _log(self, run: _Run, state: RequestState, outcome: Outcome | None, *, metered: bool) -> None:
        if run.lease is None:
            return
        if run.traced is not None:
            run.traced.ended(state, outcome)
        facts: dict[str, object] = {
            "state": state.value,
            "status": outcome.status if outcome else 0,
            "container_s": round(run.container_s, 3),
            **run.facts,
        }
        if metered:
            self._meter.invocation(run.job, state, size_bytes=run.size_bytes, duration_s=run.container_s, facts=facts)
        else:
            logger.info("attempt_given_up", extra={"public": True, "request_id": run.job.id} | facts)

    async def _drain(self) -> None:
        """End what has not started, let the rest finish for up to `drain_s`, then hand that back too."""
        self._draining = True
        await asyncio.sleep(0)  # so that tasks made a moment ago begin to wait and can be ended safely
        tasks = []
        for run in list(self._runs.values()):
            if run.task is not None:
                tasks.append(run.task)
                if run.waiting:
                    run.task.cancel()
        if tasks:
            logger.info("draining", extra={"public": True, "instance_id": self._id, "running": len(tasks)})
            _, late = await asyncio.wait(tasks, timeout=self._settings.drain_s)
            for task in late:
                task.cancel()

    async def _report(self) -> None:
        self._meter.infrastructure(ready=self._started)

    async def _beat(self) -> None:
        if self._started:
            await self._quarantine.look()
        await self._catalog.beat(self._instance(), ttl_s=self._settings.beat_s * BEATS)

    async def _missing(self) -> str:
        """What keeps this sidecar from working, '' if nothing does."""
        if not self._gate.healthy:
            return self._gate.fault
        try:
            async with loops.together() as group:
                group.create_task(self._queue.ping())
                group.create_task(self._results.ping())
        except Unavailable as exc:
            return str(exc)
        return ""

    def _instance(self) -> Instance:
        if self._gate.healthy:
            status = InstanceStatus.RUNNING
        else:
            status = InstanceStatus.ERRORED if self._started else InstanceStatus.STARTING
        return Instance(
            id=self._id,
            function_id=self._settings.function_id,
            version_id=self._settings.function_version_id,
            account=self._settings.account,
            gpu=self._settings.gpu,
            instance_type=self._settings.instance_type,
            backend=self._settings.backend,
            status=status,
            created_at=self._created_at,
            updated_at=time.time(),
            slots=self._settings.max_request_concurrency,
            busy=self._busy(),
            error=self._gate.fault,
            specification_id=self._settings.specification_id,
            location=self._settings.region,
            quarantined=self._gate.condemned,
            status_address=self._status_address,
        )

    def _busy(self) -> int:
        return sum(1 for run in self._runs.values() if run.lease is not None)


def _end_of(run: _Run, state: RequestState, *, metered: bool) -> RequestState | AttemptEnd:
    """What became of the attempt of a run that ends in `state`; `metered`: the request ended with it."""
    if metered:
        return state
    if state.terminal or state is RequestState.RUNNING:
        return AttemptEnd.LOST
    return AttemptEnd.RETURNED if run.refund else AttemptEnd.FAILED
