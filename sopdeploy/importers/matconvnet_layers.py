"""What a MatConvNet network's layers say of it: steps of Newton-Schulz, strides, drop rate, K of N.

Nothing here is assumed: a setting that a layer should hold and does not is an error.
"""

from pathlib import Path
from typing import Any

import numpy as np

from sopdeploy.errors import WeightsError
from sopdeploy.importers.weight_file import Layer, WeightFile

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
