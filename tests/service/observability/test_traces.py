"""The command of the documentation that traces requests with OpenTelemetry sends a span of each."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from tests.docs.reading import ROOT
from tests.support.children import line_of

collected = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.mark.nightly
def test_a_span_of_each_request_is_sent_to_a_collector(bundle_path: Path, jpeg: bytes) -> None:
    received: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    (command,) = re.findall(r"^opentelemetry-instrument .*$", PAGE, re.MULTILINE)
    words = shlex.split(command.replace("bundles/latest", shlex.quote(str(bundle_path))))
    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        variables = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        }

        with subprocess.Popen(
            [*words, "--port", "0"], stdout=-1, text=True, env=variables
        ) as child:
            try:
                address = line_of(child).split()[1]
                headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
                assert (
                    httpx.post(
                        f"{address}/v1/classify", content=jpeg, headers=headers
                    ).status_code
                    == 200
                )
                child.send_signal(signal.SIGTERM)
                assert child.wait(60) == 0  # the last spans are sent before the process ends
            finally:
                child.kill()
                server.shutdown()
                thread.join()

    batches = map(collected.ExportTraceServiceRequest.FromString, received)
    spans = [
        span
        for batch in batches
        for one in batch.resource_spans
        for two in one.scope_spans
        for span in two.spans
    ]
    (span,) = (span for span in spans if span.kind == span.SPAN_KIND_SERVER)

    assert span.name == "POST /v1/classify"
    assert span.trace_id.hex() == TRACE
    assert span.parent_span_id.hex() == PARENT
