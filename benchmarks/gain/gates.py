"""Studies of GM-SOP's gate: when it helps, and what prevents it from learning.

The task `kinds` favors a gate: the class of a texture depends on the kind of the image, which its color
shows. The study on CIFAR-10 changes one option at a time to find out why the mixture is less accurate than
the plain network there. The balance loss is divided by the batch size: the effective weight of alpha = 100
is 1.6 at 64 images and 0.39 at the paper's 256, and the loss of one-sided weights grows with N / K. With 64
images, alpha = 10 has the effect of the paper's value.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gain.study import Study
from gain.task import CifarConfig
from gain.textures import TextureConfig

SINGLE = {"components": 1, "chosen": 1, "gate": "none"}
RANDOM = {"gate_start": "random", "noise": "none"}
ONE, MEAN, GATE = "one expert", "all experts, mean", "gate"
NORM = {"expert_norm": True}


def kinds(seeds: int, *, tries: bool) -> Study:
    """Compare the gate with one expert, a wider one and all experts; *tries* adds variants of the gate."""

    def arm(**mixture: Any) -> dict[str, Any]:
        base = {"components": 4, "chosen": 2, "widths": (8,), "gate_widths": (16,), "balance": 10.0}
        return {"config": {"layers": "linear", "stride": 2, "mixture": {**base, **mixture}}}

    arms = {
        ONE: arm(**SINGLE),
        f"{ONE}, twice as wide": arm(**SINGLE, widths=(16,)),
        f"{ONE}, twice as wide, equal time": {**arm(**SINGLE, widths=(16,)), "epochs": 40},
        MEAN: arm(gate="none", chosen=4),
        f"{MEAN}, equal time": {**arm(gate="none", chosen=4), "epochs": 34},
        f"{GATE}, all 4 of 4": arm(gate_kind="gap", chosen=4),
        f"{GATE}, 2 of 4": arm(gate_kind="gap"),
    }
    variants = {
        "alpha 100": arm(gate_kind="gap", balance=100.0),
        "alpha 1": arm(gate_kind="gap", balance=1.0),
        "second-order gate": arm(),
        "second-order gate, alpha 100": arm(balance=100.0),
        "random start, no noise": arm(gate_kind="gap", **RANDOM),
        "noise for each expert": arm(gate_kind="gap", noise="component"),
    }
    return Study(
        name="kinds",
        title="four kinds of images with different classes for each texture; 1000 images, 20 epochs",
        seeds=tuple(range(seeds)),
        template={
            "task": TextureConfig(kinds=4, train=1000, spread=0.3),
            "network": "gated-textures",
            "epochs": 20,
            "learning_rate": 0.1,
        },
        arms=arms | ({f"{GATE}, 2 of 4, {name}": run for name, run in variants.items()} if tries else {}),
        reference=ONE,
        pairs=tuple(
            (f"{GATE}, 2 of 4", other)
            for other in (
                MEAN,
                f"{MEAN}, equal time",
                f"{GATE}, all 4 of 4",
                f"{ONE}, twice as wide",
                f"{ONE}, twice as wide, equal time",
            )
        ),
    )


def gates_on_cifar(arrays: Path, seeds: int) -> Study:
    """Compare variants on CIFAR-10, measured on held-out training images."""

    def arm(*, strides: tuple[int, int] = (2, 1), **mixture: Any) -> dict[str, Any]:
        config = {"depth": 8, "mixture": mixture}
        return {
            "network": "gated-resnet",
            "config": config,
            "strides": strides,
        }

    arms: dict[str, Mapping[str, Any]] = {
        "ReLU + GAP": {},
        ONE: arm(**SINGLE),
        f"{ONE}, norm inside": arm(**SINGLE, **NORM),
        f"{GATE} 2 of 8, as the paper": arm(),
        f"{GATE} 2 of 8, as the paper, maps 4 x 4": arm(strides=(2, 2)),
        f"{GATE} 2 of 8, alpha 10": arm(balance=10.0),
        f"{GATE} 2 of 8, alpha 10, norm inside": arm(balance=10.0, **NORM),
        f"{GATE} 2 of 8, alpha 10, norm inside, random start": arm(balance=10.0, **NORM, **RANDOM),
        "8 experts, mean, norm inside": arm(gate="none", chosen=8, **NORM),
    }
    return Study(
        name="CIFAR-10 gates",
        title="2500 images, ResNet-8, feature maps 16, 8, 8, 10 epochs, measured on 5000 held-out images",
        seeds=tuple(range(seeds)),
        template={
            "task": CifarConfig(arrays=arrays, train=2500, held_out=True),
            "network": "resnet",
            "config": {"depth": 8},
            "strides": (2, 1),
            "epochs": 10,
            "learning_rate": 0.1,
            "augment": True,
        },
        arms=arms,
        reference="ReLU + GAP",
        pairs=(
            (f"{GATE} 2 of 8, alpha 10, norm inside", f"{ONE}, norm inside"),
            (f"{GATE} 2 of 8, alpha 10, norm inside", "8 experts, mean, norm inside"),
        ),
    )
