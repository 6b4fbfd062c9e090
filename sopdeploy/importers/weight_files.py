"""Readers of weight files: PyTorch state dicts and training checkpoints, safetensors, MatConvNet.

No code of a file is run: `.pth` files go through the restricted reader of checkpoints, safetensors files are
a JSON header and numbers.

MATLAB files are read with scipy: a struct becomes a dict, a struct array a list of dicts, a cell a list, text
a `str`, a real array a NumPy array with MATLAB's axes, anything else None. Version 7.3 (HDF5) is not read.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sopdeploy.checkpoint import CHECKPOINT_FORMAT, Checkpoint, is_state_dict, parse_checkpoint
from sopdeploy.environment import import_optional
from sopdeploy.errors import WeightsError
from sopdeploy.files import sha256
from sopdeploy.importers.conversion import WeightFile
from sopdeploy.importers.matconvnet import read_dagnn
from sopdeploy.user_files import ADVICE, check_tensors, opened, read_pytorch

STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict")
MATLAB_MAGIC = b"MATLAB "
VARIABLES = ("net", "params", "layers", "meta")


def open_weights(path: Path) -> WeightFile | Checkpoint:
    """Read the weight file or the checkpoint at *path*, whose format is detected.

    Raises `WeightsError`, and `CheckpointError` for a damaged checkpoint.
    """
    with opened(path) as file:
        is_matlab = file.read(len(MATLAB_MAGIC)) == MATLAB_MAGIC
    if is_matlab:
        return read_dagnn(path, sha256(path), read_matlab(path))
    content, digest = read_pytorch(path)
    if isinstance(content, dict) and content.get("format") == CHECKPOINT_FORMAT:
        return parse_checkpoint(path, content, digest)
    state, other_keys = _find_state_dict(path, content)
    arch = content.get("arch") if other_keys else None
    return WeightFile(
        path=path,
        sha256=digest,
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


def read_matlab(path: Path, wanted: Collection[str] = VARIABLES) -> dict[str, Any]:
    """Read the *wanted* variables of a MATLAB file of version 5 to 7; raises `WeightsError`."""
    scipy_io = import_optional("scipy.io", "scipy", "sopdeploy[train]", WeightsError, str(path))
    try:
        content = scipy_io.loadmat(path, variable_names=list(wanted))
    except NotImplementedError as error:
        raise WeightsError(f"{path}: a MATLAB file of version 7.3; save it with -v7 in MATLAB") from error
    except Exception as error:  # scipy raises many types for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(f"{path}: damaged MATLAB file ({reason}); copy it again") from error
    return {name: _plain_value(content[name]) for name in wanted if name in content}


def _plain_value(value: Any) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype.kind == "c":
        return None
    if value.dtype.names:
        fields = value.dtype.names
        records = [{name: _plain_value(item[name]) for name in fields} for item in value.ravel(order="F")]
        return records[0] if len(records) == 1 else records
    if value.dtype.kind == "O":
        return [_plain_value(item) for item in value.ravel(order="F")]
    if value.dtype.kind == "U":
        return "".join(value.ravel().tolist())
    return value.astype("u1") if value.dtype.kind == "b" else value
