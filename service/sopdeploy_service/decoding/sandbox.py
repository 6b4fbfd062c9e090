"""Restrict a process to what image decoding needs: no files, new sockets, programs, processes or signals.

Three mechanisms of Linux that need no privilege and cannot be undone: `no_new_privs` (no
set-user-id program gains rights), Landlock (no files, no TCP connections; Linux 5.13) and a
seccomp filter, which allows a list of system calls. All others fail with EPERM (clone3 with
ENOSYS), including those of later kernels. Open descriptors stay usable.

Source: seccomp(2), landlock(7); numbers of system calls from asm/unistd_64.h and
asm-generic/unistd.h.
"""

import contextlib
import ctypes
import errno
import importlib
import os
import platform
import struct
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from sopdeploy.images.formats import prepare_decoders

# Modules that are otherwise imported with some images; some are private or optional.
LATE_MODULES = (
    "PIL.ImageColor",
    "PIL.ImageFilter",
    "PIL.ImageOps",
    "PIL.ImagePalette",
    "PIL.MpoImagePlugin",
    "PIL.TiffImagePlugin",  # EXIF
    "PIL.WebPImagePlugin",
    "sopdeploy.images.decode",
)

# name: number on x86-64, number on aarch64. The most frequent ones first.
ALLOWED: dict[str, tuple[int, int]] = {
    "recvfrom": (45, 207), "sendto": (44, 206), "futex": (202, 98), "madvise": (28, 233),
    "munmap": (11, 215), "mremap": (25, 216), "brk": (12, 214), "read": (0, 63), "write": (1, 64),
    "close": (3, 57), "lseek": (8, 62), "fstat": (5, 80), "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "gettimeofday": (96, 169),
    "getrusage": (98, 165), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168),
    "getrandom": (318, 278), "getpid": (39, 172), "gettid": (186, 178), "uname": (63, 160),
    "sysinfo": (99, 179), "membarrier": (324, 283), "set_robust_list": (273, 99), "rseq": (334, 293),
    "sigaltstack": (131, 132), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "restart_syscall": (219, 128), "exit": (60, 93), "exit_group": (231, 94),
    "setitimer": (38, 103),
}  # fmt: skip


class AllowedValues(NamedTuple):
    """A system call that is allowed if its argument with index *argument*, `& mask`, is one of *values*."""

    name: str
    numbers: tuple[int, int]  # as in `ALLOWED`
    argument: int
    mask: int
    values: Sequence[int]


INT = 0xFFFFFFFF  # the bits of an argument of the type `int`
EXECUTABLE = 4  # PROT_EXEC
EMPTY_PATH = 0x1000  # AT_EMPTY_PATH: `newfstatat` describes an open file, as `fstat` does
THREAD = 0x10000  # CLONE_THREAD
NAMESPACES = 0x7E020080  # CLONE_NEW*
SET_NAME = 15  # PR_SET_NAME: the name of a thread
SET_VMA = 0x53564D41  # PR_SET_VMA: the name of memory


def argument_rules(process: int, *, threads: bool) -> tuple[AllowedValues, ...]:
    """List the system calls that *process* may use with certain arguments only.

    With *threads*, `clone` may start a thread; it may never start a process.
    """
    return (
        AllowedValues(
            "clone",
            (56, 220),
            argument=0,
            mask=THREAD | NAMESPACES,
            values=(THREAD,) if threads else (),
        ),
        # No programs in memory.
        AllowedValues("mmap", (9, 222), argument=2, mask=EXECUTABLE, values=(0,)),
        AllowedValues("mprotect", (10, 226), argument=2, mask=EXECUTABLE, values=(0,)),
        AllowedValues(
            "newfstatat", (262, 79), argument=3, mask=EMPTY_PATH, values=(EMPTY_PATH,)
        ),
        AllowedValues("prctl", (157, 167), argument=0, mask=INT, values=(SET_NAME, SET_VMA)),
        # 0: the calling process.
        AllowedValues("prlimit64", (302, 261), argument=0, mask=INT, values=(0,)),
        AllowedValues("kill", (62, 129), argument=0, mask=INT, values=(process,)),
        AllowedValues("tgkill", (234, 131), argument=0, mask=INT, values=(process,)),
    )


