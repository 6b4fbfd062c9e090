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
from sopdeploy.importers.matconvnet import read_dagnn
from sopdeploy.user_files import ADVICE, check_tensors, opened, read_pytorch

STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict")
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
MATLAB_MAGIC = b"MATLAB "
USER_BLOCK = 512  # bytes before the HDF5 content of a MATLAB 7.3 file
VARIABLES = ("net", "params", "layers", "meta")
_MAX_BYTES = 2 << 30
MATLAB_CLASS, MATLAB_EMPTY = "MATLAB_class", "MATLAB_empty"
SKIPPED_FIELDS = {"vars", "inputs", "outputs", "learningRate", "weightDecay", "trainOpts"}  # not read


def open_weights(path: Path) -> WeightFile | Checkpoint:
    """Read the weight file or the checkpoint at *path*, whose format is detected.

    Raises `WeightsError`, and `CheckpointError` for a damaged checkpoint.
    """
    with opened(path) as file:
        start = file.read(USER_BLOCK + len(HDF5_MAGIC))
    if HDF5_MAGIC in (start[: len(HDF5_MAGIC)], start[USER_BLOCK:]):
        return read_dagnn(path, sha256(path), read_hdf5(path))
    if start.startswith(MATLAB_MAGIC):
        return read_dagnn(path, sha256(path), read_v5(path))
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


def read_v5(path: Path, wanted: Collection[str] = VARIABLES) -> dict[str, Any]:
    """Read the *wanted* variables of a MATLAB file of version 5 to 7; raises `WeightsError`."""
    scipy_io = import_optional("scipy.io", "scipy", "sopdeploy[import]", WeightsError, str(path))
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


class DamagedError(Exception):
    """A file refers to another one, or exceeds a limit."""


def read_hdf5(path: Path) -> dict[str, Any]:
    """Read the variables in `VARIABLES` of a MATLAB 7.3 file; raises `WeightsError`."""
    h5py = import_optional("h5py", "h5py", "sopdeploy[import]", WeightsError, str(path))
    try:
        with h5py.File(path, "r") as file:
            reader = _Hdf5Reader(h5py, file)
            return {name: reader.read_member(file, name) for name in file if name in VARIABLES}
    except DamagedError as error:
        raise WeightsError(f"{path}: refused, {error}; save it with MATLAB again") from error
    except Exception as error:  # h5py raises many types for damaged files
        raise WeightsError(f"{path}: damaged MATLAB v7.3 file ({error}); copy it again") from error


@dataclass
class _Hdf5Reader:
    """Reads groups and datasets of one file and counts their bytes."""

    h5py: Any
    file: Any
    bytes: int = 0

    def read_member(self, group: Any, name: str) -> Any:
        if not isinstance(group.get(name, getlink=True), self.h5py.HardLink):
            raise DamagedError(f"{name} is a link to another place")
        return self._read(group[name])

    def _read(self, part: Any) -> Any:
        if isinstance(part, self.h5py.Group):
            return self._read_struct(part)
        if not isinstance(part, self.h5py.Dataset):
            return None
        if part.is_virtual or part.external:
            raise DamagedError(f"{part.name} stores its values in another file")
        kind = part.attrs.get(MATLAB_CLASS, b"")
        kind = kind.decode("latin-1") if isinstance(kind, bytes) else str(kind)
        if part.attrs.get(MATLAB_EMPTY):
            return {"char": "", "cell": [], "struct": []}.get(kind, np.zeros((0, 0)))
        self.bytes += math.prod(part.shape) * part.dtype.itemsize
        if self.bytes > _MAX_BYTES:
            raise DamagedError(f"more than {_MAX_BYTES >> 30} GiB after decompression")
        if self.h5py.check_ref_dtype(part.dtype) is self.h5py.Reference:
            return [self._read(self.file[ref]) if ref else None for ref in part[()].flat]
        if part.dtype.kind not in "fiu":
            return None
        array = np.asarray(part[()]).T
        return array.astype("<u2").tobytes(order="F").decode("utf-16-le") if kind == "char" else array

    def _read_struct(self, group: Any) -> Any:
        """Read a dict, or a list of dicts if every field is an array of references that is not a cell."""
        fields = {name: self.read_member(group, name) for name in group if name not in SKIPPED_FIELDS}
        members = [group[name] for name in fields]
        is_array = bool(members) and all(
            isinstance(part, self.h5py.Dataset) and part.dtype.kind == "O" and MATLAB_CLASS not in part.attrs
            for part in members
        )
        if not is_array:
            return fields
        return [dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True)]
