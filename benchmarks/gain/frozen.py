"""Closed forms on statistics of the same frozen maps: means, deviations, covariances, roots."""

import sys
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gain.arms import ARMS, BATCH, DEFAULT, TAPS, build, fit_closed_form, fit_projections
from gain.first_order import FIRST_ORDER, best_answers
from gain.maps import ImageSet, Part, Weights
from sopdeploy.layers.covariance import covariance_matrix, covariance_trace
from sopdeploy.models.second_order_head import SecondOrderHead

EARLY_MAP, LATE_MAP = TAPS
# What each arm reads: the average of the last map ("own"), and statistics of the maps at both taps.
FROZEN: Mapping[str, tuple[str, ...]] = {
    "averages": ("own",),
    "averages of three maps": ("own", "mean"),
    "averages and deviations of three maps": ("own", "mean", "deviation"),
    "averages + covariances, no root": ("own", "covariance"),
    "averages + roots (default)": ("own", "root"),
    "averages of three maps + roots": ("own", "mean", "root"),
    "roots alone": ("root",),
    "root of the last map alone": ("last root",),
}
Statistics = dict[str, list[NDArray[np.float32]]]
Draw = tuple[int, int]  # images per class, seed


@torch.no_grad()
def first_order_answers(
    images: ImageSet, weights: Weights
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield for each arm of `FIRST_ORDER` which test images are right, with all training images."""
    train, test = all_statistics(images, weights)
    for arm, names in FIRST_ORDER.items():
        vectors = [
            np.concatenate([part for name in names for part in of_part[name]], axis=1)
            for of_part in (train, test)
        ]
        name, predicted = best_answers(vectors[0], images.train.targets, vectors[1])
        print(f"{images.name} {arm}: {name}", file=sys.stderr, flush=True)
        yield arm, predicted == images.test.targets


def all_statistics(images: ImageSet, weights: Weights) -> tuple[Statistics, Statistics]:
    """Compute the statistics of the training and of the test images."""
    network = build(ARMS[DEFAULT], weights, len(images.labels), seed=0)
    fit_projections(network, images.train, np.arange(len(images.train.targets)))
    return _statistics(network, images.train), _statistics(network, images.test)


@torch.no_grad()
def frozen_answers(
    images: ImageSet, weights: Weights, members: Mapping[Draw, NDArray[np.int64]]
) -> Iterator[tuple[Draw, str, NDArray[np.bool_]]]:
    """Yield for the training images *members* of each draw and each arm which test images are right."""
    train, test = all_statistics(images, weights)

    for draw, chosen in members.items():
        for arm, names in FROZEN.items():
            parts = [part[chosen] for name in names for part in train[name]]
            targets = images.train.targets[chosen]
            fitted = fit_closed_form(parts, targets, len(images.labels), draw[1])
            tested = np.concatenate([part for name in names for part in test[name]], axis=1)
            yield draw, arm, fitted.predict(tested) == images.test.targets


def _statistics(network: SecondOrderHead, part: Part) -> Statistics:
    """Compute all statistics of the maps of *part*, (N, D_i) for each map."""
    head = network.pooled_head
    batches: dict[str, list[list[Tensor]]] = {}
    for start in range(0, len(part.targets), BATCH):
        indices = np.arange(start, min(start + BATCH, len(part.targets)))
        last, tapped = network.feature_maps(part.select(indices), TAPS)
        roots = [head.pooling(tap)(maps) for tap, maps in zip(TAPS, tapped, strict=True)]
        computed = {
            "own": [network.pooling(last)],
            "mean": [maps.mean(dim=(2, 3)) for maps in tapped],
            "deviation": [maps.var(dim=(2, 3), correction=0).sqrt() for maps in tapped],
            "covariance": [
                _covariance(head.pooling(tap).reduce(maps))
                for tap, maps in zip(TAPS, tapped, strict=True)
            ],
            "root": roots,
            "last root": roots[-1:],
        }
        for name, tensors in computed.items():
            batches.setdefault(name, [[] for _ in tensors])
            for of_all, tensor in zip(batches[name], tensors, strict=True):
                of_all.append(tensor)
    return {
        name: [torch.cat(rows).numpy() for rows in of_all] for name, of_all in batches.items()
    }


def _covariance(reduced_BdHW: Tensor) -> Tensor:
    """Compute the triangle (B, d (d + 1) / 2) of the covariance of a reduced map, divided by its trace."""
    cov_Bdd = covariance_matrix(reduced_BdHW)
    rows, columns = np.triu_indices(cov_Bdd.shape[1])
    return (cov_Bdd / covariance_trace(cov_Bdd))[:, rows, columns]
