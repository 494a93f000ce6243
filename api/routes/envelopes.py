"""Invocation in a JSON envelope, as NVCF had it before `pexec` (contract/invocation.md §1.1, §3.2)."""

from __future__ import annotations

from dataclasses import replace

from aiohttp import web

from api import envelopes, headers, payloads
from api.answers import Answer
from api.bodies import Held
from api.front import Front
from api.routes.invocations import STATUS_PATH as RESULT_PATH
from api.routes.invocations import Call, Manner, admit, applied, ask, look, origin, respond, run
from broker.errors import BadRequest
from fnqueue import wire

ENCLOSED = Manner(status_path="/v2/nvcf/exec/status/")

# Of a body that the caller did not send: the function gets the JSON in the envelope.
_OF_THE_ENVELOPE = frozenset({"content-type", "content-encoding", "content-md5", "digest", "content-digest"})
# An encoded answer could not be put into an envelope.
_NEGOTIATED = frozenset({"accept", "accept-encoding", "range"})


async def invoke(front: Front, request: web.Request) -> web.StreamResponse:
    """Invoke with `requestBody`; what `requestHeader` leaves out, the headers of `pexec` say."""
    call = await admit(front, request, request.match_info)
    held = await front.bodies.read(request)
    try:
        call = _opened(request, call, held)
    except BaseException:
        held.close()
        raise
    found = await run(front, request, call, held, ENCLOSED)
    assert isinstance(found, Answer), "nothing is streamed into an envelope"
    return _enclosed(front, request, found, call.wait)


async def poll(front: Front, request: web.Request) -> web.StreamResponse:
    """Where the request stands, in an envelope; any request, also one of `pexec`."""
    asked = await ask(front, request, request.match_info)
    return _enclosed(front, request, await look(front, request, asked, ENCLOSED), asked.wait)


def _opened(request: web.Request, call: Call, held: Held) -> Call:
    """The call as the envelope wants it; `held` then has what the function is given."""
    envelope = payloads.parse(request, wire.Envelope, held.body)
    try:
        held.body = envelope.content()
    except ValueError:
        raise BadRequest("requestBody: must hold only numbers that JSON can say", field="requestBody") from None
    asked, wait, assets = envelope.request_header, call.wait, call.assets
    if asked.poll_duration_seconds is not None and "respond-async" not in wait.applied:
        wait = headers.Wait(seconds=max(1, asked.poll_duration_seconds))
    if asked.input_asset_references is not None:
        assets = tuple(asked.input_asset_references)
    left_out = _OF_THE_ENVELOPE | _NEGOTIATED
    forwarded = [(name, value) for name, value in call.forwarded if name.lower() not in left_out]
    return replace(
        call,
        wait=wait,
        assets=assets,
        forwarded=(*forwarded, ("Content-Type", "application/json")),
        passthrough=False,
        streaming=False,
    )


def _enclosed(front: Front, request: web.Request, answer: Answer, wait: headers.Wait) -> web.StreamResponse:
    result_url = f"{origin(front, request)}{RESULT_PATH}{answer.headers[headers.REQUEST_ID]}"
    response = respond(applied(envelopes.enclose(answer, result_url=result_url), wait))
    if response.content_type == "application/json":
        response[payloads.ANSWERED] = wire.EnvelopeAnswer
    return response
