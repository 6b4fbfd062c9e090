"""Operators that earlier exports have compared, in a file of the user's cache folder.

An entry maps the description of a chain, a hash, to the ONNX operators that ONNX Runtime executes.
The file begins with a hash of its content and of everything else that decides a comparison: the
versions of packages, the code of this folder, and the processor. A file with another hash
counts as none: its operators are compared again.
"""

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch

from sopdeploy.environment import installed
from sopdeploy.files import atomic_write, expand_user, read_file

PACKAGES = (
    "sopdeploy",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
)
MOST_OPERATORS = 20_000
MOST_BYTES = 10**7
Executed = dict[str, Counter[str]]


def read_known() -> Executed:
    """Read the ONNX operators by description; none unless the file has the expected hash."""
    try:
        digest, _, content = read_file(_path(), MOST_BYTES).partition(b"\n")
        if digest != _digest(content):
            return {}
    except OSError:
        return {}
    return {
        description: Counter(operators)
        for description, operators in json.loads(content).items()
    }


def write_known(executed: Mapping[str, Counter[str]]) -> None:
    """Write the last `MOST_OPERATORS` entries of *executed*; do nothing if the folder cannot be written."""
    last_entries = dict([*executed.items()][-MOST_OPERATORS:])
    content = json.dumps(last_entries).encode()
    path = _path()

    with suppress(OSError):
        if path.is_absolute():  # the XDG specification ignores relative paths
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_write(path) as partial:
                partial.write_bytes(_digest(content) + b"\n" + content)


def _path() -> Path:
    root = expand_user(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return root / "sopdeploy" / "operators.json"


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(_identity() + content).hexdigest().encode()


@cache
def _identity() -> bytes:
    """Describe the packages, the code and the processor that decide how a comparison ends."""
    facts = [
        *installed(PACKAGES).items(),
        torch.backends.cpu.get_cpu_capability(),
        platform.machine(),
    ]

    # The modules of this folder.
    paths = sorted(files("sopdeploy_export.lower").iterdir(), key=lambda path: path.name)
    code = [path.read_bytes() for path in paths if path.name.endswith(".py")]
    return repr([*facts, *code]).encode()
