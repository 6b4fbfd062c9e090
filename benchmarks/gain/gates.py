"""GM-SOP's gate: where it earns its place, and what keeps it from learning.

`kinds` is a task made for a gate: what a texture means depends on the kind of the picture, which its
colour tells. CIFAR-10 asks why the mixture stays below a plain network there, one switch at a time. The
balance loss is divided by the batch: alpha = 100 weighs 1.6 at a batch of 64, 0.39 at the paper's 256, and
its value for one-sided weights grows with N / K; 10 at a batch of 64 weighs as much as in the paper.
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
    """Return the gate against one expert, a wider one and all experts; *tries* adds its switches."""

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
    switches = {
        "alpha 100": arm(gate_kind="gap", balance=100.0),
        "alpha 1": arm(gate_kind="gap", balance=1.0),
        "second-order gate": arm(),
        "second-order gate, alpha 100": arm(balance=100.0),
        "random start, no noise": arm(gate_kind="gap", **RANDOM),
        "noise for each expert": arm(gate_kind="gap", noise="component"),
    }
    return Study(
        name="kinds",
        title="four kinds of pictures in which textures mean other classes; 1000 pictures, 20 epochs",
        seeds=tuple(range(seeds)),
        template={
            "task": TextureConfig(kinds=4, train=1000, spread=0.3),
            "network": "gated-textures",
            "epochs": 20,
            "learning_rate": 0.1,
        },
        arms=arms | ({f"{GATE}, 2 of 4, {name}": run for name, run in switches.items()} if tries else {}),
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
    """Return the tries on CIFAR-10, measured on held-out training pictures."""

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
        title="2500 pictures, ResNet-8, maps 16, 8, 8, 10 epochs, measured on 5000 held-out ones",
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
