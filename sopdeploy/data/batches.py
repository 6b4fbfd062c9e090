"""Batches of tensors from a dataset, in an order that depends on (seed, epoch) only."""

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from sopdeploy.base.environment import usable_cores
from sopdeploy.base.seeds import derive_seed
from sopdeploy.data.photos.network_inputs import Dataset
from sopdeploy.errors import DataError

PILLOW_BLOCKS = 2  # of 16 MB each that Pillow keeps: enough for a photograph and its conversion
SHARED = {"images", "fitted"}  # fields of a data set that loader processes have
Batch = tuple[Tensor, Tensor]  # images (B, H, W, 3) uint8; labels (B,) int64 or (B, C) float32


def count_batches(samples: int, batch_size: int) -> int:
    """Count the batches of an epoch so that each has two or more samples, because batch norm needs them.

    A single sample is one batch. Batch sizes differ by at most one. With an odd number of samples
    and a *batch_size* of 2, one is 3.
    """
    rounded_up = -(-samples // batch_size)
    return min(rounded_up, max(1, samples // 2))


def shuffled_batches(samples: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Shuffle *samples* indices and split all of them into the batches of an epoch (`count_batches`)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    shuffled = torch.randperm(samples, generator=generator)
    return [
        batch.tolist() for batch in shuffled.tensor_split(count_batches(samples, batch_size))
    ]


def sequential_batches(samples: int, batch_size: int) -> list[list[int]]:
    """Split *samples* indices into batches in their order."""
    return [
        list(range(start, min(start + batch_size, samples)))
        for start in range(0, samples, batch_size)
    ]


def load_batches(
    dataset: Dataset, batches: list[list[int]], workers: "int | Loader", device: torch.device
) -> Iterator[Batch]:
    """Load *batches*, lists of indices of *dataset*, onto *device*.

    *workers* is the largest number of loader processes, which end with the last batch, or the
    `Loader` of a run. Raises the `DataError` of the first unusable image.
    """
    on_gpu = device.type == "cuda"
    loader = Loader((dataset,), workers, device) if isinstance(workers, int) else workers

    for loaded in loader.load(dataset, batches):
        if isinstance(loaded[0], str):  # the message of an error
            raise DataError(loaded[0])
        images, labels = loaded
        yield images.to(device, non_blocking=on_gpu), labels.to(device, non_blocking=on_gpu)


class Loader:
    """Up to *workers* processes that load batches of *datasets*: from the first batch to the end of `with`.

    Each process gets the images once, and then the other fields of a data set with the indices
    of a batch.
    """

    def __init__(self, datasets: Sequence[Dataset], workers: int, device: torch.device) -> None:
        self.datasets = datasets
        count = min(workers, usable_cores()) if workers else 0
        self.sampler = _RequestSampler([])

        self.data_loader: DataLoader[Any] | None = DataLoader(
            _BatchDataset(datasets),  # type: ignore[arg-type]  # not torch's Dataset
            batch_sampler=self.sampler,  # type: ignore[arg-type]  # not lists of indices
            collate_fn=tuple,  # no change: `__getitems__` has stacked the samples
            num_workers=count,
            persistent_workers=count > 0,
            worker_init_fn=_init_worker,
            pin_memory=device.type == "cuda",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.data_loader = None  # torch ends its processes when nothing refers to it any more

    def load(self, dataset: Dataset, batches: list[list[int]]) -> Iterator[Batch | tuple[str]]:
        """Yield the *batches*, lists of indices of *dataset*; after a `DataError`, its message in a tuple.

        The images of *dataset* must be those of one of `datasets`. After the end of `with`,
        yields nothing.
        """
        number = [loaded.images is dataset.images for loaded in self.datasets].index(True)
        names = [field.name for field in fields(dataset) if field.name not in SHARED]
        own = {name: getattr(dataset, name) for name in names}
        self.sampler.requests = [_BatchRequest(number, own, indices) for indices in batches]
        yield from self.data_loader or ()


class _BatchRequest(NamedTuple):
    """A batch of a data set: its number, its fields that are not `SHARED`, and the indices of the images."""

    number: int
    own: dict[str, Any]
    indices: list[int]


@dataclass
class _RequestSampler:
    """The `requests` that the next iteration of a loader sends to its processes, as its sampler."""

    requests: list[_BatchRequest]

    def __iter__(self) -> Iterator[_BatchRequest]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


@dataclass
class _BatchDataset:
    """Load whole batches (images, labels); instead of a `DataError`, its message, without a traceback."""

    datasets: Sequence[Dataset]

    def __getitems__(self, request: _BatchRequest) -> Batch | tuple[str]:
        dataset = replace(self.datasets[request.number], **request.own)
        try:
            pixels, labels = dataset.batch(request.indices)
        except DataError as error:
            return (str(error),)
        return torch.from_numpy(pixels), torch.from_numpy(labels)


def _init_worker(_worker: int) -> None:
    """Leave the end of this loader process to the main process, and limit the memory that Pillow keeps."""
    # A terminal sends Ctrl-C to the whole group, but the main process decides when workers end.
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Image.core.set_blocks_max(PILLOW_BLOCKS)  # type: ignore[attr-defined]
