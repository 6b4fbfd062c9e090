"""The embedding as an output of the file (`--with-features`): the input of the last linear layer.

In the exported file, this layer must map the embedding to the logits.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from sopdeploy.bundle.manifest import EMBEDDING
from sopdeploy.errors import LoweringError, ParityError
from sopdeploy.models.base import Classifier, last_linear
from sopdeploy_export.findings import LOGITS, ParityReport
from sopdeploy_export.graph import EXPORT_EMBEDDING
from sopdeploy_export.parity.onnx_file import file_outputs, open_session

WRONG_LAYER = "no last linear layer computes the logits of {}, so it has no features in front of it"


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


@torch.no_grad()
def check_embedding(path: Path, network: nn.Module, images: NDArray[np.uint8], parity: ParityReport) -> None:
    """Check that the last linear layer of *network* maps embeddings of the ONNX file at *path* to its logits.

    *images* are uint8 (P, H, W, 3). Raises `ParityError` above the tolerance of the logits in *parity*.
    """
    layer = cast(nn.Linear, network.get_submodule(vars(network)[EXPORT_EMBEDDING]))
    outputs = file_outputs(open_session(path), images, 1)
    bias = None if layer.bias is None else layer.bias.double()
    logits = functional.linear(torch.from_numpy(outputs[EMBEDDING]).double(), layer.weight.double(), bias)
    deviation = float(np.abs(logits.numpy() - outputs[LOGITS]).max())
    if not deviation <= parity.logits.tolerance:  # also true for NaN
        kind = type(network).__name__
        raise ParityError(f"{WRONG_LAYER.format(kind)}; nothing was written", setting="with_features")
