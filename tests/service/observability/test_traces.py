"""The command of the documentation that traces requests with OpenTelemetry, and a collector."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.docs.reading import ROOT
from tests.service.children import line_of

pytest.importorskip("opentelemetry.instrumentation.fastapi", reason="needs the extra otel")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

COMMAND = re.search(
    r"^opentelemetry-instrument .*$", (ROOT / "docs/operations.md").read_text("utf-8"), re.MULTILINE
)
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """The URL of a collector on loopback, and the paths and bodies that it has received."""
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_the_documented_command_sends_a_span_of_each_request_to_a_collector(
    collector: tuple[str, list[tuple[str, bytes]]], bundle_path: Path, jpeg: bytes
) -> None:
    url, received = collector
    assert COMMAND is not None
    command = shlex.split(COMMAND[0].replace("bundles/latest", shlex.quote(str(bundle_path))))
    variables = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
    }
    with subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, text=True, env=variables
    ) as child:
        try:
            address = line_of(child).split()[1]
            reply = httpx.post(f"{address}/v1/classify", content=jpeg, headers={"traceparent": PARENT})
            assert reply.status_code == 200
            child.send_signal(signal.SIGTERM)
            assert child.wait(60) == 0  # the last spans are sent before the process ends
        finally:
            child.kill()
    assert {path for path, _ in received} == {"/v1/traces"}
    requests = [ExportTraceServiceRequest.FromString(body) for _, body in received]
    spans = [
        (attribute.value.string_value, span)
        for request in requests
        for resource in request.resource_spans
        for attribute in resource.resource.attributes
        if attribute.key == "service.name"
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert {service for service, _ in spans} == {"sopdeploy"}
    assert {span.trace_id.hex() for _, span in spans} == {PARENT.split("-")[1]}
    (span,) = (span for _, span in spans if span.kind == span.SPAN_KIND_SERVER)
    assert (span.name, span.parent_span_id.hex()) == ("POST /v1/classify", PARENT.split("-")[2])
