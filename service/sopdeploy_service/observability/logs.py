"""Logging: JSON lines or readable lines.

Modules log with the standard library; the fields of `extra` become fields of the line. Text
from clients never starts a new line: JSON escapes it, and console output replaces unprintable
characters.

A thread writes the lines, so that no reader of the log can stop the server. If the reader stops
or the disk is full, at most `MAX_WAITING_LINES` lines wait; more are dropped and counted.
"""

import logging
import os
import queue
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TextIO

import structlog
from prometheus_client import Counter
from structlog.typing import Processor

from sopdeploy_service.settings import Settings

ROOT = "sopdeploy"
MAX_WAITING_LINES = 10_000
CLOSE_SECONDS = 1.0  # for writing the last lines

DROPPED = Counter(
    "sopdeploy_dropped_log_lines", "Log lines that could not be written in time", registry=None
)


class LineQueue(logging.Handler):
    """Formats log records and writes them, as lines, to the file descriptor *file* in a thread of its own."""

    def __init__(self, file: int) -> None:
        super().__init__()
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_WAITING_LINES)
        self._file = file
        self._writer = threading.Thread(target=self._write_lines, name="log", daemon=True)
        self._writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Pass the line of *record* to the writer, or drop it if too many wait."""
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            DROPPED.inc()
        except Exception:  # as the library's handlers do
            self.handleError(record)

    def close(self) -> None:
        """Give the writer `CLOSE_SECONDS` for the lines that wait; a reader that has stopped loses them."""
        with suppress(queue.Full):
            self._lines.put(None, timeout=CLOSE_SECONDS)
            self._writer.join(CLOSE_SECONDS)
        super().close()

    def _write_lines(self) -> None:
        while (line := self._lines.get()) is not None:
            data = f"{line}\n".encode(errors="backslashreplace")
            try:
                while data:
                    # Go on with the rest if only a part was written.
                    data = data[os.write(self._file, data) :]
            except OSError:  # the disk is full, or nobody has the pipe open
                DROPPED.inc()


@contextmanager
def configured(settings: Settings, file: int = 2) -> Iterator[None]:
    """Write the log of this process to the descriptor *file* (default: stderr) as *settings* say.

    Without the setting `log`, a terminal gets readable lines; anything else gets JSON of
    warnings and errors only. A process without stderr writes no log.
    """
    if sys.stderr is None:  # the descriptor may be that of another file
        yield
        return

    for_people = settings.log == "console" or (settings.log is None and os.isatty(file))

    # What each line has, whoever reads it.
    added: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]

    # How a line is written: colours for people, JSON for machines.
    processors: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if for_people:
        processors += [
            lambda _logger, _method, event: {
                # `_write_traceback` replaces the characters of an exception.
                name: value if name == "exc_info" else _printable(value)
                for name, value in event.items()
            },
            structlog.dev.ConsoleRenderer(
                colors=os.isatty(file), exception_formatter=_write_traceback
            ),
        ]
    else:
        processors += [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ]

    # The handler gets the log of this project and of libraries, whose level stays at warning.
    handler = LineQueue(file)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=added, processors=processors)
    )
    logging.getLogger().addHandler(handler)

    # The level of this project.
    level = settings.log_level
    has_warnings_only = settings.log is None and not for_people
    if has_warnings_only and level in {"debug", "info"}:
        level = "warning"
    logging.getLogger(ROOT).setLevel(level.upper())

    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
        logging.getLogger(ROOT).setLevel(logging.NOTSET)


def _printable(value: object) -> object:
    """Replace characters that could control a terminal or start a line by `?`; a mapping becomes text."""
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_printable(item)}" for key, item in value.items())
    if isinstance(value, str):
        return "".join(character if character.isprintable() else "?" for character in value)
    return value


def _write_traceback(stream: TextIO, exc_info: structlog.typing.ExcInfo) -> None:
    """Write an indented traceback, so that no text in it looks like a log line."""
    lines = "".join(traceback.format_exception(*exc_info)).splitlines()
    stream.write("".join(f"\n    {_printable(line)}" for line in lines))
