"""Readers of weight files: PyTorch state dicts and training checkpoints, safetensors, MatConvNet.

No code of a file is run: `.pth` files go through the restricted reader of checkpoints, safetensors files are
a JSON header and numbers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sopdeploy.checkpoint import CHECKPOINT_FORMAT, is_state_dict
from sopdeploy.errors import WeightsError
from sopdeploy.importers.matconvnet import read_dagnn
from sopdeploy.importers.matlab_file import read_hdf5, read_v5
from sopdeploy.importers.source import WeightFile
from sopdeploy.user_files import ADVICE, check_tensors, opened, read_pytorch

STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict")
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
MATLAB_MAGIC = b"MATLAB "
USER_BLOCK = 512  # bytes before the HDF5 content of a MATLAB 7.3 file


class OwnCheckpointError(WeightsError):
    """The file is a sopdeploy checkpoint, which `read_checkpoint` reads."""


def open_weights(path: Path) -> WeightFile:
    """Read the weight file at *path*, whose format is detected; raises `WeightsError`."""
    with opened(path) as file:
        start = file.read(USER_BLOCK + len(HDF5_MAGIC))
    if HDF5_MAGIC in (start[: len(HDF5_MAGIC)], start[USER_BLOCK:]):
        return read_dagnn(path, read_hdf5(path))
    if start.startswith(MATLAB_MAGIC):
        return read_dagnn(path, read_v5(path))
    content, _ = read_pytorch(path)
    if isinstance(content, dict) and content.get("format") == CHECKPOINT_FORMAT:
        raise OwnCheckpointError(f"{path}: already a sopdeploy checkpoint; use it without importing it")
    state, other_keys = _find_state_dict(path, content)
    arch = content.get("arch") if other_keys else None
    return WeightFile(
        path=path,
        tensors=check_tensors(path, _strip_data_parallel(state)),
        arch=arch if isinstance(arch, str) else None,
        other_keys=other_keys,
    )


def _find_state_dict(path: Path, content: Any) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """Find the state dict in *content*; returns it with the keys next to it."""
    if is_state_dict(content):
        return content, ()
    if isinstance(content, dict):
        for key in STATE_DICT_KEYS:
            if is_state_dict(content.get(key)):
                return content[key], tuple(str(other) for other in content if other != key)
    raise WeightsError(f"{path}: holds no table of tensors, by itself or as `state_dict`; {ADVICE}")


def _strip_data_parallel(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove `module` from names such as `module.conv1.weight` or `features.module.0.weight`."""
    return {
        ".".join(part for part in name.split(".") if part != "module"): tensor
        for name, tensor in state.items()
    }
