"""A control group that limits the memory of processes, as a container does. Needs root on Linux."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
LIMITS = {1: "memory.limit_in_bytes", 2: "memory.max"}  # files by the version of control groups
END_SECONDS = 10.0
PEAKS = {1: "memory.max_usage_in_bytes", 2: "memory.peak"}


class MemoryGroup:
    """A control group in *folder*."""

    def __init__(self, folder: Path, version: int) -> None:
        self.folder = folder
        self._version = version

    def command(self, command: list[str]) -> list[str]:
        """Return a command that runs *command* in the group."""
        join = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        return ["/bin/sh", "-c", join, "sh", *command]

    @property
    def peak(self) -> int:
        """The most bytes that the processes have used at once."""
        return int((self.folder / PEAKS[self._version]).read_text())

    @property
    def kills(self) -> int:
        """The number of processes that the kernel has killed."""
        name = "memory.oom_control" if self._version == 1 else "memory.events"
        lines = dict(line.split() for line in (self.folder / name).read_text().splitlines())
        return int(lines["oom_kill"])


def can_limit_memory() -> bool:
    """Whether this process may create a group with a limit."""
    try:
        with memory_group(1 << 30):
            return True
    except OSError:
        return False


@contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    """Create a group of at most *limit* bytes; raises `OSError` where this is not possible."""
    version = 1 if (ROOT / "memory").is_dir() else 2
    folder = (ROOT / "memory" if version == 1 else ROOT) / f"sopdeploy-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / LIMITS[version]).write_text(str(limit))
        yield MemoryGroup(folder, version)
    finally:
        remove(folder)


def remove(folder: Path) -> None:
    """Remove a group once its processes have ended: child processes end after a server that was killed."""
    end = time.monotonic() + END_SECONDS
    while (folder / "cgroup.procs").read_text() and time.monotonic() < end:
        time.sleep(0.05)
    folder.rmdir()
