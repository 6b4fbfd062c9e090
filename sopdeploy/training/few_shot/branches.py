"""The start of DSoP's branches on a trained network: batch norms and classifiers that fit the images.

A branch whose classifier is random gives its features a random gradient, which is also small beside that
of a main head that starts from a closed form. So its classifier starts from a closed form, too.

Letters: N images, D features, K classes.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sopdeploy.models.dsop import DSoP
from sopdeploy.training.few_shot.classifier import MAX_RANK, LinearProblem, Space
from sopdeploy.training.few_shot.targets import Targets

MAX_VALUES = 1 << 26  # of the vectors, 512 MiB in float64
FOLDS = 5
Compute = Callable[[nn.Module], NDArray[np.floating]]


class BranchVectors(nn.Module):
    """Compute the vectors of all branches of *network*, joined to (B, D); with *calibrates*, also batch norms.

    The batch norms of the branches then average the statistics of all batches.
    """

    def __init__(self, network: DSoP, *, calibrates: bool = False) -> None:
        super().__init__()
        self.network = network
        self.norms = [
            part for part in network.branches.modules() if isinstance(part, _BatchNorm)
        ]
        self.calibrates = calibrates

    def forward(self, images: Tensor) -> Tensor:
        """Compute the vectors of normalized images (B, 3, H, W)."""
        for norm in self.norms:
            norm.training = self.calibrates and len(images) > 1
        return torch.cat(list(self.network.branch_vectors(images).values()), dim=1)


def count_images(network: DSoP, available: int) -> int:
    """Return how many of the *available* images `fit_branches` should read, so that vectors fit into memory."""
    length = sum(network.branch_classifier(name).in_features for name in network.taps.values())
    return max(1, min(available, MAX_VALUES // length))


@torch.no_grad()
def fit_branches(
    network: DSoP, compute: Compute, targets: Targets, keys: list[str], seed: int
) -> dict[str, float]:
    """Set batch norms and classifiers of the branches of *network*; return the shrinkage of each classifier.

    *compute* runs a module on the N images of *targets*, which are in random order, in eval mode, and
    returns its outputs. Images with equal *keys* share a fold.
    """
    # The statistics of the batch norms.
    norms = [part for part in network.branches.modules() if isinstance(part, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches
    compute(BranchVectors(network, calibrates=True))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum

    # The classifiers, from closed forms that do not interpolate.
    vectors_ND = compute(BranchVectors(network)).astype(np.float32)
    folds_N = targets.folds(keys, FOLDS, seed)
    order_N = np.random.default_rng(seed).permutation(len(vectors_ND))
    shrinkages = {}
    start = 0
    for name in network.taps.values():
        classifier = network.branch_classifier(name)
        own_ND = vectors_ND[:, start : start + classifier.in_features]
        start += classifier.in_features
        space = Space.of([own_ND[order_N[:MAX_RANK]]])
        problem = LinearProblem(space, space.project(own_ND), own_ND, targets)
        problem, scaling = problem.shrink_to_learn([folds_N])
        head = problem.fit_all(scaling)
        classifier.weight.copy_(torch.from_numpy(head.weight))
        classifier.bias.copy_(torch.from_numpy(head.bias))
        shrinkages[name] = problem.shrinkage
    return shrinkages
