"""The verbs of an invocation: invoke (submit, then wait), status, receipt, page, cancel, withdraw, position.

The steps and their order are those of PROTOCOL §2.4; each shortcut there has a known way to lose a request.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import shutil
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from broker import assets, request_ids, streams
from broker.errors import (
    AlreadyFinished,
    CircuitOpen,
    FnqueueError,
    NotFound,
    PublishRejected,
    PublishUnconfirmed,
    QueueFull,
    QueueMissing,
    RequestExpired,
    Unavailable,
)
from broker.model import (
    Callback,
    Channel,
    Draft,
    Interest,
    Job,
    Position,
    Principal,
    Record,
    RequestFilter,
    RequestPage,
    RequestState,
    Version,
)
from broker.nouns import noun
from broker.ports import Broker, Sink, Watch
from broker.visibility import check_request, is_covered

logger = logging.getLogger(__name__)

Spawn = Callable[[Coroutine[Any, Any, Record]], Awaitable[Record]]

UNKNOWN = "no such request"
NOT_PICKED_UP = "not picked up within the caller's wait"
CANCELLED_BY_CALLER = "cancelled by its caller"
_SAFETY_READ_S = (10.0, 15.0)
# A request that is due by this process's clock may not be by the store's, nor by much the other way round.
_DUE_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyFile:
    """A body on disk, there until it was submitted. `sha256` is that of its content."""

    path: Path
    sha256: bytes

    def copy_to(self, sink: Sink) -> None:
        with self.path.open("rb") as file:
            shutil.copyfileobj(file, sink, 1024 * 1024)


@noun(frozen=True, slots=True, kw_only=True)
class Submission:
    """What one caller asks to be run. `version_id` is "" for any callable version; `headers` are already
    filtered; `passthrough` asks for the container's answers as they are, `streaming` for them while they come.
    `method` and `target` are those of the Job. `queue_timeout_s` and `run_timeout_s` 0 leave those limits to the
    version; `region` is where it is accepted. `callback` is told of its end."""

    principal: Principal
    function_id: str
    version_id: str
    headers: tuple[tuple[str, str], ...]
    body: bytes | BodyFile
    assets: tuple[str, ...] = ()
    passthrough: bool = False
    streaming: bool = False
    poll_s: int = 60
    idempotency_key: str = ""
    queue_timeout_s: float = 0.0
    run_timeout_s: float = 0.0
    region: str = ""
    method: str = "POST"
    target: str = ""
    channel: Channel | None = None
    callback: Callback | None = None


async def invoke(broker: Broker, submission: Submission, version: Version, *, wait_s: float, spawn: Spawn) -> Record:
    """Accept the submission, then wait up to `wait_s` seconds for its terminal record, or for progress.

    `spawn` runs what outlives this call, and gives its end to whoever waits: a caller who leaves interrupts the wait
    and never the steps from create to confirm. The body is let go once the request was submitted, not when the wait
    ends. An Idempotency-Key that was used before leads to the first request's record.

    Raises:
        NotFound: an asset is unknown.
        IdempotencyKeyReused, QueueFull, Unavailable: refused, and it will never run (unless the error says
            that the outcome is unknown).
        StreamNotKept: as `status`, for a key that was used before.
    """
    account, streaming = submission.principal.account, submission.streaming
    request_id = await new_id(broker, account)
    async with broker.results.watch(request_id, Interest.PROGRESS) as watch:
        work = submit(broker, submission, version, request_id, watch=wait_s > 0)
        if broker.tracing is not None:
            work = broker.tracing.accept(work, request_id=request_id, version_id=version.id)
        submitting = spawn(work)
        del submission, work
        record = await submitting
        if record.id == request_id:
            return await _until_news(watch, record, wait_s)
    try:
        record = await wait(broker, record.id, wait_s=wait_s) or record
        return record if streaming else await streams.gathered(broker, record)
    except Unavailable as exc:  # no refusal: it was accepted
        if record.state.terminal:
            raise Unavailable(str(exc), retry_after_s=exc.retry_after_s, outcome_unknown=True) from exc
        return record


async def submit(broker: Broker, submission: Submission, version: Version, request_id: str, *, watch: bool) -> Record:
    """Create the record, then publish and await the confirm. Errors as `invoke`."""
    account, key = submission.principal.account, submission.idempotency_key
    if submission.assets:
        await assets.resolve(broker, account, submission.assets)
    digest = _digest(submission) if key else ""
    if key:
        bound = await broker.results.remember_key(account, key, request_id=request_id, digest=digest)
    else:
        bound = request_id
    draft = Draft(
        id=bound,
        account=account,
        function_id=version.function_id,
        version_id=version.id,
        digest=digest,
        deadline_s=broker.settings.request_deadline_s,
        queue_timeout_s=submission.queue_timeout_s or version.queue_timeout_s,
        run_timeout_s=submission.run_timeout_s or version.run_timeout_s,
        size_bytes=_size_bytes(submission.body),
        callback=submission.callback,
    )
    try:
        record = await _create(broker, draft, submission, watch=watch)
    except FnqueueError:
        if key and bound == request_id:
            await broker.results.forget_key(account, key, request_id=request_id)
        raise
    if record.state is RequestState.ABANDONED and bound != request_id:
        await broker.results.forget_key(account, key, request_id=bound)
        return await submit(broker, submission, version, request_id, watch=watch)
    return record


async def wait(broker: Broker, request_id: str, *, wait_s: float) -> Record | None:
    """The record once it is terminal or has progress that no poll was given, or as it stands after `wait_s` seconds;
    None if there is none."""
    async with broker.results.watch(request_id, Interest.PROGRESS) as watch:
        record = await watch.read()
        return await _until_news(watch, record, wait_s) if record else None


async def status(broker: Broker, principal: Principal, request_id: str, *, wait_s: float) -> Record:
    """The caller's request, after waiting up to `wait_s` seconds for its end, or for progress.

    Each update is given to one call, in order; a call that gets none is given the last one again.
    A request that was lost with a wiped store reads `queued` for as long as it may still be run and healed.

    Raises:
        NotFound: unknown or not the caller's.
        Forbidden: the key's resources do not cover the request's function.
        RequestExpired: it was the caller's, and its result has passed its time to live.
        StreamNotKept: its answer was streamed and is not kept as a whole.
    """
    return await streams.gathered(broker, await poll(broker, principal, request_id, wait_s=wait_s))


async def poll(broker: Broker, principal: Principal, request_id: str, *, wait_s: float) -> Record:
    """As `status`, and a streamed answer is left where it is. Raises as `status`, but for StreamNotKept."""
    _own_id(broker, principal, request_id)
    return await _known(broker, principal, request_id, await wait(broker, request_id, wait_s=wait_s))


async def find(broker: Broker, principal: Principal, request_id: str) -> Record:
    """The caller's request as it stands; takes no progress from polls. Raises as `poll`."""
    _own_id(broker, principal, request_id)
    return await _known(broker, principal, request_id, await broker.results.read(request_id))


