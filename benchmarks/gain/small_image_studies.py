"""The studies: networks, tasks and controls.

Learning rates and epochs were chosen with seed 100 and more, which no evaluated draw has; on
CIFAR-10, these draws have the same test images. The number of epochs of an equal-time control
gives it at least the CPU time of the DSoP training.
"""

import math
from collections.abc import Mapping
from typing import Any

from gain.study import Study
from gain.task import CifarConfig, DigitsConfig
from gain.textures import TextureConfig

ISQRT = {"kind": "isqrt", "width": 64}
PLAIN = "ReLU + GAP"
GAP_BRANCHES, DSOP, LONG = (
    f"{PLAIN}, GAP branches",
    f"{PLAIN}, DSoP, detached",
    f"{PLAIN}, equal time",
)
HEAD, LINEAR = "iSQRT head", "linear + GAP"

SMALL = {"depth": 8, "base_width": 8}
PAIRS = ((DSOP, GAP_BRANCHES), (DSOP, LONG))


def branch_arms(
    family: str, options: Mapping[str, Any], longer: int
) -> dict[str, dict[str, Any]]:
    """Return the plain network of *family*, with DSoP and its controls; "equal time" has *longer* epochs."""
    gap = {"network": f"dsop-{family}", "config": {**options, "aux_pooling": "gap"}}
    return {
        PLAIN: {},
        GAP_BRANCHES: gap,
        LONG: {"epochs": longer},
        DSOP: {"network": f"dsop-{family}"},
    }


def textures(seeds: int) -> Study:
    """Compare on generated textures; each seed generates another task."""
    return Study(
        name="textures",
        images="textures",
        title="10 classes of Gaussian textures that differ in second moments only; 500 images, 60 epochs",
        seeds=tuple(range(seeds)),
        template={
            "task": TextureConfig(),
            "network": "textures",
            "epochs": 60,
            "learning_rate": 0.3,
        },
        arms={
            LINEAR: {"config": {"layers": "linear"}, "epochs": 20},
            **branch_arms("textures", {}, 110),
            HEAD: {"config": {"layers": "linear", "pooling": ISQRT}},
        },
        reference=PLAIN,
        pairs=(*PAIRS, (HEAD, LONG)),
        must={HEAD: 30.0, DSOP: 15.0},
        chance=LINEAR,
    )


def digits(seeds: int) -> Study:
    """Compare on scikit-learn's digits; each seed selects another 200 for training."""
    run = {
        "network": "resnet",
        "config": SMALL,
        "epochs": 20,
        "learning_rate": 0.1,
        "batch": 32,
    }
    return Study(
        name="digits",
        images="digits",
        title="handwritten digits, 200 images, ResNet-8 of width 8, 20 epochs",
        seeds=tuple(range(seeds)),
        template={"task": DigitsConfig(), **run},
        arms={
            **branch_arms("resnet", SMALL, 42),
            HEAD: {"config": {**SMALL, "pooling": ISQRT}},
        },
        reference=PLAIN,
        pairs=(*PAIRS, (HEAD, LONG)),
    )


def cifar_branches(task: CifarConfig, seeds: int, epochs: int) -> Study:
    """Compare DSoP with its controls on images of CIFAR-10 after a training of *epochs*."""
    return Study(
        name=f"CIFAR-10 branches, {epochs} epochs, {task.train} images",
        images="CIFAR-10",
        title="ResNet-8 of width 16, feature maps 16, 8, 4, 10 000 test images",
        seeds=tuple(range(seeds)),
        template={
            "task": task,
            "network": "resnet",
            "config": {"depth": 8},
            "strides": (2, 2),
            "epochs": epochs,
            "learning_rate": 0.1,
            "augment": True,
        },
        arms=branch_arms("resnet", {"depth": 8}, math.ceil(2.3 * epochs)),
        reference=PLAIN,
        pairs=PAIRS,
        rates=(0.03, 0.1, 0.3),
        search=(PLAIN, GAP_BRANCHES, DSOP, LONG),
    )
