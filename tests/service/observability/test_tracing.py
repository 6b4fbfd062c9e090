"""Spans in memory: their parents and links, and a server without OpenTelemetry."""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from fake_runtime import FakeRuntime

from sopdeploy.errors import ConfigError
from sopdeploy_service.server.process import open_tracing, run_server
from sopdeploy_service.settings import Settings

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sopdeploy_service.observability.tracing import open_trace

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def client(run_server, bundle, spans):
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    opened = partial(open_trace, provider.get_tracer("sopdeploy"))
    runtime = FakeRuntime(num_classes=7, fixed_ms=30, largest_batch=8)
    with run_server(runtime, bundle, Settings(), open_trace=opened) as client:
        yield client
    provider.shutdown()


def named(spans: InMemorySpanExporter, name: str) -> list:
    return [span for span in spans.get_finished_spans() if span.name == name]


def test_stages_are_children_of_the_request_in_the_trace_of_the_client(client, spans, jpeg, until):
    reply = client.post("/v1/classify", content=jpeg, headers={"traceparent": PARENT})
    assert reply.status_code == 200
    until(lambda: named(spans, "/v1/classify"))
    (request,) = named(spans, "/v1/classify")
    assert f"{request.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{request.parent.span_id:016x}" == PARENT.split("-")[2]
    assert request.attributes["http.response.status_code"] == 200
    for stage in ("receive", "decode", "queue", "infer"):
        (span,) = named(spans, stage)
        assert span.parent.span_id == request.context.span_id
        assert span.start_time <= span.end_time <= request.end_time + 5_000_000
        assert span.start_time >= request.start_time - 5_000_000
    (infer,) = named(spans, "infer")
    assert infer.end_time - infer.start_time >= 25e6


def test_a_batch_is_a_root_span_linked_to_each_of_its_requests(client, spans, jpeg, until):
    with ThreadPoolExecutor(9) as pool:
        replies = list(pool.map(lambda _: client.post("/v1/classify", content=jpeg), range(9)))
    assert all(reply.status_code == 200 for reply in replies)
    until(lambda: len(named(spans, "/v1/classify")) == 9)
    requests = {span.context.span_id for span in named(spans, "/v1/classify")}
    until(lambda: sum(len(span.links) for span in named(spans, "batch")) == 9)
    batches = named(spans, "batch")
    assert {link.context.span_id for span in batches for link in span.links} == requests
    assert all(span.parent is None for span in batches)
    assert max(len(span.links) for span in batches) > 1
    assert sum(span.attributes["sopdeploy.images"] for span in batches) == 9


def test_unsampled_requests_and_probes_leave_no_span(client, spans, jpeg):
    client.post("/v1/classify", content=jpeg, headers={"traceparent": UNSAMPLED})
    client.get("/readyz")
    assert client.get("/info", headers={"traceparent": "nonsense"}).status_code == 200
    assert {span.name for span in spans.get_finished_spans()} <= {"/info"}


def test_tracing_without_opentelemetry_is_a_config_error(monkeypatch, bundle_path: Path):
    monkeypatch.delitem(sys.modules, "sopdeploy_service.observability.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r"^tracing: .*sopdeploy\[otel\]"):
        run_server([bundle_path], Settings(port=0, tracing=True))


def test_a_missing_collector_does_not_fail_requests(monkeypatch, caplog):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    began = asyncio.new_event_loop()
    try:
        with open_tracing(Settings(tracing=True)) as open_trace:
            assert open_trace is not None
            assert len(open_trace({"traceparent": PARENT}, began.time()).id) == 32
    finally:
        began.close()
