"""Which samples of a step one process loads and computes, piece by piece.

A step's pieces are those of the whole batch, and every process computes a part of each: what couples the
samples of a piece couples the same ones, however many processes there are.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sopdeploy.errors import ConfigError
from sopdeploy.layers.distributed import FrozenBatchNorm, GlobalBatchNorm, Replacement, Rows, RowsDropout
from sopdeploy.layers.mixture.gate import GateNoise
from sopdeploy.training.distributed.strategy import Parallel
from sopdeploy.training.recipe import Recipe


class Piece(NamedTuple):
    """Rows `first` to `end` of what is loaded are here, of `total` in all processes."""

    first: int
    end: int
    total: int


class Slice(NamedTuple):
    """`samples` are loaded in this order, `pieces` computed.

    What lies before a piece is a neighbour, loaded only to be mixed with the first sample of the piece.
    """

    samples: list[int]
    pieces: list[Piece]


def slice_of(samples: Sequence[int], recipe: Recipe, parallel: Parallel) -> Slice:
    """Return this process' slice of a step with *samples*."""
    mixes = parallel.world > 1 and (recipe.mix.mixup > 0 or recipe.mix.cutmix > 0)
    count = min(recipe.accumulate, max(1, len(samples) // max(2, parallel.world)))
    loaded: list[int] = []
    pieces = []
    for number in range(count):
        start, end = (-(-len(samples) * place // count) for place in (number, number + 1))
        places = parallel.share(range(start, end))
        if mixes:
            loaded.append(samples[places[0] - 1])
        pieces.append(Piece(len(loaded), len(loaded) + len(places), end - start))
        loaded += [samples[place] for place in places]
    return Slice(loaded, pieces)


def must_divide(recipe: Recipe, count: int, world: int) -> None:
    """Raise `ConfigError` unless *world* processes can share every step of *count* samples equally enough."""
    if recipe.batch_size % world:
        raise ConfigError(
            f"batch_size: {recipe.batch_size} samples a step cannot be shared equally by {world} processes; "
            f"it is the size of the whole step, choose a multiple of {world} (the learning rate stays)"
        )
    least = count // -(-count // recipe.batch_size)  # the sizes of steps differ by one at most
    if least // recipe.accumulate < world:
        raise ConfigError(
            f"batch_size: steps of {least} samples in {recipe.accumulate} pieces leave some of {world} "
            "processes without a sample; start fewer of them or lower accumulate"
        )


BatchNormKind = Literal["local", "global", "frozen"]


def share_batches(model: nn.Module, batch_norm: BatchNormKind, world: int, rows: Rows) -> None:
    """Change *model* for one of *world* processes; *rows* says which the next forward is of.

    `batch_norm` "global" is an ordinary batch norm where there is one process. Raises `ConfigError` for a
    batch norm that has no such kind.
    """
    for parent in list(model.modules()):
        if isinstance(parent, GateNoise | RowsDropout):
            parent.rows = rows
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout:
                setattr(parent, name, RowsDropout(child.p, rows).train(child.training))
            elif isinstance(child, _BatchNorm) and not isinstance(child, Replacement):
                setattr(parent, name, shared_norm(child, batch_norm, world))


def shared_norm(norm: _BatchNorm, kind: BatchNormKind, world: int) -> _BatchNorm:
    """Return what stands in for *norm*, with its parameters and buffers, or *norm* itself."""
    if kind == "frozen":
        return FrozenBatchNorm(norm)
    if kind == "global" and world > 1:
        return GlobalBatchNorm(norm)
    return norm
