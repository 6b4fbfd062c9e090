"""Photographs of other things than a user's, which test the threshold of the default network.

Only their vectors are stored, `other_things/SHA.npy` (M, D_0) int8 for the network whose weight
file has the SHA-256 SHA: those of 100 photographs of ImageNet, one per class
(github.com/EliSchwartz/imagenet-sample-images). `benchmarks/other_things.py` writes them.
"""

from importlib.resources import as_file, files

import numpy as np
from numpy.typing import NDArray

from sopdeploy.images.preprocess import Preprocess
from sopdeploy.training.few_shot.classifier import unit_length
from sopdeploy.training.start_weights import StartReport

FOLDER = "other_things"
LARGEST = 127  # of int8


def read_other_things(
    weights: StartReport | None, preprocess: Preprocess
) -> NDArray[np.float32] | None:
    """Read the vectors (M, D_0), of length 1, of other things by a frozen network; None without any.

    *weights* are those that the network started from. The *preprocess* of its images must be that of the
    weights, except for `decoding`.
    """
    if weights is None:
        return None
    decoded_alike = preprocess.model_copy(update={"decoding": weights.preprocess.decoding})
    if decoded_alike != weights.preprocess:
        return None

    vectors = files("sopdeploy.training.few_shot") / FOLDER / f"{weights.sha256}.npy"
    if not vectors.is_file():
        return None
    with as_file(vectors) as path:
        return unit_length(np.load(path, allow_pickle=False).astype(np.float32))


def store_vectors(vectors: NDArray[np.float32]) -> NDArray[np.int8]:
    """Round *vectors* (M, D_0) to int8, each scaled so that its largest value is `LARGEST`."""
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    return np.rint(vectors / largest * LARGEST).astype(np.int8)
