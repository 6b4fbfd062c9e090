"""Learnable parameters and multiply-adds of a network, as it was trained and as it is exported."""

from itertools import chain

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import is_in
from sopdeploy.models.describe import Counts
from sopdeploy_export.network import copy_network
from sopdeploy_export.runs import without_fast_path


def count_costs(
    network: nn.Module, removed: tuple[str, ...], preprocess: Preprocess
) -> tuple[Counts, Counts]:
    """Count the costs of *network* in train mode, and in eval mode without its *removed* parts.

    The costs are for an image of the size and channels of *preprocess*. Parts that only training needs may run
    in train mode only. If nothing is removed, if *network* cannot be copied, or if it fails in train
    mode, for example without targets, the first costs are those in eval mode, too.
    """
    shipped = _count(network, removed, preprocess)
    if not removed:
        return shipped, shipped

    # A copy in train mode, in which its code can change what the network holds.
    with torch.random.fork_rng(devices=()):  # dropout draws random numbers
        try:
            trained = _count(copy_network(network).train(), (), preprocess)
        except Exception:  # the network's own code, which can raise anything
            trained = _count(network, (), preprocess)
    return trained, shipped


def _count(network: nn.Module, without: tuple[str, ...], preprocess: Preprocess) -> Counts:
    """Count the costs of *network* in its current mode, *without* some of its modules.

    torch counts every convolution and every product of matrices of a run, also those that no module stands
    for: attention, einsum, and the products of a covariance and of its square root.
    """
    device = next(
        (tensor.device for tensor in chain(network.parameters(), network.buffers())), None
    )
    image = torch.zeros(1, preprocess.channels, preprocess.crop, preprocess.crop, device=device)

    # Attention runs as its single operators, because torch does not count the ones that join them.
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), without_fast_path(), sdpa_kernel(SDPBackend.MATH), counter:
        network(image)

    # torch counts by module, with the class of the network as the first name, and two operations for each
    # multiply-add.
    counts = counter.get_flop_counts()
    root = type(network).__name__
    outermost = [name for name in without if not is_in(name, *({*without} - {name}))]
    of_others = sum(sum(counts.get(f"{root}.{name}", {}).values()) for name in outermost)
    return Counts(
        parameters=sum(
            parameter.numel()
            for name, parameter in network.named_parameters()
            if not is_in(name, *without)
        ),
        macs=(counter.get_total_flops() - of_others) // 2,
    )
