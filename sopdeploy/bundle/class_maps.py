"""Class activation maps: how much each position of the last feature map adds to the logit of a class.

Source: Zhou et al., "Learning Deep Features for Discriminative Localization" (CVPR 2016), section 2. If a
network averages its last feature map f (C, h, w) and applies one linear layer (W, b), the map of class c is
M = sum_k W[c, k] f[k], and the mean of M plus b[c] is the logit of c: the map explains the logit exactly.

A bundle with maps has the feature map as the output `features`, and the linear layer in `class_maps.npz`:
`weight` (classes, C) and `bias` (classes,), both float32. Does not import torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.manifest import FEATURES, Manifest
from sopdeploy.bundle.probes import read_arrays
from sopdeploy.errors import BundleError

FILE = "class_maps.npz"


@dataclass(frozen=True, slots=True)
class ClassMapLayer:
    """The linear layer after the average pooling: `weight` (classes, C) and `bias` (classes,) float32."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    def map_of(self, features: NDArray[np.float32], index: int) -> NDArray[np.float64]:
        """Compute the map (h, w) of class *index* from *features* (C, h, w), in units of logits."""
        values: NDArray[np.float64] = np.tensordot(self.weight[index].astype(np.float64), features, axes=1)
        return values

    def logits(self, features: NDArray[Any]) -> NDArray[np.float64]:
        """Compute (P, classes) logits from maps (P, C, h, w), averaged over positions, or vectors (P, C)."""
        means = features.reshape(*features.shape[:2], -1).mean(axis=2, dtype=np.float64)
        logits: NDArray[np.float64] = means @ self.weight.T.astype(np.float64) + self.bias
        return logits


def write_class_maps(path: Path, layer: ClassMapLayer) -> None:
    """Write *layer* to *path*; equal layers give equal bytes."""
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, weight=layer.weight, bias=layer.bias)


def read_class_maps(folder: Path, manifest: Manifest) -> ClassMapLayer | None:
    """Read the linear layer of the bundle in *folder*, whose hashes were checked; None if it has no maps.

    Raises `BundleError` if the file is missing or does not fit the outputs in *manifest*.
    """
    shapes = {output.name: output.shape[1:] for output in manifest.outputs}
    if FEATURES not in shapes:
        return None
    classes, channels = manifest.outputs[0].shape[-1], shapes[FEATURES][0]
    path = folder / FILE
    try:
        arrays = read_arrays(path)
        layer = ClassMapLayer(arrays["weight"], arrays["bias"])
    except Exception as error:  # numpy raises many types for damaged files
        raise BundleError(f"{path}: not a file of class activation maps; export the bundle again") from error
    fits = layer.weight.shape == (classes, channels) and layer.bias.shape == (classes,)
    if not fits or FILE not in manifest.files:
        raise BundleError(f"{path}: its layer does not fit the outputs of the graph; export the bundle again")
    return layer
