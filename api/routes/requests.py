"""What can be done to a request beside waiting for it: cancel."""

from __future__ import annotations

from aiohttp import web

from api import headers, payloads
from api.front import Front
from broker import invocations
from broker.model import Principal
from fnqueue import wire


async def cancel(front: Front, request: web.Request, principal: Principal) -> web.Response:
    """202 as often as it is asked: from now on no attempt starts, and one that runs is told to stop."""
    request_id = headers.uuid(request.match_info["request_id"], field="requestId")
    record = await invocations.cancel(front.broker, principal, request_id)
    answer = payloads.answer(wire.Cancelled(request_id=record.id, status=record.state.value), status=202)
    answer.headers[headers.REQUEST_ID] = record.id
    return answer
