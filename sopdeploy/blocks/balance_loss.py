"""The balance loss: keeps a gate from sending every image to the same few components.

Paper: Wang et al., GM-SOP (NeurIPS 2018), Eq. (4): L = alpha (std(v) / mean(v))^2, where v_i is the sum
of the batch's weights of component i. Letters: B images, N components, K of them kept per image.

The deviation is the unbiased one (over N - 1), as in the released code. When all images weigh the
same K components alike, the loss is alpha N / (N - 1) (N / K - 1), 106.7 for the paper's 16, 8 and
alpha = 100; that is its value on a single image as well, so tiny batches say nothing.
"""

import torch
from torch import Tensor

from sopdeploy.blocks.ranks import sum_over_ranks


def balance_loss(weights_BN: Tensor, alpha: float) -> Tensor:
    """Return alpha / S times (std / mean)^2 of the summed weights of all S images of the step.

    The sum runs over all ranks where `torch.distributed` is initialised, so that the loss does not
    depend on how a batch is spread. Its gradient is whole when the ranks' gradients are averaged, each
    weighted by its share of the images. alpha is divided by S because the released trainer sums the
    cross entropy over the batch and then divides every gradient by its size: beside a mean cross
    entropy Eq. (4) weighs alpha / S, 0.39 for the paper's 100 and 256.
    """
    images = weights_BN.new_full((1,), weights_BN.shape[0])
    summed = sum_over_ranks(torch.cat([weights_BN.sum(dim=0), images]))
    load_N, images = summed[:-1], summed[-1].detach()
    return alpha / images * (load_N.var(correction=1) / load_N.mean().square())
