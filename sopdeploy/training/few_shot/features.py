"""Features of a frozen network: the vector of a head with all statistics, in one pass over the images.

The result is stored in the run folder under a key of weights, preprocessing and pixels, so that an
interrupted run does not compute it again.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sopdeploy.checkpoint import load_plain, write_plain
from sopdeploy.data.base import LabeledImages, PreprocessedDataset
from sopdeploy.data.batches import load_batches
from sopdeploy.errors import CheckpointError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.second_order_head import SecondOrderHead

BATCH = 16
PROJECTION_IMAGES = 128  # images for the projections: with 49 positions each, 6,272 rows


@dataclass(frozen=True, slots=True)
class Features:
    """The vectors (N, D) float32 of all images, and `keys`, the hashes of their pixels."""

    vectors: NDArray[np.float32]
    keys: tuple[str, ...]


def compute_features(
    network: SecondOrderHead,
    images: LabeledImages,
    preprocess: Preprocess,
    *,
    workers: int,
    cache: Path,
    on_image: Callable[[int, int], None],
) -> Features:
    """Compute the vectors that the head of *network* reads, and fit its projections to the feature maps.

    *on_image* receives the numbers of images done and in total. The result is read from the file *cache* if
    that has the same key.
    """
    device, count = next(network.parameters()).device, len(images)
    order = np.random.default_rng(0).permutation(count)  # so that the first batches show many classes
    batches = [order[start : start + BATCH].tolist() for start in range(0, count, BATCH)]
    dataset = PreprocessedDataset(images, preprocess)
    pixels = [part for part, _ in load_batches(dataset, batches, workers, torch.device("cpu"))]
    keys = _hash_pixels(pixels, batches)
    key = _cache_key(network, preprocess, keys)
    stored = _read_cache(cache, key, network)
    if stored is not None:
        on_image(count, count)
        return Features(stored, keys)
    normalize, head = Normalize(preprocess).to(device), network.eval().pooled_head
    vectors, fitted, done = np.zeros((count, network.num_features()), np.float32), False, 0
    waiting: list[tuple[list[int], Tensor, Mapping[str, Tensor]]] = []  # until the projections are known
    with torch.no_grad():
        for indices, part in zip(batches, pixels, strict=True):
            waiting.append((indices, *network.head_inputs(normalize(part.to(device)))))
            done += len(indices)
            if not fitted and done >= min(count, PROJECTION_IMAGES):
                head.fit_projection([maps for _, _, maps in waiting])
                fitted = True
            for some, own, maps in waiting if fitted else ():
                vectors[some] = head.vector(own, maps).float().cpu().numpy()
            waiting = [] if fitted else waiting
            on_image(done, count)
    poolings = head.poolings.state_dict()
    write_plain(cache, {"key": key, "vectors": torch.from_numpy(vectors), "poolings": poolings})
    return Features(vectors, keys)


def _hash_pixels(pixels: Sequence[Tensor], batches: Sequence[list[int]]) -> tuple[str, ...]:
    hashes = {
        index: hashlib.sha256(one.numpy().tobytes()).hexdigest()[:32]
        for part, indices in zip(pixels, batches, strict=True)
        for one, index in zip(part, indices, strict=True)
    }
    return tuple(hashes[index] for index in range(len(hashes)))


def _cache_key(network: SecondOrderHead, preprocess: Preprocess, keys: Sequence[str]) -> str:
    """Hash what features depend on: options, weights outside the head, rules and pixels."""
    config: Any = network.config
    text = f"{preprocess.model_dump_json()} {config.model_dump_json()} {' '.join(keys)}"
    digest = hashlib.sha256(text.encode())
    for name, tensor in network.state_dict().items():
        if not name.startswith("pooled_head."):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_cache(path: Path, key: str, network: SecondOrderHead) -> NDArray[np.float32] | None:
    """Read the vectors of *key* from *path* and load the projections; `None` without a file of this key."""
    if not path.is_file():
        return None
    try:
        content = load_plain(path)
    except CheckpointError:
        return None
    if not isinstance(content, dict) or content.get("key") != key or "poolings" not in content:
        return None
    network.pooled_head.poolings.load_state_dict(content["poolings"])
    vectors: NDArray[np.float32] = content["vectors"].numpy()
    return vectors
