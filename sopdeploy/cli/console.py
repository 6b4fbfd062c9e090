"""Console output that all commands share: text, JSON, progress and one-line errors.

External text (paths, names, error messages) is printed as `rich.text.Text`: rich does not parse
it as markup.
"""

import ctypes
import json
import logging
import os
import re
import sys
import traceback
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from functools import partial
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from sopdeploy.base.environment import is_main_process, missing_extras
from sopdeploy.base.files import FULL_ERRNOS, STORAGE_ERRNOS, os_reason
from sopdeploy.errors import (
    NoMemoryError,
    SopdeployError,
    StorageError,
    command_line_option,
    first_line,
    is_memory_exhausted,
)

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

MAX_ROW = 100_000  # columns of a row in a file
# White space other than spaces, and spaces around it
_BREAKS = re.compile(r" *[^\S ]\s*")
_BREAKS_AT_ENDS = "\t\n\v\f\r"
# Paths and commands, which may become input
_COPIED = re.compile(r"\S*[/\\]\S*|`[^`]*`|\bsopdeploy .*")
# Bidirectional classes: letters of a right-to-left script, what continues a word of them, and a
# space.
_DIRECTIONS = {"R": "R", "AL": "R", "NSM": "w", "AN": "w", "EN": "w", "ES": "w", "WS": " "}
_RIGHT_TO_LEFT = re.compile(r"R[Rw]*(?: R[Rw]*)*")


def plain_text(text: str) -> Text:
    """Build one line of rich text from *text*, without markup; `?` replaces control characters.

    Spaces stay, because they align columns and are a part of names. Line breaks, tabs and other
    white space become one space.

    Names in right-to-left scripts do not change the order of the text around them.
    """
    line = _BREAKS.sub(" ", text.strip(_BREAKS_AT_ENDS)).rstrip()
    printable = "".join(character if character.isprintable() else "?" for character in line)
    return Text(_isolate_right_to_left(printable))


def _isolate_right_to_left(line: str) -> str:
    """Put every run of right-to-left words in *line* between U+2068 and U+2069, except in `_COPIED`.

    Otherwise, a terminal that reorders "قبعة 10, hat 9" shows the 10 on the other side of the
    name.
    """
    # Names are joined by `_`, too, whose own class would end a word.
    classes = map(unicodedata.bidirectional, line.replace("_", "-"))
    # The direction of each character, as a letter.
    directions = "".join(_DIRECTIONS.get(each, "-") for each in classes)
    if "R" not in directions:
        return line

    copied = [match.span() for match in _COPIED.finditer(line)]
    # From the last run to the first one, so that the positions of the others stay right.
    for run in reversed([*_RIGHT_TO_LEFT.finditer(directions)]):
        start, end = run.span()
        if not any(first < end and start < last for first, last in copied):
            line = f"{line[:start]}\u2068{line[start:end]}\u2069{line[end:]}"

    return line


@contextmanager
def one_line_errors(as_json: bool = False, keys: Collection[str] = ()) -> Iterator[None]:
    """Print a user error as one line on stderr and exit with code 2; *keys* are those of `--set`.

    With *as_json*, also print its code, message and complete lists as JSON on stdout. If a
    signal has stopped a run, the exit code is another one, and only the first process prints
    the line, without `error:` before it.
    """
    try:
        with _system_errors_as_user_errors(), missing_extras():
            yield
    except SopdeployError as error:
        message = error.describe(partial(command_line_option, keys=keys))
        is_stop = error.exit_code != SopdeployError.exit_code  # by a signal
        if is_stop:
            if is_main_process():
                err.print(plain_text(message))
        else:
            print_error(message, error.code)
            if as_json:
                lists = {"lists": error.lists} if error.lists else {}
                with suppress(OSError):  # stdout may be what cannot be written
                    print_json({"error": {"code": error.code, "message": message, **lists}})
        raise typer.Exit(error.exit_code) from error


