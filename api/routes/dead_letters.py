"""Dead letters: what they died of, their inputs, starting them again, and throwing them away (fnqueue's own)."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from api import cursors, headers, payloads, queries
from api.definitions import instant
from api.front import Front
from broker import dead_letters
from broker.limits import require
from broker.model import DeadCause, DeadLetter, DeadLetterFilter, Job, Principal, Tally, Version
from fnqueue import wire

PAGE_DEFAULT = 50
PAGE_MAX = 200
CAUSES = tuple(cause.value for cause in DeadCause)
# How long one call for many goes on before it answers, with a cursor.
_BATCH_S = 15.0
_INPUT_URL_S = 3600.0


async def list_letters(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """Those of the caller's account that are kept still. A page looks at a bounded number of them, so that one with
    filters may be short, or empty, and have a next one."""
    limit = queries.integer(request.query, "limit", absent=PAGE_DEFAULT, least=1, most=PAGE_MAX)
    after = cursors.place(request.query.get("cursor", ""))
    found = await dead_letters.page(front.broker, principal, _wanted(request), limit=limit, after=after)
    return payloads.answer(
        wire.DeadLetterList(
            dead_letters=[wire.DeadLetter(**_summary(letter)) for letter in found.letters],
            cursor=cursors.cursor(found.after) if found.after else None,
        )
    )


async def causes(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """Of all those that the list would show, page by page."""
    return payloads.answer(present(await dead_letters.causes(front.broker, principal, _wanted(request))))


def present(tallies: Sequence[Tally]) -> wire.DeadLetterCauses:
    grouped: defaultdict[str, list[Tally]] = defaultdict(list)
    for tally in tallies:
        grouped[tally.cause].append(tally)
    groups = [_cause(cause, of_it) for cause, of_it in grouped.items()]
    return wire.DeadLetterCauses(causes=sorted(groups, key=lambda group: -group.count))


async def get(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """With its input; whoever acts for another account is not shown that."""
    letter = await dead_letters.find(front.broker, principal, _request_id(request))
    detail = wire.DeadLetterDetail(**_summary(letter), input=_input(front, letter.job) if letter.job else None)
    return payloads.answer(detail)


async def redrive(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """As a new request, with limits of its own that begin now. However often it is asked, there is one."""
    request_id = _request_id(request)
    wanted = await payloads.read(front, request, wire.RedriveDeadLetter)
    pick = _Pick(front, principal, str(wanted.function_version_id or ""))
    done = await dead_letters.redrive(
        front.broker, principal, request_id, pick=pick, after=str(wanted.after) if wanted.after else ""
    )
    return payloads.answer(_redriven(done), status=202)


async def redrive_many(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """Those that were started again before are passed over, so that a call which was cut off can be made again."""
    wanted = await payloads.read(front, request, wire.RedriveDeadLetters)
    most_per_s = front.settings.redrives_per_s
    batch = await dead_letters.redrive_many(
        front.broker,
        principal,
        _which(wanted.select, redriven=False),
        pick=_Pick(front, principal, str(wanted.function_version_id or "")),
        limit=wanted.limit,
        per_s=min(wanted.per_second or most_per_s, most_per_s),
        within_s=_BATCH_S,
        after=cursors.place(wanted.cursor or ""),
    )
    return payloads.answer(
        wire.DeadLettersRedriven(
            redriven=[_redriven(one) for one in batch.redriven],
            left=[wire.DeadLetterLeft(request_id=one.request_id, detail=str(one.error)) for one in batch.left],
            stopped=str(batch.stopped) if batch.stopped else None,
            retry_after_seconds=batch.stopped.retry_after_s if batch.stopped else None,
            cursor=cursors.cursor(batch.after) if batch.more else None,
        )
    )


async def purge(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """And its input; the receipt of the request stays for its time."""
    await dead_letters.purge(front.broker, principal, _request_id(request))
    return web.Response(status=204)


async def purge_many(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """Those that were started again too."""
    wanted = await payloads.read(front, request, wire.PurgeDeadLetters)
    count, after, more = await dead_letters.purge_many(
        front.broker,
        principal,
        _which(wanted.select, redriven=None),
        limit=wanted.limit,
        after=cursors.place(wanted.cursor or ""),
    )
    return payloads.answer(wire.DeadLettersPurged(purged=count, cursor=cursors.cursor(after) if more else None))


class _Pick:
    """Chooses the version of a redrive as an invocation would: of those that the caller may call now."""

    def __init__(self, front: Front, principal: Principal, version_id: str) -> None:
        self._front = front
        self._principal = principal
        self._version_id = version_id

    async def __call__(self, letter: DeadLetter) -> Version:
        """Raises as `CallableVersions.pick`, and RateLimited."""
        version_id = self._version_id or letter.version_id
        version = await self._front.versions.pick(self._principal, letter.function_id, version_id)
        require(await self._front.rate_limiter.take(self._principal, version))
        return version


def _request_id(request: web.Request) -> str:
    return headers.uuid(request.match_info["request_id"], field="requestId")


def _wanted(request: web.Request) -> DeadLetterFilter:
    query = request.query
    return DeadLetterFilter(
        function_id=headers.uuid(query["functionId"], field="functionId") if "functionId" in query else "",
        version_id=(
            headers.uuid(query["functionVersionId"], field="functionVersionId") if "functionVersionId" in query else ""
        ),
        causes=frozenset(queries.choices(query, "cause", CAUSES)),
        since=queries.instant(query, "diedAfter"),
        until=queries.instant(query, "diedBefore"),
        redriven=queries.boolean(query, "redriven", absent=False) if query.get("redriven") else None,
    )


def _which(select: wire.SelectDeadLetters, *, redriven: bool | None) -> dead_letters.Which:
    if select.request_ids:
        return [str(each) for each in select.request_ids]
    return DeadLetterFilter(
        function_id=str(select.function_id or ""),
        version_id=str(select.function_version_id or ""),
        causes=frozenset(queries.among(select.causes or [], "causes", CAUSES)),
        since=select.died_after.timestamp() if select.died_after else 0.0,
        until=select.died_before.timestamp() if select.died_before else 0.0,
        redriven=redriven,
    )


def _summary(letter: DeadLetter) -> dict[str, Any]:
    return {
        "request_id": letter.id,
        "function_id": letter.function_id,
        "function_version_id": letter.version_id,
        "cause": letter.cause,
        "reason": letter.reason or None,
        "attempts": letter.attempts,
        "size_bytes": letter.size_bytes,
        "created_at": instant(letter.created_at),
        "died_at": instant(letter.died_at),
        "kept_until": instant(letter.kept_until),
        "redriven_as": letter.redriven_as if letter.redriven_at else None,
        "redriven_at": instant(letter.redriven_at) if letter.redriven_at else None,
    }


def _input(front: Front, job: Job) -> wire.DeadLetterInput:
    blobs = front.broker.blobs
    url = blobs.download_url(job.body_key, filename=job.id, expires_s=_INPUT_URL_S) if job.body_key else None
    return wire.DeadLetterInput(
        method=job.method,
        target=job.target or None,
        headers=[wire.HeaderField(name=name, value=value) for name, value in job.headers],
        body=None if url else base64.b64encode(job.body).decode(),
        body_url=url,
        input_assets=list(job.assets) or None,
    )


def _cause(cause: str, tallies: Sequence[Tally]) -> wire.DeadLetterCause:
    return wire.DeadLetterCause(
        cause=cause,
        count=sum(tally.count for tally in tallies),
        first_died_at=instant(min(tally.first_at for tally in tallies)),
        last_died_at=instant(max(tally.last_at for tally in tallies)),
        versions=[
            wire.DeadLetterVersionCount(
                function_id=tally.function_id, function_version_id=tally.version_id, count=tally.count
            )
            for tally in tallies
        ],
    )


def _redriven(done: dead_letters.Redriven) -> wire.DeadLetterRedriven:
    return wire.DeadLetterRedriven(request_id=done.request_id, redriven_as=done.redriven_as)
