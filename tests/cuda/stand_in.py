"""The CUDA provider of ONNX Runtime without a GPU; `make cuda-stand-in` installs it. See build.py."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
import pytest

from tests.support.rooms import PYTHONPATH

FOLDER = Path(sys.prefix) / "cuda"
ABSENT = "the CUDA provider is not installed (`make cuda-stand-in`: Linux on x86-64 with gcc)"


def installed() -> bool:
    """Return whether the provider and the stand-in are here."""
    return (FOLDER / ".built").is_file()


def require() -> None:
    """Skip the test that calls this where the provider and the stand-in are not installed."""
    if not installed():
        pytest.skip(ABSENT)


def start(*command: str) -> subprocess.Popen[str]:
    """Start Python with *command*, so that it finds the provider and the stand-in; skip without them."""
    require()
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(FOLDER / "driver"),
        "PYTHONPATH": f"{FOLDER}{os.pathsep}{PYTHONPATH}",
        "PYTHONWARNINGS": "ignore",
        "SOPDEPLOY_RUNTIME": "auto",
    }
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@functools.cache
def _opener() -> subprocess.Popen[str]:
    process = start("-m", "tests.cuda.open_graphs")

    def end() -> None:
        with process:  # closes its pipes and waits
            process.kill()

    atexit.register(end)
    return process


def opened(model: onnx.ModelProto, precision: str = "fp32") -> str:
    """Open *model* with the options of the service for *precision*; return "ok" or what is wrong.

    That is the message of the provider, operators on the CPU, or copies between GPU and CPU.
    """
    if not installed():
        return ABSENT
    opener = _opener()
    assert opener.stdin
    assert opener.stdout
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(model.SerializeToString())
        opener.stdin.write(f"{precision} {path}\n")
        opener.stdin.flush()
        answer: str = json.loads(opener.stdout.readline())
    return answer
