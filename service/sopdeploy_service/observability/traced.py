"""Tracing is an extra: nothing of it is loaded before a setting asks for it."""

from collections.abc import Iterator
from contextlib import contextmanager

from sopdeploy.environment import import_optional
from sopdeploy.errors import ConfigError
from sopdeploy_service.observability.request_context import OpenTrace
from sopdeploy_service.settings import Settings


@contextmanager
def traced(settings: Settings) -> Iterator[OpenTrace | None]:
    """Give what begins the trace of a request where *settings* ask for it; what is left is sent at the end.

    Raises `ConfigError` where the extra is missing.
    """
    if not settings.tracing:
        yield None
        return
    tracing = import_optional(
        "sopdeploy_service.observability.tracing", "OpenTelemetry", "sopdeploy[otel]", ConfigError, "tracing"
    )
    tracer = tracing.Tracing(tracing.exporting())
    try:
        yield tracer.open
    finally:
        tracer.close()
