"""Assign the samples of a step to processes and micro-batches.

A step is divided into micro-batches first, and each micro-batch is sharded among the processes. The balance
loss of a gate therefore refers to the same samples for any number of processes.
"""

from collections.abc import Sequence
from typing import NamedTuple

from sopdeploy.data.batches import count_batches
from sopdeploy.errors import ConfigError
from sopdeploy.training.distributed.strategy import Strategy
from sopdeploy.training.recipe import Recipe


class MicroBatch(NamedTuple):
    """The loaded samples `first` to `end` (exclusive); `total` counts the samples of all processes."""

    first: int
    end: int
    total: int


class StepShard(NamedTuple):
    """The `samples` to load, in this order, and the `micro_batches` to compute."""

    samples: list[int]
    micro_batches: list[MicroBatch]


def shard_step(samples: Sequence[int], recipe: Recipe, strategy: Strategy) -> StepShard:
    """Select the samples and micro-batches of this process in a step with *samples*."""
    count = min(recipe.accumulate, max(1, len(samples) // max(2, strategy.world)))
    loaded: list[int] = []
    micro_batches = []
    for number in range(count):
        start, end = (-(-len(samples) * index // count) for index in (number, number + 1))
        indices = strategy.shard(range(start, end))
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
    steps = count_batches(train_count, recipe.batch_size)
    smallest = train_count // steps  # the sizes of steps differ by at most one
    if smallest // recipe.accumulate < world:
        raise ConfigError(
            f"batch_size: steps of {smallest} samples in {recipe.accumulate} micro-batches leave some of "
            f"{world} processes without a sample; start fewer processes or lower accumulate"
        )
