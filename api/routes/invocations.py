"""POST of an invocation and polling for its result (contract/invocation.md §3, §4)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from aiohttp import web

from api import answers, auth, headers
from api.answers import Answer
from api.bodies import Held
from api.calls import Accepting, Interrupted
from api.front import Front
from api.middleware import RECORD, TAKEN
from broker import invocations, limits
from broker.errors import Overloaded
from broker.invocations import Submission
from broker.model import Principal, Record, RequestState, Version

SCOPE = "invoke_function"
STATUS_PATH = "/v2/nvcf/pexec/status/"


@dataclass(frozen=True, slots=True, kw_only=True)
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
    idempotency_key: str

    def submission(self, body: bytes) -> Submission:
        return Submission(
            principal=self.principal,
            function_id=self.function_id,
            version_id=self.version_id,
            headers=self.forwarded,
            body=body,
            assets=self.assets,
            passthrough=self.passthrough,
            poll_s=max(1, int(self.wait.seconds)),
            idempotency_key=self.idempotency_key,
        )


async def invoke(front: Front, request: web.Request) -> web.Response:
    """Accept the request and hold the call until it ends, or for as long as the caller wishes."""
    call = await _admit(front, request)
    record = await _run(front, call, await front.bodies.read(request))
    request[RECORD] = record
    if _gives_up(front, request, call, record):
        record = await invocations.withdraw(front.broker, record)
        if record.state is RequestState.CANCELLED:
            return _response(answers.timed_out(record), call.wait)
    return await _answer(front, request, record, call.wait)


async def poll(front: Front, request: web.Request) -> web.Response:
    """Where the request stands, after holding the call as `invoke` does."""
    auth.token(request.headers)
    wait = headers.wait(request.headers)
    request_id = headers.uuid(request.match_info["request_id"], field="requestId")
    principal = await auth.authenticate(front, request, SCOPE)
    try:
        with front.calls.waiting():
            record = await invocations.status(front.broker, principal, request_id, wait_s=wait.seconds)
    except Interrupted:
        record = await invocations.status(front.broker, principal, request_id, wait_s=0)
    request[RECORD] = record
    return await _answer(front, request, record, wait)


async def _admit(front: Front, request: web.Request) -> Call:
    """The checks in upstream's order (contract/invocation.md §3.2), all of them before the body is read.

    The rate limit comes last, so that nothing that could never run counts; a body that then does not come, counts.
    """
    arrived, named = request.headers, request.match_info
    auth.token(arrived)
    function_id = headers.uuid(named["function_id"], field="functionId")
    version_id = headers.uuid(named["version_id"], field="functionVersionId") if "version_id" in named else ""
    assets = headers.asset_references(arrived)
    principal = await auth.authenticate(front, request, SCOPE)
    version = await front.versions.pick(principal, function_id, version_id)
    call = Call(
        principal=principal,
        version=version,
        function_id=function_id,
        version_id=version_id,
        wait=headers.wait(arrived),
        assets=assets,
        forwarded=headers.forwarded(arrived),
        passthrough=headers.passthrough(arrived),
        idempotency_key=headers.idempotency_key(arrived),
    )
    request[TAKEN] = await front.rate_limiter.take(principal, version)
    limits.require(request[TAKEN])
    return call


async def _run(front: Front, call: Call, held: Held) -> Record:
    """Submit and wait. The body is given up once it was submitted, so that who waits holds no memory."""
    accepting = Accepting(front.calls, done=held.close)
    try:
        with front.calls.waiting():
            return await invocations.invoke(
                front.broker,
                call.submission(held.body),
                call.version,
                wait_s=call.wait.seconds,
                spawn=accepting.spawn,
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


async def _answer(front: Front, request: web.Request, record: Record, wait: headers.Wait) -> web.Response:
    broker, settings = front.broker, front.settings

    def download_url(key: str, filename: str) -> str:
        return broker.blobs.download_url(key, filename=filename, expires_s=settings.result_url_ttl_s)

    answer = answers.answer(record, status_url=status_url(front, request, record.id), download_url=download_url)
    if settings.one_shot_results and record.state.terminal:
        await broker.results.forget(record.id)
    return _response(answer, wait)


def status_url(front: Front, request: web.Request, request_id: str) -> str:
    """Where a request's result is to be had."""
    origin = front.settings.public_url.rstrip("/") or f"{request.scheme}://{request.host}"
    return f"{origin}{STATUS_PATH}{request_id}"


def _response(answer: Answer, wait: headers.Wait) -> web.Response:
    if wait.applied:
        answer.headers[headers.PREFERENCE_APPLIED] = wait.applied
    return web.Response(status=answer.status, headers=answer.headers, body=answer.body)
