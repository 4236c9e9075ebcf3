"""Spans by OpenTelemetry: one for each operation and one for each answer, sent by OTLP over HTTP.

Imported only where OTEL_EXPORTER_OTLP_ENDPOINT is set. What a span has is ids, names and counts, never a document, a
variable or a text. Nothing is registered globally: two servers in a process trace apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from models.tracing import Span

_SECONDS = 3.0
_CLOSE_MILLIS = 2_000


class _RealSpan:
    """A span of OpenTelemetry's."""

    __slots__ = ("_span",)

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def rename(self, name: str) -> None:
        """Its name, known only now."""
        self._span.update_name(name)

    def note(self, attributes: Mapping[str, str | int]) -> None:
        """Attributes, as they become known."""
        self._span.set_attributes(attributes)

    def fail(self, code: str) -> None:
        """It ended with this error code."""
        self._span.set_attribute("error.type", code)
        self._span.set_status(trace.StatusCode.ERROR)


class OtelTracing:
    """Spans of one server. Closed by the composition root.

    Args:
        exporter: where they go; it is called in a thread of its own, with many spans at once.
    """

    def __init__(self, exporter: SpanExporter, *, service_name: str) -> None:
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service_name}), shutdown_on_exit=False
        )
        self._processor = BatchSpanProcessor(exporter)
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("threadgraph")
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def span(self, name: str, carrier: Mapping[str, str] | None = None) -> Iterator[Span]:
        """A span for as long as the block lasts; a parent that the carrier names is taken."""
        parent = self._propagator.extract(carrier, getter=_GETTER) if carrier else None
        # What is raised is not written into the span: its text may hold a user's.
        with self._tracer.start_as_current_span(
            name, context=parent, record_exception=False, set_status_on_exception=False
        ) as span:
            yield _RealSpan(span)

    def flush(self) -> None:
        """Send what has not been sent."""
        self._provider.force_flush(_CLOSE_MILLIS)

    def close(self) -> None:
        """Send what has not been sent, for a moment, and stop. Blocks."""
        self.flush()
        self._provider.shutdown()


class _Getter(Getter[Mapping[str, str]]):
    """How the propagator reads headers, whatever the case of their names."""

    def get(self, carrier: Mapping[str, str], key: str) -> list[str] | None:
        """The values of one header."""
        value = carrier.get(key)
        return None if value is None else [value]

    def keys(self, carrier: Mapping[str, str]) -> list[str]:
        """The names of all."""
        return list(carrier)


_GETTER = _Getter()


def otlp_tracing(endpoint: str, headers: tuple[tuple[str, str], ...], *, service_name: str) -> OtelTracing:
    """Spans that are sent to a collector.

    Args:
        endpoint: its address, without `/v1/traces`.
    """
    exporter = OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces", headers=dict(headers), timeout=_SECONDS)
    return OtelTracing(exporter, service_name=service_name)
