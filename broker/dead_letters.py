"""The verbs of a dead letter: keep, find, page, causes, redrive (one or many), purge (one or many).

A dead letter is the input of a request that ended `dead`, kept for its owner. Started again, it is another request with
an ID of its own; under which, is settled before anything else is done, so that whoever is cut off in the middle begins
again where he was: one dead letter, one redrive, however often it is asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from broker.errors import FnqueueError, NotFound, QueueFull, StateConflict, TryLater, Unavailable
from broker.invocations import input_key, new_id, owns_id, publish
from broker.model import (
    DeadLetter,
    DeadLetterFilter,
    DeadLetterPage,
    Draft,
    Job,
    Principal,
    Rate,
    RequestState,
    Tally,
    Version,
    Window,
)
from broker.ports import Broker
from broker.visibility import check_request, is_covered

UNKNOWN = "no such dead letter"
# A body above this is kept in the blob store: the store of results is memory.
KEPT_INLINE_BYTES = 16 * 1024
_WAIT_AT_LEAST_S = 0.01

Which = DeadLetterFilter | Sequence[str]
Pick = Callable[[DeadLetter], Awaitable[Version]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Redriven:
    """`request_id` was started again as `redriven_as`."""

    request_id: str
    redriven_as: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """`request_id` was not started again."""

    request_id: str
    error: FnqueueError


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What became of some dead letters. `after` is where to go on if there may be `more`; `stopped` says what ended the
    batch before its time."""

    redriven: tuple[Redriven, ...] = ()
    left: tuple[Left, ...] = ()
    after: int = 0
    stopped: TryLater | None = None
    more: bool = False


async def keep(broker: Broker, job: Job) -> None:
    """Keep the input of a request that is dead. Idempotent. Raises Unavailable.

    Of what went over a channel nothing is kept: it was never in the job.
    """
    if job.channel is not None:
        return
    size_bytes, kept = len(job.body), job
    if job.body_key:
        blob = await broker.blobs.head(job.body_key)
        size_bytes = blob.size_bytes if blob else 0
    elif len(job.body) > KEPT_INLINE_BYTES:
        kept = replace(job, body=b"", body_key=input_key(job.account, job.id))
        await broker.blobs.put(kept.body_key, job.body, content_type="application/octet-stream")
    if not await broker.dead_letters.keep(kept, size_bytes=size_bytes) and kept.body_key:
        await broker.blobs.discard(kept.body_key)


async def find(broker: Broker, principal: Principal, request_id: str) -> DeadLetter:
    """The caller's dead letter, with its job unless the caller only acts for its account. Raises NotFound, Forbidden
    (the key's resources do not cover its function)."""
    letter = await _own(broker, principal, request_id)
    return replace(letter, job=None, body_key="") if principal.super_admin else letter


async def page(
    broker: Broker, principal: Principal, wanted: DeadLetterFilter, *, limit: int, after: int = 0
) -> DeadLetterPage:
    """Those of the caller's account, as `DeadLetters.page`, but for those of functions that the key's resources do not
    cover."""
    found = await broker.dead_letters.page(principal.account, wanted, limit=limit, after=after)
    return replace(found, letters=tuple([one for one in found.letters if await is_covered(broker, principal, one)]))


async def causes(broker: Broker, principal: Principal, wanted: DeadLetterFilter) -> list[Tally]:
    """How many of those that `page` shows died of what."""
    tallies = await broker.dead_letters.tally(principal.account, wanted)
    return [tally for tally in tallies if await is_covered(broker, principal, tally)]


async def redrive(broker: Broker, principal: Principal, request_id: str, *, pick: Pick, after: str = "") -> Redriven:
    """Start the caller's dead request once more, as a request with the ID that is returned; asked again, it is the
    same. `pick` chooses the version. To start it yet again, `after` names the request that was made of it last.

    The new request's limits begin now. Its answer is kept as a whole, also where the first caller wanted a stream.

    Raises:
        NotFound: as `find`; or its input is gone.
        StateConflict: the request `after` has not ended.
        QueueFull, Unavailable: not started; asked again, it goes on.
    """
    letter = await _own(broker, principal, request_id)
    if letter.redriven_at and letter.redriven_as != after:
        return Redriven(request_id=letter.id, redriven_as=letter.redriven_as)
    # Any other ID is of no meaning here, and may be somebody else's.
    after = after if after == letter.redriven_as else ""
    if after:
        before = await broker.results.glance(after)
        if before is not None and not before.state.terminal:
            raise StateConflict(f"request {after} is still {before.state}")
    version = await pick(letter)
    while True:
        bound = await broker.dead_letters.bind(letter.id, await new_id(broker, letter.account), after=after)
        if bound is None:
            raise NotFound(UNKNOWN)
        if bound.done or await _start(broker, letter, bound.id, version):
            break
        after = bound.id
    if not bound.done:
        await broker.dead_letters.redriven(letter.id, bound.id)
    return Redriven(request_id=letter.id, redriven_as=bound.id)


