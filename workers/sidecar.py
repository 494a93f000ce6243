"""The sidecar: takes jobs of one function version, runs them in the container beside it, and settles them.

A message is a hint, the store is the fact: settle, then acknowledge (PROTOCOL §2.4, steps 6 to 10). Jobs run in
tasks owned here; a lost connection to the broker ends a loan, never a job.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from broker.errors import StoreUnavailable, Unavailable
from broker.model import Claim, Instance, InstanceStatus, Job, Lease, Outcome, RequestState, Verdict
from broker.ports import Broker, Delivery
from broker.settings import SidecarSettings
from workers import loops
from workers.health import Gate, status_server
from workers.inference import INFERENCE_FAULT, AttemptFailed, ContainerLost, Inference, RunTimedOut, problem
from workers.inputs import container_headers, headers_for_all, workspace
from workers.outputs import collect
from workers.streams import Feed, LeaseLost

logger = logging.getLogger(__name__)

SHORTEST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 60.0
FAULT_PAUSE_S = 1.0
# Bodies being deleted from the blob store at once; more are left there.
MOST_DISCARDED = 64
# Beats of an instance that may go missing before it is taken for dead.
BEATS = 5


@dataclass(slots=True, kw_only=True, eq=False)
class _Run:
    """One job of this process, from its delivery to the end of its loan.

    `refund` tells whether handing the attempt back now would cost nothing. `ends_at` is by the monotonic clock.
    """

    delivery: Delivery
    task: asyncio.Task[None] | None = None
    waiting: bool = False
    lease: Lease | None = None
    refund: bool = True
    started_at: float = 0.0
    ends_at: float = 0.0
    container_s: float = 0.0
    facts: dict[str, object] = field(default_factory=dict)

    @property
    def job(self) -> Job:
        return self.delivery.job

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


async def serve(broker: Broker, settings: SidecarSettings, stop: asyncio.Event) -> None:
    """Run jobs from when the container is healthy until `stop` is set and the running ones are done or handed back.

    Raises:
        ConfigurationError: a setting that this sidecar cannot serve.
        NeverReady: the container was not healthy within `ready_timeout_s`.
    """
    with loops.Clerk() as clerk:
        async with Inference(settings) as inference:
            await Sidecar(broker, settings, inference, clerk).run(stop)


class Sidecar:
    def __init__(self, broker: Broker, settings: SidecarSettings, inference: Inference, clerk: loops.Clerk) -> None:
        self._queue, self._results, self._streams = broker.queue, broker.results, broker.streams
        self._catalog, self._blobs = broker.catalog, broker.blobs
        self._settings = settings
        self._inference = inference
        self._clerk = clerk
        self._headers_for_all = headers_for_all(settings)
        self._gate = Gate(inference, settings, full=lambda: self._calls >= settings.max_request_concurrency)
        self._slots = asyncio.Semaphore(settings.max_request_concurrency)
        self._runs: dict[str, _Run] = {}
        self._calls = 0
        self._discarding = 0
        self._jobs = asyncio.TaskGroup()
        self._id = settings.instance_id or str(uuid.uuid4())
        self._created_at = time.time()
        self._started = False
        self._draining = False

    async def run(self, stop: asyncio.Event) -> None:
        """As `serve`; once in the life of a Sidecar."""
        try:
            async with (
                loops.beside(loops.every(self._settings.beat_s, self._beat, name="beat")),
                status_server(self._settings.status_port, self._missing),
            ):
                await loops.either(self._gate.start(), stop.wait())
                if not stop.is_set():
                    await self._work(stop)
        finally:
            with suppress(Unavailable, TimeoutError):
                async with asyncio.timeout(self._settings.store_timeout_s):
                    await self._catalog.retire(self._instance())

    async def _work(self, stop: asyncio.Event) -> None:
        self._started = True
        with suppress(StoreUnavailable):
            await self._beat()
        logger.info(
            "sidecar_started", extra={"instance_id": self._id, "version_id": self._settings.function_version_id}
        )
        checking = loops.every(self._gate.interval_s, self._gate.check, name="health")
        async with loops.beside(checking), self._jobs:
            async with loops.beside(loops.every(1.0, self._consume, name="consume")):
                await stop.wait()
            await self._drain()
        logger.info("sidecar_stopped", extra={"instance_id": self._id})

    async def _consume(self) -> None:
        """Take deliveries for as long as the container is healthy."""
        await self._gate.opened()
        async with self._queue.consume(
            self._settings.function_version_id, prefetch=self._settings.max_request_concurrency
        ) as deliveries:
            await loops.either(self._accept(deliveries), self._gate.shut())

    async def _accept(self, deliveries: AsyncIterator[Delivery]) -> None:
        async for delivery in deliveries:
            run = self._runs.get(delivery.job.id)
            if run is None:
                run = self._runs[delivery.job.id] = _Run(delivery=delivery)
                run.task = self._jobs.create_task(self._hold_slot(run))
            else:
                # A copy, or the same message after the connection was lost: the run goes on with this loan. The
                # old one is over already, or is a copy that nobody needs.
                old, run.delivery = run.delivery, delivery
                await old.ack()

    async def _hold_slot(self, run: _Run) -> None:
        """Run the job once there is a slot. After a reconnect there can be more loans than slots."""
        try:
            with run.wait():
                await self._slots.acquire()
            try:
                if self._draining or not self._gate.healthy:
                    await self._end(run, RequestState.QUEUED)
                else:
                    await loops.guard(self._run(run), request_id=run.job.id)
            finally:
                self._slots.release()
        except loops.Fault:
            await asyncio.sleep(FAULT_PAUSE_S)
            with suppress(loops.Fault):
                await loops.guard(self._give_back(run, refund=False), request_id=run.job.id)
        except asyncio.CancelledError:
            await self._give_back(run, refund=run.refund)
            raise

    async def _run(self, run: _Run) -> None:
        """Take one job to its end."""
        claim = await self._claim(run)
        if claim.lease is None:
            await self._decline(run, claim)
            return
        try:
            state, outcome = await self._attempt(run, claim.lease)
        except LeaseLost as lost:
            await self._end(run, lost.state)
        except ContainerLost as lost:
            await self._hand_back(run, lost)
        else:
            stands = await self._settle(run, claim.lease, state, outcome)
            await self._end(run, stands, outcome)
            self._discard_body(run.job, stands)

    async def _claim(self, run: _Run) -> Claim:
        """The store's answer. When another worker has a lease, its end is waited for and the claim repeated."""
        job = run.job

        async def claim() -> Claim:
            return await self._results.claim(
                job, worker=self._id, lease_s=self._settings.lease_s, max_attempts=self._settings.max_attempts
            )

        answer = await loops.insist(claim, on=StoreUnavailable, name="claim")
        if answer.verdict is Verdict.HELD and not self._draining:
            with run.wait():
                await self._until_free(job, answer.wait_s)
            answer = await loops.insist(claim, on=StoreUnavailable, name="claim")
        if answer.lease is not None:
            run.lease, run.started_at = answer.lease, time.monotonic()
            run.ends_at = run.started_at + min(answer.remaining_s, self._settings.run_timeout_s)
            run.facts = {"attempt": answer.lease.attempt, "queued_s": round(max(0.0, time.time() - job.created_at), 3)}
        return answer

    async def _attempt(self, run: _Run, lease: Lease) -> tuple[RequestState, Outcome]:
        """Run the job in the container while its lease is kept.

        Raises:
            ContainerLost, LeaseLost.
        """
        try:
            async with loops.beside(self._keep(run, lease)):
                outcome = await loops.guard(
                    self._answer(run, lease), expected=(AttemptFailed, ContainerLost, LeaseLost), request_id=run.job.id
                )
        except AttemptFailed as failed:
            return failed.state, failed.outcome
        except loops.Fault:
            return RequestState.ERRORED, problem(run.job, 500, INFERENCE_FAULT)
        return RequestState.FULFILLED if outcome.status < 400 else RequestState.ERRORED, outcome

    async def _answer(self, run: _Run, lease: Lease) -> Outcome:
        job, settings = run.job, self._settings
        async with workspace(self._blobs, settings, job, self._clerk) as room:
            headers = container_headers(job, room, self._headers_for_all, run.left_s())
            if job.streaming:
                return await self._stream(run, lease, headers, room.body)
            with self._calling(run):
                answer = await self._inference.infer(
                    job,
                    headers,
                    body=room.body,
                    spill=room.scratch / "response",
                    budget_s=run.left_s(),
                    attempt=lease.attempt,
                )
            return await collect(self._blobs, settings, job, answer, room, attempt=lease.attempt, left_s=run.left_s)

    async def _stream(self, run: _Run, lease: Lease, headers: Iterable[tuple[str, str]], body: bytes | Path) -> Outcome:
        with self._calling(run):
            async with self._streams.write(lease) as writer:
                feed = Feed(self._results, writer, self._settings, run.job)
                async with (
                    loops.beside(feed.attend()),
                    self._inference.exchange(
                        run.job, headers, body=body, budget_s=run.left_s(), attempt=lease.attempt
                    ) as response,
                ):
                    return await feed.carry(response)

    @contextmanager
    def _calling(self, run: _Run) -> Iterator[None]:
        since = time.monotonic()
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            run.container_s = time.monotonic() - since

    async def _keep(self, run: _Run, lease: Lease) -> None:
        """Renew the lease until the attempt must not go on; then raise what ends it.

        A store that does not answer ends nothing: the attempt may still be settled when it is back.
        """
        async with self._results.watch(run.job.id) as watch:
            while True:
                await watch.changed(min(self._settings.renew_every_s, run.left_s()))
                if not run.left_s():
                    raise RunTimedOut(run.job)
                with suppress(StoreUnavailable):
                    state = await self._results.renew(lease, lease_s=self._settings.lease_s)
                    if state is not RequestState.RUNNING:
                        raise LeaseLost(state)

    async def _until_free(self, job: Job, wait_s: float) -> None:
        async with self._results.watch(job.id) as watch:
            with suppress(StoreUnavailable):
                await watch.read()
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

    async def _settle(self, run: _Run, lease: Lease, state: RequestState, outcome: Outcome) -> RequestState:
        """The state that stands, once it does durably; message and lease are kept until then (PROTOCOL step 9)."""

        async def settle() -> RequestState:
            return await self._results.settle(lease, run.job, state, outcome)

        return await loops.insist(settle, on=StoreUnavailable, name="settle")

    def _discard_body(self, job: Job, state: RequestState) -> None:
        """A body in the blob store is of no use once there is a result. Best effort: what a blob store that is away
        keeps is left to its own expiry."""
        ended = state in (RequestState.FULFILLED, RequestState.ERRORED)
        if job.body_key and ended and self._discarding < MOST_DISCARDED:
            self._discarding += 1
            self._jobs.create_task(self._discard(job))

    async def _discard(self, job: Job) -> None:
        try:
            with suppress(Unavailable, TimeoutError, loops.Fault):
                async with asyncio.timeout(self._settings.store_timeout_s):
                    await loops.guard(self._blobs.delete(job.body_key), expected=(Unavailable,), request_id=job.id)
        finally:
            self._discarding -= 1

    async def _hand_back(self, run: _Run, lost: ContainerLost) -> None:
        """Give the attempt back when the container is well again, or at the end of the backoff at the latest. The
        attempt counts if the container may have seen it."""
        assert run.lease is not None
        run.refund = not lost.sent
        backoff_s = min(self._settings.crash_backoff_s * 2 ** (run.lease.attempt - 1), LONGEST_BACKOFF_S)
        logger.warning("container_lost", extra={"request_id": run.job.id, "cause": str(lost), **run.facts})
        pause_s = max(backoff_s, SHORTEST_BACKOFF_S) * random.uniform(0.5, 1)  # noqa: S311  spreads load
        with run.wait(), suppress(TimeoutError):
            await self._gate.check()
            async with asyncio.timeout(pause_s):
                # Nothing but the pause slows down what costs no attempt.
                await (self._gate.opened() if lost.sent else asyncio.sleep(pause_s))
        await self._give_back(run, refund=run.refund)

    async def _give_back(self, run: _Run, *, refund: bool) -> None:
        """Release the attempt, then the message, in bounded time; the lease runs out by itself if need be."""
        state = RequestState.QUEUED
        if run.lease is not None:
            with suppress(StoreUnavailable, TimeoutError):
                async with asyncio.timeout(self._settings.store_timeout_s):
                    state = await self._results.release(run.lease, refund=refund)
        await self._end(run, state)

    async def _end(
        self, run: _Run, state: RequestState, outcome: Outcome | None = None, *, copied: bool = False
    ) -> None:
        """End the loan. A request that is not terminal is somebody's to run: a message of it must remain."""
        if self._runs.get(run.job.id) is run:
            del self._runs[run.job.id]
        if state.terminal or copied:
            await run.delivery.ack()
        else:
            await run.delivery.requeue()
        self._log(run, state, outcome)

    def _log(self, run: _Run, state: RequestState, outcome: Outcome | None) -> None:
        if run.lease is None:
            return
        facts = {
            "request_id": run.job.id,
            "function_id": run.job.function_id,
            "version_id": run.job.version_id,
            "state": state.value,
            "status": outcome.status if outcome else 0,
            "container_s": round(run.container_s, 3),
        }
        logger.info("invocation", extra=facts | run.facts)

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
            logger.info("draining", extra={"instance_id": self._id, "running": len(tasks)})
            _, late = await asyncio.wait(tasks, timeout=self._settings.drain_s)
            for task in late:
                task.cancel()

    async def _beat(self) -> None:
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
        )

    def _busy(self) -> int:
        return sum(1 for run in self._runs.values() if run.lease is not None)
