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
from sopdeploy.importers.source import Layer, MappedTensor, WeightFile
from sopdeploy.user_files import check_tensors

EPS = 1e-5  # of every batch norm of sopdeploy
MATRIX_ROOT = "OBJ_ConvNet_Cov_Sqrtm"
PRENORMS = {"OBJ_ConvNet_Cov_TraceNorm": "trace", "OBJ_ConvNet_Cov_FroNorm": "frobenius"}
LAYER_KINDS = {
    *("Conv", "BatchNorm", "ReLU", "Sum", "Pooling", "DropOut", "Loss"),
    *("H_x", "gating", "CM_out", "Balance_loss"),
    *(MATRIX_ROOT, *PRENORMS, "OBJ_ConvNet_COV_Pool", "OBJ_ConvNet_COV_ScaleTr", "OBJ_ConvNet_COV_ScaleFro"),
}
STRIDES = {2: 1, 3: 2, 4: 2}  # of the stages; the stride of the fifth is read from the file


def read_dagnn(path: Path, variables: dict[str, Any]) -> WeightFile:
    """Read the network in the *variables* of a MATLAB file; raises `WeightsError` if there is none."""
    net = variables.get("net", variables)
    if not isinstance(net, dict) or not {"params", "layers"} <= net.keys():
        raise WeightsError(
            f"{path}: holds no MatConvNet network (`net` with `params` and `layers`); save the whole network"
        )
    meta = net.get("meta")
    normalization = meta.get("normalization") if isinstance(meta, dict) else None
    if not isinstance(normalization, dict):
        normalization = {}
    params, layers = (
        records
        if isinstance(records, list)
        else [records]  # MATLAB does not distinguish a struct from [struct]
        for records in (net["params"], net["layers"])
    )
    if not layers:
        raise WeightsError(f"{path}: its MatConvNet network has no layers; save the whole network")
    side = normalization.get("imageSize")
    return WeightFile(
        path=path,
        layers=_read_layers(path, layers),
        tensors=check_tensors(path, _read_parameters(path, params)),
        average_color=average_color(normalization.get("averageImage")),
        image_size=float(side.flat[0]) if isinstance(side, np.ndarray) and side.size >= 2 else None,
    )


def _read_layers(path: Path, records: list[Any]) -> tuple[Layer, ...]:
    layers = []
    for record in records:
        values = record if isinstance(record, dict) else {}
        name, kind, block = values.get("name"), values.get("type"), values.get("block")
        if not isinstance(name, str) or not isinstance(kind, str):
            raise WeightsError(f"{path}: a layer has no name or type; save the whole network")
        block = block if isinstance(block, dict) else {}
        layers.append(Layer(name=name, kind=kind.removeprefix("dagnn."), block=block))
    return tuple(layers)


def _read_parameters(path: Path, records: list[Any]) -> dict[str, Tensor]:
    tensors = {}
    for record in records:
        values = record if isinstance(record, dict) else {}
        name, value = values.get("name"), values.get("value")
        if not isinstance(name, str):
            raise WeightsError(f"{path}: a parameter has no name; save the whole network")
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
    """Get the kernel of convolution *name* as (out, in, height, width).

    MatConvNet computes cross-correlations like PyTorch, so the kernel is not flipped.
    """
    kernel = file.tensor(name)
    if kernel.dim() > 4:
        raise WeightsError(f"{file.path}: {name} has {kernel.dim()} axes, a kernel has four")
    return kernel.reshape(*kernel.shape, *(1,) * (4 - kernel.dim())).permute(3, 2, 0, 1)


def pointwise_kernel(file: WeightFile, name: str) -> Tensor:
    """Get 1x1 convolution *name* as a matrix (out, in)."""
    kernel = conv_kernel(file, name)
    if kernel.shape[2:] != (1, 1):
        raise WeightsError(f"{file.path}: {name} is not a 1x1 convolution")
    return kernel[:, :, 0, 0]


