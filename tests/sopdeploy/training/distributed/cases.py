"""What one process and several processes learn in the same steps; run in each of them by `ranks.py`."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sopdeploy.data.base import ArrayImages
from sopdeploy.layers.mixture import gate as balance_loss
from sopdeploy.models.gmsop import GMSOP
from sopdeploy.training.distributed.batch_sharding import shard_step
from sopdeploy.training.distributed.torchrun import create_strategy
from sopdeploy.training.loop import epoch_data, train_step
from sopdeploy.training.recipe import Recipe, read_recipe
from sopdeploy.training.run import create_run

NETWORKS = {
    "dsop": [
        "model.name=dsop-resnet8",
        "model.config={base_width=4, aux_blocks=[0, 1, 1], aux_widths=[4, 6, 6], aux_dropout=0.3, "
        "keep_unused_branches=true}",
    ],
    "gmsop": [
        "model.name=gmsop-16-8-resnet18",
        "model.config={blocks_per_stage=1, components=4, chosen=2, component_widths=[6, 5], "
        "gate_widths=[6, 5], conv5_stride=1, balance_weight=10}",
    ],
}
OPTIMIZERS = {
    "sgd": ["optimizer={lr=0.05, momentum=0.9, weight_decay=5e-4, clip_norm=5.0}"],
    # GM-SOP's stem has a bias before a batch norm: its gradient is rounding, which eps=1e-8 would enlarge
    "adamw": ["optimizer={kind='adamw', lr=1e-3, eps=1e-6}"],
    "adahessian": ["optimizer={kind='adahessian', lr=1e-2}"],
}
SAMPLES, CLASSES, SIDE = 52, 4, 8  # four steps of 13 samples: two processes compute 6 and 7


def recipe_of(network: str, optimizer: str, *settings: str) -> Recipe:
    """Return a recipe with global batch norm unless *settings* say otherwise."""
    small = [f"preprocess.resize={SIDE}", f"preprocess.crop={SIDE}", "batch_size=14", "device=cpu"]
    small += ["schedule={kind='milestones', milestones=[40]}"]
    chosen = [*NETWORKS[network], *OPTIMIZERS[optimizer]]
    return read_recipe("digits-plain", [*small, *chosen, "batch_norm=global", *settings])


def pictures() -> ArrayImages:
    """Return noise whose classes differ in brightness."""
    random = np.random.default_rng(0)
    targets = np.arange(SAMPLES) % CLASSES
    noise = random.integers(0, 156, (SAMPLES, SIDE, SIDE, 3))
    return ArrayImages(tuple("abcd"), (noise + 25 * targets[:, None, None, None]).astype(np.uint8), targets)


def learn(recipe: Recipe, steps: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return the weights and buffers after *steps* steps, in this process and whoever it is joined with."""
    data = pictures()
    run = create_run(recipe, data, create_strategy(recipe))
    run.model.to(dtype)
    run.normalize.to(dtype)
    if run.ema is not None:
        run.ema.model.to(dtype)
    if isinstance(run.model, GMSOP):
        untie(run.model)
    done = 0
    while done < steps:
        _, batches = epoch_data(recipe, data, run.position.epoch)
        for samples in batches[: steps - done]:
            loaded = shard_step(samples, recipe, run.strategy).samples
            batch = torch.from_numpy(data.images[loaded]), torch.from_numpy(data.targets[loaded])
            run.after_step(train_step(run, batch, samples, len(batches)), len(samples), 0.0, 0.0)
            done += 1
        run.position = run.position.model_copy(update={"epoch": run.position.epoch + 1, "step": 0})
    average = run.ema.model.state_dict() if run.ema is not None else {}
    return {**run.model.state_dict(), **{f"average of {name}": mean for name, mean in average.items()}}


def untie(model: GMSOP) -> None:
    """Make the gate's rows differ: where components tie, the rounding of a sum decides between them."""
    random = torch.Generator().manual_seed(1)
    for weight in (model.gate.weight, model.gate.get_submodule("noise").get_parameter("weight")):
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=random).to(weight))


@contextmanager
def balance_over(sum_over_ranks: Callable[[Tensor], Tensor]) -> Any:
    """Compute the balance loss with another sum: mistakes that look right."""
    right = balance_loss.sum_over_ranks
    balance_loss.sum_over_ranks = sum_over_ranks
    try:
        yield
    finally:
        balance_loss.sum_over_ranks = right


def whole_value_local_gradient(x: Tensor) -> Tensor:
    """Return the sum over ranks, of which only this rank's part is differentiated."""
    summed = x.detach().clone()
    dist.all_reduce(summed)
    return x + (summed - x.detach())


Case = Callable[[], dict[str, Tensor]]


def long_cases() -> dict[str, Case]:
    """Return what is learnt in a hundred steps, by name.

    A large rate lets rounding grow from step to step: GM-SOP's 1e-14 was 1.5e-9 after a hundred at 0.05.
    """
    calm = {"sgd": "optimizer.lr=0.01", "adamw": "optimizer.lr=1e-3"}
    return {
        f"{network} {optimizer} float64 100 steps": learning(
            recipe_of(network, optimizer, calm[optimizer]), 100
        )
        for network in NETWORKS
        for optimizer in ("sgd", "adamw")
    }


def cases() -> dict[str, Case]:
    """Return what is learnt in a few steps, by name."""
    found: dict[str, Case] = {}
    for network in NETWORKS:
        recipe = recipe_of(network, "sgd")
        found[f"{network} sgd float64 1 step"] = learning(recipe, 1)
        found[f"{network} sgd float32 1 step"] = learning(recipe, 1, torch.float32)
        found[f"{network} adamw float64 3 steps"] = learning(recipe_of(network, "adamw"), 3)
        found[f"{network} adahessian float64 2 steps"] = learning(recipe_of(network, "adahessian"), 2)
        pieces = recipe_of(network, "sgd", "accumulate=2", "mix.mixup=0.4", "mix.cutmix=0.4", "ema={}")
        found[f"{network} mixed in two pieces float64 3 steps"] = learning(pieces, 3)
        frozen = recipe_of(network, "sgd", "batch_norm=frozen")
        found[f"{network} frozen batch norm float64 3 steps"] = learning(frozen, 3)
    return found


def learning(recipe: Recipe, steps: int, dtype: torch.dtype = torch.float64) -> Case:
    """Return a function that learns."""
    return lambda: learn(recipe, steps, dtype)


def mistakes() -> dict[str, tuple[str, Case]]:
    """Return what must differ from a case after one step, by name, and that case."""
    right = "gmsop sgd float64 1 step"
    gated = recipe_of("gmsop", "sgd")

    def with_balance_over(wrong: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        with balance_over(wrong):
            return learn(gated, 1)

    local = "batch_norm=local"
    return {
        "batch norm of each rank, dsop": (
            "dsop sgd float64 1 step",
            lambda: learn(recipe_of("dsop", "sgd", local), 1),
        ),
        "batch norm of each rank, gmsop": (right, lambda: learn(recipe_of("gmsop", "sgd", local), 1)),
        "balance loss of each rank": (right, lambda: with_balance_over(lambda x: x)),
        "balance loss whole, its gradient not": (
            right,
            lambda: with_balance_over(whole_value_local_gradient),
        ),
    }
