"""Logging: JSON lines or readable lines, and the timeline of a start.

Modules log with the standard library; the fields of `extra` become fields of the line. Text from clients
never starts a new line: JSON escapes it, and console output replaces unprintable characters.
"""

import logging
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import structlog
from structlog.typing import Processor

from sopdeploy_service.settings import Settings

ROOT = "sopdeploy"
START_UP = "sopdeploy.start_up"  # the timeline, which a setting enables at any log level


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
    logging.getLogger(START_UP).setLevel("INFO" if settings.startup_timeline else logging.NOTSET)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        for name in (ROOT, START_UP):
            logging.getLogger(name).setLevel(logging.NOTSET)


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


@dataclass
class Timeline:
    """The steps of a server's start in milliseconds; the first step begins with the process."""

    steps_ms: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=lambda: time.monotonic() - process_age())

    def mark(self, step: str) -> None:
        """Record that *step* ends now."""
        now = time.monotonic()
        self.add([{step: now - self._last}])
        self._last = now

    def add(self, bundles: Iterable[Mapping[str, float]]) -> None:
        """Add the seconds of each step of loading *bundles*."""
        for seconds in bundles:
            for step, spent in seconds.items():
                self.steps_ms[step] = round(self.steps_ms.get(step, 0.0) + spent * 1000, 1)
                self._last += spent

    def log(self) -> None:
        """Log the steps and their sum."""
        total = round(sum(self.steps_ms.values()), 1)
        logging.getLogger(START_UP).info("started", extra={"ms": total, "steps_ms": self.steps_ms})


def process_age() -> float:
    """Return the age of this process in seconds, 0 if the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])  # field 22 of the line: start time since boot, see proc(5)
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
