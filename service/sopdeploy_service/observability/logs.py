"""Logging: JSON lines or readable lines.

Modules log with the standard library; the fields of `extra` become fields of the line. Text from clients
never starts a new line: JSON escapes it, and console output replaces unprintable characters.
"""

import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

import structlog
from structlog.typing import Processor

from sopdeploy_service.settings import Settings

ROOT = "sopdeploy"


@contextmanager
def configured(settings: Settings, stream: TextIO | None = None) -> Iterator[None]:
    """Write the log of this process to *stream* (default: stderr) as *settings* say.

    Without the setting `log`, a terminal gets readable lines; anything else gets JSON of warnings and errors
    only.
    """
    stream = stream or sys.stderr
    console = settings.log == "console" or (settings.log is None and stream.isatty())
    quiet = settings.log is None and not console
    processors: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if console:
        processors += [
            lambda _logger, _method, event: {name: _printable(value, name) for name, value in event.items()},
            structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=_write_traceback),
        ]
    else:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    added: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=added, processors=processors))
    logging.getLogger().addHandler(handler)  # also for other libraries, whose level stays at warning
    level = settings.log_level.upper()
    logging.getLogger(ROOT).setLevel("WARNING" if quiet and level != "ERROR" else level)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        logging.getLogger(ROOT).setLevel(logging.NOTSET)


def _printable(value: object, name: str = "") -> object:
    """Replace unprintable characters, which could control a terminal or start a line, by `?`.

    The field `exc_info` stays unchanged, because `_write_traceback` replaces them there.
    """
    if name == "exc_info":
        return value
    if isinstance(value, Mapping):
        return " ".join(f"{name}={_printable(item)}" for name, item in value.items())
    if isinstance(value, str):
        return "".join(character if character.isprintable() else "?" for character in value)
    return value


def _write_traceback(stream: TextIO, exc_info: structlog.typing.ExcInfo) -> None:
    """Write an indented traceback, so that no text in it looks like a log line."""
    lines = "".join(traceback.format_exception(*exc_info)).splitlines()
    stream.write("".join(f"\n    {_printable(line)}" for line in lines))
