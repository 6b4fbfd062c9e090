"""Freed memory returns to the system, unless the environment configures the allocator."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sopdeploy_service.server.process import MALLOPT, limit_heaps

OPTIONS = [option for _, option, _ in MALLOPT]
HAS_GLIBC = "CS_GNU_LIBC_VERSION" in os.confstr_names

# Free one large block, as importing the libraries does; then a peak of memory, with one block behind it.
PEAK = """
import ctypes, sys
from pathlib import Path
from sopdeploy_service.runtime.device_memory import trim_heaps
from sopdeploy_service.server.process import limit_heaps
limit_heaps()
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
def filled(size):
    block = c.malloc(size)
    c.memset(block, 1, size)
    return block
size = int(sys.argv[1])
c.free(filled(30_000_000))
before = resident()
blocks = [filled(size) for _ in range(100_000_000 // size)]
behind = filled(900_000)
for block in blocks:
    c.free(block)
kept = resident() - before
trim_heaps()
print(kept // 1_000_000, (resident() - before) // 1_000_000)
"""

needs_glibc = pytest.mark.skipif(not HAS_GLIBC, reason="the C library is not glibc")


@pytest.mark.parametrize(
    ("environment", "taken"),
    [
        ({}, OPTIONS),
        ({"MALLOC_ARENA_MAX": "4"}, OPTIONS[1:]),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, []),
    ],
)
def test_allocator_settings_of_the_environment_take_precedence(environment, taken, monkeypatch):
    calls = []
    library = SimpleNamespace(mallopt=lambda option, _: calls.append(option))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    for name in ("GLIBC_TUNABLES", *(name for name, _, _ in MALLOPT)):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    limit_heaps()
    assert calls == taken


@needs_glibc
@pytest.mark.parametrize(("size", "keeps"), [(2_000_000, False), (400_000, True)])
def test_large_blocks_return_immediately_and_all_others_when_idle(size, keeps):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {"GLIBC_TUNABLES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PEAK, str(size)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    at_once, when_idle = map(int, ended.stdout.split())
    assert (at_once > 90) is keeps
    assert at_once > 90 or at_once < 10
    assert when_idle < 10
