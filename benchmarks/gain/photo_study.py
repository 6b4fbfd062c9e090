"""The study of fine-tuning on photographs with and without DSoP branches, from fitted heads.

Frozen arms are the heads that `train` fits to EfficientNet-Lite0 with its ImageNet weights: on
averages, and on averages with two second-order statistics. All other arms start from these and
train the stages behind the third: AdamW, warm-up and cosine, random crops, label smoothing.
Arms with branches are tested after these are detached.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np

from gain.execution import Line
from gain.paired import paired
from gain.photos import MAX_PER_CLASS, PhotosConfig, count_classes, write_maps
from gain.report import accuracies
from gain.study import Study

FROZEN, FROZEN_HEAD = "frozen, averages", "frozen, second-order head"
PLAIN, LONGER, HEAD = "averages", "averages, equal time", "second-order head"
GAP_BRANCHES, DSOP = "averages, GAP branches", "averages, DSoP, detached"
PAIRS = (
    (FROZEN_HEAD, FROZEN),
    (HEAD, FROZEN_HEAD),
    (DSOP, GAP_BRANCHES),
    (DSOP, LONGER),
    (DSOP, FROZEN_HEAD),
)
LONG_TRAINING = (
    16  # epochs; from here on, the grid of rates, which widens at its edges, begins higher
)


def photo_study(name: str, task: PhotosConfig, given: argparse.Namespace, epochs: int) -> Study:
    """Build the study of a set after a training of *epochs*."""
    frozen: dict[str, dict[str, Any]] = {
        FROZEN: {"epochs": 0},
        FROZEN_HEAD: {"network": "head-photos", "epochs": 0},
    }
    trained: dict[str, dict[str, Any]] = {
        PLAIN: {},
        LONGER: {"epochs": 2 * epochs},
        GAP_BRANCHES: {"network": "dsop-photos", "config": {"aux_pooling": "gap"}},
        DSOP: {"network": "dsop-photos"},
        HEAD: {"network": "head-photos"},
    }
    if given.heads_only:
        trained = {HEAD: trained[HEAD]}
    return Study(
        name=f"{name}, {epochs} epochs",
        images=name,
        title=f"{task.classes} classes, {task.per_class} photographs of each",
        seeds=tuple(range(given.draws or 20)),
        template={
            "task": task,
            "network": "photos",
            "epochs": epochs,
            "batch": 8,
            "optimizer": "adamw",
            "weight_decay": 0.01,
            "label_smoothing": 0.1,
            "learning_rate": 1e-4,
        },
        arms={**frozen, **trained},
        reference=FROZEN if given.heads_only else PLAIN,
        pairs=PAIRS[:2] if given.heads_only else PAIRS,
        rates=(1e-4, 3e-4, 1e-3) if epochs < LONG_TRAINING else (3e-4, 1e-3, 3e-3),
        search=tuple(trained),
    )


def share(arms: Mapping[str, list[Line]]) -> str:
    """Describe the share of the second-order head's gain that the detached network has."""
    plain, dsop, head = (np.array(accuracies(arms[arm])) for arm in (PLAIN, DSOP, HEAD))
    gain = paired(accuracies(arms[HEAD]), accuracies(arms[PLAIN]))
    if len(plain) < 2 or gain.mean - gain.half <= 0:
        return "the second-order head has no significant gain, so there is no share"
    resamples = np.random.default_rng(0).integers(0, len(plain), (10_000, len(plain)))
    ratios = (dsop - plain)[resamples].mean(axis=1) / (head - plain)[resamples].mean(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    value = (dsop - plain).mean() / (head - plain).mean()
    return (
        f"share of the head's gain: {100 * value:.0f} % ({100 * low:.0f} to {100 * high:.0f} %)"
    )


def photo_studies(given: argparse.Namespace) -> list[Study]:
    """Build the studies of all sets and lengths; compute the outputs of the frozen stages once."""
    tasks = {}
    for name, folder in given.photos:
        others = "" if given.limit == MAX_PER_CLASS else f"-{given.limit}"
        maps = given.cache.resolve() / f"{name}{others}.npz"
        if not maps.exists():
            write_maps(folder, given.weights, maps, given.limit)
        sizes = {"classes": count_classes(maps), "per_class": given.per_class}
        tasks[name] = PhotosConfig(maps=maps, weights=given.weights.resolve(), **sizes)
    lengths = given.epochs or [4]
    return [
        photo_study(name, task, given, epochs)
        for epochs in lengths
        for name, task in tasks.items()
    ]
