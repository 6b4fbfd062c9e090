"""Requests as OpenTelemetry sees them: receive, decode, queue, infer, and the batch that several shared.

Spans are written when a request ends, from the times in its `RequestContext`, so that a request without a
trace costs nothing. Where they go, the standard variables say (`OTEL_EXPORTER_OTLP_ENDPOINT`,
`OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER`).
"""

import time
from collections.abc import Mapping, Sequence

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from sopdeploy_service.observability.request_context import Span, Trace

PROPAGATOR = TraceContextTextMapPropagator()  # only `traceparent`: baggage of strangers is not carried


def exporting() -> TracerProvider:
    """Return a provider that sends spans by OTLP over HTTP; `shutdown` sends the last ones."""
    resource = Resource({"service.name": "sopdeploy"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=2)))
    return provider


class Tracing:
    """Opens the traces of one server."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("sopdeploy")

    def open(self, headers: Mapping[str, str], started: float) -> Trace | None:
        """Return the trace of a request that began at *started*; None where it is not sampled."""
        carrier = {"traceparent": headers["traceparent"]} if "traceparent" in headers else {}
        span = self._tracer.start_span(
            "request",
            context=PROPAGATOR.extract(carrier),
            kind=trace.SpanKind.SERVER,
            start_time=epoch(started),
        )
        return RequestTrace(self._tracer, span) if span.is_recording() else None

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


class RequestTrace:
    """The span of one request."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def id(self) -> str:
        """Return the trace's id, 32 hexadecimal digits."""
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    def record_batch(self, sharing: Sequence[Trace], started: float, ended: float) -> None:
        """Write the span of a batch; a root of its own, linked to the requests *sharing* it."""
        requests = {id(one): one for one in sharing if isinstance(one, RequestTrace)}
        span = self._tracer.start_span(
            "batch",
            context=trace.set_span_in_context(trace.INVALID_SPAN),
            links=[trace.Link(one._span.get_span_context()) for one in requests.values()],
            attributes={"sopdeploy.images": len(sharing)},
            start_time=epoch(started),
        )
        span.end(epoch(ended))

    def end(self, route: str, status: int, spans: Sequence[Span]) -> None:
        """Write the spans of the stages, then the request's."""
        parent = trace.set_span_in_context(self._span)
        for stage in spans:
            span = self._tracer.start_span(stage.stage, context=parent, start_time=epoch(stage.started))
            span.end(epoch(stage.ended))
        self._span.update_name(route)
        self._span.set_attributes({"http.route": route, "http.response.status_code": status})
        if status >= 500:
            self._span.set_status(trace.StatusCode.ERROR)
        self._span.end()


def epoch(moment: float) -> int:
    """Return *moment*, a time of `time.monotonic`, as nanoseconds since 1970."""
    return time.time_ns() - int((time.monotonic() - moment) * 1e9)
