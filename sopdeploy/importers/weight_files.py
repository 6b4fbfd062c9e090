"""Weight files of PyTorch: state dicts, training checkpoints around them, and safetensors.

Nothing of a file is run: `.pth` goes through the reader of our own checkpoints, safetensors is a JSON header
and numbers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sopdeploy.checkpoint import FORMAT, is_state_dict, load_plain
from sopdeploy.environment import import_optional
from sopdeploy.errors import CheckpointError, WeightsError
from sopdeploy.importers.matconvnet import read_dagnn
from sopdeploy.importers.matlab_file import read_hdf5, read_v5
from sopdeploy.importers.source import WeightFile, checked

TABLES = ("state_dict", "model", "model_state_dict")
SAVE_ALONE = "save the network's state_dict() alone with torch.save, or as safetensors"


def read_torch(path: Path) -> WeightFile:
    """Return what a `.pth`, `.pth.tar`, `.th` or `.pt` file holds; raises `WeightsError`."""
    try:
        content = load_plain(path, advice=SAVE_ALONE)
    except CheckpointError as problem:
        raise WeightsError(str(problem)) from problem
    if isinstance(content, dict) and content.get("format") == FORMAT:
        raise WeightsError(f"{path}: already a sopdeploy checkpoint; use it as it is")
    table, beside = find_table(path, content)
    arch = content.get("arch") if beside else None
    return WeightFile(
        path=path,
        tensors=checked(path, without_data_parallel(path, table)),
        arch=arch if isinstance(arch, str) else None,
        beside=beside,
    )


def read_safetensors(path: Path) -> WeightFile:
    """Return what a `.safetensors` file holds; raises `WeightsError`."""
    safetensors = import_optional(
        "safetensors.torch", "safetensors", "sopdeploy[import]", WeightsError, str(path)
    )
    try:
        table: dict[str, Tensor] = safetensors.load_file(path, device="cpu")
    except Exception as problem:  # its reader's error, or the system's
        raise WeightsError(f"{path}: not a whole safetensors file ({problem}); copy it again") from problem
    return WeightFile(path=path, tensors=checked(path, without_data_parallel(path, table)))


def find_table(path: Path, content: Any) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """Return the table of tensors in *content* and the names of what lies beside it."""
    if is_state_dict(content):
        return content, ()
    if isinstance(content, dict):
        for key in TABLES:
            if is_state_dict(content.get(key)):
                return content[key], tuple(str(other) for other in content if other != key)
    raise WeightsError(f"{path}: holds no table of tensors, by itself or as `state_dict`; {SAVE_ALONE}")


def without_data_parallel(path: Path, table: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return *table* without `module` in its names, wherever `DataParallel` put it.

    It wraps a whole network (`module.conv1.weight`) or a part of it (`features.module.0.weight`).
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in table.items():
        short = ".".join(part for part in name.split(".") if part != "module")
        if short in plain:
            raise WeightsError(f"{path}: {short} is in it twice, with and without `module`; keep one")
        plain[short] = tensor
    return plain


HDF5 = b"\x89HDF\r\n\x1a\n"
MATLAB = b"MATLAB "
USER_BLOCK = 512  # what MATLAB puts before the HDF5 of a v7.3 file


def open_weights(path: Path) -> WeightFile:
    """Return what the weight file at *path* holds; raises `WeightsError`."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; give a weight file to import")
    try:
        with path.open("rb") as file:
            start = file.read(USER_BLOCK + len(HDF5))
    except OSError as problem:
        raise WeightsError(f"{path}: cannot be read ({problem.strerror or problem})") from problem
    if HDF5 in (start[: len(HDF5)], start[USER_BLOCK:]):
        return read_dagnn(path, read_hdf5(path))
    if start.startswith(MATLAB):
        return read_dagnn(path, read_v5(path))
    if start[8:9] == b"{":
        return read_safetensors(path)
    return read_torch(path)
