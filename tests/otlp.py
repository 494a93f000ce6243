"""A receiver of OTLP over HTTP, as a collector is one: it decodes what it is sent by OpenTelemetry's own protocol
buffers, and keeps it."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.eventually import eventually


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One span as it came. IDs are hex, '' for no parent; `kind` is one of SERVER, CLIENT …; `links` are span IDs."""

    service: str
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    state: str
    began_ns: int
    ended_ns: int
    failed: bool
    attributes: dict[str, Any]
    links: tuple[str, ...]


@dataclass
class Receiver:
    url: str = ""
    spans: list[Seen] = field(default_factory=list)
    posts: int = 0
    hanging: asyncio.Event | None = None

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.posts += 1
        if self.hanging is not None:
            await self.hanging.wait()
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        assert request.content_type == "application/x-protobuf"
        for each in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = _told(each.resource.attributes)["service.name"]
            self.spans += [_seen(service, span) for scope in each.scope_spans for span in scope.spans]
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(), content_type="application/x-protobuf"
        )

    def of(self, trace_id: str) -> list[Seen]:
        return sorted((span for span in self.spans if span.trace_id == trace_id), key=lambda span: span.began_ns)

    async def trace(self, *names: str, **attributes: object) -> dict[str, list[Seen]]:
        """The spans of one trace by name, once each of `names` has come to the trace that has a span with these
        attributes (`__` for a dot)."""
        wanted = {name.replace("__", "."): value for name, value in attributes.items()}

        async def look() -> dict[str, list[Seen]]:
            found: dict[str, list[Seen]] = {}
            ids = {span.trace_id for span in self.spans if wanted.items() <= span.attributes.items()}
            for span in (span for trace_id in sorted(ids) for span in self.of(trace_id)):
                found.setdefault(span.name, []).append(span)
            return found

        def complete(found: dict[str, list[Seen]]) -> bool:
            return all(len(found.get(name, ())) >= names.count(name) for name in names)

        return await eventually(look, complete, within_s=60)


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.router.add_post("/v1/traces", receiver.take)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield receiver
    finally:
        await runner.cleanup()


def _seen(service: str, span: Span) -> Seen:
    return Seen(
        service=service,
        name=span.name,
        kind=Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        state=span.trace_state,
        began_ns=span.start_time_unix_nano,
        ended_ns=span.end_time_unix_nano,
        failed=span.status.code == Status.STATUS_CODE_ERROR,
        attributes=_told(span.attributes),
        links=tuple(link.span_id.hex() for link in span.links),
    )


def _told(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    def value(found: AnyValue) -> Any:
        return getattr(found, found.WhichOneof("value") or "string_value")

    return {each.key: value(each.value) for each in pairs}
