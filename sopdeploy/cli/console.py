"""What the verbs share: the console, and how an error ends."""

import errno
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from sopdeploy.errors import SopdeployError, StorageError

USER_ERROR = 2

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


# What a machine answers to a write or a read that it cannot do: the user's to mend, in whatever step it came.
OF_STORAGE = {
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR,
    errno.EPERM, errno.EROFS,
}  # fmt: skip


@contextmanager
def one_line_errors(as_json: bool = False) -> Iterator[None]:
    """End with one line on stderr and exit code 2 where a user's error is raised.

    With *as_json* a script finds code and message on stdout too. What the disk refuses is a user's error.
    """
    try:
        with storage_errors():
            yield
    except SopdeployError as problem:
        tell(problem, as_json)
        raise typer.Exit(USER_ERROR) from problem


@contextmanager
def storage_errors() -> Iterator[None]:
    """Raise `StorageError`, which names the file where the system does, for what the disk refuses."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in OF_STORAGE:
            raise
        what = "a file" if problem.filename is None else problem.filename
        raise StorageError(
            f"{what}: cannot be read or written ({problem.strerror}); make room, or choose another file or "
            "folder"
        ) from problem


def tell(problem: SopdeployError, as_json: bool) -> None:
    """Show *problem* with its code, unless another process has."""
    if problem.told:
        return
    err.print(error_line(str(problem), problem.code))
    if as_json:
        print_json({"error": {"code": problem.code, "message": str(problem)}})


def error_line(message: str, code: str) -> str:
    """Return the line of an error, for rich: what is wrong, and the code that `docs/errors.md` explains."""
    return f"[bold red]error:[/] {plain(message)} [dim]{escape(f'[{code}]')}[/]"


def plain(text: str) -> str:
    """Return *text* on one line, without what would steer the terminal, escaped for rich."""
    line = " ".join(text.split())
    return escape("".join(character if character.isprintable() else "?" for character in line))


def print_json(value: Any) -> None:
    """Print *value* as JSON for a script."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


@contextmanager
def steps(title: str, *, quiet: bool) -> Iterator[Any]:
    """Give a function that is told each step's name: a spinner on a terminal, silence elsewhere."""
    if quiet or not err.is_terminal:
        yield lambda _: None
        return
    with err.status(title) as status:
        yield lambda name: status.update(f"{title}: {name}")
