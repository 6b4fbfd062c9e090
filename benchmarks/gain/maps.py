"""The feature maps of the frozen early stages, computed once for each image and kept in a file.

A run reads maps (40, side / 8, side / 8) in place of images, so an epoch costs only what the last
stages cost. Of training images, the maps of mirrored copies are kept, too.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sopdeploy.data.folders.folder import open_folder
from sopdeploy.data.photos.photo import LabeledImages
from sopdeploy.errors import DataError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.registry import create_model

BATCH = 16  # images
LAST_CACHED = "blocks.2"  # the stage whose output is cached; those after it are trained, as in `fine_tune`
ENTRY_TAP = "blocks.4.2"
LATE_TAP = "blocks.6.0"
Weights = Mapping[str, Tensor]


class Part(NamedTuple):
    """The maps (N, 40, h, w) float16 of images and their targets (N,), and the maps of mirrored copies or None."""

    maps: NDArray[np.float16]
    mirrored: NDArray[np.float16] | None
    targets: NDArray[np.int64]

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Return the maps at *indices* as a float32 tensor."""
        return torch.from_numpy(self.maps[np.asarray(indices)].astype(np.float32))


class ImageSet(NamedTuple):
    """A set of images: its name, its classes, and the maps of its training and test images."""

    name: str
    labels: tuple[str, ...]
    train: Part
    test: Part


def rules_of(side: int) -> Preprocess:
    """Return the preprocessing of EfficientNet-Lite0's weights, for images of *side* pixels."""
    return Preprocess(
        crop=side, interpolation="bicubic", mean=(0.5,), std=(0.5,), decoding="scaled"
    )


def open_set(
    name: str, folder: Path, weights: Weights, side: int, cache: Path, *, with_mirrored: bool
) -> ImageSet:
    """Read the maps of the set *name* in *folder*, which has train/ and test/; compute those that are missing.

    Mirrored copies are left out unless *with_mirrored*. Raises `DataError` without test images.
    """
    split = open_folder(folder)
    if not len(split.held_out):
        raise DataError(f"{folder}: has no test images; give a folder with train/ and test/")

    digest = hashlib.sha256(next(iter(weights.values())).numpy().tobytes()).hexdigest()[:8]
    kept = cache / f"{name}-{side}-{LAST_CACHED}-{digest}"
    kept.mkdir(parents=True, exist_ok=True)

    early = early_stages(weights)
    rules = rules_of(side)
    train = _maps(kept / "train.npy", split.train, early, rules, is_mirrored=False)
    mirrored = None
    if with_mirrored:
        mirrored = _maps(kept / "mirrored.npy", split.train, early, rules, is_mirrored=True)
    test = _maps(kept / "test.npy", split.held_out, early, rules, is_mirrored=False)

    return ImageSet(
        name,
        split.train.labels,
        Part(train, mirrored, split.train.targets.astype(np.int64)),
        Part(test, None, split.held_out.targets.astype(np.int64)),
    )


def early_stages(weights: Weights) -> nn.Module:
    """Build the stages of EfficientNet-Lite0 up to `LAST_CACHED` from its *weights*."""
    network = create_model("efficientnet-lite0", num_classes=1000)
    network.load_state_dict(weights)
    parts = [network.get_submodule(name) for name in network.stem_parts]
    for stage in network.stage_names:
        parts.append(network.get_submodule(stage))
        if stage == LAST_CACHED:
            break
    return nn.Sequential(*parts).eval().to(memory_format=torch.channels_last)


@torch.no_grad()
def _maps(
    path: Path, images: LabeledImages, early: nn.Module, rules: Preprocess, *, is_mirrored: bool
) -> NDArray[np.float16]:
    """Read the maps of *images* from *path*, or compute and write them."""
    if not path.exists():
        normalize = Normalize(rules, torch.channels_last)
        rows: list[NDArray[np.float16]] = []
        for start in range(0, len(images), BATCH):
            indices = range(start, min(start + BATCH, len(images)))
            pixels = np.stack([images.preprocess(index, rules) for index in indices])
            if is_mirrored:
                pixels = pixels[:, :, ::-1].copy()
            rows.append(early(normalize(torch.from_numpy(pixels))).numpy().astype(np.float16))

        partial = path.with_suffix(".partial.npy")
        np.save(partial, np.concatenate(rows))
        partial.replace(path)

    maps: NDArray[np.float16] = np.load(path, mmap_mode="r")
    return maps
