"""The balance loss of GM-SOP has its weight of the paper in training.

GM-SOP, Eq. (4) and section 3.2: alpha is 100 for steps of 256 images. The released trainer divides by their
number, so the weight beside a mean cross entropy is 100 / 256 = 0.390625.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from sopdeploy.data.base import ArrayImages
from sopdeploy.layers.mixture import gate
from sopdeploy.models import gmsop
from sopdeploy.models.registry import CATALOG
from sopdeploy.training.distributed.batch_sharding import shard_step
from sopdeploy.training.distributed.strategy import Strategy
from sopdeploy.training.recipe import read_recipe
from sopdeploy.training.recipe_files import list_recipes
from sopdeploy.training.step.gradient import train_step
from tests.sopdeploy.training.runs import start_run

CPU = torch.device("cpu")
GATED = [
    name
    for name in list_recipes()
    if issubclass(CATALOG[read_recipe(name).model.name].network, gmsop.GMSOPResNet)
]
SMALL = ["blocks_per_stage=1", "conv5_stride=1", "component_widths=[5]", "gate_widths=[]", "iterations=2"]
SIDE = 8


def random_images(count: int) -> ArrayImages:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    return ArrayImages(tuple("abcd"), images, np.arange(count) % 4)


def effective_weight(name: str) -> float:
    """Divide what the first step of a recipe adds to its cross entropy by (std / mean)^2 of the loads."""
    settings = [f"model.config.{setting}" for setting in SMALL]
    recipe = read_recipe(name, [*settings, "workers=0", "device=cpu"])
    data = random_images(recipe.batch_size)
    run = start_run(recipe, data, Strategy(CPU))
    run.model.double()
    run.normalize.double()
    samples = list(range(recipe.batch_size))
    shard = shard_step(samples, recipe, run.strategy)
    images, targets = data.images[shard.samples], data.targets[shard.samples]
    loads: list[Tensor] = []

    def keep_largest(logits: Tensor, chosen: int) -> Tensor:
        weights = gate.keep_largest(logits, chosen)
        loads.append(weights.detach().sum(dim=0))
        return weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gmsop, "keep_largest", keep_largest)
        loss, _ = train_step(run, (torch.from_numpy(images), torch.from_numpy(targets)), samples, 1)
    (load,) = loads
    assert float(load.sum()) == pytest.approx(recipe.batch_size)
    added = float(loss.parts["balance"])
    assert float(loss.total) - float(loss.parts["main"]) == pytest.approx(added, abs=1e-6)
    return added / float(load.var(correction=1) / load.mean().square())


@pytest.mark.parametrize("name", GATED)
def test_recipes_weight_the_balance_loss_as_the_paper(name: str) -> None:
    assert read_recipe(name).batch_size == 256
    assert effective_weight(name) == pytest.approx(0.390625, rel=1e-4)
