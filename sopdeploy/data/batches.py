"""From a dataset to batches of tensors, in an order that is a function of (seed, epoch)."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from sopdeploy.data.base import Dataset
from sopdeploy.errors import DataError
from sopdeploy.seeds import derive_seed

PILLOW_BLOCKS = 2  # of 16 MB each, the most that a photograph and its conversion need
Batch = tuple[Tensor, Tensor]  # images (B, H, W, 3) uint8, labels (B,) int64


def shuffled_batches(samples: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the samples of each step of an epoch: every sample once, in batches of nearly equal size.

    The sizes differ by one at most, so that no sample is dropped and no batch is too small for batch norm.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    order = torch.randperm(samples, generator=generator)
    return [chunk.tolist() for chunk in order.tensor_split(number_of_batches(samples, batch_size))]


def balanced_batches(targets: NDArray[np.int64], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return batches of an epoch as long as the data, in which all classes that have samples are as frequent.

    A class goes through its samples in a random order and starts again, so that none is shown twice before
    all were shown once; the second showing of a sample is `sample + len(targets)`, and so on.
    """
    random = np.random.default_rng(derive_seed(seed, "balanced order", epoch))
    members = [np.flatnonzero(targets == target) for target in np.unique(targets)]
    shares = np.diff(np.linspace(0, len(targets), len(members) + 1).round().astype(int))
    shown: list[int] = []
    for samples, share in zip(members, random.permutation(shares), strict=True):
        rounds = [
            random.permutation(samples) + copy * len(targets) for copy in range(-(-share // len(samples)))
        ]
        shown += np.concatenate(rounds)[:share].tolist() if rounds else []
    order = torch.from_numpy(random.permutation(np.asarray(shown, dtype=np.int64)))
    return [chunk.tolist() for chunk in order.tensor_split(number_of_batches(len(targets), batch_size))]


def number_of_batches(samples: int, batch_size: int) -> int:
    """Return how many batches of at most *batch_size* hold *samples*."""
    return -(-samples // batch_size)


def sequential_batches(samples: int, batch_size: int) -> list[list[int]]:
    """Return the samples in their own order, *batch_size* at a time."""
    return [list(range(start, min(start + batch_size, samples))) for start in range(0, samples, batch_size)]


def load_batches(
    dataset: Dataset, batches: list[list[int]], workers: int, device: torch.device
) -> Iterator[Batch]:
    """Yield *batches* of *dataset* on *device*, read by at most *workers* processes besides this one.

    Raises the `DataError` of the first picture that cannot be used.
    """
    on_gpu = device.type == "cuda"
    loader: DataLoader[Any] = DataLoader(
        WholeBatches(dataset),  # type: ignore[arg-type]  # torch's Dataset is a class, ours a protocol
        batch_sampler=batches,
        collate_fn=as_it_is,
        num_workers=min(workers, os.cpu_count() or 1),
        worker_init_fn=settle_in,
        pin_memory=on_gpu,
    )
    for batch in loader:
        if isinstance(batch, str):
            raise DataError(batch)
        images, labels = batch
        yield images.to(device, non_blocking=on_gpu), labels.to(device, non_blocking=on_gpu)


def with_wait_time(batches: Iterator[Batch]) -> Iterator[tuple[Batch, float]]:
    """Yield *batches*, each with the seconds that were spent waiting for it."""
    since = time.monotonic()
    for batch in batches:
        yield batch, time.monotonic() - since
        since = time.monotonic()


class WholeBatches:
    """A dataset that is asked for a batch at a time.

    A picture that cannot be used comes back as its message: an exception that leaves a loader process
    would arrive wrapped in a traceback.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> Batch | str:
        try:
            pairs = [self.dataset[index] for index in indices]
        except DataError as problem:
            return str(problem)
        images = torch.from_numpy(np.stack([array for array, _ in pairs]))
        return images, torch.tensor([label for _, label in pairs])


def as_it_is(batch: Any) -> Any:
    """Return *batch*: it is put together where it is read."""
    return batch


def settle_in(_worker: int) -> None:
    """Let a loader process live on after a Ctrl-C, which a terminal sends to every process of the run.

    And let Pillow keep the memory of a picture for the next one, as the service's decoders do.
    """
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Image.core.set_blocks_max(PILLOW_BLOCKS)  # type: ignore[attr-defined]
