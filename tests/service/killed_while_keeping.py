"""Kills a process at every step of keeping photographs; prints what a reader and the next start find.

    python killed_while_keeping.py FOLDER

A copy of this process, made by `fork`, keeps a second photograph, for which the first one makes room, and
adds a reason to it. It is killed at its first step on a file, the next one at its second step, and so on,
until one ends by itself. A step that writes a file writes half of it.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sopdeploy.kept import read_kept
from sopdeploy_service.kept_folder import KeptFolder
from tests.sopdeploy.test_kept import record_of

LIMIT = 20_000
STEPS = ("touch", "write_bytes", "replace", "unlink")


def keep(folder: Path, *, second: bool) -> None:
    kept = KeptFolder(folder, LIMIT, 36_500)
    if not second:
        kept.add(b"1" * 7000, record_of(f"{1:032x}"))
        return
    record = record_of(f"{2:032x}", near_hash="f" * 16)
    kept.add(b"2" * 7000, record)
    kept.add(b"2" * 7000, record.model_copy(update={"reasons": ("unknown",)}))


def kill_at(last: int) -> None:
    """Kill this process at its step number *last*."""
    steps = 0

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *values: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == last and name == "write_bytes":
                original(path, values[0][: len(values[0]) // 2])
            if steps == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(path, *values, **options)

        return call

    for name in STEPS:
        setattr(Path, name, counted(name, getattr(Path, name)))


def report(step: int, *checks: bool) -> None:
    """Print whether *checks* hold after a kill at *step*."""
    sys.stdout.write(f"{step} {all(checks)}\n")


def main() -> None:
    root = Path(sys.argv[1])
    keep(root / "start", second=False)
    for last in range(1, 1000):
        folder = shutil.copytree(root / "start", root / str(last))
        process = os.fork()
        if not process:
            kill_at(last)
            keep(folder, second=True)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        for path, record in read_kept(folder):
            expected = b"1" if path.name.endswith("1.jpg") else b"2"
            report(last, path.name == record.image, path.read_bytes() == expected * 7000)
        kept = KeptFolder(folder, LIMIT, 36_500)
        files = [file for file in folder.iterdir() if file.name != ".lock"]
        report(last, len(files) == 2 * len(read_kept(folder)), kept.used <= LIMIT)
        if status == 0:
            return


if __name__ == "__main__":
    main()
