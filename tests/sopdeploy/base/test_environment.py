"""The cores that a process may use, and packages that cannot be imported."""

import importlib
import os
import platform
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES

import pytest

from sopdeploy.base import environment
from sopdeploy.base.environment import (
    import_optional,
    install_command,
    is_distributed,
    is_main_process,
    missing_extras,
    missing_store_error,
    usable_cores,
)
from sopdeploy.errors import ConfigError, MissingPackageError, RuntimeUnavailableError

QUOTA = "cpu.cfs_quota_us"
PERIOD = "cpu.cfs_period_us"
# Groups of the process, files, cores of 8
QUOTAS = {
    "version 2": ("0::/a/b\n", {"a/b/cpu.max": "250000 100000"}, 2),
    "version 2, the group around it": (
        "0::/a/b\n",
        {"a/cpu.max": "100000 50000", "a/b/cpu.max": "max 100000"},
        2,
    ),
    "version 2 in a container": ("0::/\n", {"cpu.max": "300000 100000"}, 3),
    "version 2, less than a core": ("0::/\n", {"cpu.max": "50000 100000"}, 1),
    "version 2, more than the cores": ("0::/\n", {"cpu.max": "6400000 100000"}, 8),
    "version 1": (
        "3:cpu,cpuacct:/a\n",
        {f"cpu/a/{QUOTA}": "400000", f"cpu/a/{PERIOD}": "100000"},
        4,
    ),
    "version 1, the group around it": (
        "3:cpuacct,cpu:/a/b\n0::/\n",
        {
            **{f"cpuacct,cpu/a/b/{QUOTA}": "-1", f"cpuacct,cpu/a/b/{PERIOD}": "100000"},
            **{f"cpuacct,cpu/a/{QUOTA}": "200000", f"cpuacct,cpu/a/{PERIOD}": "100000"},
        },
        2,
    ),
    "version 1 in a container": (
        "1:cpu:/host/path\n",
        {f"cpu/{QUOTA}": "500000", f"cpu/{PERIOD}": "100000"},
        5,
    ),
    "another controller": (
        "4:cpuset:/a\n",
        {f"cpuset/a/{QUOTA}": "1", f"cpuset/a/{PERIOD}": "1"},
        8,
    ),
    "no quota": ("0::/\n", {"cpu.max": "max 100000"}, 8),
    "no groups": (None, {}, 8),
}


@pytest.mark.parametrize(("groups", "files", "expected"), QUOTAS.values(), ids=QUOTAS)
def test_a_process_may_use_its_cores_within_every_quota(
    tmp_path, monkeypatch, groups, files, expected
):
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(f"{text}\n")
    if groups is not None:
        (tmp_path / "cgroup").write_text(groups)
    monkeypatch.setattr(environment, "CGROUP", tmp_path / "fs")
    monkeypatch.setattr(environment, "PROCESS_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(8)), raising=False)

    assert usable_cores() == expected


PRODUCT = "import numpy; numpy.ones((64, 1000)) @ numpy.ones((1000, 2))"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="kernels of x86-64")
@pytest.mark.parametrize("kernels", ["Haswell", "Zen", "Prescott"])
def test_numpy_multiplies_matrices_with_the_kernels_of_other_processors(kernels: str) -> None:
    """NumPy 2.5 ends with a segmentation fault where AVX-512 is missing."""
    environment = {**os.environ, "OPENBLAS_CORETYPE": kernels}
    subprocess.run([sys.executable, "-c", PRODUCT], env=environment, check=True)


@pytest.mark.parametrize("value", ["two", "-1", "1.0", "²", "9" * 5000, " 2"])
def test_a_wrong_variable_of_a_launcher_is_named(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(ConfigError, match="WORLD_SIZE="):
        is_distributed()

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", value)
    with pytest.raises(ConfigError, match="RANK="):
        is_main_process()

    monkeypatch.setenv("RANK", "")
    assert is_main_process()


# What a module does when it is imported, and the cause or the command that the error has
IMPORTS = {
    "is missing": ("raise ModuleNotFoundError(name='runtime')", "pip install"),
    "needs a missing one": ("import there_is_no_such_module", "pip install"),
    "has a library that cannot be mapped": (
        "raise ImportError('libruntime.so: failed to map')",
        "libruntime.so",
    ),
    "hides the cause": (
        "try:\n raise ImportError('libc.so: too short')\n"
        "except ImportError as error: raise ImportError('advice') from error",
        "libc.so",
    ),
}


@pytest.mark.parametrize(("code", "said"), IMPORTS.values(), ids=IMPORTS)
def test_a_package_that_cannot_be_loaded_is_not_called_missing(
    tmp_path, monkeypatch, code, said
) -> None:
    (tmp_path / "failing_runtime.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(RuntimeUnavailableError, match=said) as caught:
        import_optional("failing_runtime", "runtime", ".[cpu]", RuntimeUnavailableError)
    assert ("pip install" in str(caught.value)) is (said == "pip install")
    assert "\n" not in str(caught.value)


def test_a_library_that_cannot_be_loaded_is_one_error_line(tmp_path, monkeypatch) -> None:
    package = tmp_path / "lib" / "timm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from timm.native import *")
    (package / f"native{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    for folder in (tmp_path, package.parent):
        monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)

    with pytest.raises(MissingPackageError, match=r"^timm is installed"), missing_extras():
        importlib.import_module("timm")


@pytest.mark.parametrize("error", [ImportError("cannot import name"), ModuleNotFoundError("x")])
def test_a_failed_import_that_no_extra_mends_stays_as_it_is(error: ImportError) -> None:
    with pytest.raises(type(error)) as caught, missing_extras():
        raise error
    assert caught.value is error


def test_a_client_of_a_store_that_is_missing_is_named() -> None:
    error = ImportError("Install s3fs to access S3")  # as fsspec raises it
    error.__cause__ = ModuleNotFoundError(name="s3fs")
    expected = f"s3://x: s3fs is not installed; {install_command('.[s3]')}"
    assert str(missing_store_error("s3://x", error)) == expected

    error = ImportError("adlfs.so: file too short")
    problem = "adlfs is installed, but cannot be loaded (ImportError: adlfs.so: file too short)"
    assert str(missing_store_error("abfs://x", error)).startswith(f"abfs://x: {problem}")
