"""Readers of weight files: PyTorch state dicts and training checkpoints, safetensors, MatConvNet.

No code of a file is run: `.pth` files go through the restricted reader of checkpoints, safetensors files are
a JSON header and numbers.

MATLAB files of version 5 to 7 are read with scipy, of version 7.3 (HDF5) with h5py: a struct becomes a dict,
a struct array a list of dicts, a cell a list, text a `str`, a real array a NumPy array with MATLAB's axes,
anything else None.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sopdeploy.checkpoint import CHECKPOINT_FORMAT, Checkpoint, is_state_dict, parse_checkpoint
from sopdeploy.environment import import_optional
from sopdeploy.errors import WeightsError
from sopdeploy.files import sha256
from sopdeploy.importers.conversion import WeightFile
from sopdeploy.importers.gmsop import read_dagnn
from sopdeploy.user_files import ADVICE, check_tensors, opened, read_pytorch

STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict")
MATLAB_MAGIC, HDF5_MAGIC = b"MATLAB ", b"MATLAB 7.3"
_MAX_BYTES = 2 << 30  # of the arrays in an HDF5 file, which may be compressed
VARIABLES = ("net", "params", "layers", "meta")


def open_weights(path: Path) -> WeightFile | Checkpoint:
    """Read the weight file or the checkpoint at *path*, whose format is detected.

    Raises `WeightsError`, and `CheckpointError` for a damaged checkpoint.
    """
    with opened(path) as file:
        start = file.read(len(HDF5_MAGIC))
    if start.startswith(MATLAB_MAGIC):
        variables = read_hdf5(path) if start == HDF5_MAGIC else read_matlab(path)
        return read_dagnn(path, sha256(path), variables)
    content, digest = read_pytorch(path)
    if isinstance(content, dict) and content.get("format") == CHECKPOINT_FORMAT:
        return parse_checkpoint(path, content, digest)
    state, other_keys = _find_state_dict(path, content)
    arch = content.get("arch") if other_keys else None
    tensors = {  # without `module` of names such as module.conv1.weight or features.module.0.weight
        ".".join(part for part in name.split(".") if part != "module"): tensor
        for name, tensor in state.items()
    }
    return WeightFile(
        path=path,
        sha256=digest,
        tensors=check_tensors(path, tensors),
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


def read_matlab(path: Path, wanted: Collection[str] = VARIABLES) -> dict[str, Any]:
    """Read the *wanted* variables of a MATLAB file of version 5 to 7; raises `WeightsError`."""
    scipy_io = import_optional("scipy.io", "scipy", "sopdeploy[train]", WeightsError, str(path))
    try:
        content = scipy_io.loadmat(path, variable_names=list(wanted))
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


def read_hdf5(path: Path) -> dict[str, Any]:
    """Read the variables in `VARIABLES` of a MATLAB 7.3 file; raises `WeightsError`, also for links."""
    h5py = import_optional("h5py", "h5py", "sopdeploy[train]", WeightsError, str(path))
    try:
        with h5py.File(path, "r") as file:
            reader = _Hdf5Reader(h5py, file)
            return dict(reader.read_struct(file, [name for name in VARIABLES if name in file]))
    except Exception as error:  # h5py raises many types for damaged files
        raise WeightsError(f"{path}: damaged MATLAB v7.3 file ({error}); save it again") from error


@dataclass
class _Hdf5Reader:
    """Reads groups and datasets of one file and counts their bytes; raises `ValueError`."""

    h5py: Any
    file: Any
    bytes: int = 0

    def read_struct(self, group: Any, names: list[str]) -> Any:
        links = [name for name in names if not isinstance(group.get(name, getlink=True), self.h5py.HardLink)]
        if links:
            raise ValueError(f"{links[0]} is a link to another place")
        fields = {name: self._read(group[name]) for name in names}
        # The fields of an array of structs are references without a class.
        is_array = all(isinstance(values, list) for values in fields.values())
        if not is_array or any("MATLAB_class" in group[name].attrs for name in names):
            return fields
        return [dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True)]

    def _read(self, part: Any) -> Any:
        if isinstance(part, self.h5py.Group):
            return self.read_struct(part, list(part))
        if part.is_virtual or part.external:
            raise ValueError(f"{part.name} stores its values in another file")
        kind = part.attrs.get("MATLAB_class", b"").decode("latin-1")
        if part.attrs.get("MATLAB_empty"):
            return {"char": "", "cell": [], "struct": []}.get(kind, np.zeros((0, 0)))
        self.bytes += math.prod(part.shape) * part.dtype.itemsize
        if self.bytes > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES >> 30} GiB after decompression")
        if part.dtype.kind == "O":
            return [self._read(self.file[reference]) if reference else None for reference in part[()].flat]
        array = np.asarray(part[()]).T
        if kind == "char":
            return array.astype("<u2").tobytes("F").decode("utf-16-le")
        return array if array.dtype.kind in "fiu" else None
