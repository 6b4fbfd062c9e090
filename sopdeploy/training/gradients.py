"""Sums of every process' gradients, in a few large pieces.

Instead of DistributedDataParallel: the network keeps its names and may lose its branches on the way, a
part that no sample of one process reached needs no search, and AdaHessian's curvatures are summed the same
way. The price is that nothing is sent while `backward` still computes.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 64 * 2**20  # few enough calls, little enough memory beside the gradients


@torch.no_grad()
def summed(tensors: Sequence[Tensor | None], likes: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the sums over all processes; those of *tensors* that are there are changed in place.

    *likes* have the shapes. `None` counts as 0 where another process has a tensor, and stays where no
    process has one: an optimizer's weight decay tells the two apart.
    """
    if not likes:
        return []
    there = torch.tensor([tensor is not None for tensor in tensors], dtype=torch.int32)
    there = there.to(likes[0].device)
    dist.all_reduce(there)
    sums = [
        (torch.zeros_like(like) if tensor is None else tensor) if count else None
        for tensor, like, count in zip(tensors, likes, there.tolist(), strict=True)
    ]
    for bucket in buckets([tensor for tensor in sums if tensor is not None]):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
    return sums


def buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield *tensors* in their order, those of one type together up to the size of a bucket."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
