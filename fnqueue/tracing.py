"""Spans of the client, where its program uses OpenTelemetry; nothing where it does not.

A library does not decide where spans go: they are those of the program's own tracer provider, as of any other
instrumented library. A program that never imported OpenTelemetry has none, and pays one look into `sys.modules`.
`exporting` is for the command line, which is a program of its own.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fnqueue import __version__

if TYPE_CHECKING:  # an optional dependency
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

FLUSH_S = 3.0
PROTOCOL = "http/protobuf"
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def _api() -> ModuleType | None:
    return sys.modules.get("opentelemetry.trace")


@contextmanager
def operation(name: str, context: Context | None = None) -> Iterator[Span | None]:
    """What the caller asked for, of as many calls as it takes. `context` is what it belongs to where the caller is in
    no span of its own."""
    api = _api()
    if api is None:
        yield None
        return
    parent = None if api.get_current_span().get_span_context().is_valid else context
    with api.get_tracer("fnqueue", __version__).start_as_current_span(name, parent) as span:
        yield span


@contextmanager
def call(method: str, address: str, port: int | None, headers: MutableMapping[str, str]) -> Iterator[Called]:
    """One HTTP request to the server, whose `headers` are told the trace."""
    api = _api()
    if api is None:
        yield _UNTRACED
        return
    attributes: dict[str, Any] = {"http.request.method": method, "server.address": address}
    if port is not None:
        attributes["server.port"] = port
    tracer = api.get_tracer("fnqueue", __version__)
    with tracer.start_as_current_span(
        method, kind=api.SpanKind.CLIENT, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as span:
        import_module("opentelemetry.propagate").inject(headers)
        try:
            yield Called(span)
        except BaseException as exc:
            span.set_attribute("error.type", type(exc).__name__)
            span.set_status(api.StatusCode.ERROR)
            raise


class Called:
    def __init__(self, span: Span | None) -> None:
        self._span = span

    def answered(self, status: int) -> None:
        if self._span is None:
            return
        self._span.set_attribute("http.response.status_code", status)
        if status >= 400:
            self._span.set_attribute("error.type", str(status))
            self._span.set_status(sys.modules["opentelemetry.trace"].StatusCode.ERROR)


_UNTRACED = Called(None)


def context() -> Context | None:
    """Where the caller is now, for what it does later; None where nothing is traced."""
    return None if _api() is None else import_module("opentelemetry.context").get_current()


@contextmanager
def exporting(service: str, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Send the spans of this program over OTLP while the body runs, if the environment says where to; a command works
    as well without. What is left at the end is sent within FLUSH_S, or lost."""
    provider = _provider(service, environ) if _wanted(environ) else None
    if provider is None:
        yield
        return
    try:
        yield
    finally:
        flushing = threading.Thread(target=provider.shutdown, daemon=True)
        flushing.start()
        flushing.join(FLUSH_S)


def _wanted(environ: Mapping[str, str]) -> bool:
    def says(name: str, usual: str) -> str:
        return (environ.get(name) or usual).strip().lower()

    protocol = says("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", says("OTEL_EXPORTER_OTLP_PROTOCOL", PROTOCOL))
    return (
        any(environ.get(name) for name in ENDPOINTS)
        and says("OTEL_SDK_DISABLED", "false") != "true"
        and says("OTEL_TRACES_EXPORTER", "otlp") == "otlp"
        and protocol == PROTOCOL
    )


def _provider(service: str, environ: Mapping[str, str]) -> Any:
    """None where the extra `tracing` is not installed, or cannot be set up as the environment has it."""
    try:
        sdk = import_module("opentelemetry.sdk.trace")
        export = import_module("opentelemetry.sdk.trace.export")
        otlp = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        resources = import_module("opentelemetry.sdk.resources")
        name = environ.get("OTEL_SERVICE_NAME") or service
        resource = resources.Resource.create({"service.name": name, "service.version": __version__})
        provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter()))
    except (ImportError, ValueError):
        return None
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    import_module("opentelemetry.trace").set_tracer_provider(provider)
    return provider
