"""What a sandboxed process tries in vain."""

import ctypes
import mmap
import os
import platform
import socket
from collections.abc import Callable
from pathlib import Path

# Of calls without a function in Python
NUMBERS = {
    "x86_64": {
        "ptrace": 101,
        "io_uring_setup": 425,
        "bpf": 321,
        "mount": 165,
        "keyctl": 250,
        "unshare": 272,
    },
    "aarch64": {
        "ptrace": 117,
        "io_uring_setup": 425,
        "bpf": 280,
        "mount": 40,
        "keyctl": 219,
        "unshare": 97,
    },
}[platform.machine()]
LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *values: object) -> None:
    if LIBC.syscall(NUMBERS[name], *values) < 0:
        raise OSError(ctypes.get_errno(), name)


FORBIDDEN: dict[str, Callable[[], object]] = {
    "read a file": lambda: Path("/etc/hostname").read_bytes(),
    "write a file": lambda: Path("/tmp/sandboxed").write_bytes(b""),  # noqa: S108
    "list a folder": lambda: list(Path("/").iterdir()),
    "delete a file": lambda: Path("/tmp/sandboxed").unlink(),  # noqa: S108
    "open a socket": lambda: socket.socket(),
    "run a program": lambda: os.execv("/bin/true", ["true"]),  # noqa: S606
    "start a process": os.fork,
    "signal another process": lambda: os.kill(os.getppid(), 0),
    "trace another process": lambda: call("ptrace", 16, os.getppid(), 0, 0),
    "create an io_uring": lambda: call("io_uring_setup", 8, 0),
    "load a BPF program": lambda: call("bpf", 0, 0, 0),
    "mount a file system": lambda: call("mount", b"x", b"/", b"tmpfs", 0, 0),
    "use keys of the kernel": lambda: call("keyctl", 0, -3, 0),
    "create a namespace": lambda: call("unshare", 0x10000000),
    "map executable memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
}


GROWS_DOWN = 0x100  # MAP_GROWSDOWN: a stack
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
# Ways to take so many bytes.
TAKES_MEMORY: dict[str, Callable[[int], object]] = {
    "private": lambda size: mmap.mmap(-1, size, flags=PRIVATE),
    "shared": lambda size: mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS),
    "a stack": lambda size: mmap.mmap(-1, size, flags=PRIVATE | GROWS_DOWN),
    "tables of pages that are read": lambda size: mmap.mmap(
        -1, size, flags=PRIVATE, prot=mmap.PROT_READ
    ),
}


def attempt(forbidden: Callable[[], object]) -> int:
    """Return the error number of *forbidden*, 0 if it is allowed."""
    try:
        forbidden()
    except OSError as problem:
        return problem.errno or -1
    return 0
