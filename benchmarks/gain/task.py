"""Tasks: pictures to learn from and pictures to be measured on, as float tensors in memory."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sopdeploy.config import StrictModel
from sopdeploy.data.base import ArrayImages, derive_seed
from sopdeploy.data.datasets.folder import FolderConfig, open_folder
from sopdeploy.data.datasets.small import open_digits

HELD_OUT = 5000  # of CIFAR's training pictures, to look at hyper-parameters


class Task(NamedTuple):
    """Pictures (B, 3, H, W) float32 and labels (B,) int64, on both sides."""

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor


class DigitsConfig(StrictModel):
    """How many of the 1797 digits are learnt from; all others are measured on."""

    train: int = 200


class CifarConfig(StrictModel):
    """How many pictures are learnt from; measured on the test pictures, or on 5000 held-out training ones."""

    arrays: Path
    train: int = 5000
    held_out: bool = False


def digits(config: DigitsConfig, seed: int) -> Task:
    """Return the digits of scikit-learn, 8 x 8, split by *seed*."""
    split = open_digits()
    parts = [part for part in (split.train, split.held_out) if isinstance(part, ArrayImages)]
    grey = torch.from_numpy(np.concatenate([part.images for part in parts])).float() / 255.0
    labels = torch.from_numpy(np.concatenate([part.targets for part in parts]))
    pictures = ((grey - grey.mean()) / grey.std())[:, None].expand(-1, 3, -1, -1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive_seed(seed, "subset")))
    learnt, measured = order[: config.train], order[config.train :]
    return Task(pictures[learnt], labels[learnt], pictures[measured], labels[measured])


def cifar(config: CifarConfig, seed: int) -> Task:
    """Return a subset of CIFAR by *seed*; which pictures are held out does not depend on it."""
    with np.load(config.arrays) as stored:
        train, labels, test, test_labels = (
            torch.from_numpy(stored[name]) for name in ("train", "labels", "test", "test_labels")
        )
    fixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(derive_seed(0, "held out")))
    held, rest = fixed[:HELD_OUT], fixed[HELD_OUT:]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(derive_seed(seed, "subset")))
    learnt = rest[order[: config.train]]
    if config.held_out:
        test, test_labels = train[held], labels[held]
    return Task(standardised(train[learnt]), labels[learnt], standardised(test), test_labels)


def standardised(pictures_BHWC: Tensor) -> Tensor:
    """Return uint8 pictures as (B, 3, H, W) float, less the usual mean and divided by the usual deviation."""
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    return ((pictures_BHWC / 255.0 - mean) / std).permute(0, 3, 1, 2).contiguous()


def write_arrays(folder: Path, target: Path) -> None:
    """Decode the pictures of *folder* (train and test, a subfolder per class) into one file of arrays."""
    split = open_folder(FolderConfig(kind="folder", path=folder))
    arrays = {}
    for part, pictures, labels in (("train", "train", "labels"), ("held_out", "test", "test_labels")):
        pairs = [getattr(split, part)[index] for index in range(len(getattr(split, part)))]
        arrays[pictures] = np.stack([np.asarray(picture.convert("RGB")) for picture, _ in pairs])
        arrays[labels] = np.asarray([label for _, label in pairs], dtype=np.int64)
    partial = target.with_name(f"{target.stem}.part.npz")
    np.savez(partial, **arrays)
    partial.replace(target)
