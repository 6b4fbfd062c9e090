"""Features as outputs of the file: the last feature map (`--with-cam`) and the embedding (`--with-features`).

`sopdeploy/bundle/class_maps.py` defines class activation maps. A network has them if a linear layer computes
its logits from the mean of the feature map; the mean of the map of a class plus its bias is then its logit.
The embedding is the input of the last linear layer. In the exported file, the linear layer must map either
output to the logits.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sopdeploy.backbones.base import Backbone
from sopdeploy.bundle.class_maps import ClassMapLayer
from sopdeploy.bundle.manifest import EMBEDDING, FEATURES
from sopdeploy.errors import LoweringError, ParityError
from sopdeploy.models.base import Classifier, last_linear
from sopdeploy_export.graph import EXPORT_EMBEDDING
from sopdeploy_export.parity.findings import LOGITS, ClassMapParity, ParityReport
from sopdeploy_export.parity.onnx_file import file_outputs, open_session

WRONG_LAYER = "no last linear layer computes the logits of {}, so it has no features in front of it"


def add_feature_map_output(network: nn.Module) -> None:
    """Make the last feature map an output of *network*.

    Raises `LoweringError` unless a linear layer computes the logits from the mean of that map.
    """
    if not isinstance(network, Backbone) or network.averaged_classifier() is None:
        raise LoweringError(
            f"{type(network).__name__} does not end in average pooling and one linear layer, so no map adds "
            'up to its logits; train it with the pooling gap, or with procedure.heads=["gap"]',
            setting="with_cam",
        )
    network.outputs = (LOGITS, FEATURES)


def add_embedding_output(network: nn.Module, classes: int, training_only: Sequence[str]) -> None:
    """Make the input of the last linear layer an output of *network*.

    Raises `LoweringError` unless the last layer outside of *training_only* is linear with *classes* outputs.
    """
    if isinstance(network, Classifier):
        layer = network.logits_layer()
    else:
        layer = last_linear(network, classes, training_only)
    if layer is None:
        raise LoweringError(WRONG_LAYER.format(type(network).__name__), setting="with_features")
    name = next(name for name, module in network.named_modules() if module is layer)
    vars(network)[EXPORT_EMBEDDING] = name


def class_map_layer(network: nn.Module) -> ClassMapLayer:
    """Copy the linear layer of *network*, which has the feature map as an output, after average pooling."""
    return copy_linear(cast(nn.Linear, cast(Backbone, network).averaged_classifier()))


def copy_linear(linear: nn.Linear) -> ClassMapLayer:
    """Copy the weights of *linear*, with zeros for a missing bias."""
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


def check_embedding(path: Path, network: nn.Module, images: NDArray[np.uint8], parity: ParityReport) -> None:
    """Check that the last linear layer of *network* maps embeddings of the ONNX file at *path* to its logits.

    *images* are uint8 (P, H, W, 3). Raises `ParityError` above the tolerance of the logits in *parity*.
    """
    layer = cast(nn.Linear, network.get_submodule(vars(network)[EXPORT_EMBEDDING]))
    deviation = logits_deviation(path, copy_linear(layer), EMBEDDING, images)
    if not deviation <= parity.logits.tolerance:  # also true for NaN
        kind = type(network).__name__
        raise ParityError(f"{WRONG_LAYER.format(kind)}; nothing was written", setting="with_features")


def logits_deviation(path: Path, layer: ClassMapLayer, output: str, images: NDArray[np.uint8]) -> float:
    """Measure how much *layer* on *output* of the file at *path* deviates from its logits on *images*."""
    outputs = file_outputs(open_session(path), images, 1)
    return float(np.abs(layer.logits(outputs[output]) - outputs[LOGITS]).max())
