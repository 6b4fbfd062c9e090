"""What the verbs share: the console, and how an error ends."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from sopdeploy.errors import SopdeployError

USER_ERROR = 2

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End with one line on stderr and exit code 2 where a user's error is raised."""
    try:
        yield
    except SopdeployError as problem:
        if not problem.told:
            err.print(f"[bold red]error:[/] {plain(str(problem))}")
        raise typer.Exit(USER_ERROR) from problem


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
