"""POST of an invocation and polling for its result (contract/invocation.md §3, §4)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web
from multidict import MultiMapping

from api import answers, auth, headers, streams
from api.answers import Answer, Pending, Speaker
from api.bodies import Body
from api.calls import Accepting, Interrupted
from api.front import Front
from api.notes import notes_of
from api.routes.webhooks import callback
from broker import invocations, limits, webhooks
from broker.errors import Overloaded, StoreUnavailable
from broker.invocations import BodyFile, Submission
from broker.model import Callback, Principal, Record, RequestState, Version
from broker.nouns import noun
from broker.streams import gathered

SCOPE = "invoke_function"
STATUS_PATH = "/v2/nvcf/pexec/status/"


@noun(frozen=True, slots=True, kw_only=True)
class Call:
    """An invocation whose credentials and headers are good."""

    principal: Principal
    version: Version
    function_id: str
    version_id: str
    wait: headers.Wait
    assets: tuple[str, ...]
    forwarded: tuple[tuple[str, str], ...]
    passthrough: bool
    streaming: bool
    region: str
    idempotency_key: str = ""
    queue_timeout_s: float = 0.0
    run_timeout_s: float = 0.0
    method: str = "POST"
    target: str = ""
    callback: Callback | None = None

    def submission(self, body: bytes | BodyFile) -> Submission:
        return Submission(
            principal=self.principal,
            function_id=self.function_id,
            version_id=self.version_id,
            headers=self.forwarded,
            body=body,
            assets=self.assets,
            passthrough=self.passthrough,
            streaming=self.streaming,
            poll_s=max(1, int(self.wait.seconds)),
            idempotency_key=self.idempotency_key,
            queue_timeout_s=self.queue_timeout_s,
            run_timeout_s=self.run_timeout_s,
            region=self.region,
            method=self.method,
            target=self.target,
            callback=self.callback,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How one way of invoking answers: where it sends who has to ask again, and in whose name. `origin` is this
    server's where the request's own Host is not."""

    status_path: str = STATUS_PATH
    speaker: Speaker = Speaker.SERVER
    origin: str = ""


PLAIN = Manner()


@noun(frozen=True, slots=True, kw_only=True)
class Question:
    """Who asks for which request, and for how long."""

    principal: Principal
    request_id: str
    wait: headers.Wait


async def invoke(front: Front, request: web.Request) -> web.StreamResponse:
    """Accept the request and hold the call until it ends, or for as long as the caller wishes. A caller that accepts
    `text/event-stream` is given the answer while it comes."""
    return respond(await accept(front, request, request.match_info))


async def poll(front: Front, request: web.Request) -> web.StreamResponse:
    """Where the request stands, after holding the call as `invoke` does. With `Accept: text/event-stream` the answer
    of a request that was made with it is given while it comes, behind the event that `Last-Event-ID` names."""
    return respond(await look_up(front, request, request.match_info))


async def accept(front: Front, request: web.Request, named: Mapping[str, str]) -> Answer | web.StreamResponse:
    """As `invoke`, for the IDs that its path names."""
    call = await admit(front, request, named)
    return applied(await run(front, request, call, await front.bodies.read(request)), call.wait)


async def look_up(front: Front, request: web.Request, named: Mapping[str, str]) -> Answer | web.StreamResponse:
    """As `poll`, for the ID that its path names."""
    asked = await ask(front, request, named)
    if head_of(front, request).wants_events:
        record = notes_of(request).record = await invocations.find(front.broker, asked.principal, asked.request_id)
        last_id = request.headers.get(headers.LAST_EVENT_ID, "")
        if (response := await streams.opened(front, record, asked.wait, last_id=last_id)) is not None:
            return response
        asked = replace(asked, wait=replace(asked.wait, seconds=0))  # it is over
    record = notes_of(request).record = await _wait(front, asked)
    if record.flowing:
        at_once = replace(asked.wait, seconds=0)
        if (response := await streams.opened(front, record, at_once)) is not None:
            return response
        record = notes_of(request).record = await invocations.find(front.broker, asked.principal, asked.request_id)
    return applied(await _answer(front, request, record, PLAIN), asked.wait)


