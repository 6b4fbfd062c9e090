"""A MatConvNet network (DagNN) out of the variables of a MATLAB file, whichever format they came in.

`net.params` has the arrays by name, `net.layers` the settings of every layer, `net.meta` the colour that is
taken off every picture. Training files hold `state` and `stats` beside it, which are not read.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sopdeploy.errors import WeightsError
from sopdeploy.importers.weight_file import Layer, WeightFile, checked


def read_dagnn(path: Path, variables: dict[str, Any]) -> WeightFile:
    """Return the network in *variables*; raises `WeightsError` where there is none."""
    net = variables.get("net", variables)
    if not isinstance(net, dict) or not {"params", "layers"} <= net.keys():
        raise WeightsError(f"{path}: holds no MatConvNet network (`net` with `params` and `layers`)")
    meta = net.get("meta")
    normalization = meta.get("normalization") if isinstance(meta, dict) else None
    if not isinstance(normalization, dict):
        normalization = {}
    layers = tuple(layer(path, record) for record in records(net["layers"]))
    if not layers:
        raise WeightsError(f"{path}: its MatConvNet network has no layers")
    return WeightFile(
        path=path,
        tensors=checked(path, dict(parameter(path, record) for record in records(net["params"]))),
        layers=layers,
        average=average_colour(normalization.get("averageImage")),
        image_size=image_size(normalization.get("imageSize")),
    )


def records(value: Any) -> list[Any]:
    """Return an array of structs as a list; MATLAB does not tell one struct from an array of one."""
    return value if isinstance(value, list) else [value]


def parameter(path: Path, record: Any) -> tuple[str, Tensor]:
    """Return name and value of one record of `net.params`."""
    name = record.get("name") if isinstance(record, dict) else None
    value = record.get("value") if isinstance(record, dict) else None
    if not isinstance(name, str):
        raise WeightsError(f"{path}: a parameter has no name")
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu" or not value.size:
        raise WeightsError(f"{path}: parameter {name} holds no numbers; move the network to the CPU and save")
    return name, torch.from_numpy(np.ascontiguousarray(value, dtype=np.float64))


def layer(path: Path, record: Any) -> Layer:
    """Return one record of `net.layers`."""
    values = record if isinstance(record, dict) else {}
    name, kind, block = values.get("name"), values.get("type"), values.get("block")
    if not isinstance(name, str) or not isinstance(kind, str):
        raise WeightsError(f"{path}: a layer has no name or type")
    return Layer(name=name, kind=kind.removeprefix("dagnn."), block=block if isinstance(block, dict) else {})


def average_colour(value: Any) -> tuple[float, float, float] | None:
    """Return the mean of 0..255 per channel of a 3x1 colour or of an HxWx3 picture."""
    if not isinstance(value, np.ndarray) or value.size % 3 or not value.size:
        return None
    channels = value.reshape(-1, 3) if value.ndim == 3 else value.reshape(3, -1).T
    red, green, blue = (float(channel) for channel in channels.astype(np.float64).mean(axis=0))
    return red, green, blue


def image_size(value: Any) -> int | None:
    """Return the side of the images the network was made for."""
    if not isinstance(value, np.ndarray) or value.size < 2:
        return None
    return int(value.flat[0])
