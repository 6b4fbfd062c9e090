"""The state of one request: API key, rate limit, model and times.

`RequestContextMiddleware` creates one `RequestContext` per request, stores it as `scope["state"]["context"]`
and writes it to metrics and access log when the request ends.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sopdeploy_service.http.api_keys import TokenBucket


@dataclass(slots=True)
class RequestContext:
    """The state of one request, which the service receives together with its images.

    `headers` are by name in lower case. `stage_seconds` maps each stage to the time of the slowest image.
    """

    request_id: str
    headers: Mapping[str, str] = field(default_factory=dict)
    key_name: str | None = None
    rate_limit: "TokenBucket | None" = None
    model_name: str = ""
    model_version: str = ""
    bytes: int = 0
    num_images: int = 0
    code: str = "ok"
    may_keep: bool = False
    stage_seconds: dict[str, float] = field(default_factory=dict)

    def record_stage(self, stage: str, seconds: float) -> None:
        """Record that one image spent *seconds* in *stage*."""
        self.stage_seconds[stage] = max(seconds, self.stage_seconds.get(stage, 0.0))

    def server_timing(self) -> str:
        """Format the value of the `Server-Timing` header; durations are in milliseconds."""
        return ", ".join([f"{stage};dur={spent * 1000:.2f}" for stage, spent in self.stage_seconds.items()])
