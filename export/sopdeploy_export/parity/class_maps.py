"""Class activation maps in the export: add the feature map as an output; check that maps add up to logits.

`sopdeploy/bundle/class_maps.py` defines the maps. A network has them if a linear layer computes its logits
from the mean of the feature map. The mean of the map of a class plus the bias of the class is then its logit.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sopdeploy.backbones.base import Backbone
from sopdeploy.bundle.class_maps import ClassMapLayer
from sopdeploy.bundle.manifest import FEATURES
from sopdeploy.errors import LoweringError, ParityError
from sopdeploy_export.parity.onnx_file import file_outputs, open_session
from sopdeploy_export.parity.report import LOGITS, ClassMapParity, ParityReport


def add_features_output(network: nn.Module) -> None:
    """Make the last feature map an output of *network*, for `--with-cam`.

    Raises `LoweringError` unless a linear layer computes the logits from the mean of that map.
    """
    if not isinstance(network, Backbone) or network.averaged_classifier() is None:
        raise LoweringError(
            f"{type(network).__name__} does not end in average pooling and one linear layer, so no map adds "
            'up to its logits; train it with the pooling gap, or with few_shot.heads=["gap"]',
            setting="with_cam",
        )
    network.outputs = (LOGITS, FEATURES)


def class_map_layer(network: nn.Module) -> ClassMapLayer:
    """Copy the linear layer after the average pooling of *network*; raises `LoweringError` without one."""
    linear = network.averaged_classifier() if isinstance(network, Backbone) else None
    if linear is None:
        raise LoweringError(f"{type(network).__name__}: no linear layer after average pooling")
    return copy_linear(linear)


def copy_linear(linear: nn.Linear) -> ClassMapLayer:
    """Copy the weights of *linear*."""
    weight = linear.weight.detach().numpy().astype(np.float32)
    bias = np.zeros(len(weight), np.float32)
    if linear.bias is not None:
        bias = linear.bias.detach().numpy().astype(np.float32)
    return ClassMapLayer(weight, bias)


def check_class_maps(
    path: Path, layer: ClassMapLayer, images: NDArray[np.uint8], parity: ParityReport
) -> ParityReport:
    """Check that the class activation maps of the ONNX file at *path* add up to its logits.

    *layer* computes the maps; *images* are uint8 (P, H, W, 3). Returns *parity* with the measured deviation.
    Raises `ParityError` if the deviation exceeds the tolerance of the logits in *parity*.
    """
    deviation, tolerance = logits_deviation(path, layer, FEATURES, images), parity.logits.tolerance
    if not deviation <= tolerance:  # also true for NaN
        raise ParityError(
            f"the class activation maps deviate from the logits by {deviation:.3g} "
            f"({deviation / parity.logits.noise_floor:.1f}x noise floor, limit "
            f"{parity.floors_allowed:.0f}x = {tolerance:.3g}); nothing was written",
            setting="with_cam",
        )
    record = ClassMapParity(deviation=deviation, tolerance=tolerance)
    return parity.model_copy(update={"class_maps": record})


def logits_deviation(path: Path, layer: ClassMapLayer, output: str, images: NDArray[np.uint8]) -> float:
    """Measure how much *layer* on *output* of the file at *path* deviates from its logits on *images*."""
    outputs = file_outputs(open_session(path), images, 1)
    return float(np.abs(layer.logits(outputs[output]) - outputs[LOGITS]).max())
