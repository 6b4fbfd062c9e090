"""The form of the log: one JSON line per event, or lines for people on a terminal.

Modules log through the standard library; what they add as `extra` becomes a field. Whatever a client sent, a
line of the log stays one line: JSON escapes it, and for people nothing unprintable is left.
"""

import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor

from sopdeploy_service.observability.request_context import RequestContext
from sopdeploy_service.settings import Settings

ROOT = "sopdeploy"
START_UP = "sopdeploy.start_up"  # the timeline; may be asked for alone


@contextmanager
def configured(settings: Settings, stream: TextIO | None = None) -> Iterator[None]:
    """Send the log of this process to *stream*, by default stderr, in the form that *settings* name.

    Where they name none: lines for people on a terminal, elsewhere JSON of warnings and errors only, so that
    a server without trouble says nothing.
    """
    stream = stream or sys.stderr
    people = settings.log == "console" or (settings.log is None and stream.isatty())
    quiet = settings.log is None and not people
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter(for_people=people, colours=stream.isatty()))
    logging.getLogger().addHandler(handler)  # of other libraries too; their level stays as it is: warnings
    logging.getLogger(ROOT).setLevel("WARNING" if quiet else settings.log_level.upper())
    logging.getLogger(START_UP).setLevel("INFO" if settings.startup_timeline else logging.NOTSET)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        for name in (ROOT, START_UP):
            logging.getLogger(name).setLevel(logging.NOTSET)


def formatter(*, for_people: bool, colours: bool = False) -> structlog.stdlib.ProcessorFormatter:
    """Return what turns a record into its line."""
    last: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if for_people:
        last += [printable, structlog.dev.ConsoleRenderer(colors=colours, exception_formatter=indented)]
    else:
        last += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ExtraAdder(),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
        ],
        processors=last,
    )


def printable(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Leave no character in *event* that would steer a terminal or begin a line."""
    return {name: value if name == "exc_info" else clean(value) for name, value in event.items()}


def clean(value: object) -> object:
    """Return *value* with `?` for every unprintable character of its texts."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={clean(one)}" for name, one in value.items())
    if isinstance(value, str):
        return "".join(character if character.isprintable() else "?" for character in value)
    return value


def indented(stream: TextIO, exc_info: structlog.typing.ExcInfo) -> None:
    """Write a traceback to *stream*; indented, so that no text in it looks like a line of the log."""
    lines = "".join(traceback.format_exception(*exc_info)).splitlines()
    stream.write("".join(f"\n    {clean(line)}" for line in lines))


log = logging.getLogger("sopdeploy.access")

PROBES = frozenset({"/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def log_request(context: RequestContext, method: str, route: str, status: int, seconds: float) -> None:
    """Log the request of *context*, answered with *status* in *seconds*.

    A status of 0 means that no answer left. Probes and scrapes are logged at debug level.
    """
    level = logging.DEBUG if route in PROBES and status < 400 else logging.INFO
    if not log.isEnabledFor(level):
        return
    fields = {
        "request": context.request_id,
        "key": context.key_name,
        "method": method if method in METHODS else "other",
        "route": route,
        "status": status,
        "code": context.code,
        "model": context.model_name or None,
        "digest": context.model_version or None,
        "images": context.images,
        "bytes": context.bytes,
        "ms": round(seconds * 1000, 2),
        "stages_ms": {name: round(spent * 1000, 2) for name, spent in context.stage_seconds.items()},
        "trace": context.trace.id if context.trace is not None else None,
    }
    log.log(level, "request", extra={name: value for name, value in fields.items() if value is not None})
