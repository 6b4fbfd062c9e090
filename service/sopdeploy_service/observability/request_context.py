"""The state of one request: API key, rate limit, model, times and trace.

`RequestContextMiddleware` creates one `RequestContext` per request, stores it as `scope["state"]["context"]`
and writes it to metrics, access log and trace when the request ends.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from sopdeploy.environment import import_optional
from sopdeploy.errors import ConfigError
from sopdeploy_service.settings import Settings

if TYPE_CHECKING:  # OpenTelemetry is optional
    from sopdeploy_service.http.api_keys import TokenBucket
    from sopdeploy_service.observability.tracing import RequestTrace

# (request headers, start time) -> trace, or None if the request is not sampled.
OpenTrace: TypeAlias = Callable[[Mapping[str, str], float], "RequestTrace | None"]


@dataclass(slots=True)
class RequestContext:
    """The state of one request, which the service receives together with its images.

    `headers` are by name in lower case. `stage_seconds` maps each stage to the time of the slowest image;
    `spans` has (stage, start, end) of every image, in times of `time.monotonic`.
    """

    request_id: str
    headers: Mapping[str, str] = field(default_factory=dict)
    trace: "RequestTrace | None" = None
    key_name: str | None = None
    rate_limit: "TokenBucket | None" = None
    model_name: str = ""
    model_version: str = ""
    bytes: int = 0
    num_images: int = 0
    code: str = "ok"
    may_keep: bool = False
    stage_seconds: dict[str, float] = field(default_factory=dict)
    spans: list[tuple[str, float, float]] = field(default_factory=list)

    def record_stage(self, stage: str, seconds: float, ended: float | None = None) -> None:
        """Record that one image spent *seconds* in *stage*, which ended at *ended* (default: now)."""
        self.stage_seconds[stage] = max(seconds, self.stage_seconds.get(stage, 0.0))
        end = time.monotonic() if ended is None else ended
        self.spans.append((stage, end - seconds, end))

    def server_timing(self) -> str:
        """Format the value of the `Server-Timing` header; durations are in milliseconds."""
        return ", ".join([f"{stage};dur={spent * 1000:.2f}" for stage, spent in self.stage_seconds.items()])


@contextmanager
def open_tracing(settings: Settings) -> Iterator[OpenTrace | None]:
    """Yield the function that opens traces, or None if tracing is disabled.

    OpenTelemetry is imported only if needed. Remaining spans are sent at the end of the block. Raises
    `ConfigError` if it is not installed.
    """
    if not settings.tracing:
        yield None
        return
    tracing = import_optional(
        "sopdeploy_service.observability.tracing", "OpenTelemetry", "sopdeploy[otel]", ConfigError, "tracing"
    )
    provider = tracing.otlp_provider()
    try:
        yield partial(tracing.open_trace, provider.get_tracer("sopdeploy"))
    finally:
        provider.shutdown()