async def receipt(broker: Broker, principal: Principal, request_id: str) -> Record:
    """The caller's request as it stands, without its outcome. Raises as `status`."""
    _own_id(broker, principal, request_id)
    return await _known(broker, principal, request_id, await broker.results.glance(request_id))


async def page(
    broker: Broker, principal: Principal, wanted: RequestFilter, *, limit: int, after: int = 0
) -> RequestPage:
    """The newest requests of the caller's account, as `Results.page`; but for those of functions that the key's
    resources do not cover, which may make the page shorter still."""
    found = await broker.results.page(principal.account, wanted, limit=limit, after=after)
    covered: dict[str, bool] = {}
    for record in found.records:
        if record.version_id not in covered:
            covered[record.version_id] = await is_covered(broker, principal, record)
    return replace(found, records=tuple(record for record in found.records if covered[record.version_id]))


async def cancel(broker: Broker, principal: Principal, request_id: str) -> Record:
    """Make sure that no attempt starts from now on, and tell the worker that runs one. Idempotent.

    Raises NotFound, or AlreadyFinished when there is a result.
    """
    _own_id(broker, principal, request_id)
    record = await broker.results.read(request_id)
    if record is None:
        raise NotFound(UNKNOWN)
    await _own(broker, principal, record)
    before = await broker.results.cancel(request_id, reason=CANCELLED_BY_CALLER)
    if before is None:
        raise NotFound(UNKNOWN)
    if before.terminal and before is not RequestState.CANCELLED:
        raise AlreadyFinished(f"the request is already {before}")
    return replace(record, state=RequestState.CANCELLED, reason=CANCELLED_BY_CALLER)


