"""The study of branches on CIFAR-10: networks, task and controls.

Learning rates were chosen with seed 100 and more, which no evaluated draw has; these draws have
the same test images. The number of epochs of the equal-time control gives it at least the CPU
time of the DSoP training.
"""

import math
from collections.abc import Mapping
from typing import Any

from gain.study import Study
from gain.task import CifarConfig

PLAIN = "ReLU + GAP"
GAP_BRANCHES, DSOP, LONG = (
    f"{PLAIN}, GAP branches",
    f"{PLAIN}, DSoP, detached",
    f"{PLAIN}, equal time",
)
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
