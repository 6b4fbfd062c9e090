"""The last linear layer: its input is the embedding, and a temperature divides its weights."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sopdeploy.bundle.manifest import ScaledTensor, TemperatureScaling
from sopdeploy.errors import LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier, last_linear
from sopdeploy_export.capture.deployed import EXPORT_EMBEDDING, Deployed
from sopdeploy_export.network import tensors
from sopdeploy_export.program_hashes import tensor_hash

ROUNDING = 16  # units in the last place, by which logits plus one number may differ


@torch.no_grad()
def find_last_layer(
    network: nn.Module,
    preprocess: Preprocess,
    images: NDArray[np.uint8],
    classes: int,
    training_only: Sequence[str] = (),
) -> nn.Linear | None:
    """Find the linear layer, outside of *training_only*, whose *classes* outputs are the logits of *network*.

    Returns None if there is none: the network must run the layer once on *images*, uint8 (P, H, W,
    3), and return its outputs, or these plus one number per image, which changes no probability.
    """
    if isinstance(network, Classifier):
        layer = network.logits_layer()
    else:
        layer = last_linear(network, classes, training_only)
    if layer is None:
        return None

    # A hook collects what the layer returns each time that it runs.
    results: list[Tensor] = []
    with layer.register_forward_hook(lambda _part, _inputs, output: results.append(output)):
        logits = Deployed(network, preprocess).eval()(torch.from_numpy(images))[0]

    computes_logits = len(results) == 1 and _have_equal_probabilities(results[0], logits)
    return layer if computes_logits else None


def _have_equal_probabilities(outputs: Tensor, logits: Tensor) -> bool:
    """Tell whether rows of *outputs* and *logits* are equal, or differ in all columns by the same number."""
    if outputs.shape != logits.shape:
        return False
    if torch.equal(outputs.nan_to_num(), logits.nan_to_num()):
        return True

    # The difference must be the same in all columns of a row, up to rounding.
    shifts = (outputs - logits).double()
    spread = shifts.amax(dim=1) - shifts.amin(dim=1)
    largest = torch.maximum(outputs.abs().amax(), logits.abs().amax())
    rounding = ROUNDING * torch.finfo(logits.dtype).eps * largest
    return bool((spread <= rounding).all())


def add_embedding_output(
    network: nn.Module,
    preprocess: Preprocess,
    images: NDArray[np.uint8],
    classes: int,
    training_only: Sequence[str] = (),
) -> None:
    """Make the input of the last linear layer an output of *network*, in place.

    *classes* is the number of logits, and *images*, uint8 (P, H, W, 3), show which layer computes
    them. Parts in *training_only* are left out. Raises `LoweringError` if no linear layer computes
    the logits.
    """
    layer = find_last_layer(network, preprocess, images, classes, training_only)
    if layer is None:
        kind = type(network).__name__
        problem = f"no last linear layer computes the logits of {kind}, so it has no features in front of it"
        raise LoweringError(problem, setting="with_features")

    # For `compute_outputs`; `vars` avoids a `__setattr__` of the user.
    name = next(name for name, module in network.named_modules() if module is layer)
    vars(network)[EXPORT_EMBEDDING] = name


@torch.no_grad()
def fold_temperature(
    network: nn.Module,
    temperature: float,
    preprocess: Preprocess,
    images: NDArray[np.uint8],
    classes: int,
) -> TemperatureScaling:
    """Divide the weights and the bias of the last linear layer of *network* by *temperature*, in place.

    This divides the logits without any cost at inference. Heads that only training needs keep
    their logits. Returns the record of the division. Raises `LoweringError` if no linear layer
    computes the logits (P, *classes*) of *images*, uint8 (P, H, W, 3).
    """
    layer = find_last_layer(network, preprocess, images, classes)
    if layer is None:
        raise LoweringError(
            f"temperature {temperature:.3g}: no linear layer of {type(network).__name__} computes its "
            "logits, so none can be divided",
            remedies={"trained_logits": True},
        )

    parameters = list(layer.parameters())
    before = {id(parameter): tensor_hash(parameter) for parameter in parameters}
    for parameter in parameters:
        parameter.div_(temperature)
    divided = [
        ScaledTensor(name=name, before=before[id(tensor)], after=tensor_hash(tensor))
        for name, tensor in tensors(network).items()
        if id(tensor) in before
    ]
    return TemperatureScaling(temperature=temperature, tensors=tuple(divided))
