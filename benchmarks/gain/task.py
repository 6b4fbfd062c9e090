"""Tasks: training and test images as float tensors in memory."""

from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sopdeploy.config import StrictModel
from sopdeploy.errors import ConfigError
from sopdeploy.photos.folder import open_folder
from sopdeploy.photos.photo import LabeledImages
from sopdeploy.seeds import derive_seed

UNUSED = 5000  # of CIFAR's training images; only the whole set has them, no subset


class Task(NamedTuple):
    """Images (B, 3, H, W) float32 and labels (B,) int64 for training and test.

    All draws test the same `pool` of images.
    """

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor
    pool: int


class CifarConfig(StrictModel):
    """File of the decoded images, and number of training images."""

    arrays: Path
    train: int = 5000


def cifar(config: CifarConfig, seed: int) -> Task:
    """Load all training images of CIFAR, or a subset by *seed* of those that are not `UNUSED`."""
    with np.load(config.arrays) as stored:
        train, labels, test, test_labels = (
            torch.from_numpy(stored[name])
            for name in ("train", "labels", "test", "test_labels")
        )
    fixed = torch.randperm(
        len(labels), generator=torch.Generator().manual_seed(derive_seed(0, "held out"))
    )
    rest = fixed if config.train == len(labels) else fixed[UNUSED:]
    if config.train > len(rest):
        raise ConfigError(
            f"a subset of CIFAR has at most {len(rest)} images, not {config.train}"
        )
    shuffled = torch.randperm(
        len(rest), generator=torch.Generator().manual_seed(derive_seed(seed, "subset"))
    )
    chosen = rest[shuffled[: config.train]]
    return Task(
        normalize(train[chosen]), labels[chosen], normalize(test), test_labels, len(test)
    )


def normalize(images_BHWC: Tensor) -> Tensor:
    """Convert uint8 images to (B, 3, H, W) float, normalized with CIFAR's mean and standard deviation."""
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    return ((images_BHWC / 255.0 - mean) / std).permute(0, 3, 1, 2).contiguous()


def write_arrays(folder: Path, target: Path) -> None:
    """Decode the images in *folder* (train/ and test/, one subfolder per class) into one NPZ file."""
    split = open_folder(folder)
    arrays = {}
    for part, images, labels in (
        ("train", "train", "labels"),
        ("held_out", "test", "test_labels"),
    ):
        files: LabeledImages = getattr(split, part)
        opened = (Image.open(BytesIO(files.read(index))) for index in range(len(files.targets)))
        arrays[images] = np.stack([np.asarray(image.convert("RGB")) for image in opened])
        arrays[labels] = files.targets.astype(np.int64)
    partial = target.with_name(f"{target.stem}.part.npz")
    np.savez(partial, **arrays)
    partial.replace(target)