async def withdraw(broker: Broker, record: Record, *, reason: str = NOT_PICKED_UP) -> Record:
    """End a request whose caller does not wait for it any more, and return it as it then stands."""
    await broker.results.cancel(record.id, reason=reason)
    return await broker.results.read(record.id) or record


def owns_id(broker: Broker, principal: Principal, request_id: str) -> bool:
    """Whether an ID was made for the caller's account, told without asking the store."""
    return request_ids.belongs(_secret(broker), principal.account, request_id)


async def new_id(broker: Broker, account: str) -> str:
    """For a request of this account, in the present life of the store's data. Raises StoreUnavailable."""
    return request_ids.mint(_secret(broker), account, (await broker.results.epoch()).number)


async def position(broker: Broker, principal: Principal, request_id: str) -> tuple[Record, Position]:
    """Where the caller's request stands in its version's queue. Raises NotFound."""
    record = await find(broker, principal, request_id)
    return record, await broker.results.position(record)


async def _create(broker: Broker, draft: Draft, submission: Submission, *, watch: bool) -> Record:
    body, body_key, body_sha256 = await _park_body(broker, draft, submission.body)
    try:
        record = await broker.results.create(draft, queue_limit=broker.settings.queue_limit, watch=watch)
    except FnqueueError:
        if body_key:
            await broker.blobs.discard(body_key)
        raise
    if record.state is not RequestState.QUEUED:
        return record
    job = Job(
        id=record.id,
        account=record.account,
        function_id=record.function_id,
        version_id=record.version_id,
        subject=submission.principal.subject,
        created_at=record.created_at,
        deadline_at=record.deadline_at,
        digest=draft.digest,
        headers=submission.headers,
        body=body,
        body_key=body_key,
        body_sha256=body_sha256,
        blob_bytes=draft.size_bytes if body_key else 0,
        assets=submission.assets,
        passthrough=submission.passthrough,
        streaming=submission.streaming,
        poll_s=submission.poll_s,
        queue_deadline_at=record.queue_deadline_at,
        run_timeout_s=record.run_timeout_s,
        region=submission.region,
        method=submission.method,
        target=submission.target,
        channel=submission.channel,
        callback=submission.callback,
    )
    try:
        await publish(broker, job)
    except Unavailable as exc:
        return await _refuse(broker, record, exc)
    return record


async def _park_body(broker: Broker, draft: Draft, body: bytes | BodyFile) -> tuple[bytes, str, str]:
    """Bodies that are too large for a message wait in the blob store; nothing waits in this process. What goes into the
    message, or the blob's key and digest."""
    key = input_key(draft.account, draft.id)
    if isinstance(body, BodyFile):
        await broker.blobs.upload(key, body.copy_to, content_type="application/octet-stream", scratch=body.path.parent)
        return b"", key, body.sha256.hex()
    if len(body) <= broker.settings.inline_body_bytes:
        return body, "", ""
    return b"", key, await broker.blobs.put(key, body, content_type="application/octet-stream")


def input_key(account: str, request_id: str) -> str:
    """Where in the blob store the body of a request is that no message carries."""
    return f"inputs/{account}/{request_id}"


