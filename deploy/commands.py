"""Run programs: stop with their last output on failure, and time the steps of a check."""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def run(*command: str | Path, **options: Any) -> str:
    """Run *command* and return its stdout; exit with its last 30 lines if it fails."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()[-30:]
        sys.exit(
            "\n".join([*lines, f"failed ({done.returncode}): {' '.join(map(str, command))}"])
        )
    return done.stdout.strip()


def exit_and_output(command: Sequence[str]) -> tuple[int, str]:
    """Run *command*; return its exit code, and its stdout followed by its stderr."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@contextmanager
def timed(step: str) -> Iterator[None]:
    """Print *step* and its duration after the block."""
    started = time.monotonic()
    yield
    sys.stdout.write(f"ok   {step} ({time.monotonic() - started:.0f} s)\n")
    sys.stdout.flush()
