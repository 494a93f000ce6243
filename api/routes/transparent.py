"""Invocation in the function's own name: any method, path and query, by host name or by header
(contract/invocation.md §1.1, §2.1, §8.4).

`{functionId}.<anything>` and `{versionId}.{functionId}.<anything>` as Host, or the headers `function-id` and
`function-version-id`, which win over the Host and over every path of ours. What the address names is only ever what
the Authorization covers.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable
from dataclasses import dataclass
from functools import lru_cache, partial

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from api import auth, headers
from api.answers import Speaker
from api.front import Front
from api.middleware import answer_errors
from api.notes import notes_of
from api.routes.channels import converse, is_websocket
from api.routes.invocations import SCOPE, Call, Manner, applied, origin, respond, run, take
from api.routes.webhooks import callback
from broker.accounts import require
from broker.errors import BadRequest

_ID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_OWN_HOST = re.compile(rf"({_ID})\.(?:({_ID})\.(?=[^.:]))?([^.:].*)", re.ASCII | re.IGNORECASE)
# What HTTP allows in a target, but for what ends it early: it goes on to the container byte for byte.
_TARGET = re.compile(r"/[!-\"$-~]*", re.ASCII)
_ABSOLUTE = re.compile(r"https?://([^/?#]*)", re.ASCII | re.IGNORECASE)
_SPOKEN_TO_US = frozenset({headers.FUNCTION_ID, headers.FUNCTION_VERSION_ID})


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Which function is meant, and what it is asked for. `version_id` is "" for any callable version; `by_host` tells
    that the Host names the function, and not headers. `host` is this server's own."""

    function_id: str
    version_id: str
    target: str
    by_host: bool
    host: str


def addressed(front: Front) -> Middleware:
    """Takes what is addressed to a function out of the hands of the router."""

    @web.middleware
    def divert(request: web.Request, handler: Handler) -> Awaitable[web.StreamResponse]:
        if not is_addressed(request):
            return handler(request)
        notes_of(request).invokes = True
        return answer_errors(request, partial(invoke, front))

    return divert


async def invoke(front: Front, request: web.Request) -> web.StreamResponse:
    """Accept the request and hold the call as `pexec` does; the answer is the container's own."""
    auth.token(request.headers)
    address = address_of(request)
    call = await _admit(front, request, address)
    await take(front, request, call)
    speaker = Speaker.CONTAINER_ON_ITS_OWN_HOST if address.by_host else Speaker.CONTAINER
    if needs_channel(request):
        return await converse(
            front, request, call.submission(b""), call.version, wait_s=call.wait.seconds, speaker=speaker
        )
    manner = Manner(speaker=speaker, origin=origin(front, request, host=address.host))
    found = await run(front, request, call, await front.bodies.receive(request), manner)
    return respond(applied(found, call.wait))


def needs_channel(request: web.Request) -> bool:
    """Whether the container must be able to answer before it has all of the request: it then has to be connected to
    this very process.

    That a body comes in chunks does not say so: most clients that send one only do not know its length.
    """
    return is_websocket(request) or headers.streams_full_request(request.headers)


def is_addressed(request: web.Request) -> bool:
    """Whether the request names a function in its headers or its host."""
    return headers.FUNCTION_ID in request.headers or is_own_host(_host(request))


@lru_cache(maxsize=1024)
def is_own_host(host: str) -> bool:
    """Whether the host is a function's."""
    return _OWN_HOST.match(host) is not None


def address_of(request: web.Request) -> Address:
    """Raises BadRequest: an ID is none, or is given twice, or what is asked for is no path."""
    target, host = _target(request), _host(request)
    found = _OWN_HOST.match(host)
    first, second, rest = (part.lower() if part else "" for part in found.groups()) if found else ("", "", host)
    if headers.FUNCTION_ID in request.headers:
        return Address(
            function_id=_named(request, headers.FUNCTION_ID),
            version_id=_named(request, headers.FUNCTION_VERSION_ID),
            target=target,
            by_host=False,
            host=rest,
        )
    return Address(
        function_id=second or first, version_id=first if second else "", target=target, by_host=True, host=rest
    )


async def _admit(front: Front, request: web.Request, address: Address) -> Call:
    """As of `pexec`, but for what has no meaning here: an envelope of assets, and whatever path of ours this is."""
    arrived = request.headers
    principal = await front.authenticator.authenticate(auth.token(arrived))
    require(principal, SCOPE)
    version = await front.versions.pick(principal, address.function_id, address.version_id)
    return Call(
        principal=principal,
        version=version,
        function_id=address.function_id,
        version_id=address.version_id,
        wait=headers.wait(arrived, transparent=True),
        assets=(),
        forwarded=tuple(
            (name, value)
            for name, value in headers.forwarded(arrived, cookies=address.by_host)
            if name.lower() not in _SPOKEN_TO_US
        ),
        passthrough=True,
        idempotency_key=headers.idempotency_key(arrived),
        queue_timeout_s=headers.timeout_s(arrived, headers.QUEUE_TIMEOUT, longest_s=front.settings.request_deadline_s),
        run_timeout_s=headers.timeout_s(arrived, headers.RUN_TIMEOUT, longest_s=front.settings.request_deadline_s),
        region=front.settings.region,
        method=request.method,
        target=address.target,
        streaming=True,
        callback=await callback(front, principal, version, arrived),
    )


def _named(request: web.Request, name: str) -> str:
    """The ID in this header, "" where there is none."""
    given = set(request.headers.getall(name, []))
    if len(given) > 1:
        raise BadRequest(f"{name} is given more than once", field=name)
    return headers.uuid(given.pop().strip(), field=name) if given else ""


def _host(request: web.Request) -> str:
    """That of an absolute target wins (RFC 9112 §3.2.2)."""
    raw = request.raw_path
    found = None if raw.startswith("/") else _ABSOLUTE.match(raw)
    return found[1] if found else request.headers.get("Host", "")


def _target(request: web.Request) -> str:
    """Path and query as they came."""
    raw = request.raw_path
    if found := _ABSOLUTE.match(raw):
        raw = raw[found.end() :]
    if not raw.startswith("/"):
        raw = f"/{raw}" if raw.startswith("?") or not raw else raw
    if request.method == "CONNECT" or (raw != "*" and _TARGET.fullmatch(raw) is None):
        raise BadRequest("the target of the request is not a path of ASCII characters without blanks and #")
    return "/" if raw == "*" else raw