async def publish(broker: Broker, job: Job) -> None:
    """Publish until confirmed, over new connections, for as long as a caller may be kept waiting. Copies are
    harmless: a claim runs a request once. Raises as `Queue.publish`."""
    loop = asyncio.get_running_loop()
    until = loop.time() + broker.settings.accept_timeout_s
    pause_s = 0.05
    while True:
        left_s = until - loop.time()
        try:
            return await broker.queue.publish(job, timeout_s=min(left_s, broker.settings.publish_timeout_s))
        except (PublishRejected, QueueMissing, CircuitOpen):
            raise
        except Unavailable as exc:
            logger.warning("publish_retried", extra={"request_id": job.id, "cause": type(exc).__name__})
            pause_s = min(pause_s * 2, 1.0)
            if until - loop.time() <= pause_s:
                raise
            await asyncio.sleep(random.uniform(pause_s / 2, pause_s))  # noqa: S311  spreads load, guards nothing


async def _refuse(broker: Broker, record: Record, cause: Unavailable) -> Record:
    """PROTOCOL P5: a refusal after create is only honest behind a tombstone."""
    try:
        abandoned = await broker.results.abandon(record.id, record.version_id, reason=str(cause))
    except Unavailable as exc:
        raise Unavailable(str(cause), retry_after_s=cause.retry_after_s, outcome_unknown=True) from exc
    if not abandoned:
        return record
    if isinstance(cause, PublishRejected):
        raise QueueFull(str(cause), retry_after_s=cause.retry_after_s) from cause
    if isinstance(cause, PublishUnconfirmed):
        raise Unavailable(str(cause), retry_after_s=cause.retry_after_s) from cause
    raise cause


async def _until_news(watch: Watch, record: Record, wait_s: float) -> Record:
    """PROTOCOL R2: a hint only means "read again", and a lost hint costs one safety interval."""
    loop = asyncio.get_running_loop()
    until = loop.time() + wait_s
    while not (record.state.terminal or record.unread or record.flowing) and (left_s := until - loop.time()) > 0:
        await watch.changed(min(left_s, _until_read_s(record)))
        try:
            record = await watch.read() or record
        except Unavailable:
            await watch.changed(min(max(0.0, until - loop.time()), 1.0))
    return record


def _until_read_s(record: Record) -> float:
    """An end that nobody announces is looked for when it is due: whoever reads makes it."""
    safety_s = random.uniform(*_SAFETY_READ_S)  # noqa: S311  spreads load
    if record.state is not RequestState.QUEUED:
        return safety_s
    due_s = record.due_at - time.time()
    return min(safety_s, due_s if due_s > 0 else _DUE_AGAIN_S)


async def _known(broker: Broker, principal: Principal, request_id: str, record: Record | None) -> Record:
    return await (_own(broker, principal, record) if record else _missing(broker, principal, request_id))


async def _missing(broker: Broker, principal: Principal, request_id: str) -> Record:
    epoch = await broker.results.epoch(fresh=True)
    deadline_at = epoch.born_at + broker.settings.request_deadline_s
    now = epoch.now
    if request_ids.epoch_of(request_id) == epoch.number or now > deadline_at:
        raise RequestExpired("the request's time to live has passed")
    return Record(
        id=request_id,
        account=principal.account,
        function_id="",
        version_id="",
        state=RequestState.QUEUED,
        created_at=epoch.born_at,
        deadline_at=deadline_at,
    )


def _own_id(broker: Broker, principal: Principal, request_id: str) -> None:
    if not owns_id(broker, principal, request_id):
        raise NotFound(UNKNOWN)


async def _own(broker: Broker, principal: Principal, record: Record) -> Record:
    if record.account != principal.account or record.state is RequestState.ABANDONED:
        raise NotFound(UNKNOWN)
    await check_request(broker, principal, record)
    return record


def _secret(broker: Broker) -> bytes:
    return broker.settings.secret_key.get_secret_value().encode()[:64]


def _size_bytes(body: bytes | BodyFile) -> int:
    return body.path.stat().st_size if isinstance(body, BodyFile) else len(body)


def _digest(submission: Submission) -> str:
    """What makes two submissions the same one."""
    head = f"{submission.function_id}\n{submission.version_id}\n{','.join(submission.assets)}\n"
    if submission.target:
        head += f"{submission.method} {submission.target}\n"
    digest = hashlib.sha256(head.encode())
    digest.update(submission.body.sha256 if isinstance(submission.body, BodyFile) else submission.body)
    return digest.hexdigest()