def batch_norm(file: WeightFile, source: str, name: str, order: Tensor | None = None) -> list[MappedTensor]:
    """Convert the batch norm *source* to *name*, with its channels permuted by *order*.

    MatConvNet stores sqrt(variance + eps). A value below sqrt(eps) would need a negative variance; the
    variance is then 0, and the weight of the channel is scaled instead.
    """
    moments = file.tensor(f"{source}_m")
    if moments.dim() != 2 or moments.shape[1] != 2:
        raise WeightsError(f"{file.path}: {source}_m has shape {tuple(moments.shape)}, not (channels, 2)")
    weight = file.tensor(f"{source}_w").reshape(-1)
    if len(weight) != len(moments):
        raise WeightsError(f"{file.path}: {source}_w has {len(weight)} values for {len(moments)} channels")
    mean, deviation = moments.unbind(dim=1)
    if not bool((deviation > 0).all()):
        raise WeightsError(
            f"{file.path}: {source}_m has a standard deviation that is not positive; save a trained network"
        )
    variance = (deviation.square() - EPS).clamp_min(0.0)
    factor = torch.where(variance > 0, torch.ones_like(deviation), (variance + EPS).sqrt() / deviation)
    parts = (
        ("weight", "w", weight * factor, "unchanged"),
        ("bias", "b", file.tensor(f"{source}_b").reshape(-1), "unchanged"),
        ("running_mean", "m", mean, "column 1"),
        ("running_var", "m", variance, f"column 2 squared, less {EPS:g}"),
    )
    return [
        MappedTensor(f"{name}.{leaf}", (f"{source}_{suffix}",), *reorder(values, order, 0, how))
        for leaf, suffix, values, how in parts
    ]


def reorder(values: Tensor, order: Tensor | None, axis: int, how: str) -> tuple[Tensor, str]:
    """Permute *axis* of *values* by *order* from column-wise to row-wise triangles; adds this to *how*."""
    if order is None or values.shape[axis] != len(order):  # `fit_tensors` reports a wrong shape
        return values, how
    return values.index_select(axis, order), f"{how}, triangle made row-wise".removeprefix("unchanged, ")


def layer_number(file: WeightFile, name: str, key: str, *, integer: bool = False) -> float:
    """Get the number *key* of the layer *name*; several values, such as strides, must be equal.

    Raises `WeightsError` if the layer or the number is missing, or if *integer* is set and it is not one.
    """
    block = next((layer.block for layer in file.layers if layer.name == name), None)
    if block is None:
        raise WeightsError(f"{file.path}: has no layer {name}; save the whole network")
    value: Any = block.get(key)
    if not isinstance(value, np.ndarray) or not value.size or value.dtype.kind not in "fiu":
        raise WeightsError(f"{file.path}: layer {name} has no {key}; save the whole network")
    if not bool((value == value.flat[0]).all()) or not np.isfinite(value.flat[0]):
        raise WeightsError(f"{file.path}: layer {name} has {key} {value.ravel().tolist()}, need one number")
    number = float(value.flat[0])
    if integer and number != int(number):
        raise WeightsError(f"{file.path}: layer {name} has {key} {number}, need an integer")
    return number


def read_settings(file: WeightFile) -> dict[str, Any]:
    """Read the stride of the fifth stage, and iterations and pre-normalization of the matrix square roots.

    Raises `WeightsError` if a layer is not supported, if another stride is not the paper's, or if the square
    roots have different settings.
    """
    for layer in file.layers:
        if layer.kind not in LAYER_KINDS:
            raise WeightsError(f"{file.path}: layer {layer.name} has the type {layer.kind}, not supported")
    for stage, stride in STRIDES.items():
        if layer_number(file, f"conv{stage}_1a_conv", "stride") != stride:
            raise WeightsError(f"{file.path}: conv{stage}_1a_conv does not have the paper's stride {stride}")
    settings: dict[str, Any] = {
        "conv5_stride": int(layer_number(file, "conv5_1a_conv", "stride", integer=True))
    }
    roots = [layer for layer in file.layers if layer.kind == MATRIX_ROOT]
    if not roots:
        return settings
    for layer in roots:
        if "coef" in layer.block and layer_number(file, layer.name, "coef") != 1:
            raise WeightsError(f"{file.path}: layer {layer.name} scales its root by coef, not supported")
    iterations = {int(layer_number(file, layer.name, "iterNum", integer=True)) for layer in roots}
    norms = {PRENORMS[layer.kind] for layer in file.layers if layer.kind in PRENORMS}
    if len(iterations) != 1 or len(norms) != 1:
        raise WeightsError(
            f"{file.path}: its matrix roots use iterations {sorted(iterations)} and norms {sorted(norms)}; "
            "only one of each is supported"
        )
    return settings | {"iterations": iterations.pop(), "prenorm": norms.pop()}
