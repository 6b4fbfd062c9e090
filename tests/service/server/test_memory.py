"""Freed memory returns to the system, unless the environment configures the allocator."""

import ctypes
from types import SimpleNamespace

import pytest

from sopdeploy_service.runtime.device_memory import limit_heaps, trim_heaps

MIB = 1 << 20
ARENAS, MAPPED, TRIMMED = (-8, 2), (-3, MIB), (-1, 4 * MIB)  # parameters of malloc.h, and values


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, [ARENAS, MAPPED, TRIMMED]),
        ({"MALLOC_ARENA_MAX": "4"}, [MAPPED, TRIMMED]),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}, []),
        ({"GLIBC_TUNABLES": "glibc.cpu.x86_shstk=off"}, [ARENAS, MAPPED, TRIMMED]),
    ],
)
def test_allocator_settings_of_the_environment_take_precedence(environment, expected, monkeypatch):
    calls = []
    library = SimpleNamespace(mallopt=lambda *given: calls.append(given))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    for name in ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    limit_heaps()
    assert calls == expected


def test_free_pages_are_returned_where_the_c_library_can(monkeypatch):
    calls = []
    for library in (SimpleNamespace(malloc_trim=calls.append), SimpleNamespace()):
        monkeypatch.setattr(ctypes, "CDLL", lambda _, library=library: library)
        trim_heaps()
        limit_heaps()
    assert calls == [0]