async def run(
    front: Front, request: web.Request, call: Call, held: Body, manner: Manner = PLAIN
) -> Answer | web.StreamResponse:
    """The answer to a call that was admitted, at its end or that of its caller's patience; of a streaming one, the
    response that gives it while it comes."""
    notes = notes_of(request)
    record = notes.record = await _submit(front, call, held, task=notes.task)
    if call.streaming:
        streamed, record = await _stream(front, request, record, call, manner)
        if streamed is not None:
            return streamed
    if _gives_up(front, request, call, record):
        record = await invocations.withdraw(front.broker, record)
        if record.state is RequestState.CANCELLED:
            return answers.timed_out(record)
    return await _answer(front, request, record, manner)


async def ask(front: Front, request: web.Request, named: Mapping[str, str]) -> Question:
    """What the path and the headers say, in upstream's order of checks. `named` is what the path names."""
    head = head_of(front, request)
    token, wait = auth.good(head.bearer), head.wait
    request_id = headers.uuid(named["request_id"], field="requestId")
    return Question(principal=await auth.admit(front, token, named, SCOPE), request_id=request_id, wait=wait)


async def look(front: Front, request: web.Request, asked: Question, manner: Manner = PLAIN) -> Answer:
    """How the request answers, at its end or that of its caller's patience."""
    record = notes_of(request).record = await _wait(front, asked)
    return await _answer(front, request, record, manner)


async def _wait(front: Front, asked: Question) -> Record:
    """The record at its end, or that of its caller's patience, or when its body flows."""
    try:
        with front.calls.waiting(asked.principal.account if asked.wait.seconds else ""):
            return await invocations.poll(front.broker, asked.principal, asked.request_id, wait_s=asked.wait.seconds)
    except Interrupted:
        return await invocations.poll(front.broker, asked.principal, asked.request_id, wait_s=0)


async def _stream(
    front: Front, request: web.Request, record: Record, call: Call, manner: Manner
) -> tuple[web.StreamResponse | None, Record]:
    """The answer from its first byte on, or None and the record as it then stands."""
    # Only a key can lead to a request that its caller has heard of before. A container in its own name has IDs of its
    # own.
    resumes = call.idempotency_key and not call.target
    last_id = request.headers.get(headers.LAST_EVENT_ID, "") if resumes else ""
    try:
        response = await streams.opened(front, record, call.wait, last_id=last_id, speaker=manner.speaker)
    except asyncio.CancelledError:
        if front.settings.on_disconnect == "cancel":
            front.calls.spawn(invocations.cancel(front.broker, call.principal, record.id))
        raise
    if response is None:
        with suppress(StoreUnavailable):
            record = await invocations.status(front.broker, call.principal, record.id, wait_s=0)
    return response, record


async def admit(front: Front, request: web.Request, named: Mapping[str, str]) -> Call:
    """The checks in upstream's order (contract/invocation.md §3.2), all of them before the body is read. `named` is
    what the path names.

    The rate limit comes last, so that nothing that could never run counts; a body that then does not come, counts.
    """
    arrived, head = request.headers, head_of(front, request)
    token = auth.good(head.bearer)
    function_id = headers.uuid(named["function_id"], field="functionId")
    version_id = headers.uuid(named["version_id"], field="functionVersionId") if "version_id" in named else ""
    options = head.survey.options
    assets = headers.asset_references(arrived) if options else ()
    principal = await auth.admit(front, token, named, SCOPE)
    version = front.versions.known(principal, function_id, version_id) or await front.versions.pick(
        principal, function_id, version_id
    )
    streaming = head.wants_events
    call = Call(
        principal=principal,
        version=version,
        function_id=function_id,
        version_id=version_id,
        wait=head.wait,
        assets=assets,
        forwarded=head.forwarded,
        passthrough=streaming,
        streaming=streaming,
        region=front.settings.region,
        callback=webhooks.default(version, principal.account),
    )
    if options:
        call = await _with_options(front, call, arrived)
    if version.rate_limit is not None:
        await take(front, request, call)
    return call


async def _with_options(front: Front, call: Call, arrived: MultiMapping[str]) -> Call:
    longest_s = front.settings.request_deadline_s
    return replace(
        call,
        passthrough=headers.passthrough(arrived),
        idempotency_key=headers.idempotency_key(arrived),
        queue_timeout_s=headers.timeout_s(arrived, headers.QUEUE_TIMEOUT, longest_s=longest_s),
        run_timeout_s=headers.timeout_s(arrived, headers.RUN_TIMEOUT, longest_s=longest_s),
        callback=await callback(front, call.principal, call.version, arrived),
    )


