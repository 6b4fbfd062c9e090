"""Goldens: counts and outputs of each family's small models and of training-only heads.

Weights depend only on their names and shapes, not on a random number generator; logits are
computed in float64 on the CPU.
"""

import json
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from sopdeploy.layers.gsop_block import GSoPBlock
from sopdeploy.models.describe import describe
from sopdeploy.models.dsop import DSoP
from sopdeploy.models.gsop import GSoP, GSoPEfficientNetLite
from sopdeploy.models.registry import CATALOG, FAMILIES, create_model
from sopdeploy.models.second_order_head import without_head
from tests.sweep.smallest import ALL, VARIANTS
from tests.sweep.steps import Small

FOLDER = Path(__file__).parents[1] / "goldens"
HEADS = "second_order_head"
GOLDENS = dict(
    zip(("pooled", "dsop", "gsop", "gmsop"), (entries for _, entries in FAMILIES), strict=True)
)
IMAGES = 2
DIGITS = 12


def path_of(family: str) -> Path:
    """Return the path of the golden of a family."""
    return FOLDER / f"{family}.json"


def small_models(family: str) -> list[Small]:
    """List the small models of *family*; networks with a head are those of the catalog with one."""
    if family == HEADS:
        return [
            small for small in ALL if without_head(small.name) in CATALOG and ":" in small.name
        ]
    return [small for small in (*ALL, *VARIANTS) if small.name in GOLDENS[family]]


def label(small: Small) -> str:
    """Return the key of a golden: the name, for other forms with the options."""
    return small.name if small in ALL else f"{small.name} {json.dumps(dict(small.config))}"


def golden(small: Small) -> dict[str, Any]:
    """Compute the golden of one model."""
    described = describe(
        small.name, image_size=small.side, num_classes=small.classes, **small.config
    )
    network = small.build().eval().double()
    fill(network)
    images = numbers("images", (IMAGES, 3, small.side, small.side))
    with torch.no_grad():
        outputs = dict(zip(network.outputs, network.outputs_tuple(images), strict=True))
        outputs |= {
            name: logits for name, logits in network.heads(images).items() if name != "main"
        }
    return {
        "config": json.loads(json.dumps(dict(small.config))),
        "image_size": small.side,
        "training": described.training.model_dump(),
        "shipped": described.shipped.model_dump(),
        "representation": described.representation,
        "outputs": {name: rounded(found) for name, found in outputs.items()},
    }


def structure(small: Small) -> Any:
    """Describe the branches or the blocks with attention of one model in full size."""
    with torch.device("meta"):
        network: Any = create_model(small.name, num_classes=small.classes, **small.config)
    if isinstance(network, DSoP):
        plans = (plan._asdict() for plan in network.plan())
        branches = [
            ", ".join(f"{key} {value}" for key, value in plan.items()) for plan in plans
        ]
        return [f"main weight {network.loss_weights()['main']}", *branches]
    if isinstance(network, GSoP):
        return network.attended_taps()
    if not isinstance(network, GSoPEfficientNetLite):
        raise TypeError(f"{small.name} has neither branches nor blocks")
    return [name for name, part in network.named_modules() if isinstance(part, GSoPBlock)]


def rounded(values: Tensor) -> list[list[float]]:
    """Round *values* to the digits of a golden."""
    return [[float(f"{value:.{DIGITS}g}") for value in row] for row in values.tolist()]


def numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal float64 numbers that depend only on *name* and *shape*."""
    return torch.from_numpy(np.random.default_rng(crc32(name.encode())).standard_normal(shape))


def fill(network: nn.Module) -> None:
    """Set weights that keep the scale of activations and all affect the output."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if not tensor.is_floating_point():
                continue
            found = numbers(name, tuple(tensor.shape))
            if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
                found = 1 + found.tanh() / 2
            elif tensor.dim() > 1:
                found *= (2 / tensor[0].numel()) ** 0.5
            else:
                found /= 5
            tensor.copy_(found)
