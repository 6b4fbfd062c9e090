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
from sopdeploy.importers.resnets import tensor
from sopdeploy.importers.source import Layer, Mapped, WeightFile, checked


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


EPS = 1e-5  # of every batch norm here


def kernel(file: WeightFile, name: str) -> Tensor:
    """Return convolution *name* as (out, in, height, width); both projects correlate, nothing is flipped."""
    found = tensor(file.path, file.tensors, name)
    if found.dim() > 4:
        raise WeightsError(f"{file.path}: {name} has {found.dim()} axes, a kernel has four")
    return found.reshape(*found.shape, *(1,) * (4 - found.dim())).permute(3, 2, 0, 1)


def pointwise(file: WeightFile, name: str) -> Tensor:
    """Return 1x1 convolution *name* as a matrix (out, in)."""
    found = kernel(file, name)
    if found.shape[2:] != (1, 1):
        raise WeightsError(f"{file.path}: {name} is no 1x1 convolution")
    return found[:, :, 0, 0]


def vector(file: WeightFile, name: str) -> Tensor:
    """Return *name*, C x 1 or 1 x C in MATLAB, as (C,)."""
    return tensor(file.path, file.tensors, name).reshape(-1)


def batch_norm(file: WeightFile, theirs: str, ours: str, order: Tensor | None = None) -> list[Mapped]:
    """Return the batch norm *theirs* as *ours*, its channels in *order* where one is given.

    Where the deviation is below sqrt(eps) no variance gives it; the factor then makes up for it.
    """
    moments = tensor(file.path, file.tensors, f"{theirs}_m")
    if moments.dim() != 2 or moments.shape[1] != 2:
        raise WeightsError(f"{file.path}: {theirs}_m is {tuple(moments.shape)}, not (channels, 2)")
    mean, deviation = moments.unbind(dim=1)
    if not bool((deviation > 0).all()):
        raise WeightsError(
            f"{file.path}: {theirs}_m has a deviation that is not positive; it was never trained"
        )
    variance = (deviation.square() - EPS).clamp_min(0.0)
    restored = (variance + EPS).sqrt()
    factor = torch.where(variance > 0, torch.ones_like(deviation), restored / deviation)
    parts = (
        ("weight", "w", vector(file, f"{theirs}_w") * factor, ""),
        ("bias", "b", vector(file, f"{theirs}_b"), ""),
        ("running_mean", "m", mean, "column 1"),
        ("running_var", "m", variance, f"column 2 squared, less {EPS:g}"),
    )
    return [
        Mapped(
            f"{ours}.{leaf}",
            (f"{theirs}_{end}",),
            *in_order(values, order, 0, how or "as it is"),
        )
        for leaf, end, values, how in parts
    ]


def in_order(values: Tensor, order: Tensor | None, axis: int, how: str) -> tuple[Tensor, str]:
    """Return *values* with *axis* in *order*, and how they were changed."""
    if order is None:
        return values, how
    if values.shape[axis] != len(order):
        return values, how  # of another length: the shape is refused where the network is compared
    return values.index_select(axis, order), f"{how}, triangle into rows' order".removeprefix("as it is, ")


ROOT = "OBJ_ConvNet_Cov_Sqrtm"
PRENORMS = {"OBJ_ConvNet_Cov_TraceNorm": "trace", "OBJ_ConvNet_Cov_FroNorm": "frobenius"}
COVARIANCE = {ROOT, *PRENORMS, "OBJ_ConvNet_COV_Pool", "OBJ_ConvNet_COV_ScaleTr", "OBJ_ConvNet_COV_ScaleFro"}
MIXTURE = {"H_x", "gating", "CM_out", "Balance_loss"}
PLAIN = {"Conv", "BatchNorm", "ReLU", "Sum", "Pooling", "DropOut", "Loss"}
STRIDES = {2: 1, 3: 2, 4: 2}  # of the stages; that of the fifth is a switch


def known_layers(file: WeightFile) -> None:
    """Refuse a network with a layer of a type that the released networks do not have."""
    for layer in file.layers:
        if layer.kind not in PLAIN | MIXTURE | COVARIANCE:
            raise WeightsError(f"{file.path}: layer {layer.name} is a {layer.kind}, which has no form here")


def scalar(path: Path, layer: Layer, key: str) -> float:
    """Return the number that *layer* holds as *key*; of several equal ones, such as a stride, the first."""
    value: Any = layer.block.get(key)
    if not isinstance(value, np.ndarray) or not value.size or value.dtype.kind not in "fiu":
        raise WeightsError(f"{path}: layer {layer.name} does not say its {key}; save the whole network")
    if not bool((value == value.flat[0]).all()) or not np.isfinite(value.flat[0]):
        raise WeightsError(
            f"{path}: layer {layer.name} has {key} {value.ravel().tolist()}, one number is needed"
        )
    return float(value.flat[0])


def integer(path: Path, layer: Layer, key: str) -> int:
    """Return the whole number that *layer* holds as *key*."""
    value = scalar(path, layer, key)
    if value != int(value):
        raise WeightsError(f"{path}: layer {layer.name} has {key} {value}, a whole number is needed")
    return int(value)


def named(file: WeightFile, name: str) -> Layer:
    """Return the layer *name*."""
    for layer in file.layers:
        if layer.name == name:
            return layer
    raise WeightsError(f"{file.path}: has no layer {name}; save the whole network")


def of_kind(file: WeightFile, kind: str) -> list[Layer]:
    """Return the layers of one *kind*."""
    return [layer for layer in file.layers if layer.kind == kind]


def root_switches(file: WeightFile) -> dict[str, Any]:
    """Return N and the pre-normalisation of all matrix roots, nothing where there are none."""
    roots = of_kind(file, ROOT)
    if not roots:
        return {}
    for layer in roots:
        if "coef" in layer.block and scalar(file.path, layer, "coef") != 1:
            raise WeightsError(
                f"{file.path}: layer {layer.name} scales its root by coef, which has no form here"
            )
    steps = {integer(file.path, layer, "iterNum") for layer in roots}
    norms = {PRENORMS[layer.kind] for layer in file.layers if layer.kind in PRENORMS}
    if len(steps) != 1 or len(norms) != 1:
        raise WeightsError(
            f"{file.path}: its roots take {sorted(steps)} steps after {sorted(norms)} norms; "
            "one of each has a form here"
        )
    return {"iterations": steps.pop(), "prenorm": norms.pop()}


def conv5_stride(file: WeightFile) -> int:
    """Return the stride of the fifth stage; refuses other strides in the others than the paper's."""
    for stage, stride in STRIDES.items():
        if integer(file.path, named(file, f"conv{stage}_1a_conv"), "stride") != stride:
            raise WeightsError(
                f"{file.path}: conv{stage}_1a_conv does not stride by {stride}, as the paper's does"
            )
    return integer(file.path, named(file, "conv5_1a_conv"), "stride")


def dropout(file: WeightFile) -> float:
    """Return the drop rate, 0 where nothing is dropped."""
    layers = of_kind(file, "DropOut")
    return scalar(file.path, layers[0], "rate") if layers else 0.0
