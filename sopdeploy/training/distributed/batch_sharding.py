"""Assign the samples of a step to processes and micro-batches.

A step is divided into micro-batches first, and each micro-batch is sharded among the processes. Layers that
couple the samples of a micro-batch, such as batch norm, therefore couple the same samples for any number of
processes.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sopdeploy.data.batches import count_batches
from sopdeploy.errors import ConfigError
from sopdeploy.layers.distributed import (
    FrozenBatchNorm,
    GlobalBatchNorm,
    Replacement,
    ShardedDropout,
    ShardRng,
)
from sopdeploy.layers.mixture.gate import GateNoise
from sopdeploy.training.distributed.strategy import Strategy
from sopdeploy.training.recipe import Recipe


class MicroBatch(NamedTuple):
    """The loaded samples `first` to `end` (exclusive); `total` counts the samples of all processes."""

    first: int
    end: int
    total: int


class StepShard(NamedTuple):
    """The `samples` to load, in this order, and the `micro_batches` to compute.

    With mixup or CutMix, the sample before each shard is loaded too, because the first sample mixes with it.
    """

    samples: list[int]
    micro_batches: list[MicroBatch]


def shard_step(samples: Sequence[int], recipe: Recipe, strategy: Strategy) -> StepShard:
    """Select the samples and micro-batches of this process in a step with *samples*."""
    mixes = strategy.world > 1 and (recipe.mix.mixup > 0 or recipe.mix.cutmix > 0)
    count = min(recipe.accumulate, max(1, len(samples) // max(2, strategy.world)))
    loaded: list[int] = []
    micro_batches = []
    for number in range(count):
        start, end = (-(-len(samples) * index // count) for index in (number, number + 1))
        indices = strategy.shard(range(start, end))
        if mixes:
            loaded.append(samples[indices[0] - 1])
        micro_batches.append(MicroBatch(len(loaded), len(loaded) + len(indices), end - start))
        loaded += [samples[index] for index in indices]
    return StepShard(loaded, micro_batches)


def check_divisible(recipe: Recipe, train_count: int, world: int) -> None:
    """Raise `ConfigError` unless *world* processes get enough samples in every step."""
    if recipe.batch_size % world:
        raise ConfigError(
            f"batch_size: a step of {recipe.batch_size} samples cannot be divided among {world} processes; "
            f"choose a multiple of {world} (batch_size counts the samples of all processes)"
        )
    smallest = train_count // count_batches(
        train_count, recipe.batch_size
    )  # sizes of steps differ by at most one
    if smallest // recipe.accumulate < world:
        raise ConfigError(
            f"batch_size: steps of {smallest} samples in {recipe.accumulate} micro-batches leave some of "
            f"{world} processes without a sample; start fewer processes or lower accumulate"
        )


def shard_layers(
    model: nn.Module, batch_norm: Literal["local", "global", "frozen"], world: int, shard_rng: ShardRng
) -> None:
    """Replace the layers of *model* whose results depend on the whole batch.

    The replacements compute one shard of the batch and give the results that the whole batch would give;
    *shard_rng* tells them which shard. With one process, "global" batch norm is not replaced. Raises
    `ConfigError` for batch norm classes without a "global" or "frozen" version.
    """
    for parent in list(model.modules()):
        if isinstance(parent, GateNoise | ShardedDropout):
            parent.shard_rng = shard_rng
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout:
                setattr(parent, name, ShardedDropout(child.p, shard_rng).train(child.training))
            elif isinstance(child, _BatchNorm) and not isinstance(child, Replacement):
                if batch_norm == "frozen":
                    setattr(parent, name, FrozenBatchNorm(child))
                elif batch_norm == "global" and world > 1:
                    setattr(parent, name, GlobalBatchNorm(child))
