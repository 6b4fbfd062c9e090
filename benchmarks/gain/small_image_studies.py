"""The studies: networks, tasks and controls. No value was chosen with test images.

Learning rates and epochs were chosen with seed 100 and more, which no evaluated draw has. The number of
epochs of an equal-time control gives it at least the CPU time of the DSoP training.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gain.study import Study
from gain.task import CifarConfig, DigitsConfig
from gain.textures import TextureConfig

ISQRT = {"kind": "isqrt", "width": 64}
PLAIN = "ReLU + GAP"
GAP_BRANCHES, DSOP, LONG = f"{PLAIN}, GAP branches", f"{PLAIN}, DSoP, detached", f"{PLAIN}, equal time"
HEAD, LINEAR = "iSQRT head", "linear + GAP"

TEXTURE_RUN: Mapping[str, Any] = {
    "task": TextureConfig(),
    "network": "textures",
    "epochs": 60,
    "learning_rate": 0.3,
}
TEXTURE_ARMS: Mapping[str, Mapping[str, Any]] = {
    LINEAR: {"config": {"layers": "linear"}, "epochs": 20},
    PLAIN: {},
    GAP_BRANCHES: {"network": "dsop-textures", "config": {"aux_pooling": "gap"}},
    LONG: {"epochs": 110},
    DSOP: {"network": "dsop-textures"},
    HEAD: {"config": {"layers": "linear", "pooling": ISQRT}},
}
SMALL = {"depth": 8, "base_width": 8}
DIGITS_RUN: Mapping[str, Any] = {
    "task": DigitsConfig(),
    "network": "resnet",
    "config": SMALL,
    "epochs": 20,
    "learning_rate": 0.1,
    "batch": 32,
}


def textures(seeds: int) -> Study:
    """Compare on generated textures; each seed generates another task."""
    return Study(
        name="textures",
        images="textures",
        title="10 classes of Gaussian textures that differ in second moments only; 500 images, 60 epochs",
        seeds=tuple(range(seeds)),
        template=TEXTURE_RUN,
        arms=TEXTURE_ARMS,
        reference=PLAIN,
        pairs=((DSOP, GAP_BRANCHES), (DSOP, LONG), (HEAD, LONG)),
        must={HEAD: 30.0, DSOP: 15.0},
        chance=LINEAR,
    )


def digits(seeds: int) -> Study:
    """Compare on scikit-learn's digits; each seed selects another 200 for training."""
    return Study(
        name="digits",
        images="digits",
        title="handwritten digits, 200 images, ResNet-8 of width 8, 20 epochs",
        seeds=tuple(range(seeds)),
        template=DIGITS_RUN,
        arms={
            PLAIN: {},
            GAP_BRANCHES: {"network": "dsop-resnet", "config": {**SMALL, "aux_pooling": "gap"}},
            LONG: {"epochs": 42},
            DSOP: {"network": "dsop-resnet"},
            HEAD: {"config": {**SMALL, "pooling": ISQRT}},
        },
        reference=PLAIN,
        pairs=((DSOP, GAP_BRANCHES), (DSOP, LONG), (HEAD, LONG)),
    )


def cifar_branches(arrays: Path, seeds: int, epochs: int) -> Study:
    """Compare DSoP with its controls on 5000 images of CIFAR-10 after a training of *epochs*."""
    return Study(
        name=f"CIFAR-10 branches, {epochs} epochs",
        images="CIFAR-10",
        title="5000 images, ResNet-8 of width 16, feature maps 16, 8, 4, 10 000 test images",
        seeds=tuple(range(seeds)),
        template={
            "task": CifarConfig(arrays=arrays),
            "network": "resnet",
            "config": {"depth": 8},
            "strides": (2, 2),
            "epochs": epochs,
            "learning_rate": 0.1,
            "augment": True,
        },
        arms={
            PLAIN: {},
            GAP_BRANCHES: {"network": "dsop-resnet", "config": {"depth": 8, "aux_pooling": "gap"}},
            DSOP: {"network": "dsop-resnet"},
            LONG: {"epochs": math.ceil(2.3 * epochs)},
        },
        reference=PLAIN,
        pairs=((DSOP, GAP_BRANCHES), (DSOP, LONG)),
        rates=(0.03, 0.1, 0.3),
        search=(PLAIN, GAP_BRANCHES, DSOP, LONG),
    )
