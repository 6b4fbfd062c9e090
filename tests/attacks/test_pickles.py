"""Every function of the project that can reach a pickle is named here, and none executes one."""

import ast
import io
import os
import pickle  # noqa: TID251
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export.pt2_archive import _package

from sopdeploy.bundle.probes import read_arrays
from sopdeploy.errors import SopdeployError
from sopdeploy.weights.checkpoint import read_checkpoint
from sopdeploy.weights.files import check_is_weights
from sopdeploy.weights.import_weights import open_weights
from sopdeploy.weights.tensor_files import load_plain, read_pytorch
from tests.support.rooms import PACKAGES, ROOT

MARKER = "pwned"
# Functions of this kind may read a pickle, so that a new one is either harmless or gets a case
# below.
LOADS = {
    "load",
    "loads",
    "loadmat",
    "Unpickler",
    "read_pickle",
    "load_from_disk",
    "set_state_dict",
}
PICKLING = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "skops",
}
# Text, an image of Pillow, an entry point
HARMLESS = {"json", "orjson", "tomllib", "image", "point"}
READERS = {
    "sopdeploy/training/few_shot/cache.py: safetensors.numpy.load",
    # with allow_pickle=False
    "sopdeploy/bundle/probes.py: np.load",
    "sopdeploy/training/few_shot/other_things.py: np.load",
    "sopdeploy/weights/tensor_files.py: import pickle",  # the type of an exception
    "sopdeploy/weights/tensor_files.py: safetensors.load",  # JSON and numbers
    "sopdeploy/weights/tensor_files.py: torch.load",  # with weights_only=True
    # numbers, text and structs
    "plugins/papers/sopdeploy_papers/gmsop_weights.py: scipy_io.loadmat",
    "sopdeploy/images/metadata.py: exif.load",  # bytes
    "sopdeploy/data/batches.py: loader.load",  # images of a batch
}


def readers(path: Path) -> set[str]:
    """Name what loads or imports in the module at *path* may reach a pickle."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in LOADS
        ):
            called = ast.unparse(node.func)
            found.update({called} if called.partition(".")[0] not in HARMLESS else ())
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
            )
            found.update(
                f"import {name}" for name in modules if name.partition(".")[0] in PICKLING
            )
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(
                "sopdeploy"
            ):
                found.update(f"{node.module}.{a.name}" for a in node.names if a.name in LOADS)

    return {f"{path.relative_to(ROOT).as_posix()}: {name}" for name in found}


def test_every_reader_that_may_reach_a_pickle_is_named() -> None:
    modules = [path for folder in PACKAGES.values() for path in folder.rglob("*.py")]
    assert set().union(*map(readers, modules)) == READERS


class RunsACommand:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARKER}",)


def as_pickle() -> bytes:
    return pickle.dumps(RunsACommand())


def as_torch(**options: Any) -> bytes:
    memory = io.BytesIO()
    torch.save({"state_dict": {"x": torch.zeros(1)}, "y": RunsACommand()}, memory, **options)
    return memory.getvalue()


def as_npz() -> bytes:
    memory, values = io.BytesIO(), np.empty(1, dtype=object)
    values[0] = RunsACommand()
    np.savez(memory, allow_pickle=True, images=values)
    return memory.getvalue()


def as_npy() -> bytes:
    memory, values = io.BytesIO(), np.empty(1, dtype=object)
    values[0] = RunsACommand()
    np.save(memory, values, allow_pickle=True)
    return memory.getvalue()


def as_program() -> bytes:
    """Write a torch.export program with a constant that torch reads with `pickle.loads`."""
    saved, memory = io.BytesIO(), io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.Linear(1, 1), (torch.zeros(1, 1),)), saved)
    constants = {
        "evil": {
            "path_name": "opaque_obj_0",
            "is_param": False,
            "use_pickle": True,
            "tensor_meta": None,
        }
    }

    with zipfile.ZipFile(saved) as program, zipfile.ZipFile(memory, "w") as changed:
        for entry in program.infolist():
            content = program.read(entry)
            if entry.filename.endswith("model_constants_config.json"):
                content = (
                    repr({"config": constants}).replace("'", '"').replace("False", "false")
                )
                content = content.replace("True", "true").replace("None", "null").encode()
            changed.writestr(entry.filename, content)
        changed.writestr("archive/data/constants/opaque_obj_0", as_pickle())

    return memory.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "a pickle": as_pickle,
    "torch.save": as_torch,
    "torch.save before 1.6": lambda: as_torch(_use_new_zipfile_serialization=False),
    "NumPy arrays": as_npz,
    "a NumPy array": as_npy,
    "torch.export.save": as_program,
}
OPEN: dict[str, Callable[[Path], object]] = {
    "a checkpoint": read_checkpoint,
    "a state of a run": lambda path: load_plain(path, path.read_bytes()),
    "weights": lambda path: read_pytorch(check_is_weights(path)),
    "weights to import": lambda path: open_weights(check_is_weights(path)),
    "arrays": lambda path: read_arrays(path.read_bytes()),
}


@pytest.mark.parametrize("opened", OPEN)
@pytest.mark.parametrize("file", FILES)
def test_no_reader_executes_what_a_file_contains(
    file: str, opened: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("file")
    path.write_bytes(FILES[file]())
    with suppress(SopdeployError, ValueError, zipfile.BadZipFile):
        OPEN[opened](path)

    assert not Path(MARKER).exists()


@pytest.mark.parametrize(
    ("file", "load"),
    [
        ("a pickle", lambda body: pickle.loads(body)),  # noqa: S301
        ("torch.save", lambda body: torch.load(io.BytesIO(body), weights_only=False)),  # noqa: TID251
        ("a NumPy array", lambda body: np.load(io.BytesIO(body), allow_pickle=True)),
        pytest.param(
            "torch.export.save",
            lambda body: torch.export.load(io.BytesIO(body)),
            marks=pytest.mark.skipif(
                not hasattr(_package, "pickle"),
                reason="this version of torch.export reads no pickle",
            ),
        ),
    ],
)
def test_the_files_execute_code_in_readers_that_trust_them(
    file: str, load: Callable[[bytes], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    body = FILES[file]()
    with suppress(Exception):  # after the code has been executed
        load(body)

    assert Path(MARKER).exists()
