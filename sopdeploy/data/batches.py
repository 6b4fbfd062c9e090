"""Batches of tensors from a dataset, in an order that depends on (seed, epoch) only."""

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from sopdeploy.environment import usable_cores
from sopdeploy.errors import DataError
from sopdeploy.photos.photo import Dataset
from sopdeploy.seeds import derive_seed

PILLOW_BLOCKS = 2  # of 16 MB each that Pillow keeps: enough for a photograph and its conversion
Batch = tuple[Tensor, Tensor]  # images (B, H, W, 3) uint8; labels (B,) int64 or (B, C) float32


def count_batches(samples: int, batch_size: int) -> int:
    """Count the batches of an epoch so that each has two or more samples, because batch norm needs them.

    Batch sizes differ by at most one. With an odd number of samples and a *batch_size* of 2, one is 3.
    """
    rounded_up = -(-samples // batch_size)
    return min(rounded_up, max(1, samples // 2))


def shuffled_batches(samples: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Shuffle *samples* indices and split all of them into the batches of an epoch (`count_batches`)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    shuffled = torch.randperm(samples, generator=generator)
    return [batch.tolist() for batch in shuffled.tensor_split(count_batches(samples, batch_size))]


def sequential_batches(samples: int, batch_size: int) -> list[list[int]]:
    """Split *samples* indices into batches in their order."""
    return [list(range(start, min(start + batch_size, samples))) for start in range(0, samples, batch_size)]


def load_batches(
    dataset: Dataset, batches: list[list[int]], workers: int, device: torch.device
) -> Iterator[Batch]:
    """Load *batches*, lists of indices of *dataset*, onto *device* with up to *workers* loader processes.

    Yields images (B, H, W, 3) uint8 and labels (B,) int64 or (B, C) float32. Raises the `DataError` of the
    first unusable image.
    """
    on_gpu = device.type == "cuda"
    loader: DataLoader[Any] = DataLoader(
        _BatchedDataset(dataset),  # type: ignore[arg-type]  # not torch's Dataset
        batch_sampler=batches,
        collate_fn=tuple,  # no change: `__getitems__` has stacked the samples
        num_workers=min(workers, usable_cores()) if workers else 0,
        worker_init_fn=_init_worker,
        pin_memory=on_gpu,
    )
    for loaded in loader:
        if isinstance(loaded[0], str):  # the message of an error
            raise DataError(loaded[0])
        images, labels = loaded
        yield images.to(device, non_blocking=on_gpu), labels.to(device, non_blocking=on_gpu)


@dataclass
class _BatchedDataset:
    """Load whole batches (images, labels). After a `DataError`, the result is its message, as a tuple of one.

    DataLoader would add a traceback to a raised error; `load_batches` raises it instead.
    """

    dataset: Dataset

    def __getitems__(self, indices: Sequence[int]) -> Batch | tuple[str]:
        try:
            pairs = [self.dataset[index] for index in indices]
        except DataError as error:
            return (str(error),)
        images = torch.from_numpy(np.stack([array for array, _ in pairs]))
        return images, torch.from_numpy(np.asarray([label for _, label in pairs]))


def _init_worker(_worker: int) -> None:
    os.setpgrp()  # a terminal sends Ctrl-C to the whole group; the main process decides when workers end
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Image.core.set_blocks_max(PILLOW_BLOCKS)  # type: ignore[attr-defined]
