"""Out-of-distribution images, which test the threshold of the default network.

Only their vectors are stored, `other_things/SHA.npy` (M, D_0) int8 for the network whose weight
file has the SHA-256 SHA: the vectors of 100 photos of ImageNet, one per class
(github.com/EliSchwartz/imagenet-sample-images). `SHA.reference.npy` (D_0,) float32 is the vector
of a generated image: a network that computes another one, for example with another pooling,
computes other vectors of the photos as well. `benchmarks/other_things.py` of commit
2753e7ecf writes both files.
"""

from importlib.resources import as_file, files

import numpy as np
import torch
from numpy.typing import NDArray

from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize, images_format
from sopdeploy.models.second_order_head import SecondOrderHead
from sopdeploy.training.few_shot.classifier import unit_length
from sopdeploy.training.start_weights import StartReport

FOLDER = "other_things"
LARGEST = 127  # of int8
SAME = 0.9999  # cosine of vectors of the reference image by one network on different processors
PERIODS = (7.0, 13.0, 29.0)  # of the waves in the reference image, pixels divided by 2 pi


def read_other_things(
    network: SecondOrderHead, weights: StartReport | None, preprocess: Preprocess
) -> NDArray[np.float32] | None:
    """Read the vectors (M, D_0), of length 1, of other things by a frozen *network*; None without any.

    *weights* are those that the network started from. The *preprocess* of its images must be that of the
    weights, except for `decoding`, and the network must compute the vector of the reference image.
    """
    if weights is None:
        return None
    decoded_alike = preprocess.model_copy(update={"decoding": weights.preprocess.decoding})
    if decoded_alike != weights.preprocess:
        return None

    folder = files("sopdeploy.training.few_shot") / FOLDER
    vectors = folder / f"{weights.sha256}.npy"
    if not vectors.is_file():
        return None
    with as_file(folder / f"{weights.sha256}.reference.npy") as path:
        reference = np.load(path, allow_pickle=False)
    computed = embed_reference(network, preprocess)
    if computed.shape != reference.shape or computed @ reference < SAME:
        return None

    with as_file(vectors) as path:
        return unit_length(np.load(path, allow_pickle=False).astype(np.float32))


@torch.no_grad()
def embed_reference(network: SecondOrderHead, preprocess: Preprocess) -> NDArray[np.float32]:
    """Compute the vector (D_0,) of length 1 of a generated image: waves of another frequency in each channel."""
    side = np.arange(preprocess.crop)
    waves = [np.sin(side / period) for period in PERIODS]
    channels = [np.add.outer(wave, wave[::-1]) for wave in waves]
    pixels = np.rint(63 * np.stack(channels, axis=-1) + 127).astype(np.uint8)

    device = next(network.parameters()).device
    normalize = Normalize(preprocess, images_format(network)).to(device)
    was_training = network.training
    own, _maps = network.eval().head_inputs(
        normalize(torch.from_numpy(pixels[None]).to(device))
    )
    network.train(was_training)
    return unit_length(own.float().cpu().numpy())[0]


def store_vectors(vectors: NDArray[np.float32]) -> NDArray[np.int8]:
    """Round *vectors* (M, D_0) to int8, each scaled so that its largest value is `LARGEST`."""
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    return np.rint(vectors / largest * LARGEST).astype(np.int8)
