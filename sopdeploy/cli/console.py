"""Console output that all commands share: text, JSON, progress and one-line errors.

External text (paths, names, error messages) is printed as `rich.text.Text`: rich does not parse it as markup.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table
from rich.text import Text

from sopdeploy.api.progress import plain_text as plain_text
from sopdeploy.environment import missing_extras
from sopdeploy.errors import (
    NoMemoryError,
    SopdeployError,
    StorageError,
    command_line_option,
    first_line,
    is_out_of_memory,
)
from sopdeploy.files import STORAGE_ERRNOS

USER_ERROR_EXIT_CODE = 2

BundleArgument = Annotated[Path, typer.Argument(help="A bundle written by `sopdeploy export`.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


@contextmanager
def one_line_errors(as_json: bool = False) -> Iterator[None]:
    """Print a user error as one line on stderr and exit with code 2.

    With *as_json*, also print its code, message and complete lists as JSON on stdout. Errors of the operating
    system in `STORAGE_ERRNOS`, exhausted memory and missing packages of an extra are user errors. An error
    that another process has already shown (`reported`) is not printed again.
    """
    try:
        try:
            with missing_extras():
                yield
        except OSError as error:
            if error.errno not in STORAGE_ERRNOS:
                raise
            name = "a file or stdout" if error.filename is None else error.filename
            raise StorageError(
                f"{name}: cannot be read or written ({error.strerror}); free disk space, or choose another "
                "file or folder"
            ) from error
        except Exception as error:
            if isinstance(error, SopdeployError) or not is_out_of_memory(error):
                raise
            raise NoMemoryError(
                f"out of memory ({first_line(error)}); end other programs, choose smaller batches or images, "
                "or use a machine or GPU with more memory"
            ) from error
    except SopdeployError as error:
        if not error.reported:
            message = error.describe(command_line_option)
            print_error(message, error.code)
            if as_json:
                lists = {"lists": error.lists} if error.lists else {}
                with suppress(OSError):  # stdout may be what cannot be written
                    print_json({"error": {"code": error.code, "message": message, **lists}})
        raise typer.Exit(USER_ERROR_EXIT_CODE) from error


def say(*lines: str, style: str | None = None) -> None:
    """Print *lines* on stdout without markup."""
    for line in lines:
        out.print(plain_text(line), style=style)


def print_table(columns: Iterable[str], rows: Iterable[Iterable[str | Text]]) -> None:
    """Print *rows* below the names of *columns*, aligned and without markup."""
    table = Table(*(Column(plain_text(name)) for name in columns), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(plain_text(cell) if isinstance(cell, str) else cell for cell in row))
    out.print(table)


def print_field(label: str, text: str, *, style: str = "bold", width: int = 8) -> None:
    """Print *label* in *style*, padded to *width* columns, followed by *text* without markup."""
    out.print(Text.assemble((f"{label:{width}}", style), " ", plain_text(text)))


def print_error(message: str, code: str) -> None:
    """Print an error line on stderr: the message and the code that docs/errors.md explains."""
    err.print(Text.assemble(("error:", "bold red"), " ", plain_text(message), " ", (f"[{code}]", "dim")))


def print_json(value: Any) -> None:
    """Print *value* as indented JSON on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


@contextmanager
def show_steps(title: str, *, lines: bool = False) -> Iterator[Any]:
    """Yield a callback for step names that updates a spinner; without a terminal, it may print *lines*."""
    if not err.is_terminal:
        yield lambda name: err.print(plain_text(f"{title}: {name}")) if lines else None
        return
    with err.status(title) as status:
        yield lambda name: status.update(plain_text(f"{title}: {name}"))


@contextmanager
def image_progress() -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (done, total) that draws a progress bar on a terminal and otherwise does nothing."""
    if not err.is_terminal:
        yield lambda _done, _total: None
        return
    with Progress(console=err, transient=True) as progress:
        task = progress.add_task("images", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