@contextmanager
def _system_errors_as_user_errors() -> Iterator[None]:
    """Convert system errors of the block to `StorageError`, and those of exhausted memory to `NoMemoryError`.

    A system error counts if it names a file or is in `STORAGE_ERRNOS`.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno not in STORAGE_ERRNOS:
            raise

        name = "a file or stdout" if error.filename is None else error.filename
        advice = "check it, its disk and its permissions"
        if error.errno in FULL_ERRNOS:
            advice = "free disk space, or choose another file or folder"
        raise StorageError(
            f"{name}: cannot be read or written ({os_reason(error)}); {advice}"
        ) from error
    except Exception as error:  # each library has its own type for missing memory
        if isinstance(error, SopdeployError) or not is_memory_exhausted(error):
            raise
        raise NoMemoryError(
            f"out of memory ({first_line(error)}); end other programs, choose "
            "smaller batches or images, or use a machine or GPU with more "
            "memory"
        ) from error


@contextmanager
def showing_causes() -> Iterator[None]:
    """Log to stderr what the block does, and print the traceback of its user error."""
    logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s")
    logging.getLogger().setLevel(logging.WARNING)  # of other packages, warnings are enough
    logging.getLogger("sopdeploy").setLevel(logging.DEBUG)
    try:
        yield
    except SopdeployError:
        err.print(Text(traceback.format_exc()))
        raise


def say(*lines: str, style: str | None = None) -> None:
    """Print *lines* on stdout without markup."""
    for line in lines:
        out.print(plain_text(line), style=style)


def print_table(columns: Iterable[str], rows: Iterable[Iterable[str | Text]]) -> None:
    """Print *rows* below the names of *columns*, aligned and without markup.

    A terminal wraps long cells; a pipe or file, which has no width, gets each row in one line.
    """
    fields = [Column(plain_text(name), overflow="fold") for name in columns]
    table = Table(*fields, box=None, pad_edge=False)
    for row in rows:
        cells = (plain_text(cell) if isinstance(cell, str) else cell for cell in row)
        table.add_row(*cells)

    # A terminal folds long cells; what is read by programs stays on one line.
    width = out.width
    try:
        out.width = width if out.is_terminal else MAX_ROW
        out.print(table)
    finally:
        out.width = width


def print_field(label: str, text: str, *, style: str = "bold", width: int = 8) -> None:
    """Print *label* in *style*, padded to *width* columns, followed by *text* without markup."""
    out.print(Text.assemble((f"{label:{width}}", style), " ", plain_text(text)))


def print_check(label: str, text: str, holds: bool | None = True) -> None:
    """Print a field with a mark before its *text*: a check mark if it *holds*, or "!".

    None prints "-", for what could not be checked.
    """
    mark, style = {True: ("✓", "green"), False: ("!", "bold yellow"), None: ("-", "dim")}[holds]
    try:
        mark.encode(out.encoding)
    except UnicodeEncodeError:  # of a terminal that does not show UTF-8
        mark = "ok"
    out.print(Text.assemble((f"{label:8}", "bold"), " ", (mark, style), " ", plain_text(text)))


def print_error(message: str, code: str) -> None:
    """Print an error line on stderr: the message and the code that docs/errors.md explains."""
    err.print(
        Text.assemble(
            ("error:", "bold red"), " ", plain_text(message), " ", (f"[{code}]", "dim")
        )
    )


def print_json(value: Any) -> None:
    """Print *value* as indented JSON on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Print on stderr what code in the block, also a library in C, prints on stdout."""
    sys.stdout.flush()
    with ExitStack() as stack:
        # Standard output of the process, on which C prints, and then that of Python.
        with suppress(OSError):  # stdout is closed
            saved = os.dup(1)
            stack.callback(os.close, saved)
            os.dup2(2, 1)
            stack.callback(os.dup2, saved, 1)
            with suppress(OSError, TypeError):  # not on Windows
                # At the end, this writes what C has kept, before stdout is restored.
                stack.callback(ctypes.CDLL(None).fflush, None)

        stack.enter_context(redirect_stdout(sys.stderr))
        yield


@contextmanager
def show_steps(title: str) -> Iterator[Callable[[str], None]]:
    """Yield a callback that shows the names of steps in a spinner, or without a terminal as a line each."""
    if not err.is_terminal:
        yield lambda name: err.print(plain_text(f"{title}: {name}"))
        return
    with err.status(title) as status:
        yield lambda name: status.update(plain_text(f"{title}: {name}"))


@contextmanager
def image_progress() -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (done, total) that draws a progress bar on a terminal and otherwise does nothing."""
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("images", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class ProgressBars:
    """A training callback that draws a progress bar and prints a line per epoch."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stage = ""
        self.epochs = 0
        self.has_header = False

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(28),
            TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (console.is_terminal or console.is_jupyter),
        )
        self.task = self.progress.add_task("", total=None, note="", visible=False)

    def __enter__(self) -> "ProgressBars":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def on_message(self, message: str) -> None:
        """Print the message."""
        self.console.print(plain_text(message))

    def on_warning(self, warning: str) -> None:
        """Print the warning."""
        self.console.print(Text.assemble(("warning:", "yellow"), " ", plain_text(warning)))

    def on_stage(self, *, name: str, done: int, total: int) -> None:
        """Advance the bar of a procedure without epochs; print the name of a stage when it begins."""
        if name != self.stage:
            self.stage = name
            self.console.print(name)
        self.progress.update(
            self.task, description="", completed=done, total=total, note="", visible=True
        )

    def on_step_end(
        self, *, epoch: int, epochs: int, step: int, steps: int, loss: float
    ) -> None:
        """Advance the bar, whose end is that of the run."""
        self.epochs = epochs
        self.progress.update(
            self.task,
            description=f"epoch {epoch + 1}/{epochs}",
            completed=epoch * steps + step + 1,
            total=epochs * steps,
            note=f"loss {loss:.3f}",
            visible=True,  # not before the first step, whose run has no known end
        )

    def on_evaluation_batch(self, *, epoch: int, epochs: int, done: int) -> None:
        """Show the number of evaluated images."""
        description = f"epoch {epoch + 1}/{epochs}"
        note = f"{done} validation images"
        self.progress.update(self.task, description=description, note=note)

    def on_epoch_end(self, row: Any) -> None:
        """Print scores, losses, learning rate, images/s and the time of the run, within 80 columns.

        Before the first row, it prints the names of the columns.
        """
        if self.stage:  # a procedure without epochs; its result is printed at the end
            return

        if not self.has_header:
            self.has_header = True
            name = row.metrics.score_name
            self.console.print(
                f"{'epoch':>9} {name:>9} {'loss':>8} {'training loss':>14} {'lr':>9} "
                f"{'images/s':>9} {'s':>8}"
            )
        loss = row.losses.get("loss", 0.0)
        epoch = f"{row.epoch}/{self.epochs}"
        speed = row.images_per_second or 0.0
        self.console.print(
            f"{epoch:>9} [bold]{100 * row.metrics.score:>7.2f} %[/] {row.metrics.loss:>8.3f} "
            f"{loss:>14.3f} {row.lr:>9.2e} {speed:>9.0f} {row.seconds:>8.1f}"
        )
