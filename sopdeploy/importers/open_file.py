"""A weight file is opened by what it begins with, not by how it is called."""

from pathlib import Path

from sopdeploy.errors import WeightsError
from sopdeploy.importers.dagnn import read_dagnn
from sopdeploy.importers.matlab_hdf5 import read_hdf5
from sopdeploy.importers.matlab_v5 import read_v5
from sopdeploy.importers.torch_file import read_safetensors, read_torch
from sopdeploy.importers.weight_file import WeightFile

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
