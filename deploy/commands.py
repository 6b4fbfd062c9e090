"""Programs that are run here: what they print where they fail, and how long a step takes."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def run(*command: str | Path, **options: Any) -> str:
    """Run *command* and return its output; where it fails, print its last lines and end."""
    found = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
    if found.returncode:
        lines = (found.stdout + found.stderr).splitlines()[-30:]
        sys.exit("\n".join([*lines, f"failed ({found.returncode}): {' '.join(map(str, command))}"]))
    return found.stdout.strip()


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print that *what* was done, and how long it took."""
    started = time.monotonic()
    yield
    sys.stdout.write(f"ok   {what} ({time.monotonic() - started:.0f} s)\n")
    sys.stdout.flush()
