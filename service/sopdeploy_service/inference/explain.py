"""Explain predictions on request: check that a class can be explained, and format its activation map."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sopdeploy.bundle.class_maps import FEATURES, ClassMapLayer
from sopdeploy.images.pixels import visible_box
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.inference.results import Prediction, RejectedError, Rejection


def check_explainable(
    name: str, layer: ClassMapLayer | None, labels: Sequence[str], label: str | None
) -> None:
    """Raise `RejectedError` if model *name* cannot explain class *label* (None: the best class)."""
    if layer is None:
        message = f"{name}: has no class activation maps; export it with --with-cam, or omit explain"
        raise RejectedError(Rejection("no_class_maps", 400, message))
    if label is not None and label not in labels:
        message = f"explain_label: the model has no class {label[:100]!r}"
        raise RejectedError(Rejection("unknown_label", 400, message))


def format_class_map(
    prediction: Prediction, layer: ClassMapLayer, index: int, labels: Sequence[str], rules: Preprocess
) -> dict[str, Any]:
    """Build the JSON object `schema.ClassMap` of class *index* for an image with the output `FEATURES`."""
    size = prediction.size or (rules.crop, rules.crop)
    return {
        "label": labels[index],
        "values": layer.map_of(prediction.outputs[FEATURES], index).astype(np.float32).tolist(),
        "bias": float(layer.bias[index]),
        "box": visible_box(size, rules),
        "image_size": size,
    }
