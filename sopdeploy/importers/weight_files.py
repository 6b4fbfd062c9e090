"""Readers of weight files: PyTorch state dicts and training checkpoints, safetensors, MatConvNet.

No code of a file is run: `.pth` files go through the restricted reader of checkpoints, safetensors files are
a JSON header and numbers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sopdeploy.checkpoint import (
    CHECKPOINT_FORMAT,
    WEIGHTS_ADVICE,
    Checkpoint,
    check_tensors,
    is_state_dict,
    parse_checkpoint,
    read_pytorch,
)
from sopdeploy.errors import WeightsError
from sopdeploy.files import check_is_weights, sha256
from sopdeploy.importers.conversion import WeightFile

STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict")
MATLAB_MAGIC, HDF5_MAGIC = b"MATLAB ", b"MATLAB 7.3"


def open_weights(path: Path) -> WeightFile | Checkpoint:
    """Read the weight file or the checkpoint at *path*, whose format is detected.

    Raises `WeightsError`, and `CheckpointError` for a damaged checkpoint.
    """
    check_is_weights(path)
    with path.open("rb") as file:
        start = file.read(len(HDF5_MAGIC))
    if start == HDF5_MAGIC:
        raise WeightsError(f"{path}: MATLAB's version 7.3 is not read; save it in MATLAB with the option -v7")
    if start.startswith(MATLAB_MAGIC):
        from sopdeploy.importers.gmsop import read_dagnn  # noqa: PLC0415 # imports networks

        return read_dagnn(path, sha256(path))
    content, digest = read_pytorch(path)
    if isinstance(content, dict) and content.get("format") == CHECKPOINT_FORMAT:
        return parse_checkpoint(path, content, digest)
    state = _find_state_dict(path, content)  # raises unless the content is a dict
    arch = content["arch"] if isinstance(content.get("arch"), str) else None
    tensors = {  # without `module` of names such as module.conv1.weight or features.module.0.weight
        ".".join(part for part in name.split(".") if part != "module"): tensor
        for name, tensor in state.items()
    }
    return WeightFile(path=path, sha256=digest, tensors=check_tensors(path, tensors), arch=arch)


def _find_state_dict(path: Path, content: Any) -> Mapping[str, Tensor]:
    """Find the state dict in *content*: itself, or the value of one of `STATE_DICT_KEYS`."""
    if isinstance(content, dict):
        states: tuple[Any, ...] = (content, *map(content.get, STATE_DICT_KEYS))
        for state in states:
            if is_state_dict(state):
                return state
    problem = "holds no table of tensors, by itself or as `state_dict`"
    raise WeightsError(f"{path}: {problem}; {WEIGHTS_ADVICE}")