async def take(front: Front, request: web.Request, call: Call) -> None:
    """Count the call against its function's rates. Raises RateLimited."""
    if call.version.rate_limit is not None:
        taken = notes_of(request).taken = await front.rate_limiter.take(call.principal, call.version)
        limits.require(taken)


async def _submit(front: Front, call: Call, held: Body, *, task: asyncio.Task[Any] | None) -> Record:
    """Submit and wait. The body is given up once it was submitted, so that who waits holds no memory. `task` is as
    in Notes."""
    accepting = Accepting(front.calls, done=held.close, task=task)
    try:
        with front.calls.waiting(call.principal.account if call.wait.seconds else "", task):
            return await invocations.invoke(
                front.broker,
                call.submission(held.body),
                call.version,
                wait_s=0 if call.streaming else call.wait.seconds,
                spawn=accepting.run if task is not None else accepting.spawn,
            )
    except Interrupted:
        if not accepting.begun:
            raise Overloaded("this server is stopping; send the request again") from None
        return await accepting.record()
    except asyncio.CancelledError:
        if accepting.begun and front.settings.on_disconnect == "cancel":
            front.calls.spawn(_cancel(front, call.principal, accepting))
        raise
    finally:
        if not accepting.begun:
            held.close()


async def _cancel(front: Front, principal: Principal, accepting: Accepting) -> None:
    record = await accepting.record()
    await invocations.cancel(front.broker, principal, record.id)


def _gives_up(front: Front, request: web.Request, call: Call, record: Record) -> bool:
    """Whether upstream's 504 is wanted in place of 202: the wait is over and nobody has picked the request up."""
    if record.state is not RequestState.QUEUED or call.wait.seconds == 0 or front.calls.stopping:
        return False
    return front.settings.gateway_timeout or headers.gateway_timeout(request.headers)


async def _answer(front: Front, request: web.Request, record: Record, manner: Manner) -> Answer:
    broker, settings = front.broker, front.settings
    if not auth.holds(front, head_of(front, request).bearer, SCOPE):
        await auth.still(front, request, SCOPE)
    if record.outcome is not None and record.outcome.streamed:
        record = await gathered(broker, record)

    def download_url(key: str, filename: str) -> str:
        return broker.blobs.download_url(key, filename=filename, expires_s=settings.result_url_ttl_s)

    pending, where = answers.NOT_KNOWN, ""
    if not record.state.terminal:
        estimate = await front.outlooks.estimate(record)
        pending = Pending(estimate=estimate, longest_pause_s=settings.max_poll_pause_s)
        where = status_url(front, request, record.id, manner)
    answer = answers.answer(
        record, status_url=where, download_url=download_url, speaker=manner.speaker, pending=pending
    )
    if settings.one_shot_results and record.state.terminal:
        await broker.results.forget(record.id)
    return answer


def head_of(front: Front, request: web.Request) -> headers.Head:
    """What its headers say."""
    notes = notes_of(request)
    if notes.head is None:
        notes.head = front.heads.of(request.headers, request.raw_headers)
    return notes.head


def origin(front: Front, request: web.Request, *, host: str = "") -> str:
    """How this server is reached, by the Host of the request unless another one is given."""
    return front.settings.public_url.rstrip("/") or f"{request.scheme}://{host or request.host}"


def status_url(front: Front, request: web.Request, request_id: str, manner: Manner = PLAIN) -> str:
    """Where a request's result is to be had."""
    return f"{manner.origin or origin(front, request)}{manner.status_path}{request_id}"


def applied(found: Answer | web.StreamResponse, wait: headers.Wait) -> Answer | web.StreamResponse:
    """An answer that says which preference was followed; a stream's is said when it begins."""
    if wait.applied and isinstance(found, Answer):
        found.headers[headers.PREFERENCE_APPLIED] = wait.applied
    return found


def respond(found: Answer | web.StreamResponse) -> web.StreamResponse:
    if isinstance(found, Answer):
        return web.Response(status=found.status, headers=found.headers, body=found.body)
    return found
