"""Moment Probing, the successor of the families: a trained head on means and cross-covariances of a frozen network.

Paper: Gao et al., "Tuning Pre-trained Model via Moment Probing" (ICCV 2023), section 3: the features are
reduced and divided into heads. The cross-covariances of neighboring heads are normalized, go through two
convolutions with stride, and a linear layer; its scores are averaged with the scores of the linear layer of the
means. A logistic regression on the means alone is the control. Both are trained by AdamW, as in the paper,
with mirrored copies.
"""

import copy
import time
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from gain.arms import ARMS, AVERAGES, BATCH, build
from gain.maps import ImageSet, Weights
from gain.runs import Case
from sopdeploy.layers.covariance import deviations
from sopdeploy.models.second_order_head import SecondOrderHead

# The logistic regression on means is the control of Moment Probing.
PROBES = ("logistic regression, averages", "Moment Probing")
REDUCED = 256  # channels after the reduction
HEADS = 4
KERNEL, STRIDE = 3, 2
DROPOUT = 0.2
SMOOTHING = 0.1
WEIGHT_DECAY = 1e-2


class MomentProbing(nn.Module):
    """Map a feature map (B, C, H, W) to logits (B, K) by its means and, *with_covariances*, by cross-covariances."""

    def __init__(self, channels: int, num_classes: int, *, with_covariances: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fc = nn.Linear(channels, num_classes)
        self.second: nn.Sequential | None = None
        if with_covariances:
            width = REDUCED // HEADS
            pairs = HEADS - 1
            side = width
            for _ in range(2):
                side = (side - KERNEL) // STRIDE + 1
            self.reduce = nn.Sequential(
                nn.Conv2d(channels, REDUCED, 1, bias=False), nn.BatchNorm2d(REDUCED), nn.GELU()
            )
            self.second = nn.Sequential(
                nn.Conv2d(pairs, pairs, KERNEL, STRIDE),
                nn.GELU(),
                nn.Conv2d(pairs, pairs, KERNEL, STRIDE),
                nn.Flatten(),
                nn.Dropout(DROPOUT),
                nn.Linear(pairs * side * side, num_classes),
            )

    def forward(self, maps: Tensor) -> Tensor:
        """Compute the logits."""
        first_BK: Tensor = self.fc(self.norm(maps.mean(dim=(2, 3))))
        if self.second is None:
            return first_BK

        # (B, heads, width, positions), centered; neighbors are the heads n and n + 1.
        heads = deviations(self.reduce(maps)).unflatten(1, (HEADS, -1))
        cross = heads[:, :-1] @ heads[:, 1:].transpose(2, 3)
        cross = normalize(cross.flatten(start_dim=2), dim=2).unflatten(2, cross.shape[2:])
        second_BK: Tensor = self.second(cross)
        return (first_BK + second_BK) / 2


class Probed(NamedTuple):
    """Which test images are right, and the CPU seconds of the training."""

    right: NDArray[np.bool_]
    seconds: float


def probe(
    case: Case,
    images: ImageSet,
    weights: Weights,
    learned: NDArray[np.int64],
    validation: NDArray[np.int64],
) -> Probed:
    """Train the probe of *case* on the *learned* images; the epoch of the lowest *validation* loss counts."""
    rate, epochs, seed = case.rate, case.epochs, case.seed
    network = build(ARMS[AVERAGES], weights, len(images.labels), seed)
    train = _last_maps(network, images.train.maps)
    mirrored = _last_maps(network, images.train.mirrored)
    test = _last_maps(network, images.test.maps)
    targets = torch.from_numpy(images.train.targets)

    torch.manual_seed(seed)
    with_covariances = case.arm == PROBES[1]
    head = MomentProbing(train.shape[1], len(images.labels), with_covariances=with_covariances)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    size = min(BATCH, len(learned))
    num_steps = len(learned) // size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=epochs * num_steps
    )
    random = np.random.default_rng(seed)

    best, lowest = copy.deepcopy(head.state_dict()), float("inf")
    seconds = 0.0
    for _ in range(epochs):
        started = time.process_time()
        head.train()
        order = random.permutation(learned)
        for step in range(num_steps):
            chosen = order[step * size : (step + 1) * size]
            is_mirrored = torch.from_numpy(random.random(size) < 0.5)[:, None, None, None]
            maps = torch.where(is_mirrored, mirrored[chosen], train[chosen]).float()
            loss = cross_entropy(head(maps), targets[chosen], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds += time.process_time() - started

        loss_of_validation = float(
            cross_entropy(_predict(head, train[validation]), targets[validation])
        )
        if loss_of_validation < lowest:
            best, lowest = copy.deepcopy(head.state_dict()), loss_of_validation

    head.load_state_dict(best)
    predicted = _predict(head, test).argmax(dim=1).numpy()
    return Probed(predicted == images.test.targets, round(seconds, 1))


@torch.no_grad()
def _last_maps(network: SecondOrderHead, maps: NDArray[np.float16] | None) -> Tensor:
    """Compute the last feature maps (N, 1280, h, w) float16 from the cached ones."""
    if maps is None:
        raise TypeError("training images have mirrored copies")
    rows = []
    for start in range(0, len(maps), BATCH):
        batch = torch.from_numpy(maps[start : start + BATCH].astype(np.float32))
        rows.append(network.feature_maps(batch)[0].half())
    return torch.cat(rows)


@torch.no_grad()
def _predict(head: MomentProbing, maps: Tensor) -> Tensor:
    """Compute the logits (N, K) of *maps*."""
    head.eval()
    return torch.cat([head(batch.float()) for batch in maps.split(BATCH)])