async def redrive_many(
    broker: Broker,
    principal: Principal,
    which: Which,
    *,
    pick: Pick,
    limit: int,
    per_s: int,
    within_s: float,
    after: int = 0,
) -> Batch:
    """Redrive the dead letters of these IDs, or those that a filter keeps, from the place `after` on: at most `limit`,
    and as many as can begin within `within_s` seconds.

    In no second are more than `per_s` begun in the caller's account, whoever else asks. One that cannot be started is
    left, and the next one begun; what has to be tried later ends the batch.
    """
    until = asyncio.get_running_loop().time() + within_s
    redriven: list[Redriven] = []
    left: list[Left] = []
    stopped: TryLater | None = None
    while len(redriven) + len(left) < limit:
        following = await _next(broker, principal, which, after)
        if following is None:
            return Batch(redriven=tuple(redriven), left=tuple(left))
        request_id, place = following
        try:
            if not await _turn(broker, principal.account, per_s, until):
                break
            redriven.append(await redrive(broker, principal, request_id, pick=pick))
        except TryLater as exc:
            stopped = exc
            break
        except FnqueueError as exc:
            left.append(Left(request_id=request_id, error=exc))
        after = place
    return Batch(redriven=tuple(redriven), left=tuple(left), after=after, stopped=stopped, more=True)


async def purge(broker: Broker, principal: Principal, request_id: str) -> None:
    """Remove the caller's dead letter and its input; the record stays. Raises as `find`, and Unavailable."""
    letter = await _own(broker, principal, request_id)
    if letter.body_key:  # first, so that whoever is cut off here can ask again
        await broker.blobs.discard(letter.body_key)
    await broker.dead_letters.drop(letter.account, letter.id)


async def purge_many(
    broker: Broker, principal: Principal, which: Which, *, limit: int, after: int = 0
) -> tuple[int, int, bool]:
    """Remove the dead letters of these IDs, or those that a filter keeps, from the place `after` on: at most `limit`.
    Returns how many, where to go on, and whether there may be more. Unknown IDs are passed over."""
    count = 0
    while count < limit:
        following = await _next(broker, principal, which, after)
        if following is None:
            return count, 0, False
        request_id, after = following
        try:
            await purge(broker, principal, request_id)
        except NotFound:
            continue
        count += 1
    return count, after, True


async def _start(broker: Broker, letter: DeadLetter, request_id: str, version: Version) -> bool:
    """Accept the dead request's input as a request of this ID, or see that it is accepted. False when the ID is spent:
    a try that was refused left a tombstone.

    Raises NotFound (the input is gone), QueueFull, Unavailable.
    """
    job = letter.job
    if job is None:
        raise NotFound("the input of the request is not there any more")
    body_key = input_key(letter.account, request_id) if job.body_key else ""
    if body_key:
        await broker.blobs.copy(job.body_key, body_key)
    draft = Draft(
        id=request_id,
        account=letter.account,
        function_id=version.function_id,
        version_id=version.id,
        digest=job.digest,
        deadline_s=broker.settings.request_deadline_s,
        queue_timeout_s=max(0.0, job.queue_deadline_at - job.created_at) if job.queue_deadline_at else 0.0,
        run_timeout_s=job.run_timeout_s,
        size_bytes=letter.size_bytes,
        callback=job.callback,
    )
    try:
        record = await broker.results.create(draft, queue_limit=broker.settings.queue_limit, watch=False)
    except QueueFull:
        await broker.dead_letters.unbind(letter.id, request_id)
        if body_key:
            await broker.blobs.discard(body_key)
        raise
    if record.state is RequestState.ABANDONED:
        return False
    if record.state is RequestState.QUEUED:
        again = replace(
            job,
            id=record.id,
            function_id=record.function_id,
            version_id=record.version_id,
            created_at=record.created_at,
            deadline_at=record.deadline_at,
            queue_deadline_at=record.queue_deadline_at,
            body_key=body_key,
            streaming=False,
        )
        await _publish(broker, letter, again)
    return True


async def _publish(broker: Broker, letter: DeadLetter, job: Job) -> None:
    """Nobody was told of the new request yet. What is refused leaves no request behind that might still run; if even
    that cannot be seen to, the letter stays bound to it, and whoever asks again publishes it again."""
    try:
        await publish(broker, job)
    except Unavailable as exc:
        if await broker.results.abandon(job.id, job.version_id, reason=str(exc)):
            await broker.dead_letters.unbind(letter.id, job.id)
        raise


async def _next(broker: Broker, principal: Principal, which: Which, after: int) -> tuple[str, int] | None:
    """The ID behind a place, and its own place; None when there are no more."""
    if not isinstance(which, DeadLetterFilter):
        return (which[after], after + 1) if after < len(which) else None
    while True:
        found = await broker.dead_letters.page(principal.account, which, limit=1, after=after)
        for letter in found.letters:
            if await is_covered(broker, principal, letter):
                return letter.id, found.after
        if not found.after:
            return None
        after = found.after


async def _turn(broker: Broker, account: str, per_s: int, until: float) -> bool:
    """Wait until one more may begin in the account; False if that is not before `until`, in loop time."""
    loop = asyncio.get_running_loop()
    window = Window(counter="redrive", policy="second", rate=Rate(limit=per_s, window_s=1))
    while loop.time() < until:
        taken = await broker.counters.take(account, [window])
        if taken.granted:
            return True
        await asyncio.sleep(max(taken.retry_after_s, _WAIT_AT_LEAST_S))
    return False


async def _own(broker: Broker, principal: Principal, request_id: str) -> DeadLetter:
    letter = await broker.dead_letters.read(request_id) if owns_id(broker, principal, request_id) else None
    if letter is None or letter.account != principal.account:
        raise NotFound(UNKNOWN)
    await check_request(broker, principal, letter)
    return letter
