"""OpenTelemetry spans of requests, of their stages and of batches.

Spans are written when a request ends, from the times in its `RequestContext`, so that a request without a
trace costs nothing. The standard variables `OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_SERVICE_NAME` and
`OTEL_TRACES_SAMPLER` apply.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

PROPAGATOR = TraceContextTextMapPropagator()  # only `traceparent`: baggage from clients is not propagated


def otlp_provider() -> TracerProvider:
    """Create a provider that sends spans by OTLP over HTTP."""
    resource = Resource({"service.name": "sopdeploy"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=2)))
    return provider


def open_trace(tracer: trace.Tracer, headers: Mapping[str, str], started: float) -> "RequestTrace | None":
    """Open the trace of a request that began at *started*; None if it is not sampled."""
    carrier = {"traceparent": headers["traceparent"]} if "traceparent" in headers else {}
    span = tracer.start_span(
        "request",
        context=PROPAGATOR.extract(carrier),
        kind=trace.SpanKind.SERVER,
        start_time=_to_epoch(started),
    )
    if not span.is_recording():
        return None
    return RequestTrace(trace.format_trace_id(span.get_span_context().trace_id), tracer, span)


@dataclass(frozen=True, eq=False)
class RequestTrace:
    """The span of one request; `id` is its W3C trace id, 32 hexadecimal digits.

    Times are those of `time.monotonic`.
    """

    id: str
    _tracer: trace.Tracer
    _span: trace.Span

    def record_batch(self, traces: Sequence["RequestTrace"], started: float, ended: float) -> None:
        """Write the span of a batch as a root span with one link per request.

        *traces* has one entry per image; several images may belong to one request.
        """
        requests = {id(request): request for request in traces}
        span = self._tracer.start_span(
            "batch",
            context=trace.set_span_in_context(trace.INVALID_SPAN),
            links=[trace.Link(request._span.get_span_context()) for request in requests.values()],
            attributes={"sopdeploy.images": len(traces)},
            start_time=_to_epoch(started),
        )
        span.end(_to_epoch(ended))

    def end(self, route: str, status: int, spans: Sequence[tuple[str, float, float]]) -> None:
        """Write *spans* (stage, start, end), then end the span of the request."""
        parent = trace.set_span_in_context(self._span)
        for stage, started, ended in spans:
            self._tracer.start_span(stage, context=parent, start_time=_to_epoch(started)).end(
                _to_epoch(ended)
            )
        self._span.update_name(route)
        self._span.set_attributes({"http.route": route, "http.response.status_code": status})
        if status >= 500:
            self._span.set_status(trace.StatusCode.ERROR)
        self._span.end()


def _to_epoch(moment: float) -> int:
    """Convert a time of `time.monotonic` to nanoseconds since 1970."""
    return time.time_ns() - int((time.monotonic() - moment) * 1e9)