# Column of numbers, AUDIT_ARCH_*
ARCHITECTURES = {
    "x86_64": (0, 0xC000003E),
    "aarch64": (1, 0xC00000B7),
}
CLONE3 = 435
ALLOW = 0x7FFF0000
FAIL = 0x00050000
KILL = 0x80000000
# BPF instructions on 32 bits
LOAD = 0x20
EQUAL = 0x15
AND = 0x54
RETURN = 0x06
# offsets in struct seccomp_data
NUMBER_AT = 0
ARCHITECTURE_AT = 4
ARGUMENTS_AT = 16
NO_NEW_PRIVS = 38
SET_FILTER = 1
ALL_THREADS = 1
SECCOMP = {"x86_64": 317, "aarch64": 277}
CREATE_RULESET = 444
RESTRICT_SELF = 446
# Numbers of rights of files, of TCP and of scopes (abstract sockets, signals) in each version
# of Landlock.
LANDLOCK = {
    1: (13, 0, 0),
    2: (14, 0, 0),
    3: (15, 0, 0),
    4: (15, 2, 0),
    5: (16, 2, 0),
    6: (16, 2, 2),
}


def preload() -> None:
    """Import what decoding would import later."""
    Image.preinit()
    prepare_decoders()
    for name in LATE_MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def build_filter(machine: str, process: int, *, threads: bool) -> bytes:
    """Assemble the seccomp filter of *process* on *machine*, `x86_64` or `aarch64`.

    Without *threads*, the process cannot start any. An instruction is (operation, number of
    instructions to skip if a comparison holds, number to skip if not, operand).
    """
    # Kill a process of another architecture: its numbers mean other calls.
    column, architecture = ARCHITECTURES[machine]
    deny = FAIL | errno.EPERM
    code = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (EQUAL, 1, 0, architecture),  # skips the next instruction
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_AT),
    ]

    # Allow the calls in the table.
    for numbers in ALLOWED.values():
        code += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, ALLOW)]

    # Allow others with certain arguments only.
    for rule in argument_rules(process, threads=threads):
        offset = ARGUMENTS_AT + 8 * rule.argument  # the low four of the eight bytes come first
        check = [(LOAD, 0, 0, offset), (AND, 0, 0, rule.mask)]
        for value in rule.values:
            check += [(EQUAL, 0, 1, value), (RETURN, 0, 0, ALLOW)]
        check.append((RETURN, 0, 0, deny))

        # Other calls skip the check of this one.
        code += [(EQUAL, 0, len(check), rule.numbers[column]), *check]

    # Say that clone3 does not exist: the C library then calls clone.
    code += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, FAIL | errno.ENOSYS)]

    # Deny all others.
    code += [(RETURN, 0, 0, deny)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def enter() -> str:
    """Restrict this process forever, or raise `OSError`; return the names of the restrictions.

    Call `preload` before.
    """
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in ARCHITECTURES:
        raise OSError(
            errno.ENOSYS,
            f"{platform.system()} on {machine} is not supported by the seccomp filter",
        )

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs is not available")

    # Deny files and TCP, then build the filter of system calls.
    version = _enter_landlock(libc)
    # The decoder of HEIC, libde265, always works in another thread; no other decoder does.
    instructions = build_filter(machine, os.getpid(), threads="HEIF" in Image.OPEN)
    code = ctypes.create_string_buffer(instructions)

    # The number of instructions, of 8 bytes each, and their address (struct sock_fprog).
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(code))
    # A positive result is the id of a thread that has another filter.
    if libc.syscall(SECCOMP[machine], SET_FILTER, ALL_THREADS, program):
        raise OSError(ctypes.get_errno() or errno.EBUSY, "seccomp is not available")
    return f"no_new_privs, {f'landlock {version}' if version else 'no landlock'}, seccomp"


def _enter_landlock(libc: ctypes.CDLL) -> int:
    """Deny files and TCP to this thread and those that it starts; return Landlock's version or 0.

    Landlock denies every right of a rule set except those that a rule allows, and this set has
    no rules.
    """
    # With the flag 1, this call asks for the version.
    version: int = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return 0

    # A later version also has the rights of earlier ones.
    numbers = LANDLOCK[min(version, max(LANDLOCK))]

    # A struct landlock_ruleset_attr: a mask for each kind of rights, with a bit for each right.
    rights = struct.pack("QQQ", *((1 << number) - 1 for number in numbers))

    ruleset = libc.syscall(CREATE_RULESET, rights, ctypes.c_size_t(len(rights)), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock does not create a rule set")
    try:
        if libc.syscall(RESTRICT_SELF, ruleset, 0):
            raise OSError(ctypes.get_errno(), "landlock does not restrict this process")
    finally:
        os.close(ruleset)
    return version
