"""Kills and losses of power: a process ends before any of its steps that change files of a folder."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.children import kills_itself

WRITES = os.O_WRONLY | os.O_RDWR
# Events of Python's audit hooks -> how many of their first arguments are paths.
STEPS = {
    "open": 1,
    "os.link": 2,
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rename": 2,
    "os.rmdir": 1,
    "os.symlink": 2,
}
MAX_STEPS = 400
KILL = 1.0  # share of the content that is not flushed, which remains
LOSSES = {"killed": KILL, "power lost": 0.5}


def end_at(last: int, folder: Path, remains: float) -> None:
    """Let this process kill itself before step number *last* in *folder*.

    Of what was not flushed until then, a share of each file *remains*. Names are as the steps
    left them: file systems keep the order of names, not of contents.
    """
    steps = iter(range(1, last))
    flushed = {path.stat().st_ino: path.stat().st_size for path in files_of(folder)}

    def step() -> None:
        if next(steps, None) is None:
            if remains < KILL:
                lose(folder, flushed, remains)
            os.kill(os.getpid(), signal.SIGKILL)

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in STEPS:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
            return
        paths = [
            os.fsdecode(path)
            for path in arguments[: STEPS[event]]
            if isinstance(path, str | bytes | os.PathLike)
        ]
        if any(os.path.abspath(path).startswith(f"{folder}/") for path in paths):  # noqa: PTH100
            step()

    flush = os.fsync

    def flush_and_note(file: int) -> None:
        status = os.fstat(file)
        step()
        flush(file)
        flushed[status.st_ino] = status.st_size

    os.fsync = flush_and_note  # type: ignore[assignment]
    sys.addaudithook(on_event)


def files_of(folder: Path) -> Iterator[Path]:
    """Yield the files below *folder*."""
    for parent, _, names in os.walk(folder):
        yield from (path for name in names if not (path := Path(parent, name)).is_symlink())


def lose(folder: Path, flushed: dict[int, int], remains: float) -> None:
    """Shorten the files in *folder* to what is *flushed* and a share of the rest."""
    for path in list(files_of(folder)):
        status = path.stat()
        kept = flushed.get(status.st_ino, 0)
        if status.st_size > kept:
            os.truncate(path, kept + int(remains * (status.st_size - kept)))


def end_at_each_step(
    folder: Path, remains: float, prepare: Callable[[], object], run: Callable[[], object]
) -> Iterator[int]:
    """*prepare* and *run* in another process, which ends at its first step in *folder*, the second, and so on.

    Yields the number of the step after each end.
    """

    def run_until(last: int) -> None:
        end_at(last, folder, remains)
        run()

    for last in range(1, MAX_STEPS):
        prepare()
        if not kills_itself(partial(run_until, last)):
            return
        yield last
    raise AssertionError("the process did not end")
