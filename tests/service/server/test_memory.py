"""Freed memory goes back to the system, unless the environment says something else about the allocator."""

import os
import subprocess
import sys

import pytest

from sopdeploy_service.server.memory import REST_SECONDS, RULES, Rest, keep_little

NAMES = [name for name, _, _ in RULES]
HAS_GLIBC = "CS_GNU_LIBC_VERSION" in os.confstr_names

# One large block was freed before, as importing the libraries does; then a peak, with something behind it.
PEAK = """
import ctypes, sys
from pathlib import Path
from sopdeploy_service.server.memory import (give_back, keep_little)
keep_little()
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
give_back()
print(kept // 1_000_000, (resident() - before) // 1_000_000)
"""

needs_glibc = pytest.mark.skipif(not HAS_GLIBC, reason="the C library is not glibc")


@needs_glibc
@pytest.mark.parametrize(
    ("environment", "taken"),
    [
        ({}, NAMES),
        ({"MALLOC_ARENA_MAX": "4"}, NAMES[1:]),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, []),
        ({"GLIBC_TUNABLES": "glibc.rtld.nns=2"}, NAMES),
    ],
)
def test_what_the_environment_says_about_the_allocator_holds(environment, taken):
    assert list(keep_little(environment)) == taken


@needs_glibc
@pytest.mark.parametrize(
    ("size", "tunables", "keeps"),
    [
        (2_000_000, "", False),
        (2_000_000, "glibc.malloc.arena_max=8", True),  # the allocator as it is without our rules
        (400_000, "", True),
    ],
)
def test_a_peak_of_large_blocks_goes_back_at_once_and_every_other_at_rest(size, tunables, keeps):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {"GLIBC_TUNABLES": tunables, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PEAK, str(size)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    at_once, at_rest = map(int, ended.stdout.split())
    assert (at_once > 90) is keeps
    assert at_once > 90 or at_once < 10
    assert at_rest < 10


def test_rest_comes_once_after_each_time_that_there_was_something_to_do():
    seen = []
    rest = Rest(lambda: seen.append(now))
    step = REST_SECONDS / 10
    requests = [0] * 20 + [1, 2, 0, 0, 1] + [0] * 20 + [3] * 30 + [0] * 20
    for number, count in enumerate(requests):
        now = number * step
        rest.tick(now, count)
    assert [round(at / step) for at in seen] == [34, 84]
