"""MatConvNet networks (DagNN): reading their variables, layers and tensors.

`net.params` has the arrays by name, `net.layers` the settings of each layer, `net.meta` the color that is
subtracted from images. Training files also hold `state` and `stats`, which are not read.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sopdeploy.errors import WeightsError
from sopdeploy.importers.conversion import Layer, WeightFile
from sopdeploy.user_files import check_tensors

EPS = 1e-5  # of every batch norm of sopdeploy
MATRIX_ROOT = "OBJ_ConvNet_Cov_Sqrtm"
PRENORMS = {"OBJ_ConvNet_Cov_TraceNorm": "trace", "OBJ_ConvNet_Cov_FroNorm": "frobenius"}
LAYER_KINDS = {
    *("Conv", "BatchNorm", "ReLU", "Sum", "Pooling", "DropOut", "Loss"),
    *("H_x", "gating", "CM_out", "Balance_loss"),
    *(MATRIX_ROOT, *PRENORMS, "OBJ_ConvNet_COV_Pool", "OBJ_ConvNet_COV_ScaleTr", "OBJ_ConvNet_COV_ScaleFro"),
}


def read_dagnn(path: Path, digest: str, variables: dict[str, Any]) -> WeightFile:
    """Read the network in the *variables* of a MATLAB file with sha256 *digest*; raises `WeightsError`."""
    net = variables.get("net", variables)
    try:
        normalization = (net.get("meta") or {}).get("normalization") or {}
        side, color = normalization.get("imageSize"), normalization.get("averageImage")
        return WeightFile(
            path=path,
            sha256=digest,
            layers={record["name"]: _read_layer(record) for record in _records(net["layers"])},
            tensors=check_tensors(path, _read_parameters(path, _records(net["params"]))),
            average_color=average_color(color),
            image_size=float(side.flat[0]) if isinstance(side, np.ndarray) and side.size >= 2 else None,
        )
    except (AttributeError, LookupError, TypeError) as error:
        raise WeightsError(
            f"{path}: holds no MatConvNet network (`net` with `params` and `layers`); save the whole network"
        ) from error


def _records(value: Any) -> list[Any]:
    """Return a struct array as a list; MATLAB stores an array of one struct as that struct."""
    return value if isinstance(value, list) else [value]


def _read_layer(record: Any) -> Layer:
    block = record.get("block")
    return Layer(record["type"].removeprefix("dagnn."), block if isinstance(block, dict) else {})


def _read_parameters(path: Path, records: list[Any]) -> dict[str, Tensor]:
    tensors = {}
    for record in records:
        name, value = record["name"], record["value"]
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu" or not value.size:
            raise WeightsError(
                f"{path}: parameter {name} holds no numbers; move the network to the CPU and save it"
            )
        tensors[name] = torch.from_numpy(np.ascontiguousarray(value, dtype=np.float64))
    return tensors


def average_color(value: Any) -> tuple[float, float, float] | None:
    """Compute the mean RGB color (0 to 255) of a 3 x 1 color or an (H, W, 3) image."""
    if not isinstance(value, np.ndarray) or value.size % 3 or not value.size:
        return None
    channels = value.reshape(-1, 3) if value.ndim == 3 else value.reshape(3, -1).T
    red, green, blue = (float(channel) for channel in channels.astype(np.float64).mean(axis=0))
    return red, green, blue


def conv_kernel(file: WeightFile, name: str) -> Tensor:
    """Get the kernel of convolution *name* as (out, in, height, width)."""
    kernel = file.tensor(name)
    return kernel.reshape(*kernel.shape, *(1,) * (4 - kernel.dim())).permute(3, 2, 0, 1)


def pointwise_kernel(file: WeightFile, name: str) -> Tensor:
    """Get 1x1 convolution *name* as a matrix (out, in)."""
    return conv_kernel(file, name).flatten(1)


def bias(file: WeightFile, source: str) -> Tensor:
    """Get the bias (out,) of the layer *source*."""
    return file.tensor(f"{source}_b").reshape(-1)


def batch_norm(file: WeightFile, source: str, order: Tensor | None = None) -> dict[str, Tensor]:
    """Convert the batch norm *source*, with its channels permuted by *order*.

    MatConvNet stores sqrt(variance + eps). Where it is below sqrt(eps), the variance is 0 and the weight of
    the channel is scaled instead.
    """
    mean, deviation = file.tensor(f"{source}_m").unbind(dim=1)
    variance = (deviation.square() - EPS).clamp_min(0.0)
    factor = torch.where(variance > 0, torch.ones_like(deviation), (variance + EPS).sqrt() / deviation)
    parts = {
        "weight": file.tensor(f"{source}_w").reshape(-1) * factor,
        "bias": bias(file, source),
        "running_mean": mean,
        "running_var": variance,
    }
    return {name: reorder(values, order, 0) for name, values in parts.items()}


def reorder(values: Tensor, order: Tensor | None, axis: int) -> Tensor:
    """Permute *axis* of *values* by *order* from column-wise to row-wise triangles."""
    if order is None or values.shape[axis] != len(order):  # `fit_tensors` reports a wrong shape
        return values
    return values.index_select(axis, order)


def layer_number(file: WeightFile, name: str, key: str) -> float:
    """Get the number *key* of the layer *name*; several values, such as strides, must be equal.

    Raises `WeightsError` if the layer or the number is missing.
    """
    value = file.layers[name].block.get(key) if name in file.layers else None
    if not isinstance(value, np.ndarray) or not value.size or value.dtype.kind not in "fiu":
        raise WeightsError(f"{file.path}: layer {name} has no {key}; save the whole network")
    if not bool((value == value.flat[0]).all()):
        raise WeightsError(f"{file.path}: layer {name} has {key} {value.ravel().tolist()}, need one number")
    return float(value.flat[0])


def read_settings(file: WeightFile) -> dict[str, Any]:
    """Read the stride of the fifth stage, and iterations and pre-normalization of the matrix square roots.

    Raises `WeightsError` if a layer is not supported, or if the square roots have different settings.
    """
    for name, layer in file.layers.items():
        if layer.kind not in LAYER_KINDS:
            raise WeightsError(f"{file.path}: layer {name} has the type {layer.kind}, not supported")
    settings: dict[str, Any] = {"conv5_stride": int(layer_number(file, "conv5_1a_conv", "stride"))}
    roots = [name for name, layer in file.layers.items() if layer.kind == MATRIX_ROOT]
    if not roots:
        return settings
    iterations = {int(layer_number(file, name, "iterNum")) for name in roots}
    norms = {PRENORMS[layer.kind] for layer in file.layers.values() if layer.kind in PRENORMS}
    if len(iterations) != 1 or len(norms) != 1:
        raise WeightsError(
            f"{file.path}: its matrix roots use iterations {sorted(iterations)} and norms {sorted(norms)}; "
            "supported is one of each"
        )
    return settings | {"iterations": iterations.pop(), "prenorm": norms.pop()}
